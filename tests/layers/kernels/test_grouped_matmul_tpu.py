"""The TPU kernels for grouped products: values in interpret mode, races, visited rows, lowering."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from layers.kernels.grouped_matmul import pallas_tpu
from layers.kernels.grouped_matmul.visits import ALIGN, usual, visit, visits, windows
from tests.oracles import grouped
from tests.oracles.grouped import (
  SIZES,
  close,
  interpreted,
  one,
  outer_products,
  products,
  rows_of,
)

# Tiles of 128 rows of which the last is not full, two blocks of columns of which the second
# sticks out, and in a block a step and a remainder.
D, F = 256, 640


@pytest.fixture
def small_tiles(monkeypatch):
  monkeypatch.setattr(pallas_tpu, "HEIGHTS", (32, 96))
  monkeypatch.setattr(pallas_tpu, "OUTER_HEIGHTS", (64, 128))
  monkeypatch.setattr(pallas_tpu, "product_tiles", lambda *_, **__: pallas_tpu.Tiles(128, 384, 256))
  monkeypatch.setattr(
    pallas_tpu, "outer_tiles", lambda *_: pallas_tpu.OuterTiles(128, 256, 384, 128)
  )


@pytest.fixture
def run(monkeypatch, small_tiles):
  return interpreted(pallas_tpu, monkeypatch)


make = partial(grouped.make, d=D, f=F)


@pytest.mark.parametrize(("dtype", "transposed"), [("bfloat16", True), ("float32", False)])
def test_product(run, dtype, transposed):
  run = run(partial(pallas_tpu.row_products, finish=one, transposed=transposed))
  for sizes in SIZES.values():
    x, w = make("x", dtype, sizes), make("w", dtype, sizes)
    (got,) = run(x, (jnp.swapaxes(w, 1, 2) if transposed else w,), jnp.array(sizes, jnp.int32))
    close(got, products(x, w, sizes), dtype)


@pytest.mark.parametrize("out", ["bfloat16", "float32"])
def test_outer(run, out):
  """A float32 result of bfloat16 rows is not rounded on the way."""
  run = run(partial(pallas_tpu.outer, dtype=out))
  for sizes in SIZES.values():
    x, dy = make("x", "bfloat16", sizes), make("dy", "bfloat16", sizes)
    got = run(x, dy, jnp.array(sizes, jnp.int32))
    close(got, outer_products(x, dy, sizes), out)


def one_block_of_results(**specs):
  """All columns are written to one place, on two cores."""
  fixed = lambda spec: pl.BlockSpec(spec.block_shape, lambda *_: (0,) * len(spec.block_shape))
  found = specs["out_specs"]
  specs["out_specs"] = tuple(map(fixed, found)) if isinstance(found, tuple) else fixed(found)
  return pltpu.PrefetchScalarGridSpec(**specs)


@pytest.mark.parametrize("seeded", [False, True], ids=["as it is", "seeded"])
@pytest.mark.parametrize("kernel", ["product", "outer"])
def test_races(kernel, seeded, small_tiles, monkeypatch, capfd):
  """On two cores, with memory that is NaN until written."""
  if seeded:
    names = vars(pltpu) | {"PrefetchScalarGridSpec": one_block_of_results}
    monkeypatch.setattr(pallas_tpu, "pltpu", SimpleNamespace(**names))
  sizes = SIZES["uneven"]
  x, w, dy = (make(name, "bfloat16", sizes) for name in ("x", "w", "dy"))
  groups = jnp.array(sizes, jnp.int32)
  parameters = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2
  )
  found, got = "", None
  with pltpu.force_tpu_interpret_mode(parameters):
    try:
      if kernel == "product":
        (got,) = pallas_tpu.row_products(x, (w,), groups, finish=one)
      else:
        got = pallas_tpu.outer(x, dy, groups, dtype=jnp.bfloat16)
      got = np.asarray(jax.block_until_ready(got), np.float64)
    except jax.errors.JaxRuntimeError as error:  # newer versions raise, older ones print
      found = str(error)
  found += "".join(capfd.readouterr())
  assert ("RACE DETECTED" in found) == seeded
  if not seeded:
    want = products(x, w, sizes) if kernel == "product" else outer_products(x, dy, sizes)
    close(got, want, "bfloat16")


def test_gated(run):
  finish = lambda gate, up: (jax.nn.silu(gate) * up, gate, up)
  run = run(partial(pallas_tpu.row_products, finish=finish))
  for sizes in SIZES.values():
    x, w, w_up = (make(name, "bfloat16", sizes) for name in ("x", "w", "up"))
    hidden, gate, up = run(x, (w, w_up), jnp.array(sizes, jnp.int32))
    want_gate, want_up = products(x, w, sizes), products(x, w_up, sizes)
    close(gate, want_gate, "bfloat16")
    close(up, want_up, "bfloat16")
    close(hidden, want_gate / (1 + np.exp(-want_gate)) * want_up, "bfloat16")


def test_own_tiles_in_tpu_interpret_mode():
  """The tiles and heights of a run, several windows a visit; unwritten memory reads as NaN."""
  sizes, rows = (700, 0, 37, 203, 20), 1040
  x = jnp.asarray(np.random.default_rng(0).normal(size=(rows, 128)), jnp.float32)
  x = x.at[sum(sizes) :].set(jnp.nan)
  f = jax.jit(partial(pallas_tpu.outer, dtype=jnp.float32))
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
    dw = np.asarray(f(x, x[:, ::-1], jnp.array(sizes, jnp.int32)), np.float64)
  close(dw, outer_products(x, x[:, ::-1], sizes), "float32")


ROWS, TILE, GROUPS = 300, 64, 6
WINDOW_HEIGHTS = (16, 48)


@partial(jax.jit, static_argnums=1)
def all_visits(sizes, each_group):
  plan = visits(sizes, ROWS, TILE, each_group=each_group)
  found = jax.vmap(lambda v: visit(v, *plan[1:], rows=ROWS, tile=TILE))(
    jnp.arange(plan.next_V.size)
  )
  return (
    plan.number,
    found,
    jax.vmap(lambda a, b: windows(a, b, WINDOW_HEIGHTS))(found.low, found.high),
  )


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 130), min_size=GROUPS, max_size=GROUPS), st.booleans())
def test_visits_are_those_that_share_rows(sizes, each_group):
  number, found, plan = all_visits(jnp.array(sizes, jnp.int32), each_group)
  number = int(number)
  found = [np.asarray(a)[:number] for a in found]
  plan = [np.asarray(a)[:number] for a in plan]
  owner = np.full(ROWS, GROUPS)
  for e, start, end in rows_of(sizes):
    owner[start:end] = e
  # Brute force: each (tile, group) pair that shares rows.
  pairs = {}
  for row, e in enumerate(owner):
    pairs.setdefault((e, row // TILE), []).append(row)
  if each_group:
    pairs = {pair: rows for pair, rows in pairs.items() if pair[0] < GROUPS}
    empty = set(range(GROUPS)) - set(owner)
  else:
    empty = set()
  assert number == len(pairs) + len(empty)
  last = -1
  for group, tile, low, high, rest, start, full, kind in zip(*found, *plan, strict=True):
    assert 0 <= tile <= (ROWS - 1) // TILE
    if rest:
      assert high <= low
      assert pairs.pop((GROUPS, tile))[0] == tile * TILE + low
      # The weights that are there already: nothing is fetched.
      assert group == max([e for e in range(GROUPS) if e in owner], default=group)
      continue
    assert group >= last  # results are written once
    last = group
    if group in empty:
      assert high <= low
      empty.remove(group)
      continue
    rows = pairs.pop((group, tile))  # and a pair is visited once
    assert [tile * TILE + low, tile * TILE + high] == [rows[0], rows[-1] + 1]
    assert start % ALIGN == 0 and 0 <= low - start < ALIGN
    rest_of_it = high - start - full * WINDOW_HEIGHTS[-1]
    assert 0 < rest_of_it <= WINDOW_HEIGHTS[kind]
    assert kind == 0 or rest_of_it > WINDOW_HEIGHTS[kind - 1]  # no lower window would do
  assert not pairs and not empty
  assert np.all(np.diff(found[1]) >= 0)  # a tile of results is left only once


@pytest.mark.parametrize("heights", ["HEIGHTS", "HIGH_HEIGHTS", "OUTER_HEIGHTS"])
def test_windows_cover_little_more_than_the_rows(heights):
  heights = getattr(pallas_tpu, heights)
  low, rows = np.meshgrid(np.arange(0, 48, 5), np.arange(1, 1025 - 48), indexing="ij")
  plan = jax.jit(partial(windows, heights=heights))(low, low + rows)
  start, full, last = map(np.asarray, plan)
  assert np.all((start % ALIGN == 0) & (low - start >= 0) & (low - start < ALIGN))
  left = low + rows - start - full * usual(heights)
  edges = np.array((0, *heights))
  assert np.all((left > edges[last]) & (left <= edges[last + 1]))
  assert np.all((full == 0) | (left > heights[-1] - usual(heights)))


SHAPES = [(8192, 2048, 1024, 32), (16384, 4096, 14336, 8), (16384, 4096, 5376, 64)]


def calls(rows, d, f, experts, dtype=jnp.bfloat16):
  s = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
  sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
  multiply = lambda gate, up: (gate * up, gate, up)
  plain = partial(pallas_tpu.row_products, finish=one)
  back = partial(plain, transposed=True)
  return {
    "product": (plain, s(rows, d), (s(experts, d, f),), sizes),
    "d-rows": (back, s(rows, f), (s(experts, d, f),), sizes),
    "gated": (
      partial(pallas_tpu.row_products, finish=multiply),
      s(rows, d), (s(experts, d, f), s(experts, d, f)), sizes,
    ),
    "outer": (partial(pallas_tpu.outer, dtype=jnp.float32), s(rows, d), s(rows, f), sizes),
  }  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "cores"), [("TPU v5 lite", 1), ("TPU v5", 2)])
def test_lowers_for_tpus(shape, kind, cores):
  device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform="tpu")
  mesh = jax.sharding.AbstractMesh((1,), ("d",), (AxisType.Auto,), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    assert pallas_tpu.chip() == pallas_tpu.CHIPS[128 if cores == 1 else 64]
    for f, *args in calls(*shape).values():
      text = jax.jit(f).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
      assert "tpu_custom_call" in text


def test_lowers_inside_shard_map():
  mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
  f, x, w, sizes = calls(512, 256, 384, 4)["product"]
  g, _, dy, _ = calls(512, 256, 384, 4)["outer"]

  def region(x, w, dy, sizes):
    return f(x, w, sizes), g(x, dy, sizes)[None]

  mapped = jax.shard_map(
    region,
    mesh=mesh,
    in_specs=(P(("data", "expert")), P(), P(("data", "expert")), P()),
    out_specs=(P(("data", "expert")), P(("data", "expert"))),
  )
  text = jax.jit(mapped).trace(x, w, dy, sizes).lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("tpu_custom_call") == 2


@pytest.mark.parametrize("shape", [*SHAPES, (4096, 2048, 1408, 64), (100, 128, 128, 4)], ids=str)
@pytest.mark.parametrize("mib", [16, 64, 128])
def test_tiles_cover_and_fit(shape, mib):
  rows, d, f, _ = shape
  target = pallas_tpu.CHIPS[mib]
  for inner, width in ((d, f), (f, d)):
    tiles = pallas_tpu.product_tiles(rows, inner, width, 2, target)
    blocks = -(-width // tiles.columns)
    assert blocks * tiles.columns < width * 1.1
    assert blocks % target.cores == 0 or width == 128
    size = tiles.rows * inner + inner * tiles.columns + tiles.rows * tiles.columns
    assert 2 * 2 * size <= target.budget < target.limit < mib * 2**20
  tiles = pallas_tpu.outer_tiles(rows, d, f, 2, 4, target)
  blocks = -(-d // tiles.d) * -(-f // tiles.f)
  assert blocks % target.cores == 0 or d * f == 128 * 128
  size = 2 * 2 * tiles.rows * (tiles.d + tiles.f) + 2 * 4 * tiles.d * tiles.f
  assert size <= target.budget


def test_what_is_not_supported_says_why():
  s = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
  reason = lambda x, w, platform="tpu": pallas_tpu.supports(x, w, platform)
  bf16 = jnp.bfloat16
  assert reason(s(bf16, 64, 128), s(bf16, 2, 128, 256)) is None
  assert "not for cpu" in reason(s(bf16, 64, 128), s(bf16, 2, 128, 256), "cpu")
  assert "float16" in reason(s(jnp.float16, 64, 128), s(jnp.float16, 2, 128, 256))
  assert "multiples of 128" in reason(s(bf16, 64, 128), s(bf16, 2, 128, 200))
  assert "fast memory" in reason(s(bf16, 64, 2**16), s(bf16, 2, 2**16, 128))


@pytest.mark.full
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1"])
def test_compiles_for_described_tpus(name):
  """Fast memory suffices, which lowering alone does not show."""
  topologies = pytest.importorskip("jax.experimental.topologies")
  devices = topologies.get_topology_desc(topology_name=name, platform="tpu").devices
  mesh = jax.sharding.Mesh(np.array(devices[:1]), ("d",))
  replicated = jax.sharding.NamedSharding(mesh, P())
  for f, *args in calls(*SHAPES[2]).values():
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), args)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      compiled = jax.jit(f).lower(*args).compile()
    assert "tpu_custom_call" in compiled.as_text()
