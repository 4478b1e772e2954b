"""Feature maps, decays, states as caches; what the layers compute is in test_families."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from layers.attention import Rows
from layers.cache import empty_state
from layers.kernels.linear_attention import linear_attention
from layers.linear_attention import (
  LinearAttention,
  elu_plus_one,
  favor_features,
  favor_projection,
  last_inputs,
  retention_decays,
  short_convolution,
  unit,
)
from layers.params import init_params
from layers.spec import LinearAttentionSpec
from tests.layers.stacks import quick_jit
from tests.oracles.linear_attention import convolution

D, T = 16, 12
KINDS = ("elu", "retention", "gla", "delta")


def test_elu_plus_one():
  x = jnp.array([-200.0, -1.0, 0.0, 2.0, 200.0])
  np.testing.assert_allclose(elu_plus_one(x), [0, math.exp(-1), 1, 3, 201], rtol=1e-6)
  slopes = jax.vmap(jax.grad(elu_plus_one))(x)
  np.testing.assert_allclose(slopes, [0, math.exp(-1), 1, 1, 1], rtol=1e-6)


def test_retention_decays():
  """RetNet's heads, arXiv 2307.08621."""
  np.testing.assert_allclose(np.exp(retention_decays(3)), [1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128])


def test_unit_vectors():
  x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
  np.testing.assert_allclose(unit(x), [[0.6, 0.8], [0, 0]], atol=1e-6)
  assert np.all(np.isfinite(jax.grad(lambda x: unit(x).sum())(x)))


def test_projections_are_orthogonal_in_runs_and_as_long_as_gaussian_vectors():
  w = np.asarray(favor_projection(jax.random.key(0), 40, 16), np.float64)
  lengths = np.linalg.norm(w, axis=1)
  directions = w / lengths[:, None]
  for start in (0, 16, 32):
    run = directions[start : start + 16]
    np.testing.assert_allclose(run @ run.T, np.eye(len(run)), atol=1e-5)
  assert np.abs(directions[:16] @ directions[16:32].T).max() > 0.1
  many = np.asarray(favor_projection(jax.random.key(1), 4096, 16))
  squares = np.sum(many**2, axis=1)
  # Chi-squared with 16 degrees of freedom: mean 16, variance 32.
  assert abs(squares.mean() - 16) < 0.5 and abs(squares.var() - 32) < 5
  assert np.abs(many.mean(0)).max() < 0.1


def test_random_features_estimate_softmax_weights():
  """Unbiased: the mean over many projections meets exp(q . k / sqrt(H)) for small vectors."""
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(0.3 * rng.normal(size=(1, 5, 1, 8)), jnp.float32) for _ in "qk")

  def weights(key):
    w_MH = favor_projection(key, 64, 8)
    features = partial(favor_features, projection_MH=w_MH, queries=False, eps=0.0)
    return features(q)[0, :, 0] @ features(k)[0, :, 0].T

  draws = np.asarray(quick_jit(jax.vmap(weights))(jax.random.split(jax.random.key(0), 300)))
  want = np.exp(np.asarray(q[0, :, 0] @ k[0, :, 0].T) / math.sqrt(8))
  error = draws.std(0) / math.sqrt(len(draws))
  assert np.all(np.abs(draws.mean(0) - want) < 4 * error) and error.max() < 0.01


