"""Attention: reference against numpy, dense block and blocks against the reference, structure."""

from dataclasses import dataclass, field
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from layers.kernels.attention import Alibi, Bucketed, RelativeKeys, attention, bucket, xla
from layers.masks import (
  BigBird,
  Causal,
  Chunked,
  Local,
  Longformer,
  Mask,
  MistralWindow,
  PerHead,
  SparseTransformer,
)
from tests.oracles.attention import attention as oracle
from tests.oracles.attention import t5_bucket

B, H, HV = 2, 8, 4
BLOCK = 16  # of the blockwise runs; rows of 40 make 3 blocks, the last one padded


@dataclass(frozen=True)
class Case:
  heads: tuple[int, int] = (2, 2)
  mask: Mask | PerHead | None = field(default_factory=Causal)
  segments: bool = False
  softcap: float | None = None
  scale: float | None = None
  sink: bool = False
  bias: str | None = None
  cache: bool = False  # 12 queries against 40 keys in ring order, some slots empty


CASES = {
  "causal": Case(),
  "window": Case((8, 2), Local(8)),
  "chunk": Case((6, 2), Chunked(12), segments=True),
  # By index no block would see the one before; documents begin inside of blocks.
  "chunk a block": Case((2, 1), Chunked(BLOCK), segments=True),
  "everything": Case((4, 1), None, softcap=2.0, scale=0.6),
  "around": Case(mask=Local(3, 5), segments=True, sink=True),
  "sink": Case((6, 2), Local(4), softcap=3.0, sink=True),
  "alibi": Case((4, 1), segments=True, softcap=4.0, bias="alibi"),
  "bucketed": Case((4, 2), bias="bucketed", sink=True),
  "bidirectional": Case((2, 1), None, segments=True, bias="bidirectional"),
  "bigbird": Case((2, 1), BigBird(10, size=4)),
  "longformer": Case((2, 1), Longformer(8, 2, 2), sink=True),
  "fixed": Case((2, 1), SparseTransformer(12, "fixed", 3), segments=True),
  "relative": Case((4, 2), Local(19), segments=True, bias="relative", softcap=3.0),
  "cache": Case((4, 2), Local(24), segments=True, sink=True, cache=True),
  "cache_alibi": Case((2, 1), bias="alibi", cache=True),
  "cache_bucketed": Case((2, 2), bias="bucketed", cache=True),
  "cache_relative": Case((4, 2), bias="relative", segments=True, cache=True),
}


def make_bias(kind, rng, T, N):
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {
    None: lambda: None,
    "alibi": lambda: Alibi(jnp.abs(normal(N))),
    "bucketed": lambda: Bucketed(normal(8, N), max_distance=20),
    "bidirectional": lambda: Bucketed(normal(8, N), max_distance=20, bidirectional=True),
    "relative": lambda: RelativeKeys(normal(B, T, N, H), normal(44, N, H)),
  }[kind]()


@lru_cache
def make(name):
  """(differentiable arrays, keywords, cotangent) of a case, float32."""
  case, rng = CASES[name], np.random.default_rng(len(name))
  T, S = (12, 40) if case.cache else (40, 40)
  N, K = case.heads
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  arrays = {
    "q": normal(B, T, N, H),
    "k": normal(B, S, K, H),
    "v": normal(B, S, K, HV),
    "bias": make_bias(case.bias, rng, T, N),
    "sink": normal(N) if case.sink else None,
  }
  keywords = {"mask": case.mask, "softcap": case.softcap, "scale": case.scale}
  if case.cache:
    order = np.stack([np.roll(np.arange(S), shift) for shift in (7, 0)])
    keywords["q_positions_BT"] = jnp.asarray([np.arange(28, 40), np.arange(12)], jnp.int32)
    keywords["kv_positions_BS"] = jnp.asarray(order, jnp.int32)
    if case.segments:  # the last query of row 0 is padding, slots at positions 0..4 are empty
      keywords["q_segments_BT"] = jnp.ones((B, T), jnp.int32).at[0, -1].set(0)
      keywords["kv_segments_BS"] = jnp.asarray(order >= 5, jnp.int32)
  elif case.segments:  # two rows packed unlike each other, positions restart, padding at the end
    lengths = ((13, 20, 7), (29, 4, 7))
    segments = np.stack([np.repeat([1, 2, 0], n) for n in lengths])
    positions = np.stack([np.concatenate([np.arange(i) for i in n]) for n in lengths])
    keywords["q_segments_BT"] = jnp.asarray(segments, jnp.int32)
    keywords["q_positions_BT"] = jnp.asarray(positions, jnp.int32)
  return arrays, keywords, normal(B, T, N, HV)


