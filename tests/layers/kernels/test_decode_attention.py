"""Attention over a cache: every implementation against numpy, what is read, and on a mesh."""

from functools import lru_cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from layers.kernels import decode_attention as package
from layers.kernels.decode_attention import (
  decode_attention,
  paged_decode_attention,
  pallas_gpu,
  pallas_tpu,
  xla,
)
from layers.kernels.decode_attention.inputs import Inputs, bounds, needed_pages
from layers.kernels.select import select
from layers.masks import Causal, Local, PerHead
from tests.layers.stacks import quick_jit
from tests.oracles import decode
from tests.oracles.decode import CASES, S, paged

make = lru_cache(decode.make)
expected = lru_cache(lambda name, dtype: make(name, dtype).expected())

# Probabilities are rounded to the dtype of the values, results to that of the queries.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
POSITIONS = {"cache_axes": ((), ("context",), ())}  # spread, so "xla" takes them in one piece
FORMS = ("reference", "dense", "loop", "pallas_tpu", "pallas_gpu")


@pytest.fixture
def small(monkeypatch):
  """Blocks so small that rows have several, and kernels in interpret mode."""
  monkeypatch.setattr(xla, "BLOCK", 48)  # the last of 200 is not full
  monkeypatch.setattr(pallas_tpu, "STEP_BYTES", 2**16)
  monkeypatch.setattr(pallas_tpu, "COLUMNS", 128)
  call = partial(pl.pallas_call, interpret=True)
  for module in (pallas_tpu, pallas_gpu):
    monkeypatch.setattr(module, "pl", SimpleNamespace(**vars(pl) | {"pallas_call": call}))
  monkeypatch.setattr(pallas_gpu, "POSITIONS", 16)
  # As on the kernels' own platforms; what runs is the interpreter.
  monkeypatch.setattr(
    package, "select", lambda name, _, candidates: select(name, name.split("_")[-1], candidates)
  )


def call(name, form, dtype="float32", page=None, layers=None):
  """The result of a case as float64; in pages of `page` positions."""
  made = make(name, dtype)
  a, case = made.arrays, made.case
  array = lambda x: None if x is None else jnp.asarray(x, dtype)
  integers = lambda x: jnp.asarray(x, jnp.int32)
  more = {
    "q_positions_BT": integers(a["q_positions_BT"]),
    "lengths_B": integers(a["lengths_B"]),
    "sink_N": None if a["sink"] is None else jnp.asarray(a["sink"], jnp.float32),
    "alibi_slopes_N": None if a["slopes"] is None else jnp.asarray(a["slopes"], jnp.float32),
  }
  how = {"mask": case.mask, "softcap": case.softcap}
  how["implementation"] = "xla" if form in ("dense", "loop") else form
  if page is not None:
    k, v, table = paged(made, page)
    function, arrays = paged_decode_attention, (array(k), array(v), integers(table))
  else:
    function, arrays = decode_attention, (array(a["k"]), array(a["v"]))
    if layers is not None:  # the others hold nothing that may be read
      stack = lambda x: jnp.full((layers, *x.shape), jnp.nan, x.dtype).at[layers - 2].set(x)
      arrays, more["layer"] = tuple(map(stack, arrays)), jnp.array(layers - 2)
    how |= POSITIONS if form == "dense" else {}
    if case.rolling:
      more["kv_positions_BS"] = integers(a["kv_positions_BS"])
  o = quick_jit(partial(function, **how))(array(a["q"]), *arrays, **more)
  assert o.dtype == jnp.dtype(dtype)
  return np.asarray(o, np.float64)


def close(got, want, dtype="float32"):
  atol = TOLERANCE[dtype] * np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=0, atol=atol)
  np.testing.assert_array_equal(got[want == 0], 0)  # rows that have or see nothing


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_values(name, form, small):
  close(call(name, form), expected(name, "float32"))


@pytest.mark.parametrize("name", ["around", "rolling", "sink, cap, alibi"])
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_of_a_stack(name, form, small):
  close(call(name, form, layers=3), expected(name, "float32"))


PAGED = ("several tokens", "window", "sink, cap, alibi", "windows a head")