def test_the_largest_feature_of_a_query_cancels():
  """Queries that would overflow; earlier results don't depend on later keys."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  q, k, v, w = normal(1, T, 2, 8), normal(1, T, 2, 8), normal(1, T, 2, 4), normal(32, 8)

  def attend(q, k, queries=True):
    phi_q = favor_features(q, w, queries=queries, eps=0.0)
    return linear_attention(phi_q, favor_features(k, w, queries=False), v, normalize=True)[0]

  np.testing.assert_allclose(attend(q, k), attend(q, k, queries=False), rtol=1e-4, atol=1e-5)
  assert np.all(np.isfinite(attend(300 * q, k)))
  np.testing.assert_array_equal(attend(q, k.at[:, 6:].add(3.0))[:, :6], attend(q, k)[:, :6])
  phi = favor_features(q, w, queries=True)
  assert phi.dtype == jnp.float32 and np.all(phi >= 1e-6 / math.sqrt(32))


def convolution_inputs(seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return normal(2, T, 2, 3), normal(4, 2, 3), normal(2, 3, 2, 3)


@quick_jit
def convolve(x, w, segments, before):
  return short_convolution(x, w, segments, before), last_inputs(x, before, segments)


@pytest.mark.parametrize("documents", [False, True])
def test_short_convolution(documents):
  """Values, and the gradient along a random direction, against float64."""
  arrays = convolution_inputs()
  segments = np.array([[1] * 5 + [2] * 2 + [3] * 5, [0] * 2 + [1] * 3 + [0] + [1] * 4 + [0] * 2])
  segments = segments.astype(np.int32) if documents else None
  valid = np.ones((2, T), bool) if segments is None else segments > 0
  rng = np.random.default_rng(1)
  dy = rng.normal(size=(2, T, 2, 3)) * valid[..., None, None]
  dlast = rng.normal(size=(2, 3, 2, 3))
  directions = [rng.normal(size=x.shape) for x in arrays]

  @quick_jit
  @jax.grad
  def gradients(arrays):
    x, w, before = arrays
    y, last = short_convolution(x, w, segments, before), last_inputs(x, before, segments)
    return jnp.sum(y * dy.astype(np.float32)) + jnp.sum(last * dlast.astype(np.float32))

  x, w, before = arrays
  y, last = convolve(x, w, segments, before)
  want, want_last = convolution(x, w, segments=segments, before=before)
  np.testing.assert_allclose(np.asarray(y)[valid], want[valid], atol=1e-5)
  np.testing.assert_allclose(last, want_last, atol=1e-6)

  def loss(step):
    x, w, before = (a + step * d for a, d in zip(arrays, directions, strict=True))
    y, last = convolution(x, w, segments=segments, before=before)
    return np.sum(y * dy) + np.sum(last * dlast)

  got = gradients(arrays)
  along = sum(np.sum(g * d) for g, d in zip(got, directions, strict=True))
  size = math.sqrt(sum(np.sum(np.square(g)) for g in got))
  assert abs((loss(1e-6) - loss(-1e-6)) / 2e-6 - along) < 1e-5 * size


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=8))
def test_any_segments_of_a_convolution(parts):
  """And what padding holds (NaN too) does not count."""
  x, w, before = convolution_inputs()
  row = np.resize(np.concatenate([np.full(n, segment) for segment, n in parts]), T)
  segments = np.stack([row, row[::-1]]).astype(np.int32)
  want, want_last = convolution(x, w, segments=segments, before=before)
  x[segments == 0] = np.nan
  y, last = convolve(x, w, segments, before)
  valid = segments > 0
  np.testing.assert_allclose(np.asarray(y)[valid], want[valid], atol=1e-5)
  np.testing.assert_allclose(last, want_last, atol=1e-6)


def layer(kind, **more):
  shell = LinearAttention(LinearAttentionSpec(kind, 2, 4, 6, **more), D)
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, T, D)), jnp.float32)
  rows = Rows(jnp.tile(jnp.arange(T, dtype=jnp.int32), (2, 1)))
  return shell, init_params(shell, jax.random.key(0), x, rows), x, rows


@pytest.mark.parametrize(("kind", "conv"), [("elu", 0), ("delta", 0), ("delta", 4)])
def test_states_continue_rows_and_skip_padding(kind, conv):
  """A prompt padded on the right, whatever pads hold, then the rest: as the whole row."""
  shell, params, x, rows = layer(kind, conv=conv)
  run = quick_jit(lambda x, rows, cache: shell.apply({"params": params}, x, rows, cache))
  want, none = run(x, rows, None)
  assert none is None
  cache = empty_state(2, shell.spec.state, shell.spec.conv_inputs)
  lengths = np.array([5, 8])
  valid = np.arange(8)[None] < lengths[:, None]
  segments = jnp.asarray(valid, jnp.int32)
  prompt = jnp.where(valid[..., None], x[:, :8], 1e3)
  got, cache = run(prompt, Rows(rows.positions_BT[:, :8], segments), cache)
  assert cache.state_BNHU.dtype == jnp.float32
  np.testing.assert_allclose(np.asarray(got)[valid], np.asarray(want[:, :8])[valid], atol=1e-5)
  at = lengths[:, None] + np.arange(4)
  then = jnp.take_along_axis(x, jnp.asarray(at)[..., None], axis=1)
  got, _ = run(then, Rows(jnp.asarray(at, jnp.int32)), cache)
  np.testing.assert_allclose(got, np.take_along_axis(np.asarray(want), at[..., None], 1), atol=1e-5)


def test_convolutions_token_by_token_and_documents():
  """Decoding gives the whole row; packed documents are alone, and keep no more than the last."""
  shell, params, x, rows = layer("delta", conv=4)
  run = quick_jit(lambda x, rows, cache: shell.apply({"params": params}, x, rows, cache))
  empty = empty_state(2, shell.spec.state, shell.spec.conv_inputs)
  assert [a.shape for a in empty.inputs] == [(2, 3, 2, 4), (2, 3, 2, 4), (2, 3, 2, 6)]
  want, want_cache = run(x, rows, empty)
  cache = empty
  for t in range(T):
    got, cache = run(x[:, t : t + 1], Rows(rows.positions_BT[:, t : t + 1]), cache)
    np.testing.assert_allclose(got, want[:, t : t + 1], atol=1e-5)
  jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), cache, want_cache)

  # Two rows of one document each, behind each other in one row, then padding.
  packed = jnp.concatenate([x[:1, :7], x[1:, :2], jnp.full((1, 3, D), jnp.nan)], 1)
  segments = jnp.asarray([[1] * 7 + [2] * 2 + [0] * 3], jnp.int32)
  positions = jnp.asarray([[*range(7), *range(2), 0, 0, 0]], jnp.int32)
  twice = lambda a: jnp.concatenate([a, a])
  got, cache = run(twice(packed), Rows(twice(positions), twice(segments)), empty)
  np.testing.assert_allclose(got[0, :7], want[0, :7], atol=1e-5)
  np.testing.assert_allclose(got[0, 7:9], want[1, :2], atol=1e-5)
  for kept in cache.inputs:
    assert not np.asarray(kept[:, 0]).any() and np.asarray(kept[:, 1:]).any((2, 3)).all()


def test_how_gates_start():
  """Decays of the delta rule: rates 1..16 times steps of 0.001..0.1; what must not be rounded."""
  shell = LinearAttention(LinearAttentionSpec("delta", 64, 4, conv=2), D)
  x, rows = jnp.zeros((1, 1, D)), Rows(jnp.zeros((1, 1), jnp.int32))
  boxed = shell.init(jax.random.key(0), x, rows)["params"]
  rates = np.exp(boxed["decay_rate"].value)
  steps = np.log1p(np.exp(boxed["decay_bias"].value))
  assert 1 <= rates.min() < 2 and 14 < rates.max() <= 16
  assert steps.min() > 0.99e-3 and steps.max() < 0.1001 and 0.005 < np.median(steps) < 0.02
  assert {name for name, w in boxed.items() if hasattr(w, "exact") and w.exact} == {
    "beta", "decay", "decay_bias", "decay_rate", "key_conv", "query_conv", "value_conv",
  }  # fmt: skip
  assert boxed["query_conv"].value.shape == (2, 64, 4)
  assert boxed["query_conv"].names == (None, "heads", "head_dim")


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_keeps_decays_and_states_exact(kind):
  shell, params, x, rows = layer(kind, conv=4 if kind == "delta" else 0)
  cache = empty_state(2, shell.spec.state, shell.spec.conv_inputs)
  run = quick_jit(lambda x: shell.apply({"params": params}, x, rows, cache))
  (got, state), (want, want_state) = run(x.astype(jnp.bfloat16)), run(x)
  assert got.dtype == jnp.bfloat16 and state.state_BNHU.dtype == jnp.float32
  for a, b in ((got, want), (state.state_BNHU, want_state.state_BNHU)):
    assert np.abs(np.asarray(a, np.float32) - b).max() < 3e-2 * np.abs(b).max()


@pytest.mark.xdist_group("devices")
def test_positions_over_devices_are_refused():
  shell, params, x, rows = layer("retention")
  mesh = jax.make_mesh((2,), ("context",), axis_types=(AxisType.Auto,))
  run = lambda x, positions: shell.apply({"params": params}, x, Rows(positions))[0]
  row = P(None, "context")
  mapped = jax.shard_map(run, mesh=mesh, in_specs=(row, row), out_specs=row)
  with pytest.raises(NotImplementedError, match=r"linear attention hands a state.*context=1"):
    jax.eval_shape(mapped, x, rows.positions_BT)