def run(name, implementation, dtype=jnp.float32):
  """(output, gradients of all arrays)."""
  arrays, keywords, cotangent = make(name)
  arrays = jax.tree.map(lambda x: x.astype(dtype), arrays)

  def loss(arrays):
    o = attention(
      arrays["q"], arrays["k"], arrays["v"], bias=arrays["bias"], sink_N=arrays["sink"],
      implementation=implementation, **keywords,
    )  # fmt: skip
    return jnp.sum(o.astype(jnp.float32) * cotangent), o

  grads, o = jax.jit(jax.grad(loss, has_aux=True))(arrays)
  return o, grads


reference = lru_cache(partial(run, implementation="reference"))


def close(got, want, tolerance):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.abs(b).max()))


def in_blocks(monkeypatch, size=BLOCK):
  monkeypatch.setattr(xla, "block_size", lambda: size)


@pytest.mark.parametrize("name", CASES)
def test_reference_matches_numpy(name):
  arrays, keywords, _ = make(name)
  T, S = arrays["q"].shape[1], arrays["k"].shape[1]
  q_pos = np.asarray(keywords.get("q_positions_BT", np.tile(np.arange(T), (B, 1))))
  kv_pos = np.asarray(keywords.get("kv_positions_BS", q_pos))
  q_seg = np.asarray(keywords.get("q_segments_BT", np.ones((B, T), int)))
  kv_seg = np.asarray(keywords.get("kv_segments_BS", np.ones((B, S), int) if T != S else q_seg))
  mask, bias = keywords["mask"], arrays["bias"]
  scale = H**-0.5 if keywords["scale"] is None else keywords["scale"]

  def visible(b, i, j):
    allowed = mask is None or bool(mask.visible(q_pos[b, i, None], kv_pos[b, j, None]))
    return allowed and q_seg[b, i] == kv_seg[b, j] and q_seg[b, i] > 0

  def added(b, n, i, j):
    distance = int(q_pos[b, i] - kv_pos[b, j])
    match bias:
      case Alibi():
        return -float(bias.slopes_N[n]) * distance
      case Bucketed():
        return table[t5_bucket(distance, 8, 20, bias.bidirectional), n]
      case RelativeKeys():
        return scale * float(rows[b, i, n] @ table[distance, n])

  if isinstance(bias, Bucketed):
    table = np.asarray(bias.table_UN, np.float64)
  elif isinstance(bias, RelativeKeys):
    rows, table = np.asarray(bias.q_BTNH, np.float64), np.asarray(bias.r_PNH, np.float64)
  expected = oracle(
    arrays["q"], arrays["k"], arrays["v"], visible=visible, scale=scale,
    softcap=keywords["softcap"], bias=None if bias is None else added,
    sink=None if arrays["sink"] is None else np.asarray(arrays["sink"], np.float64),
  )  # fmt: skip
  close(reference(name)[0], expected, 1e-5)


@pytest.mark.parametrize("blocks", [False, True], ids=["dense", "blocks"])
@pytest.mark.parametrize("name", CASES)
def test_xla_matches_reference(name, blocks, monkeypatch):
  if blocks:
    in_blocks(monkeypatch)
  close(run(name, "xla"), reference(name), 1e-5)


@pytest.mark.parametrize("blocks", [False, True], ids=["dense", "blocks"])
@pytest.mark.parametrize("name", ["sink", "relative"])
def test_bfloat16(name, blocks, monkeypatch):
  if blocks:
    in_blocks(monkeypatch)
  o, grads = run(name, "xla", jnp.bfloat16)
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves((o, grads)))
  close((o, grads), reference(name, dtype=jnp.bfloat16), 2e-2)


@pytest.mark.parametrize("implementation", ["reference", "dense", "blocks"])
def test_queries_that_see_nothing(implementation, monkeypatch):
  """Padding gives exact zeros and takes part in no gradient, even when it holds NaN."""
  if implementation == "blocks":
    in_blocks(monkeypatch)
  arrays, keywords, cotangent = make("chunk")
  pad = np.asarray(keywords["q_segments_BT"]) == 0
  q, k, v = (arrays[n].at[pad].set(jnp.nan) for n in "qkv")
  name = "reference" if implementation == "reference" else "xla"

  def loss(q, k, v):
    o = attention(q, k, v, implementation=name, **keywords)
    return jnp.sum(o * cotangent), o

  grads, o = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
  clean_o, clean = reference("chunk")
  close((o, grads), (clean_o, (clean["q"], clean["k"], clean["v"])), 1e-5)
  for x in (o, *grads):
    assert pad.any() and not np.asarray(x)[pad].any()


