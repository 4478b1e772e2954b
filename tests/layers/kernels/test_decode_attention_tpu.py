"""The TPU kernel for attention over a cache: races, lowering, compilation, blocks. Values are in
test_decode_attention."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from layers.kernels import decode_attention as package
from layers.kernels.decode_attention import (
  decode_attention,
  paged_decode_attention,
  pallas_tpu,
)
from layers.kernels.decode_attention.inputs import Inputs
from layers.masks import Causal, Local, PerHead
from tests.layers.stacks import quick_jit


def one_block_of_results(**specs):
  """Two rows that write to one place, on two cores."""
  shape = specs["out_specs"].block_shape
  specs["out_specs"] = pl.BlockSpec(shape, lambda *_: (0, 0, 0))
  return pltpu.PrefetchScalarGridSpec(**specs)


@pytest.mark.parametrize("seeded", [False, True], ids=["as it is", "seeded"])
def test_races(seeded, monkeypatch, capfd):
  """On two cores, with memory that is NaN until written; pages are joined in a step."""
  monkeypatch.setattr(package, "current_platform", lambda: "tpu")
  monkeypatch.setattr(pallas_tpu, "PAGES", 2)
  if seeded:
    names = vars(pltpu) | {"PrefetchScalarGridSpec": one_block_of_results}
    monkeypatch.setattr(pallas_tpu, "pltpu", SimpleNamespace(**names))
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  q, k, v = normal(2, 1, 4, 32), normal(10, 64, 2, 32), normal(10, 64, 2, 32)
  table, lengths = jnp.asarray(rng.permutation(10).reshape(2, 5)), jnp.array([70, 280])
  f = lambda name: quick_jit(partial(
    paged_decode_attention, mask=Causal() & Local(140), implementation=name
  ))(q, k, v, table, q_positions_BT=lengths[:, None] - 1, lengths_B=lengths)  # fmt: skip
  parameters = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2
  )
  found = ""
  with pltpu.force_tpu_interpret_mode(parameters):
    try:
      o = np.asarray(f("pallas_tpu"))
    except jax.errors.JaxRuntimeError as error:  # newer versions raise, older ones print
      found = str(error)
  found += "".join(capfd.readouterr())
  assert ("RACE DETECTED" in found) == seeded
  if not seeded:
    np.testing.assert_allclose(o, f("reference"), atol=1e-5)


def calls(H, U=None, dtype=jnp.bfloat16, B=4, T=2, N=16, K=4, S=2048, R=16):
  """(function, arguments, keywords) of each kind of cache, as shapes."""
  U = U or H
  s = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
  ids = partial(s, dtype=jnp.int32)
  of_row = {"q_positions_BT": ids(B, T), "lengths_B": ids(B)}
  how = {
    "mask": PerHead((Causal(), Causal() & Local(700)) * (N // 2)),
    "implementation": "pallas_tpu",
    "softcap": 20.0,
    "sink_N": jnp.ones(N),
    "alibi_slopes_N": jnp.ones(N),
  }
  q, cache = s(B, T, N, H), (s(B, S, K, H), s(B, S, K, U))
  pages = (s(B * S // R, R, K, H), s(B * S // R, R, K, U), ids(B, S // R))
  whole = partial(decode_attention, **how)
  return (
    (whole, (q, *cache), of_row),
    (whole, (q, *cache), of_row | {"kv_positions_BS": ids(B, S)}),
    (partial(paged_decode_attention, **how), (q, *pages), of_row),
  )


SHAPES = {
  "64": {"H": 64},
  "128": {"H": 128},
  "256": {"H": 256},
  "latents": {"H": 576, "U": 512, "N": 128, "K": 1, "T": 1},
  "many tokens": {"H": 128, "T": 16, "N": 32, "K": 8},
  "odd heads": {"H": 128, "N": 12, "K": 3, "S": 1024},
  "as many heads": {"H": 128, "N": 32, "K": 32, "S": 512, "T": 1},
  "float32": {"H": 128, "K": 8, "dtype": jnp.float32, "R": 8},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
  ("kind", "cores"),
  [("TPU v5 lite", 1), pytest.param("TPU v5", 2, marks=pytest.mark.full), ("TPU v6 lite", 1)],
)
def test_lowers_for_tpus(shape, kind, cores):
  device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform="tpu")
  mesh = jax.sharding.AbstractMesh((1,), ("d",), (AxisType.Auto,), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    for f, arrays, keywords in calls(**SHAPES[shape]):
      lowered = jax.jit(f).trace(*arrays, **keywords).lower(lowering_platforms=("tpu",))
      assert lowered.as_text().count("tpu_custom_call") == 1


def test_lowers_inside_shard_map():
  """Rows over one axis and heads over another; each region walks as far as its own rows need."""
  mesh = jax.sharding.AbstractMesh(
    (2, 2), ("data", "tensor"), (AxisType.Auto,) * 2,
    abstract_device=jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu"),
  )  # fmt: skip
  f, (q, k, v), ids = calls(128)[0]
  f = partial(f, mask=Causal(), sink_N=None, alibi_slopes_N=None)
  heads = P("data", None, "tensor")
  run = jax.shard_map(
    lambda q, k, v, ids: f(q, k, v, **ids),
    mesh=mesh, in_specs=(heads, heads, heads, P("data")), out_specs=heads,
  )  # fmt: skip
  with jax.sharding.use_abstract_mesh(mesh):
    lowered = jax.jit(run).trace(q, k, v, ids).lower(lowering_platforms=("tpu",))
  assert lowered.as_text().count("tpu_custom_call") == 1


def test_what_is_not_supported_says_why():
  s = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
  ids = lambda *shape: s(*shape, dtype=jnp.int32)
  whole = Inputs(ids(2, 1), ids(2), *[None] * 5)
  q, k, pages = s(2, 1, 8, 128), s(2, 64, 4, 128), s(8, 16, 4, 128)
  reason = pallas_tpu.supports
  assert reason(q, k, k, whole) is None
  paged = whole._replace(page_table_BJ=ids(2, 4))
  assert reason(q, pages, pages, paged) is None
  assert "float16" in reason(s(2, 1, 8, 128, dtype=jnp.float16), k, k, whole)
  assert "2048, not 4096" in reason(s(2, 16, 256, 128), k, k, whole)
  assert "multiple of 16" in reason(q, s(8, 2, 4, 128), s(8, 2, 4, 128), paged)
  table = whole._replace(page_table_BJ=ids(2, 2**17))
  assert "scalar memory" in reason(q, pages, pages, table)
  big = s(2, 2**16, 8, 128)
  assert "fast memory" in reason(q, big, big, paged)
  f, arrays, keywords = calls(128)[0]
  device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
  mesh = jax.sharding.AbstractMesh((2,), ("d",), (AxisType.Auto,), abstract_device=device)
  with (
    jax.sharding.use_abstract_mesh(mesh),
    pytest.raises(NotImplementedError, match="call it in a shard_map"),
  ):
    jax.eval_shape(f, *arrays, **keywords)


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_whole_positions_and_pages(shape):
  for _, (q, k, v, *table), _ in calls(**SHAPES[shape]):
    inputs = Inputs(*[None] * 3, table[0] if table else None, *[None] * 3)
    blocks = pallas_tpu._blocks(q, k, v, inputs)
    step = blocks.pieces * blocks.piece
    assert step % blocks.chunk == 0 and blocks.chunk % k.shape[2] == 0
    assert blocks.piece % blocks.chunk == 0 or blocks.chunk % blocks.piece == 0
    least = 128 * (k.shape[2] if blocks.ahead else 1)
    assert blocks.chunk <= max(pallas_tpu.LOGITS // (q.shape[1] * q.shape[2]), least)
    if table:
      assert blocks.piece == k.shape[1] * k.shape[2] and blocks.positions >= 128
    else:
      assert blocks.piece % 128 == 0
      assert 2 * step * q.shape[-1] * k.dtype.itemsize >= pallas_tpu.STEP_BYTES / 2


@pytest.mark.full
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_compiles_for_described_tpus(shape, name):
  """Fast memory suffices, which lowering alone does not show."""
  topologies = pytest.importorskip("jax.experimental.topologies")
  devices = topologies.get_topology_desc(topology_name=name, platform="tpu").devices
  mesh = jax.sharding.Mesh(np.array(devices[:1]), ("d",))
  put = partial(
    jax.tree.map,
    lambda a: jax.ShapeDtypeStruct(
      a.shape, a.dtype, sharding=jax.sharding.NamedSharding(mesh, P())
    ),
  )
  for f, arrays, keywords in calls(**SHAPES[shape]):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      compiled = jax.jit(f).lower(*put(arrays), **put(keywords)).compile()
    assert compiled.as_text().count("tpu_custom_call") == 1


@pytest.mark.full
@pytest.mark.parametrize(
  ("K", "H"),
  [(1, 256), (2, 128), (4, 128), (8, 128), (8, 256), (3, 128), (2, 64), (8, 64), (4, 96), (1, 576)],
)
def test_the_cache_is_not_copied(K, H):
  """It is larger than fast memory, where a compiler might put it beforehand."""
  topologies = pytest.importorskip("jax.experimental.topologies")
  devices = topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu").devices
  mesh = jax.sharding.Mesh(np.array(devices[:1]), ("d",))
  one = jax.sharding.NamedSharding(mesh, P())
  f, arrays, keywords = calls(H, B=2, N=24, K=K, S=2**18)[0]
  put = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    compiled = jax.jit(f).lower(*map(put, arrays), **jax.tree.map(put, keywords)).compile()
  cache = arrays[1].size * arrays[1].dtype.itemsize
  assert compiled.memory_analysis().temp_size_in_bytes < cache / 10