@pytest.mark.parametrize("name", PAGED)
@pytest.mark.parametrize("form", ["reference", "loop", "pallas_tpu", "pallas_gpu"])
def test_pages(name, form, small):
  """Entries of the table that are not needed point nowhere."""
  close(call(name, form, page=16), expected(name, "float32"))


@pytest.mark.parametrize("page", [8, 100])
@pytest.mark.parametrize("form", ["loop", "pallas_tpu"])
def test_page_sizes(form, page, small):
  """Several pages a step, and several products a page."""
  close(call("window", form, page=page), expected("window", "float32"))


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(form, small):
  name, dtype = "sink, cap, alibi", "bfloat16"
  close(call(name, form, dtype), expected(name, dtype), dtype)


@pytest.mark.parametrize("form", FORMS)
def test_unseen_keys_change_nothing(form, small):
  """Bitwise: what the window hides, and what stands past the length."""
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(1, n, 2, 32)), jnp.float32) for n in (1, S, S))
  how = {
    "mask": Causal() & Local(30),
    "implementation": "xla" if form in ("dense", "loop") else form,
  } | (POSITIONS if form == "dense" else {})
  ids = {"q_positions_BT": jnp.array([[149]]), "lengths_B": jnp.array([150])}
  f = quick_jit(partial(decode_attention, **how))
  base = f(q, k, v, **ids)
  for hidden, same in ((np.s_[:, :119], True), (np.s_[:, 150:], True), (np.s_[:, 119], False)):
    moved = f(q, k.at[hidden].add(3.0), v.at[hidden].multiply(-2.0), **ids)
    assert jnp.array_equal(base, moved) == same


MASKS = {
  "none": None,
  "causal": Causal(),
  "window": Causal() & Local(20),
  "around": Local(9, 2),
  "a mask a head": PerHead((Local(20, 1), Local(5, 4))),
  "one of them unbounded": PerHead((Causal(), Local(5, 4))),
}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(MASKS)), st.integers(0, 64), st.integers(0, 70), st.integers(1, 4))
def test_bounds_are_those_of_the_visible_keys(name, length, position, tokens):
  mask, queries = MASKS[name], position + np.arange(tokens)
  seen = np.zeros(64, bool)
  for one in (None,) if mask is None else mask.distinct:
    i, j = queries[:, None], np.arange(64)[None]
    table = np.ones((tokens, 64), bool) if one is None else one.visible(i, j)
    # The masks above hide nothing inside their reach.
    seen |= table.any(0) & (np.arange(64) < length)
  inputs = Inputs(jnp.asarray(queries[None]), jnp.array([length]), *[None] * 5)
  first, end = (int(x[0]) for x in bounds(mask, inputs))
  assert [*range(first, end)] == [*np.flatnonzero(seen)]
  rolling = inputs._replace(kv_positions_BS=jnp.arange(64)[None])
  assert [int(x[0]) for x in bounds(mask, rolling)] == [0, length]
  table = jnp.arange(1, 9)[None]
  used = np.asarray(needed_pages(table, 8, jnp.array([first]), jnp.array([end])))[0]
  assert [*used] == [j + 1 if seen[8 * j : 8 * j + 8].any() else 0 for j in range(8)]


SEEN_BY = (Causal(), Causal() & Local(20), Causal() & Local(1))
# Head size, place of positions in the kernel's blocks, and the blocks of each row that are read.
READ = {
  "of 64 positions": (
    128, 1,
    ([{0}, {0, 1, 2}, {0, 1, 2, 3}, {0}], [{0}, {1, 2}, {2, 3}, {0}], [{0}, {2}, {3}, {0}]),
  ),
  "of 128, which come last": (
    32, 3, ([{0}, {0, 1}, {0, 1}, {0}], [{0}, {0, 1}, {1}, {0}], [{0}, {1}, {1}, {0}])
  ),
}  # fmt: skip


