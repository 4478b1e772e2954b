"""The MoE layer against a float64 loop over tokens, and identities that need no oracle."""

import dataclasses
import functools

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


def run(x, w, dispatch="capacity", **kwargs):
  kwargs["dispatch"] = dispatch
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
  layer = SwitchMoE(dataclasses.replace(SPEC, dispatch="capacity"), D)
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


def random_layer(bias):
  """x [B, T, D], router, weights of gated experts, and where a token is no padding."""
  rng = np.random.default_rng(9)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)
  weights = ExpertWeights(draw(E, D, F), draw(E, F, D), draw(E, D, F))
  if bias:
    weights = weights._replace(
      up_bias_EF=draw(E, F), gate_bias_EF=draw(E, F), down_bias_ED=draw(E, D)
    )
  router, x = draw(D, E), draw(B, T, D)
  return x, router, weights, jnp.asarray(np.arange(T)[None] < np.array([[T], [T - 4]]))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_every_dispatch_gives_the_same_with_slots_enough(bias):
  """Values and every gradient, padding included."""
  x, router, weights, valid = random_layer(bias)
  route = functools.partial(top_k_route, k=2, normalize=True)

  def loss(x, router, weights, dispatch):
    y, _, dropped = moe(
      x, router, weights, route=route, valid_BT=valid, dispatch=dispatch, capacity_factor=float(E)
    )
    return jnp.sum(jnp.sin(y)), (y, dropped)

  grad = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True), static_argnums=3)
  want = grad(x, router, weights, "einsum")
  assert want[1][1] == 0
  for dispatch in ("dropless", "capacity"):
    got = grad(x, router, weights, dispatch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6, rtol=1e-5), got, want)


def test_decoding_token_by_token_equals_the_whole_row_without_drops():
  w, x = weights(), np.random.default_rng(10).normal(size=(B, T, D))
  one_by_one = lambda **kw: jnp.concatenate([run(x[:, t : t + 1], w, **kw)[0] for t in range(T)], 1)
  whole = run(x, w, "dropless")[0]
  np.testing.assert_allclose(one_by_one(dispatch="dropless"), whole, atol=1e-6)
  short = run(x, w, capacity_factor=0.5, min_capacity=1)[0]
  assert np.abs(one_by_one(capacity_factor=0.5, min_capacity=1) - short).max() > 0.01


def test_scaling_the_input_is_not_scaling_the_output():
  """Llama 4: expert(sigmoid(logit) x), one token at a time in float64."""
  w, x = weights(), np.random.default_rng(11).normal(size=(B, T, D))
  route = functools.partial(top_k_route, k=1, normalize=False, scores="sigmoid")
  y, routing, _ = run(x, w, "dropless", route=route, scale_input=True)
  router, up, gate, down = w
  for b, t in np.ndindex(B, T):
    logits = x[b, t] @ router
    e = int(logits.argmax())
    scaled = x[b, t] / (1 + np.exp(-logits[e]))
    np.testing.assert_allclose(
      y[b, t], oracle.gated_mlp(scaled, up[e], gate[e], down[e]), atol=2e-5
    )
  assert routing.expert_GSX.shape == (B, T, 1)


