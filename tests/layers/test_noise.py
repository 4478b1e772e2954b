import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.noise import dropout_BTD, fold, jitter_BTD

SHAPE = (4, 6, 8)
X = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32)
KEYS = jax.random.split(jax.random.key(0), 4)

jitter = jax.jit(jitter_BTD, static_argnums=1)
drop = jax.jit(dropout_BTD, static_argnums=1)
NOISES = pytest.mark.parametrize("noise", [jitter, drop])


def data(keys):
  return np.asarray(jax.random.key_data(keys)).tolist()


def test_fold_is_fold_in_of_each_row_in_order():
  folded = jax.jit(lambda k, layer, row_B: fold(k, layer, row_B))(KEYS, 7, jnp.arange(4))
  want = [jax.random.fold_in(jax.random.fold_in(KEYS[b], 7), b) for b in range(4)]
  assert data(folded) == [data(key) for key in want]
  assert data(fold(KEYS)) == data(KEYS)
  assert data(fold(KEYS, 1, 2)) != data(fold(KEYS, 2, 1))


@NOISES
def test_noise_of_a_row_depends_on_its_key_only(noise):
  whole = noise(X, 0.3, KEYS)
  order = np.array([2, 0, 3, 1])
  np.testing.assert_array_equal(noise(X[order], 0.3, KEYS[order]), whole[order])
  np.testing.assert_array_equal(noise(X[1:2], 0.3, KEYS[1:2]), whole[1:2])
  same_value = noise(jnp.ones(SHAPE), 0.3, KEYS)
  assert not np.array_equal(same_value[0], same_value[1])


@NOISES
def test_a_longer_row_starts_with_the_same_noise(noise):
  np.testing.assert_array_equal(noise(X[:, :3], 0.3, KEYS), noise(X, 0.3, KEYS)[:, :3])


@NOISES
def test_a_sharded_batch_gets_the_same_noise(noise):
  mesh = jax.make_mesh((4, 2), ("data", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  rows = jax.NamedSharding(mesh, jax.P("data", "context"))
  got = noise(jax.device_put(X, rows), 0.3, KEYS)
  np.testing.assert_array_equal(got, noise(X, 0.3, KEYS))


def test_jitter_is_uniform_around_one():
  eps = 1e-2
  keys = jax.random.split(jax.random.key(1), 8)
  ratio = np.asarray(jitter(jnp.ones((8, 64, 32)), eps, keys), np.float64)
  assert 1 - eps <= ratio.min() < 1 - 0.99 * eps
  assert 1 + 0.99 * eps < ratio.max() <= 1 + eps
  # 16,384 draws of variance eps^2 / 3: five standard errors.
  assert abs(ratio.mean() - 1) < 5 * eps / np.sqrt(3 * ratio.size)
  np.testing.assert_allclose(ratio.var(), eps**2 / 3, rtol=0.05)


def test_jitter_multiplies_in_float32():
  x = X.astype(jnp.bfloat16)
  got = jitter(x, 0.3, KEYS)
  assert got.dtype == jnp.float32
  ratio = jitter(jnp.ones(SHAPE), 0.3, KEYS)
  np.testing.assert_allclose(got, np.asarray(x, np.float32) * ratio, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dropout_zeroes_some_and_scales_the_rest(dtype):
  ones = jnp.ones((8, 64, 32), dtype)
  got = drop(ones, 0.25, jax.random.split(jax.random.key(1), 8))
  assert got.dtype == dtype
  kept = np.asarray(got, np.float64)
  scaled = float(jnp.asarray(1 / 0.75, dtype))
  np.testing.assert_allclose(np.unique(kept), [0.0, scaled], rtol=1e-6)
  share = (kept == 0).mean()
  assert abs(share - 0.25) < 5 * np.sqrt(0.25 * 0.75 / kept.size)


def test_dropout_gradient_is_its_own_mask():
  grad = jax.jit(jax.grad(lambda x: drop(x, 0.3, KEYS).sum()))(X)
  np.testing.assert_allclose(grad, np.where(drop(X, 0.3, KEYS) == 0, 0.0, 1 / 0.7), rtol=1e-6)


def test_no_key_or_no_rate_is_no_noise():
  for noise in (drop, jitter):
    np.testing.assert_array_equal(noise(X, 0.3, None), X)
    np.testing.assert_array_equal(noise(X, 0.0, KEYS), X)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_that_keeps_nothing_is_refused(rate):
  with pytest.raises(ValueError, match="dropout rate"):
    dropout_BTD(X, rate, KEYS)
