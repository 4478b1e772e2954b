"""Routers against worked numbers, float64 loops and identities."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from layers import router
from layers.router import (
  expert_choice_route,
  gshard_route,
  hash_route,
  hash_table,
  no_token_left_behind_route,
  switch_route,
  top_k_route,
  updated_bias,
)
from tests.oracles import moe as oracle
from tests.oracles.numeric import numeric_gradient

# Worked by hand in float64: four tokens, four experts.
LOGITS = np.array([[2.0, 1, 0, -1], [1.5, 0.5, 1, 0], [3, 2, -1, 0], [0, 1, 2, 0.5]])
TOP_2 = [[0, 1], [0, 2], [0, 1], [2, 1]]

# Three tokens, six experts in three groups of two.
DEEPSEEK_LOGITS = np.array(
  [[1, 0.5, -0.5, 0.2, 2, -2], [0, 1, 0.8, 0.7, -1, 0.1], [0.3, -0.2, 1.5, -1, 0.4, 0.6]]
)
DEEPSEEK_BIAS = np.array([0, 0, 0.1, 0.2, -0.3, 0])
DEEPSEEK = {
  "k": 2, "normalize": True, "scores": "sigmoid", "scale": 2.5, "num_groups": 3, "keep_groups": 2,
}  # fmt: skip

IDS = np.array([3, 1, 1, 0])
TABLE = np.array([2, 0, 1, 2])


@functools.cache
def compiled(route, static):
  """`(x, w, arrays) -> Routing`, compiled once for the same settings."""
  return jax.jit(lambda x, w, arrays: route(x, w, **dict(static), **arrays))


def run(logits, route=switch_route, *, w=True, **kwargs):
  """Logits [S, E] or [G, S, E] as activations through an identity router, in NumPy on both sides:
  each operation on a jax.Array outside of `compiled` would be compiled for itself."""
  x_GSD = np.float32(logits)
  x_GSD = x_GSD if x_GSD.ndim == 3 else x_GSD[None]
  arrays = {
    n: np.atleast_2d(a) if n.endswith("_GS") else a for n, a in kwargs.items() if is_array(a)
  }
  static = tuple((n, a) for n, a in kwargs.items() if not is_array(a))
  eye = np.eye(x_GSD.shape[-1], dtype=np.float32) if w else None
  return jax.tree.map(np.asarray, compiled(route, static)(x_GSD, eye, arrays))


def is_array(a):
  return isinstance(a, np.ndarray)


def dense(r, num_experts=4, group=0):
  """Combine weights [S, E]: what a token gets from each expert."""
  hot = np.eye(num_experts)[r.expert_GSX[group]]
  return np.einsum("sxe,sx->se", hot, r.weight_GSX[group])


def close(a, b, atol=1e-6):
  np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def equal(a, b):
  np.testing.assert_array_equal(a, b)


# Settings of every router for LOGITS, and its oracle.
ROUTERS = {
  "switch": (switch_route, {}, partial(oracle.route_scores, k=1)),
  "mixtral": (
    top_k_route, {"k": 2, "normalize": True}, partial(oracle.route_scores, k=2, normalize=True),
  ),
  "llama4": (
    top_k_route, {"k": 1, "normalize": False, "scores": "sigmoid"},
    partial(oracle.route_scores, k=1, sigmoid=True),
  ),
  "deepseek": (
    top_k_route,
    {**DEEPSEEK, "num_groups": 2, "keep_groups": 1, "selection_bias_E": np.float32([0, 0, .9, 0])},
    partial(oracle.route_scores, k=2, normalize=True, sigmoid=True, scale=2.5, groups=2,
            bias_E=np.array([0, 0, 0.9, 0])),
  ),
  "gshard": (gshard_route, {}, oracle.gshard),
  "expert choice": (
    expert_choice_route, {"capacity": 2}, partial(oracle.expert_choice, slots=2)
  ),
  "hash": (
    hash_route, {"ids_GS": IDS, "table_V": TABLE},
    partial(oracle.hashed, ids_S=IDS, table_V=TABLE),
  ),
  "no token left behind": (
    no_token_left_behind_route, {"capacity": 1, "rounds": 3},
    partial(oracle.no_token_left_behind, slots=1, rounds=3),
  ),
}  # fmt: skip
every_router = pytest.mark.parametrize("name", ROUTERS)


# Worked examples


def test_switch():
  r = run(LOGITS)
  equal(r.expert_GSX[0, :, 0], [0, 0, 0, 2])
  close(r.weight_GSX[0, :, 0], [0.643914, 0.455054, 0.696387, 0.579259])
  close(r.balance, 1.644103)
  close(r.z, 7.242655, 1e-5)
  equal(r.load_E, [3, 0, 1, 0])
  close(r.entropy / r.tokens, 1.018856)
  close(r.gate / r.tokens, 0.593654)
  assert r.tokens == 4 and r.nonfinite == 0 and r.chosen_GSX.all()


def test_batch_prioritised_order_and_what_it_keeps():
  """V-MoE sorts tokens by the first choice's gate; one slot an expert then keeps tokens 2 and 3."""
  r = run(LOGITS)
  order = np.argsort(-r.weight_GSX[0, :, 0], kind="stable")
  equal(order, [2, 0, 3, 1])
  kept = oracle.place(r.expert_GSX[0][order], 4, 1)
  assert sorted(order[kept[:, 0]]) == [2, 3]