@pytest.mark.parametrize("implementation", ["reference", "dense", "blocks"])
def test_parts_of_the_keys_make_a_whole(implementation, monkeypatch):
  """By their log-sum-exps: values and gradients, where a part shows a query nothing too."""
  if implementation == "blocks":
    in_blocks(monkeypatch)
  name = "reference" if implementation == "reference" else "xla"
  arrays, keywords, cotangent = make("sink")
  q, k, v, sink = (arrays[n] for n in ("q", "k", "v", "sink"))
  T, half = q.shape[1], k.shape[1] // 2
  places = jnp.arange(k.shape[1], dtype=jnp.int32)[None].repeat(B, 0)

  def whole(q, k, v, sink):
    o, lse = attention(
      q, k, v, sink_N=sink, return_lse=True, implementation="reference", **keywords
    )
    return jnp.sum(o * cotangent) + jnp.sum(jnp.sin(lse)), (o, lse)

  def parts(q, k, v, sink):
    def one(keys, sink=None):
      return attention(
        q, k[:, keys], v[:, keys], kv_positions_BS=places[:, keys], q_positions_BT=places[:, :T],
        sink_N=sink, return_lse=True, implementation=name, **keywords,
      )  # fmt: skip

    (o, lse), (late, late_lse) = one(slice(half), sink), one(slice(half, None))
    total = jnp.logaddexp(lse, late_lse)
    share = lambda x: jnp.exp(x - total)[..., None]
    o = o * share(lse) + late * share(late_lse)
    assert total.shape == q.shape[:3] and total.dtype == jnp.float32
    return jnp.sum(o * cotangent) + jnp.sum(jnp.sin(total)), (o, total)

  got, want = (
    jax.jit(jax.grad(f, (0, 1, 2, 3), has_aux=True))(q, k, v, sink) for f in (parts, whole)
  )
  close(got, want, 1e-5)


@pytest.mark.parametrize("blocks", [False, True], ids=["dense", "blocks"])
def test_masked_keys_change_nothing(blocks, monkeypatch):
  """Bitwise; and blocks of keys beyond the reach are not even read, so NaN there is harmless."""
  if blocks:
    in_blocks(monkeypatch)
  arrays, keywords, _ = make("window")  # 9 keys: rows 24.. of 40 see no key before 16
  f = jax.jit(lambda q, k, v: attention(q, k, v, implementation="xla", **keywords))
  q, k, v = arrays["q"], arrays["k"], arrays["v"]
  base = f(q, k, v)
  moved = f(q, k.at[:, :16].add(3.0), v.at[:, :16].multiply(-2.0))
  assert jnp.array_equal(base[:, 24:], moved[:, 24:])
  assert not jnp.array_equal(base[:, :24], moved[:, :24])
  if blocks:
    skipped = f(q, k.at[:, :16].set(jnp.nan), v.at[:, :16].set(jnp.nan))
    assert jnp.array_equal(base[:, 32:], skipped[:, 32:])


def test_window_of_the_whole_row_is_causal(monkeypatch):
  in_blocks(monkeypatch)
  arrays, _, _ = make("causal")
  q, k, v = arrays["q"], arrays["k"], arrays["v"]
  causal, windowed = (
    jax.jit(partial(attention, mask=mask))(q, k, v) for mask in (Causal(), MistralWindow(40))
  )
  assert jnp.array_equal(causal, windowed)


@pytest.mark.parametrize("blocks", [False, True], ids=["dense", "blocks"])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_mask_a_head(implementation, blocks, monkeypatch):
  """Each head's output is that of all heads under its mask."""
  if blocks:
    in_blocks(monkeypatch)
  arrays, _, _ = make("causal")
  q, k, v = arrays["q"], arrays["k"], arrays["v"]
  N = q.shape[2]
  masks = (Causal(), Local(3, 5), BigBird(10, size=4), Causal())[:N]
  got = attention(q, k, v, mask=PerHead(masks), implementation=implementation)
  for n, mask in enumerate(masks):
    want = attention(q, k, v, mask=mask, implementation="reference")
    close(got[:, :, n], want[:, :, n], 1e-5)
  with pytest.raises(ValueError, match="heads"):
    attention(q, k, v, mask=PerHead((Causal(),)))


@pytest.mark.parametrize("size", [8, 24])
def test_block_sizes_agree(size, monkeypatch):
  in_blocks(monkeypatch, size)
  close(run("relative", "xla"), reference("relative"), 1e-5)


