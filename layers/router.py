"""Routers: which experts each token goes to, with what weight, and what that costs in losses.

G routing groups, S tokens of a group, D model width, E experts, X choices a token, V vocabulary.
Everything here is float32, whatever the activations are (Switch, section 2.4), and ties go to the
lowest index. Jitter, if any, is applied to `x_GSD` by the caller. What all routers take:

  x_GSD     router input
  w_DE      router weights
  b_E       added to the logits (gpt-oss), learned like `w_DE`
  valid_GS  False for padding, which is left out of choices, weights, losses and statistics

A token whose logits are NaN keeps valid expert numbers, its weights and the losses are NaN, and
`nonfinite` counts it. Under expert choice and no-token-left-behind it may get no expert at all.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from .linear import explicit_spec

_SECOND_THRESHOLD = 0.2  # GShard's second choice is certain from this renormalised gate on


class Routing(NamedTuple):
  """Choices and their statistics. Losses are means over tokens of a group, summed over groups;
  statistics are sums over tokens: both add over shards and microbatches."""

  expert_GSX: jax.Array  # int32, always in 0..E-1, most preferred first
  weight_GSX: jax.Array  # float32 combine weights; 0 where not chosen
  chosen_GSX: jax.Array  # bool; False for padding and for choices that were not made
  balance: jax.Array  # load-balancing loss without coefficient, uniform routing gives 1
  z: jax.Array  # router z-loss without coefficient
  load_E: jax.Array  # choices an expert received, before any is dropped for want of capacity
  entropy: jax.Array  # of the router's distribution, nats
  gate: jax.Array  # score of the first choice, before any division or scaling
  tokens: jax.Array  # valid tokens
  nonfinite: jax.Array  # valid tokens whose logits hold a NaN or an infinity


def switch_route(
  x_GSD: jax.Array,
  w_DE: jax.Array,
  *,
  b_E: jax.Array | None = None,
  valid_GS: jax.Array | None = None,
) -> Routing:
  """Top-1 routing of the Switch Transformer (arXiv 2101.03961, equations 1 to 6).

  The weight is the raw probability of the chosen expert, so the router learns through it.
  """
  return top_k_route(x_GSD, w_DE, k=1, normalize=False, b_E=b_E, valid_GS=valid_GS)


def top_k_route(
  x_GSD: jax.Array,
  w_DE: jax.Array,
  *,
  k: int,
  normalize: bool,
  scores: Literal["softmax", "sigmoid"] = "softmax",
  scale: float = 1.0,
  num_groups: int = 1,
  keep_groups: int = 1,
  selection_bias_E: jax.Array | None = None,
  b_E: jax.Array | None = None,
  valid_GS: jax.Array | None = None,
) -> Routing:
  """The k experts of highest score, weighted by it, divided by the sum of the k if `normalize`.

  Mixtral (arXiv 2401.04088, section 2.1) and Qwen3 normalise a softmax, which is the softmax over
  the k logits; gpt-oss does the same with `b_E`; Llama 4 is k=1 with a sigmoid. DeepSeek-V3 (arXiv
  2412.19437, equations 12 to 16) takes a sigmoid, groups, a selection bias, `normalize`, scale 2.5.

  The balance loss is E * sum_e f_e P_e: f_e is the share of choices, without gradient, P_e the mean
  of the scores divided by their sum over experts (Switch, equations 4 to 6). As in DeepSeek-V3
  (equations 17 to 20, a group being a sequence), f counts the top k without bias or groups.

  Args:
    scale: factor on the weights.
    num_groups: runs of E / num_groups experts, of which a token may use the best only.
    keep_groups: how many; a group is as good as the sum of its two best experts.
    selection_bias_E: added to the scores to choose by, never to weigh by; gets no gradient.

  Raises:
    ValueError: k or the groups do not fit the number of experts.
  """
  router = _softmax(_logits(x_GSD, w_DE, b_E), valid_GS)
  E = router.probs_GSE.shape[-1]
  fits = 0 < num_groups <= E and E % num_groups == 0
  _require(fits, f"{E} experts do not divide into num_groups={num_groups}")
  _require(
    0 < keep_groups <= num_groups, f"keep_groups={keep_groups} must lie in 1..{num_groups} groups"
  )
  usable = E // num_groups * keep_groups
  _require(0 < k <= usable, f"k={k} must lie in 1..{usable}, the experts a token may use")
  score_GSE = router.probs_GSE
  if scores == "sigmoid":
    score_GSE = jax.nn.sigmoid(router.logits_GSE)
    router = router._replace(probs_GSE=_divided_by_sum(score_GSE))
  # Logits have the order of the scores and fewer ties: a sigmoid is 1 from 17 on.
  expert_GSX = _top_experts(router.logits_GSE, k)
  demand_GE = _count(expert_GSX, router.valid_GS[..., None], E)
  if selection_bias_E is not None or num_groups > 1:
    select_GSE = score_GSE
    if selection_bias_E is not None:
      select_GSE += jnp.expand_dims(selection_bias_E.astype(jnp.float32), (0, 1))
    expert_GSX = _top_experts(_best_groups(select_GSE, num_groups, keep_groups), k)
  raw_GSX = _pick(score_GSE, expert_GSX)
  weight_GSX = scale * (_divided_by_sum(raw_GSX) if normalize else raw_GSX)
  chosen_GSX = jnp.broadcast_to(router.valid_GS[..., None], expert_GSX.shape)
  return _routing(router, expert_GSX, weight_GSX, chosen_GSX, raw_GSX[..., 0], demand_GE)


def gshard_route(
  x_GSD: jax.Array,
  w_DE: jax.Array,
  *,
  second_GS: jax.Array | None = None,
  b_E: jax.Array | None = None,
  valid_GS: jax.Array | None = None,
) -> Routing:
  """Top-2 routing with a random second choice (GShard, arXiv 2006.16668, algorithm 1).

  The two gates are divided by their sum first: a token that loses a choice keeps a weight below 1.
  The second choice is made with probability min(1, g2 / 0.2), the threshold of Mesh TensorFlow. The
  balance loss counts first choices only.

  Args:
    second_GS: uniform numbers in [0, 1) that decide; None makes every second choice.

  Raises:
    ValueError: there is one expert only.
  """
  router = _softmax(_logits(x_GSD, w_DE, b_E), valid_GS)
  E = router.probs_GSE.shape[-1]
  _require(E >= 2, "GShard makes two choices and needs two experts")
  expert_GSX = _top_experts(router.logits_GSE, 2)
  raw_GSX = _pick(router.probs_GSE, expert_GSX)
  weight_GSX = _divided_by_sum(raw_GSX)
  made_GS = router.valid_GS
  if second_GS is not None:
    made_GS &= second_GS < weight_GSX[..., 1] / _SECOND_THRESHOLD
  chosen_GSX = jnp.stack([router.valid_GS, made_GS], axis=-1)
  first_GE = _count(expert_GSX[..., :1], router.valid_GS[..., None], E)
  return _routing(router, expert_GSX, weight_GSX, chosen_GSX, raw_GSX[..., 0], first_GE)


def expert_choice_route(
  x_GSD: jax.Array,
  w_DE: jax.Array,
  *,
  capacity: int,
  b_E: jax.Array | None = None,
  valid_GS: jax.Array | None = None,
) -> Routing:
  """Each expert takes the `capacity` tokens of a group most probable for it (arXiv 2202.09368,
  section 3.2); weights are probabilities. A token may get any number of experts, none included.

  X is E: choice x of every token is expert x, chosen where that expert took the token. Load is
  equal by construction, so the balance loss is 0. What a token gets depends on later tokens.

  Raises:
    ValueError: `capacity` is not in 1..S.
  """
  router = _softmax(_logits(x_GSD, w_DE, b_E), valid_GS)
  _, valid_GS, probs_GSE = router
  _, S, E = probs_GSE.shape
  _require(0 < capacity <= S, f"capacity={capacity} must lie in 1..{S}, a group's tokens")
  ranked_GES = jnp.swapaxes(jnp.where(valid_GS[..., None], probs_GSE, -1.0), 1, 2)
  ranked_GES = jax.lax.stop_gradient(ranked_GES)
  # Compared with the last score that is taken; among its equals the first tokens fill what is left.
  last_GE1 = jax.lax.top_k(ranked_GES, capacity)[0][..., -1:]
  above_GES, equal_GES = ranked_GES > last_GE1, ranked_GES == last_GE1
  left_GE1 = capacity - jnp.sum(above_GES, axis=-1, keepdims=True, dtype=jnp.int32)
  taken_GES = above_GES | (equal_GES & (jnp.cumsum(equal_GES, -1, dtype=jnp.int32) <= left_GE1))
  chosen_GSX = jnp.swapaxes(taken_GES, 1, 2) & valid_GS[..., None]
  index_E = jnp.expand_dims(jnp.arange(E, dtype=jnp.int32), (0, 1))
  expert_GSX = jnp.zeros_like(chosen_GSX, jnp.int32) + index_E
  load_GE = jnp.sum(chosen_GSX, axis=1, dtype=jnp.float32)
  gate_GS, zero_GE = probs_GSE.max(-1), jnp.zeros_like(load_GE)
  return _routing(router, expert_GSX, probs_GSE, chosen_GSX, gate_GS, zero_GE, load_GE)


def hash_route(
  x_GSD: jax.Array,
  w_DE: jax.Array | None,
  *,
  ids_GS: jax.Array,
  table_V: jax.Array | np.ndarray,
  num_experts: int | None = None,
  b_E: jax.Array | None = None,
  valid_GS: jax.Array | None = None,
) -> Routing:
  """A fixed table says the expert of a token id (Hash Layers, arXiv 2106.04426, section 3).

  With `w_DE` the weight is the softmax probability of the table's expert; without, it is 1 and
  there is nothing to learn. No choice can change, so the balance loss is 0.

  Args:
    ids_GS: token ids; those outside the table take its first or last entry.
    table_V: as of `hash_table`.
    num_experts: needed without `w_DE`.

  Raises:
    ValueError: there is neither `w_DE` nor `num_experts`.
  """
  table_V, spec = jnp.asarray(table_V, jnp.int32), explicit_spec(ids_GS)
  expert_GSX = table_V.at[ids_GS].get(
    mode="clip",
    wrap_negative_indices=False,
    out_sharding=None if spec is None else PartitionSpec(*spec),
  )[..., None]
  if w_DE is None:
    if num_experts is None:
      raise ValueError("hash_route needs num_experts where w_DE is None")
    # Logits whose softmax is the table itself: weight 1, entropy 0, z-loss 0, no gradient.
    logits_GSE = jnp.where(_one_hot(expert_GSX[..., 0], num_experts), 0.0, -1e30)
  else:
    logits_GSE = _logits(x_GSD, w_DE, b_E)
  router = _softmax(logits_GSE, valid_GS)
  weight_GSX, chosen_GSX = _pick(router.probs_GSE, expert_GSX), router.valid_GS[..., None]
  zero_GE = jnp.zeros_like(logits_GSE[:, 0])
  return _routing(router, expert_GSX, weight_GSX, chosen_GSX, weight_GSX[..., 0], zero_GE)


def hash_table(vocab_size: int, num_experts: int, seed: int) -> np.ndarray:
  """A random table [V] int32 in which expert counts differ by at most 1.

  It is part of the model: the stream of RandomState never changes between NumPy versions.
  """
  order_V = np.random.RandomState(seed).permutation(vocab_size)
  return (order_V % num_experts).astype(np.int32)


def no_token_left_behind_route(
  x_GSD: jax.Array,
  w_DE: jax.Array,
  *,
  capacity: int,
  rounds: int,
  b_E: jax.Array | None = None,
  valid_GS: jax.Array | None = None,
) -> Routing:
  """A token whose expert is full tries its next choice (Switch, appendix B; Mesh TensorFlow).

  In round r the tokens without an expert try their r-th choice, in token order, for the slots that
  are left. A token gets one expert at most, with its raw probability as the weight. X is `rounds`.
  `load_E` and the balance loss count first choices; tokens - sum(chosen) found no slot.

  Raises:
    ValueError: `rounds` is not in 1..E, or `capacity` is not positive.
  """
  router = _softmax(_logits(x_GSD, w_DE, b_E), valid_GS)
  _, waiting_GS, probs_GSE = router
  E = probs_GSE.shape[-1]
  _require(0 < rounds <= E, f"rounds={rounds} must lie in 1..{E}, the number of experts")
  _require(capacity > 0, f"capacity={capacity} must be positive")
  expert_GSX = _top_experts(router.logits_GSE, rounds)
  used_GE, placed = jnp.zeros_like(probs_GSE[:, 0], jnp.int32), []
  for x in range(rounds):
    tries_GSE = _one_hot(expert_GSX[..., x], E) & waiting_GS[..., None]
    place_GSE = used_GE[:, None] + jnp.cumsum(tries_GSE, axis=1, dtype=jnp.int32)  # from 1
    placed_GSE = tries_GSE & (place_GSE <= capacity)
    placed.append(placed_GSE.any(-1))
    waiting_GS &= ~placed[-1]
    used_GE += jnp.sum(placed_GSE, axis=1, dtype=jnp.int32)
  raw_GSX, chosen_GSX = _pick(probs_GSE, expert_GSX), jnp.stack(placed, axis=-1)
  first_GE = _count(expert_GSX[..., :1], router.valid_GS[..., None], E)
  return _routing(router, expert_GSX, raw_GSX, chosen_GSX, raw_GSX[..., 0], first_GE, first_GE)


def updated_bias(bias_E: jax.Array, load_E: jax.Array, rate: float) -> jax.Array:
  """DeepSeek-V3's selection bias after a step: up by `rate` for experts below the mean load, down
  for those above (arXiv 2408.15664, algorithm 1). float32; bfloat16 would lose steps of 0.001.

  Args:
    bias_E: [..., E].
    load_E: [..., E], choices summed over the whole batch, all shards and microbatches.
    rate: 0.001 in the paper.
  """
  load_E = load_E.astype(jnp.float32)
  return bias_E.astype(jnp.float32) + rate * jnp.sign(load_E.mean(-1, keepdims=True) - load_E)


def _require(condition: bool, what: str) -> None:
  if not condition:
    raise ValueError(what)


class _Router(NamedTuple):
  """What a router computes before it chooses."""

  logits_GSE: jax.Array
  valid_GS: jax.Array
  probs_GSE: jax.Array


def _logits(x_GSD, w_DE, b_E) -> jax.Array:
  """float32 [G, S, E], in full precision on every platform."""
  logits_GSE = jnp.einsum(
    "gsd,de->gse",
    x_GSD.astype(jnp.float32),
    w_DE.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  if b_E is not None:
    logits_GSE += jnp.expand_dims(b_E.astype(jnp.float32), (0, 1))
  return checkpoint_name(logits_GSE, "router_logits")


def _softmax(logits_GSE, valid_GS) -> _Router:
  """Padding gets logits of zero: whatever it held, NaN included, reaches no sum or gradient."""
  if valid_GS is None:
    valid_GS = jnp.ones_like(logits_GSE[..., 0], bool)
  logits_GSE = jnp.where(valid_GS[..., None], logits_GSE, 0.0)
  return _Router(logits_GSE, valid_GS, jax.nn.softmax(logits_GSE))


def _one_hot(expert: jax.Array, num_experts: int) -> jax.Array:
  return jax.nn.one_hot(expert, num_experts, dtype=jnp.bool_)


def _top_experts(select_GSE, k) -> jax.Array:
  """Indices of the k largest, the largest first."""
  return jax.lax.top_k(jax.lax.stop_gradient(select_GSE), k)[1]


def _pick(score_GSE, expert_GSX) -> jax.Array:
  """Scores of the chosen experts: a sum over one that is fused, where a gather's gradient would
  scatter numbers one by one."""
  hot_GSXE = _one_hot(expert_GSX, score_GSE.shape[-1])
  return jnp.sum(jnp.where(hot_GSXE, score_GSE[..., None, :], 0.0), axis=-1)


def _count(expert_GSX, chosen_GSX, num_experts) -> jax.Array:
  """Choices of each expert [G, E], float32."""
  hot_GSXE = _one_hot(expert_GSX, num_experts) & chosen_GSX[..., None]
  return jnp.sum(hot_GSXE, axis=(1, 2), dtype=jnp.float32)


def _divided_by_sum(x: jax.Array) -> jax.Array:
  return x / (x.sum(-1, keepdims=True) + 1e-20)


def _best_groups(select_GSE, num_groups, keep_groups) -> jax.Array:
  """-inf, not 0, outside a token's best groups: a score with a negative bias lies below 0."""
  if keep_groups == num_groups:
    return select_GSE
  G, S, E = select_GSE.shape
  group_GSNK = select_GSE.reshape(G, S, num_groups, E // num_groups)
  two = min(2, E // num_groups)
  score_GSN = jax.lax.top_k(group_GSNK, two)[0].sum(-1)
  kept_GSN = _one_hot(jax.lax.top_k(score_GSN, keep_groups)[1], num_groups).any(-2)
  return jnp.where(kept_GSN[..., None], group_GSNK, -jnp.inf).reshape(G, S, E)


def _routing(
  router: _Router, expert_GSX, weight_GSX, chosen_GSX, gate_GS, demand_GE, load_GE=None
) -> Routing:
  """Losses and statistics of every router; f of the balance loss is the share of `demand_GE`."""
  logits_GSE, valid_GS, probs_GSE = router
  E = logits_GSE.shape[-1]
  load_GE = _count(expert_GSX, chosen_GSX, E) if load_GE is None else load_GE
  total = lambda value_GS: jnp.sum(jnp.where(valid_GS, value_GS, 0.0))
  tokens_G1 = jnp.maximum(jnp.sum(valid_GS, -1, keepdims=True, dtype=jnp.float32), 1.0)
  fraction_GE = demand_GE / jnp.maximum(demand_GE.sum(-1, keepdims=True), 1.0)
  # Sums and not matrix products, which round to bfloat16 on TPU.
  mean_prob_GE = jnp.sum(jnp.where(valid_GS[..., None], probs_GSE, 0.0), axis=1) / tokens_G1
  return Routing(
    expert_GSX=expert_GSX,
    weight_GSX=jnp.where(chosen_GSX, weight_GSX, 0.0),
    chosen_GSX=chosen_GSX,
    balance=E * jnp.sum(fraction_GE * mean_prob_GE),
    z=total(jnp.square(jax.nn.logsumexp(logits_GSE, axis=-1)) / tokens_G1),
    load_E=load_GE.sum(0),
    entropy=total(jax.scipy.special.entr(jax.lax.stop_gradient(probs_GSE)).sum(-1)),
    gate=jax.lax.stop_gradient(total(gate_GS)),
    tokens=jnp.sum(valid_GS, dtype=jnp.float32),
    nonfinite=total(~jnp.isfinite(logits_GSE).all(-1)),
  )