@pytest.mark.parametrize("blocks", READ)
def test_cost_follows_what_rows_see(blocks, small, monkeypatch):
  """Steps of the loop, and blocks that the kernel's index maps ask for; not the cache's size."""
  H, where, wanted = READ[blocks]
  monkeypatch.setattr(pallas_tpu, "STEP_BYTES", 2**16 if H == 128 else 2**14)
  steps, fetched = [], []
  loop = jax.lax.fori_loop

  def counted(low, high, body, carry):
    steps.append(int(high) - int(low))
    return loop(low, high, body, carry)

  def recorded(**specs):
    fetched.append((specs["grid"], specs["in_specs"][3][0].index_map))
    raise StopIteration  # what follows, other tests see

  names = {"PrefetchScalarGridSpec": recorded}
  monkeypatch.setattr(jax.lax, "fori_loop", counted)
  monkeypatch.setattr(pallas_tpu, "pltpu", SimpleNamespace(**vars(pallas_tpu.pltpu) | names))
  lengths = jnp.array([0, 130, 200, 40])
  q = jnp.ones((4, 1, 2, H))
  k = jnp.ones((4, S, 2, H))
  ids = {"q_positions_BT": lengths[:, None] - 1, "lengths_B": lengths}
  for mask, blocks in zip(SEEN_BY, wanted, strict=True):
    decode_attention(q, k, k, mask=mask, implementation="xla", **ids)
    with pytest.raises(StopIteration):
      decode_attention(q, k, k, mask=mask, implementation="pallas_tpu", **ids)
    (rows, count), index_map = fetched.pop()
    first_B, end_B = bounds(mask, Inputs(*ids.values(), *[None] * 5))
    scalars = (first_B, end_B, jnp.arange(rows))
    at = [[index_map(b, j, *scalars) for j in range(int(count))] for b in range(rows)]
    asked = [{int(place[where]) for place in row} for row in at]
    assert asked == blocks  # an empty row has one that is there anyway
    assert count == max(map(len, blocks))
  assert steps == [5, 2, 1]  # of 48


@pytest.mark.xdist_group("devices")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
  "spec",
  [("data", None, "tensor"), ("data", "context", "tensor"), (None, ("data", "context"), None)],
  ids=["batch, heads", "batch, positions, heads", "positions"],
)
def test_no_part_of_a_cache_travels(spec, kind, small, monkeypatch):
  name = "a mask a head"
  monkeypatch.undo()
  monkeypatch.setattr(xla, "BLOCK", 48)
  made = make(name)
  a, case = made.arrays, made.case
  mesh = jax.make_mesh((2, 2, 2), ("data", "context", "tensor"), axis_types=(kind,) * 3)
  put = lambda x, dtype, *spec: jax.device_put(jnp.asarray(x, dtype), NamedSharding(mesh, P(*spec)))
  batch, positions, heads = spec
  how = POSITIONS if positions else {}
  f = partial(decode_attention, mask=case.mask, implementation="xla", **how)
  with jax.set_mesh(mesh):
    q = put(a["q"], jnp.float32, batch, None, heads)
    k, v = (put(a[n], jnp.float32, *spec) for n in "kv")
    ids = {n: put(a[n], jnp.int32, batch) for n in ("q_positions_BT", "lengths_B")}
    compiled = quick_jit(f).lower(q, k, v, **ids).compile()
    o = compiled(q, k, v, **ids)
  close(np.asarray(o, np.float64), expected(name, "float32"))
  text = compiled.as_text()
  for exchange in ("all-gather", "all-to-all", "collective-permute"):
    assert f" {exchange}(" not in text and f" {exchange}-start(" not in text
  assert " all-reduce(" in text  # of the number of steps, or of the parts of a row's result


SPREAD = {"several tokens": 2, "multi-query, everything": 2, "sink, cap, alibi": 2} | {
  "a mask a head": 2,
  "windows a head": 1,  # three heads on two devices: they stay together
  "around": 2,
}