def test_memory_is_linear():
  def temp_bytes(implementation, T):
    x = jax.ShapeDtypeStruct((1, T, 1, 8), jnp.float32)
    loss = lambda q, k, v: jnp.sum(attention(q, k, v, mask=Causal(), implementation=implementation))
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temp_bytes("xla", 2048) < 2.5 * temp_bytes("xla", 1024)
  square = 4 * 2048**2
  assert temp_bytes("xla", 2048) < square / 4 < square <= temp_bytes("reference", 2048)


def test_remat_policy_keeps_the_forward_pass(monkeypatch):
  """With output and log-sum-exp saved by name, the backward pass runs no forward loop again."""
  in_blocks(monkeypatch)
  arrays, keywords, _ = make("causal")
  f = lambda q: attention(q, arrays["k"], arrays["v"], **keywords)
  names = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")

  def loops(policy):
    step = jax.grad(lambda q: jnp.sum(jax.checkpoint(f, policy=policy)(q) ** 2))
    return jax.jit(step).lower(arrays["q"]).as_text().count("stablehlo.while")

  assert loops(names) == 6  # a scan and its two inner loops, forward and backward
  assert loops(jax.checkpoint_policies.nothing_saveable) == 9


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_on_a_mesh(kind, monkeypatch):
  """Batch and heads sharded: the same numbers, and nothing is exchanged between devices."""
  in_blocks(monkeypatch)
  arrays, keywords, cotangent = make("relative")
  mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(kind,) * 2)
  put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
  heads = ("data", None, "tensor")
  with jax.set_mesh(mesh):
    q, k, v, c = (put(x, *heads) for x in (arrays["q"], arrays["k"], arrays["v"], cotangent))
    bias = RelativeKeys(
      put(arrays["bias"].q_BTNH, *heads), put(arrays["bias"].r_PNH, None, "tensor")
    )
    ids = {n: put(keywords[n], "data") for n in ("q_positions_BT", "q_segments_BT")}

    def loss(q, k, v, bias, ids, c):
      return jnp.sum(attention(q, k, v, bias=bias, **(keywords | ids)) * c)

    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v, bias, ids, c).compile()
    grads = step(q, k, v, bias, ids, c)
  want = reference("relative")[1]
  close(grads, (want["q"], want["k"], want["v"]), 1e-5)
  collectives = ("all-gather(", "all-reduce(", "all-to-all(", "collective-permute(")
  assert not [line for line in step.as_text().splitlines() if any(c in line for c in collectives)]


def test_bucket_is_t5s():
  distance = np.arange(-300, 300)
  for options in ((32, 128, False), (32, 128, True), (8, 20, False), (8, 20, True), (5, 9, False)):
    want = [t5_bucket(int(d), *options) for d in distance]
    np.testing.assert_array_equal(bucket(jnp.asarray(distance), *options), want)
  # The published T5 code's own boundaries, encoder side: exact up to 7, then powers of sqrt 2.
  edges = [d for d in range(1, 129) if bucket(d, 32, 128, True) != bucket(d - 1, 32, 128, True)]
  assert edges == [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
  with pytest.raises(ValueError, match="logarithmic"):
    bucket(distance, 32, 16)


def test_errors():
  arrays, _, _ = make("window")
  q, k, v = arrays["q"], arrays["k"], arrays["v"]
  with pytest.raises(ValueError, match="known: pallas_tpu, cudnn, pallas_gpu, xla, ref"):
    attention(q, k, v, implementation="flash")
  with pytest.raises(ValueError, match="give kv_positions_BS"):
    attention(q[:, :4], k, v)
  with pytest.raises(ValueError, match="do not divide"):
    attention(q[:, :, :3], k, v)
  with pytest.raises(ValueError, match="head size"):
    attention(q[..., :4], k, v)
  with pytest.raises(ValueError, match=r"q \[B, T, N, H\]"):
    attention(q[0], k, v)
  with pytest.raises(ValueError, match="both"):
    attention(q, k, v, kv_segments_BS=jnp.ones((B, 40), jnp.int32))
  with pytest.raises(ValueError, match="q_positions_BT"):
    attention(q, k, v, q_positions_BT=jnp.arange(40))
  with pytest.raises(ValueError, match="bias has 3 heads"):
    attention(q, k, v, bias=Alibi(jnp.ones(3)))
  with pytest.raises(ValueError, match="sink_N"):
    attention(q, k, v, sink_N=jnp.ones(2))
  with pytest.raises(ValueError, match="softcap"):
    attention(q, k, v, softcap=-1.0)
