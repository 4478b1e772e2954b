"""Attention over a row spread over devices, against the reference on the whole row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from layers.attention import causal_mask
from layers.context import row_attention, zigzag
from layers.kernels.attention import Alibi, attention, xla
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


def spread(method):
  """The same over C devices; extras are whole everywhere."""

  def function(q, k, v, positions, segments, sink_N=None, bias=None, **flags):
    def local(q, k, v, positions, segments, sink_N, bias):
      return row_attention(
        q, k, v, q_positions_BT=positions, q_segments_BT=segments, sink_N=sink_N, bias=bias,
        method=method, **flags,
      )  # fmt: skip

    rows = P(None, "context")
    local = jax.shard_map(local, in_specs=(rows,) * 5 + (P(), P()), out_specs=rows)
    return local(q, k, v, positions, segments, sink_N, bias)

  return function


def whole(q, k, v, positions, segments, **flags):
  return attention(
    q, k, v, q_positions_BT=positions, q_segments_BT=segments, implementation="reference", **flags
  )


def assert_spread_is_whole(options, method):
  extras = {name: jnp.asarray(x, jnp.float32) for name, x in EXTRAS.items()}
  arrays = (Q, KEYS, VALUES)
  wanted, wanted_extras = run(whole, options, arrays, np.arange(T), extras)
  with jax.set_mesh(make_mesh({"context": C}, jax.devices()[:C])):
    found, found_extras = run(spread(method), options, arrays, zigzag(T, C), extras)
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
  for name in extras:
    np.testing.assert_allclose(found_extras[name], wanted_extras[name], rtol=2e-4, atol=1e-4)
  assert np.abs(wanted[0][:, 44:]).max() == 0 == np.abs(found[0][:, 44:]).max()


@pytest.mark.parametrize("method", ["ring", "all_gather"])
@pytest.mark.parametrize("case", CASES)
def test_row_spread_over_devices(case, method):
  assert_spread_is_whole(CASES[case], method)


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