def test_mixtral_and_qwen():
  r = run(LOGITS, top_k_route, k=2, normalize=True)
  equal(r.expert_GSX[0], TOP_2)
  close(r.weight_GSX[0, :2], [[0.731059, 0.268941], [0.622459, 0.377541]])
  close(r.balance, 1.269036)
  equal(r.load_E, [3, 3, 2, 0])
  raw = run(LOGITS, top_k_route, k=2, normalize=False)
  close(raw.weight_GSX[0, 0], [0.643914, 0.236883])
  close(raw.balance, 1.269036)


def test_gpt_oss_is_a_softmax_over_the_chosen_biased_logits():
  close(
    run(LOGITS, top_k_route, k=2, normalize=True, b_E=np.zeros(4, np.float32)).weight_GSX[0, 1],
    [0.622459, 0.377541],
  )
  b_E = np.float32([0, 0, 0, 3])
  r = run(LOGITS, top_k_route, k=2, normalize=True, b_E=b_E)
  equal(r.expert_GSX[0], [[0, 3], [3, 0], [0, 3], [3, 2]])  # a tie in token 0: 2.0 twice
  e = np.exp(np.take_along_axis(LOGITS + b_E, r.expert_GSX[0], 1))
  close(r.weight_GSX[0], e / e.sum(1, keepdims=True))


def test_llama_4():
  r = run(LOGITS, top_k_route, k=1, normalize=False, scores="sigmoid")
  close(r.weight_GSX[0, :, 0], [0.880797, 0.817574, 0.952574, 0.880797])
  close(r.gate / 4, np.mean([0.880797, 0.817574, 0.952574, 0.880797]))


def test_a_saturated_sigmoid_is_no_tie():
  r = run(
    np.array([[20.0, 30, 25, 0]]), top_k_route, k=2, normalize=True, scores="sigmoid"
  )  # all three are 1 in float32
  equal(r.expert_GSX[0, 0], [1, 2])


def test_gshard():
  r = run(LOGITS, gshard_route)
  equal(r.expert_GSX[0], TOP_2)
  close(r.weight_GSX[0, :, 0], [0.731059, 0.622459, 0.731059, 0.731059])
  close(r.weight_GSX[0, :, 1], [0.268941, 0.377541, 0.268941, 0.268941])
  close(r.balance, 1.644103)  # of first choices
  equal(r.load_E, [3, 3, 2, 0])
  kept = oracle.place(r.expert_GSX[0], 4, 2)
  equal(kept, [[True, True], [True, True], [False, True], [True, False]])


def test_gshard_makes_a_second_choice_with_probability_g2_over_a_fifth():
  """Gates of 0.9 and 0.1: every other token; the first choice keeps its 0.9 regardless."""
  logits = np.tile(np.log([[0.9, 0.1]]), (4, 1))
  r = run(logits, gshard_route, second_GS=np.float32([0, 0.49, 0.51, 0.99]))
  equal(r.chosen_GSX[0], [[True, True], [True, True], [True, False], [True, False]])
  close(dense(r, 2), [[0.9, 0.1], [0.9, 0.1], [0.9, 0], [0.9, 0]])
  equal(r.load_E, [4, 2])
  assert run(LOGITS, gshard_route, second_GS=np.full(4, 0.999, np.float32)).chosen_GSX.all()


