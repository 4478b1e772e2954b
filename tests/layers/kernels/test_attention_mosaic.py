"""Attention in Mosaic for Hopper GPUs: kernels interpreted, raced and lowered for CUDA."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import (
  reset_gpu_interpret_mode_state,
)
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental.pallas import mosaic_gpu as plgpu

from layers.kernels.attention import Alibi, attention, cudnn, gpu, mosaic_gpu, reference
from layers.masks import (
  BigBird,
  Causal,
  Fixed,
  Global,
  Local,
  Longformer,
  PerHead,
  SparseTransformer,
)
from tests.layers.kernels import attention_cases
from tests.layers.kernels.attention_cases import Case, close
from tests.layers.kernels.cuda import array, described, lowered
from tests.layers.kernels.test_attention_gpu import SIZES

CASES = {
  "a mask a head": Case(PerHead((Local(70, 4), Fixed(100, 4))), (2, 2), (16, 32), length=200),
  "documents": Case(
    Causal(), (2, 1), (32, 16), softcap=3.0, sink=True, alibi=True, length=120,
    documents=((57, 53, 10),),
  ),
  "rows that see nothing": Case(Causal() & ~Global(40), (1, 1), (16, 16), length=128),
}  # fmt: skip


def product(a, b):
  """By plain loads, where no version interprets `wgmma`: of transposed buffers, of registers."""
  found = jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
  plgpu.commit_smem()  # it would read as copies write, and need no fence
  return found


def interpret(patch, **params):
  kernel = partial(plgpu.kernel, interpret=InterpretGPUParams(**params))
  names = {"kernel": kernel, "layout_cast": lambda x, layout: x}
  patch.setattr(mosaic_gpu, "plgpu", SimpleNamespace(**vars(plgpu) | names))
  patch.setattr(mosaic_gpu, "_product", lambda a, b: product(a[...], b[...].T))
  patch.setattr(
    mosaic_gpu, "_add_product", lambda total, a, b: total + product(a.astype(b.dtype), b[...])
  )
  patch.setattr(attention_cases, "B", 1)  # a second of each program on jax 0.10


@pytest.mark.parametrize(
  ("name", "dtype", "tolerance"),
  [
    pytest.param("a mask a head", "float32", 1e-5, marks=pytest.mark.full),
    ("documents", "float32", 1e-5),
    ("rows that see nothing", "bfloat16", 2e-2),
  ],
)
def test_values_and_gradients(name, dtype, tolerance, monkeypatch):
  """Also of float32, which the products of a GPU do not take: only the order of sums differs.

  In bfloat16 probabilities and their gradients are rounded before they meet values and keys.
  """
  interpret(monkeypatch)
  modules = mosaic_gpu, reference
  got, want = (attention_cases.run(module, CASES[name], jnp.dtype(dtype)) for module in modules)
  close(got, want, tolerance)
  if name == "rows that see nothing":
    (dq, dk, dv, *_), (o, *_) = got
    for x in (dq, dk, dv, o):
      assert not np.asarray(x)[:, :40].any() and np.asarray(x)[:, 41:].any((2, 3)).all()


class Careless(mosaic_gpu._Ring):
  """Gives buffers back before it reads them; arrivals stay paired, so nothing waits for ever."""

  def wait(self, step):
    views = super().wait(step)
    super().release(step)
    return views

  def release(self, step) -> None:
    pass


@pytest.mark.parametrize("seeded", [False, True], ids=["as it is", "seeded"])
def test_races(seeded, monkeypatch, capfd):
  """Six blocks of queries go through two buffers, which are NaN until written."""
  interpret(monkeypatch, detect_races=True, uninitialized_memory="nan")
  if seeded:
    monkeypatch.setattr(mosaic_gpu, "_Ring", Careless)
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  q, k, v, do = (draw(1, T, 1, 16) for T in (384, 128, 128, 384))
  nothing = mosaic_gpu.Ids(None, None)
  rest = (mosaic_gpu.Heads(None, None), nothing, nothing, jnp.zeros(1, jnp.int32))
  static = gpu.Static(None, 0.2, None, "index", 384, 128)
  arrays = (q, k, v, do, draw(1, 1, 384), draw(1, 1, 384))
  found = ""
  try:
    dk, dv = jax.block_until_ready(
      jax.jit(lambda *arrays: mosaic_gpu._backward_keys(static, arrays, *rest))(*arrays)
    )
    assert np.isfinite(dk).all() and np.isfinite(dv).all()
  except jax.errors.JaxRuntimeError as error:
    found = str(error)
  finally:
    reset_gpu_interpret_mode_state()
  found += "".join(capfd.readouterr())
  assert ("RACE DETECTED" in found) == seeded


# ---- lowering for CUDA ----

MASK = PerHead((BigBird(32), Causal() & Local(700), BigBird(32), SparseTransformer(kind="fixed")))


def kernels(f, *arrays):
  with described():
    text = lowered(f, *arrays)
  return re.findall(r"custom_call @(?:__gpu\$)?(mosaic_gpu|xla\.gpu\.triton)", text)


@pytest.mark.parametrize(
  ("sizes", "dtype", "mask"),
  [
    ("64", "bfloat16", MASK), ("80", "float16", Causal()), ("96", "bfloat16", Causal()),
    ("128", "bfloat16", Causal()),
  ],
)  # fmt: skip
def test_lowers_for_cuda(sizes, dtype, mask, monkeypatch):
  monkeypatch.setattr(cudnn, "compute_capability", lambda: (9, 0))

  def loss(q, k, v, sinks, slopes, positions, segments):
    o = attention(
      q, k, v, mask=mask, implementation="mosaic_gpu", q_positions_BT=positions,
      q_segments_BT=segments, softcap=20.0, sink_N=sinks, bias=Alibi(slopes),
    )  # fmt: skip
    return jnp.sum(o.astype(jnp.float32) ** 2)

  s, (H, U) = partial(array, dtype=jnp.dtype(dtype)), SIZES[sizes]
  ids = array(2, 500, dtype=jnp.int32)
  arrays = (s(2, 500, 4, H), s(2, 500, 2, H), s(2, 500, 2, U), s(4), s(4), ids, ids)
  assert kernels(jax.grad(loss, (0, 1, 2, 3, 4)), *arrays) == ["mosaic_gpu"] * 3


@pytest.mark.parametrize(
  ("mask", "H", "T", "segments"),
  [
    (None, 64, 256, False), (None, 128, 256, True), (Causal(), 64, 200, False),
    (Causal(), 128, 256, True), (Local(70), 128, 256, False), (Longformer(8, 2), 64, 256, False),
    (Causal() & ~Global(13), 64, 256, False),
  ],
)  # fmt: skip
def test_few_arguments_lower_for_cuda(mask, H, T, segments, monkeypatch):
  """Where kernels use no index, or the mask's use of it folds away, jax is left with no iota."""
  monkeypatch.setattr(cudnn, "compute_capability", lambda: (9, 0))

  def loss(q, k, v, segments):
    o, lse = attention(
      q, k, v, mask=mask, q_segments_BT=segments, return_lse=True, implementation="mosaic_gpu"
    )
    return jnp.sum(o.astype(jnp.float32)) + jnp.sum(lse)

  arrays = array(1, T, 2, H), array(1, T, 1, H), array(1, T, 1, H)
  ids = array(1, T, dtype=jnp.int32) if segments else None
  assert kernels(jax.grad(loss, (0, 1, 2)), *arrays, ids) == ["mosaic_gpu"] * 3


def test_what_is_not_supported_says_why(monkeypatch):
  reason = partial(mosaic_gpu.supports, mask=None, order="index")
  x = array(1, 8, 2, 64)
  assert "Hopper" in reason(x, x, x, None)
  monkeypatch.setattr(cudnn, "compute_capability", lambda: (10, 0))
  assert "Hopper" in reason(x, x, x, None)
  monkeypatch.setattr(cudnn, "compute_capability", lambda: (9, 0))
  assert reason(x, x, x, None) is None
  assert "float32" in reason(*[array(1, 8, 2, 64, dtype=jnp.float32)] * 3, None)
  assert "one dtype" in reason(x, x, array(1, 8, 2, 64, dtype=jnp.float16), None)
  assert "own row" in reason(x, x, x, None, order="any")
  assert "up to 128" in reason(*[array(1, 8, 2, 192)] * 3, None)
  assert "not 40" in reason(*[array(1, 8, 2, 40)] * 3, None)
  with pytest.raises(NotImplementedError, match="not for cpu"):
    attention(*[jnp.ones((1, 8, 2, 64), jnp.bfloat16)] * 3, implementation="mosaic_gpu")
