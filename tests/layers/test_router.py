"""Routing against worked numbers (arXiv 2101.03961) and a float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layers.router import switch_route, top_k_route
from tests.oracles import moe as oracle

# Worked by hand in float64: four tokens, four experts.
LOGITS = np.array([[2.0, 1, 0, -1], [1.5, 0.5, 1, 0], [3, 2, -1, 0], [0, 1, 2, 0.5]])


def route_logits(logits, route=switch_route, **kwargs):
  """Feed logits as activations through an identity router."""
  x_GSD = jnp.asarray(logits, jnp.float32)[None]
  return route(x_GSD, jnp.eye(logits.shape[-1]), **kwargs)


def test_switch_worked_example():
  r = route_logits(LOGITS)
  np.testing.assert_array_equal(r.expert_GSX[0, :, 0], [0, 0, 0, 2])
  np.testing.assert_allclose(
    r.weight_GSX[0, :, 0], [0.643914, 0.455054, 0.696387, 0.579259], atol=1e-6
  )
  np.testing.assert_allclose(r.balance, 1.644103, atol=1e-6)
  np.testing.assert_allclose(r.z, 7.242655, atol=1e-5)
  np.testing.assert_array_equal(r.load_E, [3, 0, 1, 0])
  np.testing.assert_allclose(r.entropy / r.tokens, 1.018856, atol=1e-6)
  np.testing.assert_allclose(r.gate / r.tokens, 0.593654, atol=1e-6)


def test_top2_worked_example():
  r = route_logits(LOGITS, top_k_route, k=2, normalize=True)
  np.testing.assert_array_equal(r.expert_GSX[0], [[0, 1], [0, 2], [0, 1], [2, 1]])
  np.testing.assert_allclose(
    r.weight_GSX[0, :2], [[0.731059, 0.268941], [0.622459, 0.377541]], atol=1e-6
  )
  np.testing.assert_allclose(r.balance, 1.269036, atol=1e-6)
  raw = route_logits(LOGITS, top_k_route, k=2, normalize=False)
  np.testing.assert_allclose(raw.weight_GSX[0, 0], [0.643914, 0.236883], atol=1e-6)


def test_uniform_router_has_balance_one_and_ties_go_to_the_lowest_index():
  r = route_logits(np.zeros((8, 4)))
  np.testing.assert_allclose(r.balance, 1.0, atol=1e-6)
  np.testing.assert_array_equal(r.expert_GSX, 0)


def test_padding_is_left_out_of_losses_and_statistics():
  valid = np.array([[True, True, True, False]])
  padded = route_logits(LOGITS, valid_GS=jnp.asarray(valid))
  short = route_logits(LOGITS[:3])
  for name in ("balance", "z", "load_E", "entropy", "gate", "tokens"):
    np.testing.assert_allclose(getattr(padded, name), getattr(short, name), rtol=1e-6)
  assert padded.weight_GSX[0, 3, 0] == 0


def test_balance_gradient_flows_through_probabilities_only():
  """d/dlogits of E sum f_e P_e with f constant: f-weighted softmax Jacobian."""
  grad = jax.grad(lambda x: switch_route(x[None], jnp.eye(4)).balance)(
    jnp.asarray(LOGITS, jnp.float32)
  )
  probs, order, _ = oracle.route(LOGITS, 1)
  f = np.bincount(order[:, 0], minlength=4) / 4
  want = 4 / 4 * probs * (f - (probs @ f)[:, None])
  np.testing.assert_allclose(grad, want, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_router_runs_in_float32(dtype):
  x = jnp.asarray(LOGITS, dtype)[None]
  assert switch_route(x, jnp.eye(4)).weight_GSX.dtype == jnp.float32


_route = jax.jit(top_k_route, static_argnames=("k", "normalize"))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31 - 1), st.sampled_from([1, 3]), st.booleans())
def test_against_oracle(seed, k, normalize):
  logits = np.random.default_rng(seed).normal(size=(12, 6)) * 2
  r = _route(jnp.asarray(logits, jnp.float32)[None], jnp.eye(6), k=k, normalize=normalize)
  probs, order, weights = oracle.route(logits, k, normalize)
  np.testing.assert_array_equal(r.expert_GSX[0], order)
  np.testing.assert_allclose(r.weight_GSX[0], weights, atol=2e-6)
  np.testing.assert_allclose(r.balance, oracle.balance_loss(probs, order), rtol=1e-5)
  np.testing.assert_allclose(r.z, oracle.z_loss(logits), rtol=1e-5)