def test_deepseek():
  r = run(DEEPSEEK_LOGITS, top_k_route, **DEEPSEEK, selection_bias_E=np.float32(DEEPSEEK_BIAS))
  equal(r.expert_GSX[0], [[3, 0], [3, 2], [2, 0]])
  close(r.weight_GSX[0], [[1.073146, 1.426854], [1.229948, 1.270052], [1.468327, 1.031673]])
  equal(r.load_E, [2, 0, 2, 2, 0, 0])
  close(
    updated_bias(jnp.float32(DEEPSEEK_BIAS), r.load_E, 1e-3),
    [-0.001, 0.001, 0.099, 0.199, -0.299, 0.001],
  )
  weights_from_biased = [[1.265848, 1.234152], [1.308961, 1.191039], [1.537473, 0.962527]]
  assert np.abs(r.weight_GSX[0] - np.array(weights_from_biased)).min() > 0.06


@pytest.mark.parametrize(
  ("mistake", "wanted"),
  (
    ({"selection_bias_E": None}, [[4, 0], [1, 2], [2, 5]]),
    ({"num_groups": 1, "keep_groups": 1}, [[3, 0], [3, 2], [2, 5]]),
  ),
)
def test_deepseek_mistakes_can_be_told_apart(mistake, wanted):
  settings = DEEPSEEK | {"selection_bias_E": np.float32(DEEPSEEK_BIAS)} | mistake
  equal(run(DEEPSEEK_LOGITS, top_k_route, **settings).expert_GSX[0], wanted)


def test_experts_of_other_groups_lose_to_negative_scores():
  """A mask of 0 instead of -inf would choose them here."""
  settings = DEEPSEEK | {"selection_bias_E": np.full(6, -2.0, np.float32), "keep_groups": 1}
  r = run(DEEPSEEK_LOGITS, top_k_route, **settings)
  equal(np.sort(r.expert_GSX[0]), [[0, 1], [2, 3], [4, 5]])


def test_the_bias_is_updated_in_float32_for_each_layer():
  bias = updated_bias(jnp.full((2, 3), 1.0, jnp.bfloat16), jnp.array([[5, 1, 0], [7, 7, 7]]), 1e-3)
  assert bias.dtype == jnp.float32
  close(bias, [[0.999, 1.001, 1.001], [1, 1, 1]], 1e-7)


def test_expert_choice():
  one = run(LOGITS, expert_choice_route, capacity=1)
  close(dense(one)[[2, 2, 3, 3], [0, 1, 2, 3]], [0.696387, 0.256187, 0.579259, 0.129250])
  equal(one.chosen_GSX[0].sum(1), [0, 0, 2, 2])
  equal(one.load_E, [1, 1, 1, 1])
  assert one.balance == 0
  two = run(LOGITS, expert_choice_route, capacity=2)
  equal(one.expert_GSX[0], np.tile(np.arange(4), (4, 1)))
  assert [set(np.flatnonzero(two.chosen_GSX[0, :, e])) for e in range(4)] == [
    {0, 2}, {0, 2}, {1, 3}, {1, 3},
  ]  # fmt: skip
  equal(two.chosen_GSX[0].sum(1), [2, 2, 2, 2])


def test_expert_choice_takes_the_first_of_equal_tokens_and_no_padding():
  tied = run(np.zeros((4, 4)), expert_choice_route, capacity=2)
  equal(tied.chosen_GSX[0], np.tile([[True], [True], [False], [False]], (1, 4)))
  some = run(LOGITS, expert_choice_route, capacity=2, valid_GS=np.arange(4) == 1)
  equal(some.chosen_GSX[0], np.tile((np.arange(4) == 1)[:, None], (1, 4)))
  equal(some.load_E, [1, 1, 1, 1])