@pytest.mark.xdist_group("devices")
@pytest.mark.parametrize("name", SPREAD)
@pytest.mark.parametrize("form", ["xla", "pallas_tpu"])
def test_each_device_has_its_rows_and_heads(name, form, small, monkeypatch):
  """The kernel too, which no compiler can split; of a stack, and on a mesh with an idle axis."""
  if form == "pallas_tpu":
    shapes = []
    run = pallas_tpu.attention
    monkeypatch.setattr(pallas_tpu, "attention", lambda *a: shapes.append(a[2].shape) or run(*a))
  made = make(name)
  a, case = made.arrays, made.case
  mesh = jax.make_mesh((2, 2, 2), ("data", "idle", "tensor"), axis_types=(AxisType.Auto,) * 3)
  f = partial(
    decode_attention, mask=case.mask, softcap=case.softcap, implementation=form,
    cache_axes=(("data",), (), ("tensor",)),
  )  # fmt: skip
  heads = "tensor" if SPREAD[name] == 2 else None
  put = lambda x, dtype, *spec: (
    None if x is None else jax.device_put(jnp.asarray(x, dtype), NamedSharding(mesh, P(*spec)))
  )
  stack = lambda x: np.stack([np.full_like(x, np.nan), x])
  of_keys = "tensor" if heads and case.heads[1] > 1 else None
  with jax.set_mesh(mesh):
    q = put(a["q"], jnp.float32, "data", None, heads)
    k, v = (put(stack(a[n]), jnp.float32, None, "data", None, of_keys) for n in "kv")
    ids = {n: put(a[n], jnp.int32, "data") for n in ("q_positions_BT", "lengths_B")}
    if case.rolling:
      ids["kv_positions_BS"] = put(a["kv_positions_BS"], jnp.int32, "data")
    ids["sink_N"] = put(a["sink"], jnp.float32, heads)
    ids["alibi_slopes_N"] = put(a["slopes"], jnp.float32, heads)
    compiled = quick_jit(f).lower(q, k, v, layer=put(1, jnp.int32), **ids).compile()
    o = compiled(q, k, v, layer=put(1, jnp.int32), **ids)
  close(np.asarray(o, np.float64), expected(name, "float32"))
  for exchange in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
    assert f" {exchange}(" not in compiled.as_text()
  if form == "pallas_tpu":  # both layers of half of the rows
    K = case.heads[1]
    assert shapes == [(4, S, K // 2 if of_keys else K, case.sizes[0])]


def test_in_a_manual_region():
  """Batch cut by hand: each device loops as long as its own rows need."""
  made = make("window")
  a = made.arrays
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
  f = partial(decode_attention, mask=made.case.mask, implementation="xla")
  run = jax.shard_map(
    lambda q, k, v, i, n: f(q, k, v, q_positions_BT=i, lengths_B=n),
    mesh=mesh, in_specs=P("data"), out_specs=P("data"),
  )  # fmt: skip
  arrays = (jnp.asarray(a[n], jnp.float32) for n in "qkv")
  ids = (jnp.asarray(a[n], jnp.int32) for n in ("q_positions_BT", "lengths_B"))
  o = quick_jit(run)(*arrays, *ids)
  close(np.asarray(o, np.float64), expected("window", "float32"))


def test_errors():
  q, k = jnp.ones((2, 1, 4, 8)), jnp.ones((2, 16, 2, 8))
  ids = {"q_positions_BT": jnp.zeros((2, 1), jnp.int32), "lengths_B": jnp.ones(2, jnp.int32)}
  f = partial(decode_attention, q, k, k, **ids)
  pages = partial(paged_decode_attention, q, k, k, **ids)
  for match, run in {
    "known: pallas_tpu, xla, pallas_gpu, reference": lambda: f(implementation="flash"),
    "four dims": lambda: decode_attention(q[0], k, k, **ids),
    "one head size": lambda: decode_attention(q[..., :4], k, k, **ids),
    "do not divide": lambda: decode_attention(q[:, :, :3], k, k, **ids),
    "2 rows of queries": lambda: decode_attention(q, k[:1], k[:1], **ids),
    "3 heads": lambda: f(mask=PerHead((Causal(),) * 3)),
    "q_positions_BT": lambda: decode_attention(q, k, k, **ids | {"q_positions_BT": jnp.ones(2)}),
    "lengths_B": lambda: decode_attention(q, k, k, **ids | {"lengths_B": jnp.ones((2, 1))}),
    "kv_positions_BS": lambda: f(kv_positions_BS=jnp.zeros((2, 8), jnp.int32)),
    "sink_N": lambda: f(sink_N=jnp.ones(2)),
    "alibi_slopes_N": lambda: f(alibi_slopes_N=jnp.ones(2)),
    "softcap": lambda: f(softcap=-1.0),
    "page_table_BJ": lambda: pages(jnp.zeros((3, 4), jnp.int32)),
  }.items():
    with pytest.raises(ValueError, match=match):
      run()
  with pytest.raises(NotImplementedError, match="not for cpu"):
    f(implementation="pallas_tpu")
