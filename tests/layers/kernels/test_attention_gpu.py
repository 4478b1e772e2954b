"""Attention on GPUs: kernels interpreted and lowered for CUDA, cuDNN's arguments, the choice."""

import re
from functools import lru_cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from layers.kernels.attention import (
  Alibi,
  Bucketed,
  _select,
  attention,
  cudnn,
  gpu,
  pallas_gpu,
  reference,
)
from layers.masks import (
  BigBird,
  Causal,
  Chunked,
  Dilated,
  Full,
  Global,
  Local,
  MistralWindow,
  PerHead,
  SparseTransformer,
)
from tests.layers.kernels import attention_cases
from tests.layers.kernels.attention_cases import EXPRESSIONS, MASKS, Case, close
from tests.layers.kernels.cuda import array, described, lowered, lowers

DOCUMENTS = ((37, 53, 10), (70, 20, 10))
Row = partial(Case, length=100, sizes=(16, 16))  # blocks of 32 and 16, the last one cut
CASES = {
  "causal": Row(sizes=(80, 48)),
  "everything": Row(None, (4, 1), sizes=(32, 16)),
  "whole blocks": Row(Causal(), (2, 1), length=64),
  "less than a block": Row(Causal(), sizes=(32, 16), length=5),
  "window, cap, sink": Row(Local(20), (8, 1), softcap=5.0, sink=True),
  "around": Row(Local(9, 30), sink=True),
  "strided": Row(SparseTransformer(24), (1, 1)),
  "rows that see nothing": Row(Causal() & ~Global(40)),
  "a mask a head": Row(
    PerHead((Causal(), Local(30, 4), BigBird(7, 16), Causal() & Dilated(3, 20))), (4, 2)
  ),
  "documents": Row(Causal(), (4, 2), documents=DOCUMENTS, alibi=True),
  "places in documents": Row(BigBird(5, 16), documents=DOCUMENTS, sink=True, softcap=3.0),
}


def small_blocks(q, v, *, backward):
  return pallas_gpu._Blocks(16, 32, 4) if backward else pallas_gpu._Blocks(32, 16, 4)


def interpret(patch):
  call = partial(pl.pallas_call, interpret=True)
  patch.setattr(pallas_gpu, "pl", SimpleNamespace(**vars(pl) | {"pallas_call": call}))
  patch.setattr(pallas_gpu, "_blocks", small_blocks)


@pytest.fixture
def interpreted(monkeypatch):
  interpret(monkeypatch)


def run(module, name, dtype=jnp.float32):
  return attention_cases.run(module, CASES[name], dtype)


expected = lru_cache(partial(run, reference))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, interpreted):
  close(run(pallas_gpu, name), expected(name), 1e-5)


def test_what_sees_nothing_is_exactly_zero(interpreted):
  """The first 40 places neither see nor are seen; the next sees itself, which needs no gradient."""
  (dq, dk, dv, *_), (o, *_) = run(pallas_gpu, "rows that see nothing")
  for x in (dq, dk, dv, o):
    assert not np.asarray(x)[:, :40].any() and np.asarray(x)[:, 41:].any((2, 3)).all()


@pytest.mark.parametrize(
  ("name", "dtype", "tolerance"),
  [("causal", "bfloat16", 2e-2), ("around", "float16", 3e-3)],
)
def test_half_precision(name, dtype, tolerance, interpreted):
  """Probabilities and their gradients are rounded before they meet values, keys and queries."""
  close(run(pallas_gpu, name, jnp.dtype(dtype)), expected(name, jnp.dtype(dtype)), tolerance)


@settings(deadline=None, max_examples=4)
@given(EXPRESSIONS)
def test_any_mask(mask):
  with pytest.MonkeyPatch.context() as patch:
    interpret(patch)
    case = Case(mask, (1, 1), (16, 16), length=40)
    for a, b in zip(
      jax.tree.leaves(attention_cases.run(pallas_gpu, case)),
      jax.tree.leaves(attention_cases.run(reference, case)),
      strict=True,
    ):
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))