def test_hash():
  r = run(LOGITS[:, :3], hash_route, ids_GS=IDS, table_V=TABLE)
  equal(r.expert_GSX[0, :, 0], [2, 0, 0, 2])
  equal(r.load_E, [2, 0, 2])
  close(r.weight_GSX[0, :, 0], oracle.softmax(LOGITS[:, :3])[range(4), [2, 0, 0, 2]])
  fixed = run(LOGITS, hash_route, w=False, ids_GS=IDS, table_V=TABLE, num_experts=3)
  equal(fixed.expert_GSX, r.expert_GSX)
  equal(fixed.load_E, [2, 0, 2])
  equal(fixed.weight_GSX, 1)
  assert (fixed.balance, fixed.z, fixed.entropy, fixed.gate) == (0, 0, 0, 4)
  assert r.balance == 0
  outside = run(LOGITS[:, :3], hash_route, ids_GS=np.array([-1, 9, 1, 0]), table_V=np.arange(3))
  equal(outside.expert_GSX[0, :, 0], [0, 2, 1, 0])


def test_hash_table_is_balanced_and_never_changes():
  table = hash_table(1003, 8, seed=0)
  assert table.dtype == np.int32 and table.shape == (1003,)
  assert set(np.bincount(table, minlength=8)) == {125, 126}
  assert (table != hash_table(1003, 8, seed=1)).any()
  assert hash_table(12, 4, seed=3).tolist() == [1, 0, 1, 2, 3, 2, 3, 0, 3, 1, 0, 2]


def test_no_token_left_behind():
  r = run(LOGITS, no_token_left_behind_route, capacity=1, rounds=4)
  wanted = np.zeros((4, 4))
  wanted[[0, 3, 2, 1], [0, 2, 1, 3]] = 0.643914, 0.579259, 0.256187, 0.101536
  close(dense(r), wanted)
  equal(np.argwhere(r.chosen_GSX[0]), [[0, 0], [1, 3], [2, 1], [3, 0]])  # token, round
  close(r.balance, 1.644103)  # of first choices: that of all four would always be 1
  equal(r.load_E, [3, 0, 1, 0])
  two = run(LOGITS, no_token_left_behind_route, capacity=1, rounds=2)
  wanted[1] = 0
  close(dense(two), wanted)
  assert two.tokens - two.chosen_GSX.sum() == 1


# All routers


def test_uniform_router_has_balance_one_and_ties_go_to_the_lowest_index():
  r = run(np.zeros((8, 4)))
  close(r.balance, 1.0)
  equal(r.expert_GSX, 0)
  r = run(np.zeros((8, 4)), top_k_route, **DEEPSEEK | {"num_groups": 2, "keep_groups": 1})
  close(r.balance, 1.0)
  equal(r.expert_GSX, np.tile([0, 1], (1, 8, 1)))


def sums(r):
  """What adds over groups."""
  return {name: getattr(r, name) for name in r._fields if not name.endswith("_GSX")}


@every_router
def test_against_float64(name):
  route, settings, reference = ROUTERS[name]
  r, want = run(LOGITS, route, **settings), reference(LOGITS)
  close(dense(r), want.weight_SE)
  close(r.balance, want.balance)
  close(r.z, oracle.z_loss(LOGITS), 1e-5)
  chosen = np.einsum("sxe,sx->se", np.eye(4)[r.expert_GSX[0]], r.chosen_GSX[0])
  equal(chosen, want.chosen_SE)
  if name != "no token left behind":
    equal(r.load_E, want.chosen_SE.sum(0))
  # GShard and no-token-left-behind leave the order of what is not chosen as it is.
  if want.order_SX is not None:
    equal(r.expert_GSX[0], want.order_SX)


@every_router
def test_padding_never_routes_and_never_counts(name):
  """The same tokens in two groups, with padding of NaN in different places."""
  route, settings, _ = ROUTERS[name]
  places = [[0, 2, 3, 5], [1, 2, 4, 5]]
  padded, valid, ids = np.full((2, 6, 4), np.nan), np.zeros((2, 6), bool), np.full((2, 6), 2)
  for g, place in enumerate(places):
    padded[g, place], valid[g, place], ids[g, place] = LOGITS, True, IDS
  per_token = {"ids_GS": ids} if "ids_GS" in settings else {}
  both = run(padded, route, **settings | per_token, valid_GS=valid)
  one = run(LOGITS, route, **settings)
  for field, total in sums(both).items():
    np.testing.assert_allclose(total, 2 * getattr(one, field), rtol=2e-6, err_msg=field)
  for g, place in enumerate(places):
    close(dense(both, group=g)[place], dense(one))
  assert np.all(both.weight_GSX[~valid] == 0) and not both.chosen_GSX[~valid].any()
  assert both.nonfinite == 0
  assert np.all((both.expert_GSX >= 0) & (both.expert_GSX < 4))


