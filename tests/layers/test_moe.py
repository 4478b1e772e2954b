"""The MoE layer against a float64 loop over tokens, and identities that need no oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.mlp import mlp
from layers.moe import ExpertWeights, SwitchMoE, moe
from layers.params import init_params
from layers.router import switch_route, top_k_route
from layers.spec import MlpSpec, MoeSpec
from tests.oracles import moe as oracle

B, T, D, F, E = 2, 12, 8, 16, 4
SPEC = MoeSpec(num_experts=E, expert=MlpSpec(hidden=F))


def weights(seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape) / np.sqrt(shape[-2])
  return draw(D, E), draw(E, D, F), draw(E, D, F), draw(E, F, D)


def run(x, w, **kwargs):
  router, up, gate, down = (jnp.asarray(a, jnp.float32) for a in w)
  return moe(jnp.asarray(x, jnp.float32), router, ExpertWeights(up, down, gate), **kwargs)


@pytest.mark.parametrize("k, factor", [(1, 1.0), (2, 0.5), (2, 4.0)])
def test_against_loop_over_tokens(k, factor):
  w, x = weights(), np.random.default_rng(1).normal(size=(B, T, D))
  valid = np.arange(T)[None] < np.array([[T], [T - 4]])
  route = lambda *a, **kw: top_k_route(*a, k=k, normalize=k > 1, **kw)
  y, routing, dropped = run(
    x, w, route=route, valid_BT=jnp.asarray(valid), capacity_factor=factor, min_capacity=1
  )
  C = oracle.capacity(T, E, k, factor, 1)
  want_dropped = 0
  router, up, gate, down = w
  for b in range(B):
    want, kept = oracle.moe(
      x[b], router, up, gate, down, k=k, capacity=C, normalize=k > 1, valid_S=valid[b]
    )
    np.testing.assert_allclose(y[b], want, atol=2e-5)
    want_dropped += k * valid[b].sum() - kept.sum()
  assert dropped == want_dropped
  assert routing.load_E.sum() == k * valid.sum()


def test_gradients_equal_those_of_the_dense_mixture_when_nothing_drops():
  """k=E with all slots: y = sum_e p_e expert_e(x), differentiated without any dispatch."""
  w, x = weights(), np.random.default_rng(2).normal(size=(B, T, D)).astype(np.float32)
  route = lambda *a, **kw: top_k_route(*a, k=E, normalize=False, **kw)
  sparse = lambda x, w: jnp.sum(jnp.sin(run(x, w, route=route, capacity_factor=float(E))[0]))

  def dense(x, w):
    router, up, gate, down = (jnp.asarray(a, jnp.float32) for a in w)
    p = jax.nn.softmax(x @ router)
    h = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate)) * jnp.einsum("btd,edf->btef", x, up)
    return jnp.sum(jnp.sin(jnp.einsum("bte,btef,efd->btd", p, h, down)))

  w = tuple(a.astype(np.float32) for a in w)
  got, want = jax.grad(sparse, (0, 1))(x, w), jax.grad(dense, (0, 1))(x, w)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), got, want)


def test_an_expert_nobody_chose_has_exactly_zero_gradient():
  w = weights()
  w[0][:, 3] = -100.0
  x = np.abs(np.random.default_rng(3).normal(size=(B, T, D)))
  loss = lambda up: jnp.sum(run(x, (w[0], up, w[2], w[3]), capacity_factor=4.0)[0])
  grad = jax.grad(loss)(jnp.asarray(w[1], jnp.float32))
  assert np.all(np.asarray(grad[3]) == 0)
  assert np.any(np.asarray(grad[:3]) != 0)


def test_one_expert_is_an_mlp():
  router, up, gate, down = weights()
  x = jnp.asarray(np.random.default_rng(4).normal(size=(B, T, D)), jnp.float32)
  one = (router[:, :1], up[:1], gate[:1], down[:1])
  y, _, dropped = run(x, one, capacity_factor=1.0)
  f32 = lambda a: jnp.asarray(a[0], jnp.float32)
  want = mlp(x, f32(up), f32(down), w_gate_DF=f32(gate), activation="silu")
  np.testing.assert_allclose(y, want, atol=1e-5)
  assert dropped == 0


def test_groups_are_independent_and_must_divide_the_row():
  w, x = weights(), np.random.default_rng(5).normal(size=(B, T, D))
  whole, _, _ = run(x[:, :6], w, capacity_factor=1.0)
  grouped, _, _ = run(x, w, capacity_factor=1.0, group_size=6)
  np.testing.assert_allclose(grouped[:, :6], whole, atol=1e-6)
  with pytest.raises(ValueError, match="row of 12 tokens does not divide into routing groups of 5"):
    run(x, w, group_size=5)


def test_jitter_reaches_the_router_only_and_depends_on_the_row_key():
  """With one expert the router cannot change the output: jitter must leave it untouched."""
  spec = MoeSpec(num_experts=1, expert=MlpSpec(hidden=F), jitter=0.5)
  layer = SwitchMoE(spec, D)
  x = jnp.asarray(np.random.default_rng(6).normal(size=(B, T, D)), jnp.float32)
  params = init_params(layer, jax.random.key(0), x)
  keys = jax.random.split(jax.random.key(1), B)
  clean, _ = layer.apply({"params": params}, x, train=True)
  noisy, stats = layer.apply({"params": params}, x, train=True, key_B=keys)
  np.testing.assert_array_equal(clean, noisy)
  _, quiet = layer.apply({"params": params}, x, train=True)
  assert stats.z != quiet.z


def test_capacity_differs_between_training_and_evaluation():
  layer = SwitchMoE(SPEC, D)
  x = jnp.ones((1, 32, D))  # all tokens alike: they all choose one expert
  params = init_params(layer, jax.random.key(0), x)
  dropped = {
    train: float(layer.apply({"params": params}, x, train=train)[1].dropped)
    for train in (True, False)
  }
  assert dropped == {True: 32 - 10, False: 32 - 16}  # ceil(1.25 * 32 / 4), ceil(2 * 32 / 4)


def test_statistics_add_over_rows():
  layer = SwitchMoE(SPEC, D)
  x = jnp.asarray(np.random.default_rng(7).normal(size=(4, T, D)), jnp.float32)
  params = init_params(layer, jax.random.key(0), x)
  stats = lambda x: layer.apply({"params": params}, x, train=True)[1]
  halves = jax.tree.map(jnp.add, stats(x[:2]), stats(x[2:]))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), stats(x), halves)


def test_switch_is_top_1_without_renormalising():
  w, x = weights(), np.random.default_rng(8).normal(size=(B, T, D))
  a, _, _ = run(x, w, route=switch_route)
  b, _, _ = run(x, w, route=lambda *args, **kw: top_k_route(*args, k=1, normalize=False, **kw))
  np.testing.assert_array_equal(a, b)
