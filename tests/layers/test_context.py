"""Attention over a row spread over devices, against the reference on the whole row."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from layers import context
from layers.attention import causal_mask
from layers.context import choose_method, row_attention, zigzag
from layers.kernels.attention import Alibi, attention, pallas_tpu, xla
from layers.masks import BigBird, Causal, Chunked, Local, PerHead
from mesh.constrain import use_mesh
from mesh.topology import make_mesh

pytestmark = pytest.mark.xdist_group("devices")
B, T, N, K, H, C = 2, 48, 4, 2, 8, 4
rng = np.random.default_rng(0)
Q, KEYS, VALUES, DO = (
  rng.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (N, K, K, N)
)
CUT = np.array([[17], [30]])
PLACE = np.arange(T)[None]
SEGMENTS = np.where(PLACE >= 44, 0, 1 + (PLACE >= CUT)).astype(np.int32)  # the end is padding
POSITIONS = np.where(PLACE >= CUT, PLACE - CUT, PLACE).astype(np.int32)
EXTRAS = {"sink_N": rng.normal(size=N).astype(np.float32), "slopes_N": np.array([1, 0.5, 0.25, 0])}
CASES = {
  "causal": {"mask": causal_mask()},
  "window": {"mask": causal_mask(window=5)},
  "everything": {"mask": None},
  "cap, sink": {"mask": causal_mask(), "softcap": 5.0, "sink_N": True},
  "alibi": {"mask": causal_mask(), "bias": True},
}
# Of 6 positions a chunk: part of a neighbour, all of it and a part of the next, both sides.
NEAR = {
  "window": {"mask": causal_mask(window=5)},
  "two hops": {"mask": causal_mask(window=10), "sink_N": True, "bias": True},
  "around": {"mask": Local(3, 8)},
  "a mask a head": {"mask": PerHead((Local(2), Local(7, 1), Chunked(5), Causal() & Local(6)))},
}


def run(function, options, arrays, place, extras):
  """Outputs and gradients by q, k, v, sink and slopes."""
  positions, segments = (jnp.asarray(x[:, place]) for x in (POSITIONS, SEGMENTS))
  flags = {k: v for k, v in options.items() if k not in ("sink_N", "bias")}

  def weighted(q, k, v, extras):
    if "sink_N" in options:
      flags["sink_N"] = extras["sink_N"]
    if "bias" in options:
      flags["bias"] = Alibi(extras["slopes_N"])
    o = function(q, k, v, positions, segments, **flags)
    return jnp.sum(o * DO[:, place]), o

  q, k, v = (jnp.asarray(x[:, place]) for x in arrays)
  grad = jax.value_and_grad(weighted, argnums=(0, 1, 2, 3), has_aux=True)
  (_, o), grads = jax.jit(grad)(q, k, v, extras)
  back = np.argsort(place)
  return [np.asarray(x)[:, back] for x in (o, *grads[:3])], grads[3]


def spread(method, check_vma=True):
  """The same over C devices; extras are whole everywhere."""

  def function(q, k, v, positions, segments, sink_N=None, bias=None, **flags):
    def local(q, k, v, positions, segments, sink_N, bias):
      return row_attention(
        q, k, v, q_positions_BT=positions, q_segments_BT=segments, sink_N=sink_N, bias=bias,
        method=method, **flags,
      )  # fmt: skip

    rows = P(None, "context")
    specs = {"in_specs": (rows,) * 5 + (P(), P()), "out_specs": rows}
    local = jax.shard_map(local, check_vma=check_vma, **specs)
    return local(q, k, v, positions, segments, sink_N, bias)

  return function


def whole(q, k, v, positions, segments, **flags):
  return attention(
    q, k, v, q_positions_BT=positions, q_segments_BT=segments, implementation="reference", **flags
  )


def assert_spread_is_whole(options, method, **checks):
  extras = {name: jnp.asarray(x, jnp.float32) for name, x in EXTRAS.items()}
  arrays = (Q, KEYS, VALUES)
  wanted, wanted_extras = run(whole, options, arrays, np.arange(T), extras)
  with jax.set_mesh(make_mesh({"context": C}, jax.devices()[:C])):
    found, found_extras = run(spread(method, **checks), options, arrays, zigzag(T, C), extras)
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
  for name in extras:
    np.testing.assert_allclose(found_extras[name], wanted_extras[name], rtol=2e-4, atol=1e-4)
  assert np.abs(wanted[0][:, 44:]).max() == 0 == np.abs(found[0][:, 44:]).max()


@pytest.mark.parametrize("method", ["ring", "all_gather"])
@pytest.mark.parametrize("case", CASES)
def test_row_spread_over_devices(case, method):
  assert_spread_is_whole(CASES[case], method)


BY_KERNELS = {
  "window, cap, sink": {"mask": causal_mask(window=20), "softcap": 5.0, "sink_N": True},
  "alibi": CASES["alibi"],
}


@pytest.mark.parametrize("case", BY_KERNELS)
def test_kernels_for_tpus_pass_round_a_ring(case, monkeypatch):
  call = functools.partial(pl.pallas_call, interpret=True)
  monkeypatch.setattr(pallas_tpu, "pl", SimpleNamespace(**vars(pl) | {"pallas_call": call}))
  monkeypatch.setattr(context, "select_partial", lambda *_: pallas_tpu)
  # Interpreted kernels read scalars that vary by counters that do not.
  assert_spread_is_whole(BY_KERNELS[case], "ring", check_vma=False)


@pytest.mark.parametrize("window", [None, 300])
def test_kernels_of_a_ring_visit_several_blocks(window, monkeypatch):
  """Rows of 1,100, so 276 positions in three blocks a device, some of them padding."""
  call = functools.partial(pl.pallas_call, interpret=True)
  monkeypatch.setattr(pallas_tpu, "pl", SimpleNamespace(**vars(pl) | {"pallas_call": call}))
  monkeypatch.setattr(pallas_tpu, "BLOCK", 256)  # of which the smallest chips take half
  monkeypatch.setattr(context, "select_partial", lambda *_: pallas_tpu)
  length, devices = 1104, jax.devices()[:C]
  place = zigzag(length, C)
  q, k, v, do = (rng.normal(size=(1, length, n, H)).astype(np.float32) for n in (2, 1, 1, 2))
  segments = np.where(np.arange(length) < 1100, 1 + (np.arange(length) >= 500), 0)[None]
  positions = np.where(segments == 2, np.arange(length) - 500, np.arange(length))

  def both(function, place):
    ids = (jnp.asarray(x[:, place], jnp.int32) for x in (positions, segments))
    loss = lambda q, k, v, *ids: jnp.sum(
      function(q, k, v, *ids, mask=causal_mask(window=window)) * do[:, place]
    )
    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(*(x[:, place] for x in (q, k, v)), *ids)
    return [np.asarray(x)[:, np.argsort(place)] for x in grads]

  wanted = both(whole, np.arange(length))
  with jax.set_mesh(make_mesh({"context": C}, devices)):
    found = both(spread("ring", check_vma=False), place)
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_a_ring_on_tpus_runs_kernels():
  """Own keys, keys from before, keys from after: each a kernel forward and two backward."""
  device = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=2, platform="tpu")
  mesh = jax.sharding.AbstractMesh((C,), ("context",), (AxisType.Auto,), abstract_device=device)
  rows = P(None, "context")

  def local(q, k, v, positions):
    return row_attention(q, k, v, mask=Causal(), q_positions_BT=positions, method="ring")

  spread = jax.shard_map(local, mesh=mesh, in_specs=(rows,) * 4, out_specs=rows)
  loss = lambda *x: jnp.sum(spread(*x).astype(jnp.float32))
  s = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
  arrays = s(1, 4096, 4, 128), s(1, 4096, 2, 128), s(1, 4096, 2, 128), s(1, 4096, dtype=jnp.int32)
  with jax.sharding.use_abstract_mesh(mesh):
    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays).lower(lowering_platforms=("tpu",))
  assert text.as_text().count("tpu_custom_call") == 3 * 3


@pytest.mark.parametrize("case", NEAR)
def test_neighbours_send_what_a_local_mask_reaches(case):
  assert_spread_is_whole(NEAR[case], "halo")


@pytest.mark.parametrize(("kv_heads", "context", "names"), [(1, 2, ()), (4, 1, ("attention_out",))])
def test_heads_are_cut_within_a_region(kv_heads, context, names):
  """Over `tensor`, inside a shard_map over the other axes, recomputed: one key/value head that
  both devices need, round a ring too, and gradients of what devices share."""
  q, do = jnp.asarray(Q), jnp.asarray(DO)
  k, v = (jnp.asarray(np.repeat(x[:, :, :1], kv_heads, 2)) for x in (KEYS, VALUES))
  extras = tuple(jnp.asarray(x, jnp.float32) for x in EXTRAS.values())
  segments, positions = jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS)
  place = zigzag(T, context) if context > 1 else np.arange(T)

  def one(q, k, v, sink_N, slopes_N, positions, segments):
    return row_attention(
      q, k, v, q_positions_BT=positions, q_segments_BT=segments, mask=causal_mask(), softcap=5.0,
      sink_N=sink_N, bias=Alibi(slopes_N),
    )  # fmt: skip

  def cut(*arrays):
    rows = P("fsdp", "context")
    specs = (rows, rows, rows, P(), P(), rows, rows)
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    local = jax.shard_map(
      jax.checkpoint(one, policy=policy), in_specs=specs, out_specs=rows,
      axis_names={"fsdp", "context"},
    )  # fmt: skip
    sorted_rows = lambda x: x[:, place] if x.ndim > 1 else x
    return local(*map(sorted_rows, arrays))[:, np.argsort(place)]

  def gradients(function):
    loss = lambda *x: jnp.sum(function(*x, positions, segments) * do)
    return jax.jit(jax.value_and_grad(loss, tuple(range(5))))(q, k, v, *extras)

  wanted = gradients(one)
  axes = {"fsdp": 2, "context": context, "tensor": 2}
  with use_mesh(make_mesh(axes, jax.devices()[: 4 * context]), "all"):
    found = gradients(cut)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * float(jnp.abs(b).max()))


def test_a_halo_is_all_that_travels():
  """Forward: the last 4 positions of a chunk of 6, for each of the two chunks, at most twice."""
  rows = P(None, "context")

  def local(q, k, v, positions):
    return row_attention(q, k, v, mask=causal_mask(window=5), q_positions_BT=positions)

  with jax.set_mesh(make_mesh({"context": C}, jax.devices()[:C])):
    spread = jax.shard_map(local, in_specs=(rows,) * 4, out_specs=rows)
    shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (Q, KEYS, VALUES, POSITIONS))
    text = jax.jit(spread).lower(*shapes).compile().as_text()
  assert "all-gather(" not in text and "all-reduce(" not in text
  sent = re.findall(r"= \w+\[([\d,]+)\]\S* collective-permute\(", text)
  assert sent and all(shape.split(",")[1] == "4" for shape in sent)
  # Keys, values, positions, segments: from the chunk before the first, before the second, and for
  # the device whose second chunk follows its first.
  assert len(sent) <= 3 * 4


def test_keys_travel_as_little_as_the_mask_allows():
  choose = lambda mask, implementation=None: choose_method(1024, 4, mask, implementation)
  assert choose(causal_mask(window=1000)) == "halo"
  assert choose(causal_mask(window=1537)) == "ring"  # two halos are no less than three shares
  assert choose(causal_mask()) == choose(None) == choose(BigBird(64)) == "ring"
  assert choose(PerHead((Causal(), Local(4)))) == "all_gather"
  assert choose(PerHead((Local(9, 5), Local(4)))) == "halo"
  assert choose(causal_mask(), "reference") == "all_gather"


@pytest.mark.parametrize("method", ["ring", "all_gather", "halo"])
def test_blocks_of_spread_positions(method, monkeypatch):
  """Several blocks on each device: those that positions or documents rule out are not visited."""
  monkeypatch.setattr(xla, "block_size", lambda: 8)
  mask = causal_mask(window=9)
  assert_spread_is_whole({"mask": mask}, method)


def test_blocks_of_a_device_know_that_its_positions_have_gaps(monkeypatch):
  """A whole block within the window by index, whose positions lie in two far chunks."""
  monkeypatch.setattr(xla, "block_size", lambda: 8)
  assert_spread_is_whole({"mask": causal_mask(window=12)}, "ring")


def test_zigzag_gives_each_device_an_early_and_a_late_chunk():
  assert zigzag(16, 4).tolist() == [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
  with pytest.raises(ValueError, match="12 positions do not divide into 8 chunks"):
    zigzag(12, 4)


def test_zigzag_balances_causal_pairs():
  """Pairs of a query and an earlier or equal key: each device has the same number, but for its
  own diagonal."""
  queries = zigzag(64, 4).reshape(4, -1)
  work = (queries + 1).sum(1)
  assert work.max() == work.min()


def test_a_named_implementation_is_never_replaced():
  """The reference has no ring; over gathered keys it is what runs."""
  extras = {name: jnp.asarray(x, jnp.float32) for name, x in EXTRAS.items()}
  options = {"mask": causal_mask(), "implementation": "reference"}
  with jax.set_mesh(make_mesh({"context": C}, jax.devices()[:C])):
    with pytest.raises(NotImplementedError, match="'reference' has no ring"):
      run(spread("ring"), options, (Q, KEYS, VALUES), zigzag(T, C), extras)
    with pytest.raises(ValueError, match="unknown implementation 'fast'"):
      options["implementation"] = "fast"
      run(spread("all_gather"), options, (Q, KEYS, VALUES), zigzag(T, C), extras)