@every_router
def test_nan_and_infinity_are_counted_and_hurt_no_other_token(name):
  route, settings, _ = ROUTERS[name]
  bad = LOGITS.copy()
  bad[1, 2], bad[3, 0] = np.nan, np.inf
  r = run(bad, route, **settings)
  assert r.nonfinite == 2 and r.tokens == 4
  assert np.isnan(r.z)
  assert np.isfinite(r.load_E).all()
  assert np.all((r.expert_GSX >= 0) & (r.expert_GSX < 4))
  if name not in ("expert choice", "no token left behind"):  # where tokens compete
    close(dense(r)[[0, 2]], dense(run(LOGITS, route, **settings))[[0, 2]])
  else:
    assert np.isfinite(dense(r)[[0, 2]]).all()


@every_router
def test_gradients_against_central_differences(name):
  """Of weights and losses; f of the balance loss is constant between the jumps of choices."""
  route, settings, reference = ROUTERS[name]
  mix = np.random.default_rng(1).normal(size=(4, 4))

  def loss(x_SE):
    r = route(x_SE[None], jnp.eye(4), **{n: arrays(n, a) for n, a in settings.items()})
    hot = jax.nn.one_hot(r.expert_GSX[0], 4)
    weights = jnp.einsum("sxe,sx,se->", hot, r.weight_GSX[0], jnp.asarray(mix, jnp.float32))
    return weights + 0.7 * r.balance + 0.1 * r.z + r.entropy + r.gate + r.load_E.sum()

  def arrays(n, a):
    return jnp.atleast_2d(a) if n.endswith("_GS") else a

  def want(x_SE):
    r = reference(x_SE)
    return np.sum(r.weight_SE * mix) + 0.7 * r.balance + 0.1 * oracle.z_loss(x_SE)

  got = jax.jit(jax.grad(loss))(jnp.asarray(LOGITS, jnp.float32))
  close(got, numeric_gradient(want, LOGITS), 2e-6)


def test_balance_gradient_flows_through_probabilities_only():
  """d/dlogits of E sum f_e P_e with f constant: f-weighted softmax Jacobian."""
  balance = lambda x: switch_route(x[None], jnp.eye(4)).balance
  grad = jax.jit(jax.grad(balance))(jnp.float32(LOGITS))
  probs, order, _ = oracle.route(LOGITS, 1)
  f = np.bincount(order[:, 0], minlength=4) / 4
  close(grad, 4 / 4 * probs * (f - (probs @ f)[:, None]))


def test_what_has_no_gradient():
  """A selection bias; a table without router weights; padding, whatever it holds."""

  def everything(r):
    return r.weight_GSX.sum() + r.balance + r.z + r.entropy + r.gate

  x_GSD = jnp.float32(DEEPSEEK_LOGITS)[None]
  biased = lambda b: everything(
    top_k_route(x_GSD, jnp.eye(6), **DEEPSEEK | {"normalize": False}, selection_bias_E=b)
  )
  equal(jax.jit(jax.grad(biased))(jnp.float32(DEEPSEEK_BIAS)), 0)
  hashed = lambda x: everything(
    hash_route(x, None, ids_GS=jnp.array([[0, 1, 2]]), table_V=TABLE, num_experts=6)
  )
  equal(jax.jit(jax.grad(hashed))(x_GSD), 0)
  valid_GS = jnp.array([[True, False, True]])
  padded = lambda x: everything(switch_route(x, jnp.eye(6), valid_GS=valid_GS))
  grad = jax.jit(jax.grad(padded))(x_GSD.at[0, 1].set(jnp.nan))
  equal(grad[0, 1], 0)
  assert np.isfinite(grad).all() and np.all(grad[0, 0] != 0)