@settings(deadline=None, max_examples=100)
@given(
  st.lists(st.one_of(MASKS, EXPRESSIONS), min_size=1, max_size=2), st.integers(1, 64),
  st.integers(1, 16), st.integers(1, 16), st.booleans(),
)  # fmt: skip
def test_each_visible_block_is_visited_once(masks, length, own, visited, by_column):
  mask = masks[0] if None in masks or len(masks) == 1 else PerHead(tuple(masks))
  static = gpu.Static(mask, 1.0, None, "index", length, length)
  plans = jax.tree.map(np.asarray, gpu.plans(static, (own, visited), by_column=by_column))
  for n, one in enumerate(static.masks):
    table = np.ones((length, length), bool) if one is None else one.table(length)
    table = table.T if by_column else table
    seen = np.zeros(table.shape, int)
    for cut, plan in zip((True, False), plans, strict=True):
      if plan is not None:
        ends = np.stack([plan.start[n], plan.end[n]], axis=1)
        assert ends.shape == (-(-length // own), 2)
        for row, (start, end) in enumerate(ends):
          for column in range(start, end) if plan.block is None else plan.block[n, start:end]:
            at = np.s_[row * own : (row + 1) * own, column * visited : (column + 1) * visited]
            seen[at] += 1
            assert cut or table[at].all()
    assert seen.max() <= 1 and np.all(seen[table] == 1)


def test_masked_keys_change_nothing(interpreted):
  """Bitwise; and blocks of keys beyond the reach are not even read, so NaN there is harmless."""
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(1, 100, 1, 16)), jnp.float32) for _ in range(3))
  positions = jnp.arange(100, dtype=jnp.int32)[None]

  @jax.jit
  def f(k, v):
    ids = (positions, None, None, None)
    static = {"mask": Local(8), "scale": 0.2, "softcap": None, "order": "index"}
    return pallas_gpu.attention(q, k, v, *ids, None, None, None, **static)[0]

  base = f(k, v)
  moved = f(k.at[:, :20].add(3.0), v.at[:, :20].multiply(-2.0))
  assert jnp.array_equal(base[:, 28:], moved[:, 28:])
  assert not jnp.array_equal(base[:, :28], moved[:, :28])
  skipped = f(k.at[:, :48].set(jnp.nan), v.at[:, :48].set(jnp.nan))
  assert jnp.array_equal(base[:, 64:], skipped[:, 64:])


# ---- lowering for CUDA ----

SIZES = {
  "64": (64, 64), "80": (80, 80), "96": (96, 96), "128": (128, 128), "192, 128": (192, 128),
  "256": (256, 256),
}  # fmt: skip
MASK = PerHead((BigBird(32), Causal() & Local(700), BigBird(32), SparseTransformer(kind="fixed")))


@lowers
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("dtype", "mask"), [("bfloat16", MASK), ("float16", Causal())])
def test_lowers_for_cuda(sizes, dtype, mask):
  def loss(q, k, v, sinks, slopes, positions, segments):
    o = attention(
      q, k, v, mask=mask, implementation="pallas_gpu", q_positions_BT=positions,
      q_segments_BT=segments, softcap=20.0, sink_N=sinks, bias=Alibi(slopes),
    )  # fmt: skip
    return jnp.sum(o.astype(jnp.float32) ** 2)

  s, (H, U) = partial(array, dtype=jnp.dtype(dtype)), SIZES[sizes]
  ids = array(2, 2000, dtype=jnp.int32)
  arrays = (s(2, 2000, 4, H), s(2, 2000, 2, H), s(2, 2000, 2, U), s(4), s(4), ids, ids)
  with described():
    text = lowered(jax.grad(loss, (0, 1, 2, 3, 4)), *arrays)
  assert text.count("gpu.triton") == 3
  assert set(re.findall(r'name = "attention_(\w+)"', text)) == {"forward", "dq", "dkv"}


@lowers
def test_in_a_shard_map():
  """Chosen there, and there only: outside nothing spreads the kernel over devices."""
  loss = lambda q, k, v: jnp.sum(attention(q, k, v, mask=BigBird(4)).astype(jnp.float32) ** 2)
  x = array(2, 256, 2, 64)
  grad = jax.grad(loss, (0, 1, 2))
  with described(2):
    inside = jax.shard_map(grad, in_specs=(P("x"),) * 3, out_specs=(P("x"),) * 3)
    assert lowered(inside, x, x, x).count("gpu.triton") == 3
    assert "gpu.triton" not in lowered(grad, x, x, x)
    with pytest.raises(NotImplementedError, match="shard_map"):
      jax.eval_shape(partial(attention, implementation="pallas_gpu"), x, x, x)


@lowers
def test_remat_policy_keeps_the_forward_pass():
  """With output and log-sum-exp saved by name, the backward pass does not run it again."""
  names = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
  f = partial(attention, mask=Causal(), implementation="pallas_gpu")

  def kernels(policy):
    one = jax.checkpoint(f, policy=policy)
    loss = lambda q, k, v: jnp.sum(one(q, k, v).astype(jnp.float32) ** 2)
    with described():
      text = lowered(jax.grad(loss, (0, 1, 2)), *[array(2, 256, 2, 64)] * 3)
    results = re.findall(r"(%\d+)(?::\d+)? = stablehlo.custom_call @__gpu\$xla.gpu.triton", text)
    # jax 0.10 leaves a call whose result nobody reads, which the compiler drops.
    return sum(len(re.findall(rf"{result}\b", text)) > 1 for result in results)

  assert kernels(names) == 3
  assert kernels(jax.checkpoint_policies.nothing_saveable) == 4


# ---- cuDNN ----


