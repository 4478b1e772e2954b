import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.kernels.attention import bucket as t5_bucket
from layers.positions import (
  alibi_slopes,
  apply_rotary,
  rotary_frequencies,
  rotary_table,
  sinusoids,
  yarn_attention_factor,
)
from layers.spec import LinearScaling, Llama3Scaling, RotarySpec, YarnScaling
from tests.oracles import positions as oracle

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 2, 8))
POSITIONS = np.array([[0, 1, 2], [5, 900, 7]])
INTERLEAVED = pytest.mark.parametrize("interleaved", [False, True])

rotary = jax.jit(apply_rotary, static_argnames=("interleaved", "attention_factor"))


def plain(dims, theta=10_000.0):
  return np.array([oracle.frequency(k, dims, theta) for k in range(dims // 2)])


# --- frequencies ---------------------------------------------------------------------------------


def test_plain_frequencies():
  np.testing.assert_allclose(rotary_frequencies(8, theta=5e5), plain(8, 5e5), rtol=1e-12)
  inv_freq, factor = rotary_table(RotarySpec(theta=5e5), 8)
  assert inv_freq.dtype == np.float32 and factor == 1.0
  np.testing.assert_allclose(inv_freq, plain(8, 5e5), rtol=1e-7)


def test_partial_dims_use_their_own_count():
  inv_freq, _ = rotary_table(RotarySpec(dims=4), 16)
  np.testing.assert_allclose(inv_freq, plain(4), rtol=1e-7)


def test_linear_scaling_divides_positions():
  inv_freq, factor = rotary_table(RotarySpec(theta=1e6, scaling=LinearScaling(8.0)), 32)
  assert factor == 1.0
  turned = rotary(jnp.ones((1, 1, 1, 32)), jnp.array([[40]]), inv_freq, interleaved=False)
  want = oracle.rotate(np.ones((1, 1, 1, 32)), np.array([[5]]), plain(32, 1e6), False)
  np.testing.assert_allclose(turned, want, atol=1e-5)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling(factor):
  scaling = Llama3Scaling(factor)
  inv_freq, attention_factor = rotary_table(RotarySpec(theta=5e5, scaling=scaling), 128)
  want = np.array([oracle.llama3_frequency(f, factor, 1.0, 4.0, 8192) for f in plain(128, 5e5)])
  np.testing.assert_allclose(inv_freq, want, rtol=1e-6)
  assert attention_factor == 1.0
  # The case holds all three regimes.
  ratio = plain(128, 5e5) / want
  assert ratio[0] == 1.0 and ratio[-1] == factor
  assert np.any((ratio > 1.01) & (ratio < factor - 0.01))


@pytest.mark.parametrize(
  ("dims", "theta", "scaling"),
  [
    (64, 150_000.0, YarnScaling(32.0, 4096, truncate=False)),  # gpt-oss
    (64, 10_000.0, YarnScaling(40.0, 4096)),  # DeepSeek-V3
    (32, 10_000.0, YarnScaling(4.0, 65_536, beta_fast=16.0, beta_slow=2.0)),
    (16, 10_000.0, YarnScaling(4.0, 6, truncate=False)),  # both limits lie before the first pair
    (16, 10_000.0, YarnScaling(4.0, 2**18)),  # the upper limit lies beyond the last pair
    (16, 10_000.0, YarnScaling(4.0, 2**26, beta_fast=1e4, beta_slow=0.1)),  # and beyond dims - 1
  ],
)
def test_yarn_scaling(dims, theta, scaling):
  inv_freq, attention_factor = rotary_table(RotarySpec(theta=theta, scaling=scaling), dims)
  want = oracle.yarn_frequencies(
    dims,
    theta,
    scaling.factor,
    scaling.original_length,
    scaling.beta_fast,
    scaling.beta_slow,
    scaling.truncate,
  )
  np.testing.assert_allclose(inv_freq, want, rtol=1e-6)
  assert attention_factor == pytest.approx(0.1 * math.log(scaling.factor) + 1)


def test_yarn_truncation_matters_and_keeps_the_ends():
  spec = RotarySpec(theta=150_000.0, scaling=YarnScaling(32.0, 4096, truncate=False))
  loose, _ = rotary_table(spec, 64)
  rounded, _ = rotary_table(
    dataclasses.replace(spec, scaling=YarnScaling(32.0, 4096, truncate=True)), 64
  )
  assert loose[0] == rounded[0] == 1.0
  np.testing.assert_allclose(loose[-1], plain(64, 150_000.0)[-1] / 32, rtol=1e-6)
  assert np.abs(loose / rounded - 1).max() > 0.01


def test_yarn_attention_factor():
  assert yarn_attention_factor(32.0) == pytest.approx(1.3466, abs=5e-5)  # gpt-oss
  assert yarn_attention_factor(1.0) == yarn_attention_factor(0.5) == 1.0
  given = YarnScaling(40.0, 4096, attention_factor=1.25)
  assert rotary_table(RotarySpec(scaling=given), 64)[1] == 1.25


# --- rotation ------------------------------------------------------------------------------------


@INTERLEAVED
@pytest.mark.parametrize("dims", [8, 4])
def test_rotation_is_complex_multiplication(interleaved, dims):
  got = rotary(
    jnp.asarray(X, jnp.float32),
    jnp.asarray(POSITIONS),
    plain(dims).astype(np.float32),
    interleaved=interleaved,
    attention_factor=1.25,
  )
  want = oracle.rotate(X, POSITIONS, plain(dims), interleaved, 1.25)
  np.testing.assert_allclose(got, want, atol=2e-4)  # angle 900 in float32 is exact to 3e-5
  np.testing.assert_array_equal(got[..., dims:], np.float32(X[..., dims:]))


@INTERLEAVED
def test_logits_depend_on_distance_only(interleaved):
  q, k = jnp.asarray(X[:1, :1], jnp.float32), jnp.asarray(X[1:, :1], jnp.float32)
  turn = lambda y, at: rotary(
    y, jnp.array([[at]]), np.float32(plain(8)), interleaved=interleaved, attention_factor=1.25
  )
  logit = lambda i, j: (turn(q, i) * turn(k, j)).sum(axis=-1)
  np.testing.assert_allclose(logit(3, 1), logit(103, 101), atol=1e-4)
  np.testing.assert_allclose(logit(9, 9), 1.25**2 * (q * k).sum(axis=-1), atol=1e-5)
  assert np.abs(logit(3, 1) - logit(1, 3)).max() > 1e-2


@INTERLEAVED
def test_rotation_gradient_is_the_rotation_back(interleaved):
  inv_freq = np.float32(plain(4))
  x, positions = jnp.asarray(X, jnp.float32), jnp.asarray(POSITIONS)
  turn = functools.partial(rotary, inv_freq=inv_freq, interleaved=interleaved)
  cotangent = RNG.normal(size=X.shape)
  _, pull = jax.vjp(lambda y: turn(y, positions), x)
  want = oracle.rotate(cotangent, -POSITIONS, plain(4), interleaved)
  np.testing.assert_allclose(pull(jnp.float32(cotangent))[0], want, atol=2e-4)


def test_one_row_of_positions_serves_a_batch():
  x, inv_freq = jnp.asarray(X, jnp.float32), np.float32(plain(8))
  shared = rotary(x, jnp.asarray(POSITIONS[1:]), inv_freq, interleaved=False)
  each = rotary(x, jnp.asarray(POSITIONS[[1, 1]]), inv_freq, interleaved=False)
  np.testing.assert_allclose(shared, each, atol=1e-6)


def test_bfloat16_rounds_only_the_result():
  x = jnp.asarray(X, jnp.bfloat16)
  positions = np.array([[300, 301, 302], [0, 1, 511]])  # bfloat16 would merge 300 and 301
  got = rotary(x, jnp.asarray(positions), np.float32(plain(8)), interleaved=False)
  assert got.dtype == jnp.bfloat16
  want = oracle.rotate(np.asarray(x, np.float64), positions, plain(8), False)
  np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2.0**-8, atol=2e-4)


# --- biases --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 6, 7, 8, 12, 16, 20, 112])
def test_alibi_slopes_are_the_papers_recursion(num_heads):
  np.testing.assert_allclose(alibi_slopes(num_heads), oracle.alibi_slopes(num_heads), rtol=1e-6)


def test_alibi_worked_numbers():
  four = [0.25, 0.0625, 0.015625, 0.00390625]
  assert alibi_slopes(4).tolist() == four
  assert alibi_slopes(6).tolist() == [*four, 0.5, 0.125]
  np.testing.assert_allclose(alibi_slopes(12)[:8], 2.0 ** -np.arange(1, 9))
  np.testing.assert_allclose(alibi_slopes(12)[8:], [0.707107, 0.353553, 0.176777, 0.088388], 1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (16, 13)])
def test_t5_buckets_are_the_papers_rule(num_buckets, max_distance, bidirectional):
  distance = np.arange(-2 * max_distance - 1, 2 * max_distance + 2)
  got = t5_bucket(
    jnp.asarray(distance)[None, :],
    num_buckets=num_buckets,
    max_distance=max_distance,
    bidirectional=bidirectional,
  )
  want = [oracle.t5_bucket(-d, num_buckets, max_distance, bidirectional) for d in distance]
  assert got.dtype == jnp.int32
  np.testing.assert_array_equal(got[0], want)


def test_t5_sign_and_edges():
  bucket = lambda d, both: int(
    t5_bucket(jnp.array(d), num_buckets=32, max_distance=128, bidirectional=both)
  )
  # Keys in the past of a decoder: exact to 15, then geometric; keys after the query are bucket 0.
  assert [bucket(d, False) for d in (0, 1, 15, 16, 127, 10_000)] == [0, 1, 15, 16, 31, 31]
  assert [bucket(d, False) for d in (-1, -500)] == [0, 0]
  # An encoder doubles distances at two buckets each: 8, 16, 32, 64; later keys start at 16.
  assert [bucket(d, True) for d in (7, 8, 16, 32, 64, 128)] == [7, 8, 10, 12, 14, 15]
  assert [bucket(-d, True) for d in (1, 8, 16, 32, 64, 128)] == [17, 24, 26, 28, 30, 31]


def test_t5_buckets_agree_with_float32_logarithms_as_models_were_trained():
  n = np.arange(16, 300)
  share = np.log(n.astype(np.float32) / 16) / np.float32(math.log(128 / 16)) * 16
  want = np.minimum(16 + share.astype(np.int32), 31)
  got = t5_bucket(jnp.asarray(n), num_buckets=32, max_distance=128, bidirectional=False)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 16), (1, 128)])
def test_t5_without_a_geometric_range_is_refused(num_buckets, max_distance):
  with pytest.raises(ValueError, match="no logarithmic buckets"):
    t5_bucket(
      jnp.arange(3), num_buckets=num_buckets, max_distance=max_distance, bidirectional=False
    )


def test_sinusoids_are_the_definition():
  got = jax.jit(sinusoids, static_argnums=(0, 1), static_argnames="theta")
  np.testing.assert_allclose(got(50, 6), oracle.sinusoids(50, 6), atol=1e-5)
  np.testing.assert_allclose(got(9, 4, theta=100.0), oracle.sinusoids(9, 4, 100.0), atol=1e-6)