@pytest.mark.parametrize(
  ("route", "settings", "message"),
  (
    (top_k_route, {"k": 5, "normalize": True}, "k=5 must lie in 1..4"),
    (top_k_route, {"k": 0, "normalize": True}, "k=0 must lie in 1..4"),
    (top_k_route, {"k": 1, "normalize": True, "num_groups": 3}, "do not divide into num_groups=3"),
    (top_k_route, {"k": 3, "normalize": True, "num_groups": 2}, "k=3 must lie in 1..2"),
    (top_k_route, {"k": 1, "normalize": True, "keep_groups": 2}, "keep_groups=2 must lie in 1..1"),
    (expert_choice_route, {"capacity": 5}, "capacity=5 must lie in 1..4"),
    (expert_choice_route, {"capacity": 0}, "capacity=0 must lie in 1..4"),
    (no_token_left_behind_route, {"capacity": 1, "rounds": 5}, "rounds=5 must lie in 1..4"),
    (no_token_left_behind_route, {"capacity": 0, "rounds": 1}, "capacity=0 must be positive"),
    (hash_route, {"w": False, "ids_GS": IDS, "table_V": TABLE}, "hash_route needs num_experts"),
  ),
)
def test_settings_that_do_not_fit_are_refused(route, settings, message):
  with pytest.raises(ValueError, match=message):
    run(LOGITS, route, **settings)


def test_gshard_needs_two_experts():
  with pytest.raises(ValueError, match="needs two experts"):
    run(LOGITS[:, :1], gshard_route)


@every_router
def test_dtypes(name):
  """float32 whatever the activations are, int32 and bool choices; nothing is computed here."""
  route, settings, _ = ROUTERS[name]
  settings = {n: jnp.atleast_2d(a) if n.endswith("_GS") else a for n, a in settings.items()}
  x_GSD = jnp.zeros((1, 4, 8), jnp.bfloat16)
  r = jax.eval_shape(lambda x, w: route(x, w, **settings), x_GSD, jnp.zeros((8, 4), jnp.bfloat16))
  X = r.expert_GSX.shape[-1]
  assert r.expert_GSX.shape == r.weight_GSX.shape == r.chosen_GSX.shape == (1, 4, X)
  dtypes = {field: x.dtype for field, x in r._asdict().items()}
  assert dtypes.pop("expert_GSX") == jnp.int32 and dtypes.pop("chosen_GSX") == jnp.bool_
  assert set(dtypes.values()) == {jnp.dtype("float32")}


def test_logits_are_not_rounded_to_bfloat16():
  """bfloat16 logits of 8.0 and 8.03 would be a tie, which goes to the lower index."""
  x_GSD, w_DE = jnp.ones((1, 1, 2), jnp.bfloat16), jnp.array([[8.0, 8.0], [0.0, 0.03]])
  assert jax.jit(switch_route)(x_GSD, w_DE).expert_GSX.item() == 1


@every_router
@pytest.mark.parametrize("mode", ["explicit", "shard_map"])
def test_sharding_is_inferred(name, mode):
  """Groups spread over a mesh: outputs follow them, forward and backward, without a hint."""
  route, settings, _ = ROUTERS[name]
  kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
  mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(kind, kind))
  rows, whole = PartitionSpec("fsdp"), PartitionSpec()
  arrays = {"valid_GS": np.ones((8, 4), bool)}
  if "ids_GS" in settings:
    arrays["ids_GS"] = np.tile(IDS, (2 * 4, 1))
  static = {n: a for n, a in settings.items() if n != "ids_GS"}

  def loss(x, w, arrays):
    r = route(x, w, **static, **arrays)
    return r.weight_GSX.sum() + r.balance + r.z, r

  value = jax.grad(loss, argnums=(0, 1), has_aux=True)
  with jax.set_mesh(mesh):
    place = lambda a: jax.device_put(a, jax.NamedSharding(mesh, rows))
    x, arrays = place(jnp.zeros((8, 4, 4))), jax.tree.map(place, arrays)
    if mode == "explicit":
      (dx, _), r = jax.eval_shape(value, x, jnp.eye(4), arrays)
      for a in (dx, r.expert_GSX, r.weight_GSX, r.chosen_GSX):
        assert a.sharding.spec[0] == "fsdp", a
    else:
      out = router.Routing(*(rows if f.endswith("_GSX") else whole for f in router.Routing._fields))
      mapped = lambda *a: jax.tree.map(
        lambda v, spec: v if spec == rows else jax.lax.psum(v, "fsdp"), value(*a)[1], out
      )
      sharded = jax.shard_map(mapped, in_specs=(rows, whole, rows), out_specs=out)
      r = jax.eval_shape(sharded, x, jnp.eye(4), arrays)
      grad = lambda *a: value(*a)[0]
      grad = jax.shard_map(grad, in_specs=(rows, whole, rows), out_specs=(rows, whole))
      dx, _ = jax.eval_shape(grad, x, jnp.eye(4), arrays)
    assert dx.shape == x.shape and r.load_E.shape == (4,)