@pytest.mark.parametrize(
  "mask",
  [
    None, Full(), Causal(), Local(0), Local(3), Local(14), MistralWindow(16), MistralWindow(17),
    Local(30), Causal() & Local(5, 2), PerHead((Causal(),) * 4), Local(15, 15), Local(40, 20),
  ],
  ids=repr,
)  # fmt: skip
def test_arguments_of_cudnn(mask, monkeypatch):
  """jax.nn's own implementation, given what cuDNN would be given, shows the same keys."""
  theirs = jax.nn.dot_product_attention

  def on_cpu(*arrays, implementation, **more):
    assert implementation == "cudnn"
    return theirs(*arrays, implementation="xla", **more)

  monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)
  case = Case(mask, (4, 2), (8, 8), length=16)
  run_case = lambda module: attention_cases.run(module, case, with_lse=False)
  close(run_case(cudnn), run_case(reference), 1e-5)


NOTHING = dict.fromkeys(("softcap", "bias", "sinks", "segments"))


def test_what_cudnn_does_not_do(monkeypatch):
  monkeypatch.setattr(cudnn, "compute_capability", lambda: (9, 0))
  x = array(1, 64, 2, 64)
  reason = lambda q=x, k=x, v=x, mask=None, order="index", **more: cudnn.supports(
    q, k, v, mask, NOTHING | more, order
  )
  assert reason() is None and reason(mask=MistralWindow(8)) is None
  assert "own row" in reason(order="any")
  assert "no softcap, sinks" in reason(softcap=3.0, sinks=array(2))
  assert "no segments" in reason(segments=array(1, 64))
  masks = (Local(3, 5), BigBird(4, 16), ~Causal(), PerHead((Causal(), Local(3))))
  assert all("causal window" in reason(mask=mask) for mask in masks)
  assert "float32" in reason(*[array(1, 64, 2, 64, dtype=jnp.float32)] * 3)
  assert "one dtype" in reason(v=array(1, 64, 2, 64, dtype=jnp.float16))
  assert "one head size" in reason(v=array(1, 64, 2, 32))
  assert "not 60" in reason(*[array(1, 64, 2, 60)] * 3)
  wide = [array(1, 64, 2, 256)] * 3
  assert reason(*wide) is None
  monkeypatch.setattr(cudnn, "compute_capability", lambda: (8, 0))
  assert "up to 128, not 256" in reason(*wide)
  monkeypatch.setattr(cudnn, "compute_capability", lambda: (7, 5))
  assert "Ampere" in reason()


def test_there_is_no_gpu_here():
  assert cudnn.compute_capability() is None
  x = jnp.ones((1, 8, 2, 64), jnp.bfloat16)
  for name in ("pallas_gpu", "cudnn"):
    with pytest.raises(NotImplementedError, match="not for cpu"):
      attention(x, x, x, implementation=name)


# ---- the choice ----


@pytest.mark.parametrize(
  ("arrays", "mask", "more", "chosen"),
  [
    ([array(1, 64, 2, 64)] * 3, Causal(), {}, "cudnn"),
    ([array(1, 64, 2, 64)] * 3, Local(9), {}, "cudnn"),
    ([array(1, 64, 2, 64)] * 3, BigBird(4, 16), {}, "pallas_gpu"),
    ([array(1, 64, 2, 64)] * 3, Causal(), {"segments": array(1, 64)}, "pallas_gpu"),
    ([array(1, 64, 2, 64, dtype=jnp.float32)] * 3, None, {}, "pallas_gpu"),
    ([array(1, 64, 2, 72)] * 3, Causal(), {}, "cudnn"),
    ([array(1, 64, 2, 72)] * 3, Chunked(16), {}, "xla"),
    ([array(1, 64, 2, 64)] * 3, None, {"bias": Bucketed(jnp.ones((8, 2)))}, "xla"),
  ],
)
def test_choice_on_a_gpu(arrays, mask, more, chosen, monkeypatch):
  monkeypatch.setattr(cudnn, "compute_capability", lambda: (9, 0))
  with described():
    module = _select(None, tuple(arrays), mask, NOTHING | more, "index")
  assert module.__name__.rpartition(".")[2] == chosen


def test_what_is_not_supported_says_why():
  reason = partial(pallas_gpu.supports, mask=None, order="index")
  x = array(1, 8, 2, 64)
  assert reason(x, x, x, None) is None
  assert "own row" in reason(x, x, x, None, order="any")
  assert "Bucketed" in reason(x, x, x, Bucketed(jnp.ones((8, 2))))
  assert "float64" in reason(array(1, 8, 2, 64, dtype=jnp.float64), x, x, None)
  assert "one dtype" in reason(x, x, array(1, 8, 2, 64, dtype=jnp.float16), None)
  assert "not 40" in reason(*[array(1, 8, 2, 40)] * 3, None)
  assert "not 512" in reason(x, x, array(1, 8, 2, 512), None)