@pytest.mark.parametrize(
  "router",
  [
    {"router": "gshard", "experts_per_token": 2},
    {"router": "expert_choice", "dispatch": "capacity", "noncausal": True},
    {"router": "no_token_left_behind", "experts_per_token": 2, "dispatch": "capacity"},
    {"router": "hash", "hash_vocab": 11},
    {"router": "top_k", "scores": "sigmoid", "num_groups": 2, "keep_groups": 1, "bias_rate": 1e-3,
     "normalize": True, "routed_scale": 2.5, "shared": MlpSpec(hidden=F)},
    {"priority": "gate", "noncausal": True, "dispatch": "einsum"},
  ],
  ids=lambda r: r.get("router", "gate priority"),
)  # fmt: skip
def test_every_router_runs_and_learns(router):
  """From the spec to gradients: finite, and none but the selection bias's and hash's are zero."""
  layer = SwitchMoE(dataclasses.replace(SPEC, expert_dropout=0.1, **router), D)
  x = jnp.asarray(np.random.default_rng(12).normal(size=(B, T, D)), jnp.float32)
  ids = jnp.asarray(np.random.default_rng(13).integers(0, 11, (B, T)), jnp.int32)
  keys = jax.random.split(jax.random.key(1), B)
  params = init_params(layer, jax.random.key(0), x, tokens_BT=ids)

  def loss(params):
    y, stats = layer.apply({"params": params}, x, tokens_BT=ids, key_B=keys, train=True)
    return jnp.sum(jnp.sin(y)) + jnp.sum(stats.aux_loss), stats

  grads, stats = jax.jit(jax.grad(loss, has_aux=True))(params)
  for path, g in jax.tree_util.tree_leaves_with_path(grads):
    frozen = "selection_bias" in str(path)
    assert np.isfinite(g).all() and bool(np.any(np.asarray(g))) != frozen, path
  assert stats.tokens == B * T and stats.nonfinite == 0


def test_expert_dropout_drops_hidden_units_at_its_rate():
  """With down = identity-like sums, the share of zeroed hidden units is the rate."""
  hidden = 64
  spec = MoeSpec(num_experts=2, expert=MlpSpec(hidden=hidden, gated=False, activation="relu"),
                 expert_dropout=0.4)  # fmt: skip
  layer, x = SwitchMoE(spec, hidden), jnp.ones((4, 32, hidden))
  params = init_params(layer, jax.random.key(0), x)
  params["up"], params["down"] = jnp.ones_like(params["up"]), jnp.tile(jnp.eye(hidden), (2, 1, 1))
  keys = jax.random.split(jax.random.key(1), 4)
  y, _ = layer.apply({"params": params}, x, key_B=keys, train=True)
  zero = np.asarray(y) == 0
  assert abs(zero.mean() - 0.4) < 0.02
  assert zero.mean((0, 1)).min() > 0.2 and zero.mean((0, 1)).max() < 0.6  # no unit always
  still, _ = layer.apply({"params": params}, x, key_B=keys, train=True)
  np.testing.assert_array_equal(y, still)


def test_a_token_that_no_round_places_is_counted_as_dropped():
  """All tokens alike: two experts with a slot each take two of them in two rounds."""
  spec = dataclasses.replace(
    SPEC, router="no_token_left_behind", experts_per_token=2, dispatch="capacity", min_capacity=1,
    capacity_factor=0.25,
  )  # fmt: skip
  layer, x = SwitchMoE(spec, D), jnp.ones((1, 8, D))
  params = init_params(layer, jax.random.key(0), x)
  _, stats = layer.apply({"params": params}, x, train=True)
  assert stats.dropped == 8 - 2 and stats.load_E.sum() == 8


def test_nan_logits_are_counted():
  x = jnp.ones((1, 4, D)).at[0, 2].set(jnp.nan)
  _, routing, _ = run(x, weights(), "dropless")
  assert routing.nonfinite == 1


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_what_padding_holds_reaches_nothing(bias, dispatch):
  """Padding may hold NaN; the router is given zeros there."""
  x, router, weights, valid = random_layer(bias)
  clean, dirty = (jnp.where(valid[..., None], x, nothing) for nothing in (0, jnp.nan))
  route = functools.partial(top_k_route, k=2, normalize=True)

  def loss(x, weights):
    y, *_ = moe(
      x, router, weights, route=route, valid_BT=valid, router_x_BTD=clean, dispatch=dispatch
    )
    return jnp.sum(jnp.sin(y)), y

  grad = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
  jax.tree.map(np.testing.assert_array_equal, grad(dirty, weights), grad(clean, weights))