# Against the oracles on random logits, with ties and padding


S, E, V = 12, 6, 20
seeds = st.integers(0, 2**31 - 1)


def draw(seed, ties=False):
  """Logits, which tokens are real, a generator for the rest."""
  rng = np.random.default_rng(seed)
  logits = rng.integers(-2, 3, (S, E)) / 2 if ties else rng.normal(size=(S, E)) * 2
  return logits, rng.random(S) < 0.8, rng


def agree(r, valid, want):
  """Code on all tokens against the oracle on the real ones."""
  close(dense(r, E)[valid], want.weight_SE, 5e-6)
  assert not dense(r, E)[~valid].any() and not r.chosen_GSX[0][~valid].any()
  np.testing.assert_allclose(r.balance, want.balance, rtol=1e-5)
  if want.order_SX is not None:
    equal(r.expert_GSX[0][valid], want.order_SX)


# k, normalize, sigmoid
FAMILIES = [(1, False, False), (3, True, False), (3, False, True)]
property_test = settings(max_examples=12, deadline=None)


@property_test
@given(seeds, st.sampled_from(FAMILIES), st.booleans())
def test_top_k_on_random_logits(seed, family, ties):
  logits, valid, _ = draw(seed, ties)
  valid[0] = True
  k, normalize, sigmoid = family
  scores = "sigmoid" if sigmoid else "softmax"
  r = run(logits, top_k_route, k=k, normalize=normalize, scores=scores, valid_GS=valid)
  agree(r, valid, oracle.route_scores(logits[valid], k, normalize=normalize, sigmoid=sigmoid))
  np.testing.assert_allclose(r.z, oracle.z_loss(logits[valid]), rtol=1e-5)


@property_test
@given(seeds, st.sampled_from([(3, 2), (6, 3), (1, 1)]))
def test_deepseek_on_random_logits(seed, groups):
  logits, valid, rng = draw(seed)
  valid[0] = True
  bias = rng.normal(size=E).astype(np.float32)
  groups, keep = groups
  settings = DEEPSEEK | {"num_groups": groups, "keep_groups": keep}
  r = run(logits, top_k_route, **settings, selection_bias_E=bias, valid_GS=valid)
  want = oracle.route_scores(
    logits[valid], 2, normalize=True, sigmoid=True, scale=2.5, groups=groups, keep=keep,
    bias_E=bias.astype(np.float64),
  )  # fmt: skip
  agree(r, valid, want)
  equal(r.load_E, want.chosen_SE.sum(0))


@property_test
@given(seeds)
def test_gshard_on_random_logits(seed):
  logits, valid, rng = draw(seed)
  valid[0] = True
  second = rng.random(S).astype(np.float32)
  r = run(logits, gshard_route, second_GS=second, valid_GS=valid)
  want = oracle.gshard(logits[valid], second[valid])
  agree(r, valid, want)
  equal(r.load_E, want.chosen_SE.sum(0))


@property_test
@given(seeds, st.sampled_from([5, S]))
def test_expert_choice_on_random_logits(seed, slots):
  logits, valid, _ = draw(seed)
  r = run(logits, expert_choice_route, capacity=slots, valid_GS=valid)
  agree(r, valid, oracle.expert_choice(logits[valid], slots))
  equal(r.load_E, min(slots, valid.sum()))


@property_test
@given(seeds)
def test_no_token_left_behind_on_random_logits(seed):
  logits, valid, _ = draw(seed)
  valid[0] = True
  r = run(logits, no_token_left_behind_route, capacity=2, rounds=4, valid_GS=valid)
  want = oracle.no_token_left_behind(logits[valid], 2, 4)
  agree(r, valid, want)
  equal(r.chosen_GSX[0].sum(-1)[valid], want.chosen_SE.sum(-1))
