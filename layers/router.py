"""Routers: which experts each token goes to, with what weight, and what that costs in losses.

G routing groups, S tokens of a group, D model width, E experts, X experts chosen per token.
Everything here is float32, whatever the activations are (Switch, section 2.4).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


class Routing(NamedTuple):
  """Choices and their statistics. Losses are means over tokens of a group, summed over groups;
  statistics are sums over tokens: both add over shards and microbatches."""

  expert_GSX: jax.Array  # int32, most preferred first
  weight_GSX: jax.Array  # float32 combine weights; 0 where `valid` is False
  balance: jax.Array  # load-balancing loss without coefficient, uniform routing gives 1
  z: jax.Array  # router z-loss without coefficient
  load_E: jax.Array  # choices an expert received, before any is dropped
  entropy: jax.Array  # of the router's distribution, nats
  gate: jax.Array  # probability of the first choice
  tokens: jax.Array  # valid tokens


def router_logits(x_GSD: jax.Array, w_DE: jax.Array, b_E: jax.Array | None = None) -> jax.Array:
  """float32 logits [G, S, E], in full precision on every platform."""
  logits_GSE = jnp.einsum(
    "gsd,de->gse",
    x_GSD.astype(jnp.float32),
    w_DE.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  if b_E is not None:
    logits_GSE += jnp.expand_dims(b_E, (0, 1))
  return checkpoint_name(logits_GSE, "router_logits")


def switch_route(
  x_GSD: jax.Array,
  w_DE: jax.Array,
  *,
  b_E: jax.Array | None = None,
  valid_GS: jax.Array | None = None,
) -> Routing:
  """Top-1 routing of the Switch Transformer (arXiv 2101.03961, equations 1 to 6).

  The gate is the raw probability of the chosen expert, so the router learns through it. Ties go
  to the lowest index. Jitter, if any, is applied to `x_GSD` by the caller.

  Args:
    x_GSD: router input.
    w_DE: router weights.
    b_E: added to the logits; Switch itself has none.
    valid_GS: False for padding, which is left out of weights, losses and statistics.
  """
  return top_k_route(x_GSD, w_DE, k=1, normalize=False, b_E=b_E, valid_GS=valid_GS)


def top_k_route(
  x_GSD: jax.Array,
  w_DE: jax.Array,
  *,
  k: int,
  normalize: bool,
  b_E: jax.Array | None = None,
  valid_GS: jax.Array | None = None,
) -> Routing:
  """The k most probable experts a token; weights are probabilities, divided by their sum when
  `normalize` (Mixtral, arXiv 2401.04088, section 2.1).

  The balance loss is E * sum_e f_e P_e with f_e the share of all choices (mean convention:
  uniform routing gives 1 for every k); f carries no gradient.
  """
  logits_GSE = router_logits(x_GSD, w_DE, b_E)
  probs_GSE = jax.nn.softmax(logits_GSE)
  weight_GSX, expert_GSX = jax.lax.top_k(probs_GSE, k)
  gate_GS = weight_GSX[..., 0]
  if normalize:
    weight_GSX = weight_GSX / weight_GSX.sum(-1, keepdims=True)
  valid_GS = jnp.ones_like(gate_GS, bool) if valid_GS is None else valid_GS
  mask_GS = valid_GS.astype(jnp.float32)
  return _with_losses(logits_GSE, probs_GSE, expert_GSX, weight_GSX, gate_GS, mask_GS)


def _with_losses(logits_GSE, probs_GSE, expert_GSX, weight_GSX, gate_GS, mask_GS) -> Routing:
  num_experts, k = logits_GSE.shape[-1], expert_GSX.shape[-1]
  choices_GSE = jax.nn.one_hot(expert_GSX, num_experts, dtype=jnp.float32).sum(-2)
  load_GE = jnp.einsum("gse,gs->ge", choices_GSE, mask_GS)
  tokens_G1 = jnp.maximum(mask_GS.sum(-1, keepdims=True), 1.0)
  fraction_GE = jax.lax.stop_gradient(load_GE / (k * tokens_G1))
  mean_prob_GE = jnp.einsum("gse,gs->ge", probs_GSE, mask_GS) / tokens_G1
  log_z_GS = jax.nn.logsumexp(logits_GSE, axis=-1)
  log_probs_GSE = logits_GSE - log_z_GS[..., None]
  entropy_GS = jax.lax.stop_gradient(-jnp.sum(probs_GSE * log_probs_GSE, axis=-1))
  return Routing(
    expert_GSX=expert_GSX,
    weight_GSX=weight_GSX * mask_GS[..., None],
    balance=num_experts * jnp.sum(fraction_GE * mean_prob_GE),
    z=jnp.sum(jnp.sum(jnp.square(log_z_GS) * mask_GS, axis=-1) / tokens_G1[:, 0]),
    load_E=jax.lax.stop_gradient(load_GE.sum(0)),
    entropy=jnp.sum(entropy_GS * mask_GS),
    gate=jax.lax.stop_gradient(jnp.sum(gate_GS * mask_GS)),
    tokens=mask_GS.sum(),
  )
