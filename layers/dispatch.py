"""Capacity dispatch: tokens into a fixed number of slots an expert, and back.

G routing groups, S tokens of a group, X choices a token, E experts, C slots an expert, D width.

Both directions, forward and backward, are row gathers: the slot of a token and the token of a
slot are inverse maps, so no gradient needs a scatter-add of rows (slow on CPU and TPU alike).
"""

import functools
import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Slots(NamedTuple):
  """Where each choice went. Slot e * C + c is the c-th place of expert e."""

  slot_GSX: jax.Array  # int32; E * C where the choice was dropped
  token_GR: jax.Array  # int32, R = E * C; S where the slot is empty
  choice_GR: jax.Array  # int32, which of the token's X choices fills the slot
  dropped: jax.Array  # float32 count of valid choices without a slot


def expert_capacity(
  num_tokens: int, num_experts: int, k: int, capacity_factor: float, min_capacity: int
) -> int:
  """Slots an expert has for a group: ceil(factor * k * S / E), at least `min_capacity`, at most S.

  The number of choices k is included: factor 1 is exactly enough under perfect balance.
  """
  wanted = math.ceil(capacity_factor * k * num_tokens / num_experts)
  return min(num_tokens, max(wanted, min_capacity))


def assign_slots(
  expert_GSX: jax.Array, valid_GS: jax.Array, *, num_experts: int, capacity: int
) -> Slots:
  """Fill slots in token order; every first choice comes before any second choice (GShard).

  Padding never takes a slot. A choice whose expert is full is dropped: its token contributes
  nothing there, and the residual branch carries it.
  """
  G, S, X = expert_GSX.shape
  expert_GXS = jnp.swapaxes(expert_GSX, 1, 2)
  valid_GXS = jnp.broadcast_to(valid_GS[:, None], (G, X, S))
  choice_GKE = jax.nn.one_hot(expert_GXS.reshape(G, X * S), num_experts, dtype=jnp.int32)
  choice_GKE = choice_GKE * valid_GXS.reshape(G, X * S)[..., None]
  before_GKE = jnp.cumsum(choice_GKE, axis=1) - choice_GKE
  place_GXS = jnp.sum(before_GKE * choice_GKE, axis=-1).reshape(G, X, S)
  kept_GXS = valid_GXS & (place_GXS < capacity)
  num_slots = num_experts * capacity
  slot_GXS = jnp.where(kept_GXS, expert_GXS * capacity + place_GXS, num_slots)
  choice_GR = _invert(slot_GXS.reshape(G, X * S), num_slots, empty=X * S)
  return Slots(
    slot_GSX=jnp.swapaxes(slot_GXS, 1, 2),
    token_GR=jnp.where(choice_GR == X * S, S, choice_GR % S),
    choice_GR=jnp.where(choice_GR == X * S, 0, choice_GR // S),
    dropped=jnp.sum(valid_GXS & ~kept_GXS).astype(jnp.float32),
  )


def _invert(slot_GK: jax.Array, num_slots: int, empty: int) -> jax.Array:
  """Index k of the entry in each slot; `empty` where none."""

  def one(slot_K):
    index_K = jnp.arange(slot_K.shape[0], dtype=jnp.int32)
    return jnp.full((num_slots,), empty, jnp.int32).at[slot_K].set(index_K, mode="drop")

  return jax.vmap(one)(slot_GK)


def _rows(x_GND: jax.Array, index_GR: jax.Array) -> jax.Array:
  """x[g, index[g, r]]; an index beyond N gives a row of zeros."""
  take = lambda x_ND, index_R: x_ND.at[index_R].get(mode="fill", fill_value=0)
  return jax.vmap(take)(x_GND, index_GR)


@jax.custom_vjp
def permute(x_GSD: jax.Array, slots: Slots) -> jax.Array:
  """Token rows in slot order [G, E * C, D]; empty slots hold zeros."""
  return _rows(x_GSD, slots.token_GR)


def _permute_fwd(x_GSD, slots):
  return permute(x_GSD, slots), slots


def _permute_bwd(slots, d_rows_GRD):
  dx_GSD = sum(_rows(d_rows_GRD, slots.slot_GSX[..., x]) for x in range(slots.slot_GSX.shape[-1]))
  return dx_GSD, None


permute.defvjp(_permute_fwd, _permute_bwd)


@jax.custom_vjp
def unpermute(rows_GRD: jax.Array, weight_GSX: jax.Array, slots: Slots) -> jax.Array:
  """Weighted sum over each token's kept choices [G, S, D], in the dtype of the rows."""
  parts_XGSD = [
    _rows(rows_GRD, slots.slot_GSX[..., x]) * weight_GSX[..., x, None].astype(rows_GRD.dtype)
    for x in range(weight_GSX.shape[-1])
  ]
  return functools.reduce(operator.add, parts_XGSD)


def _unpermute_fwd(rows_GRD, weight_GSX, slots):
  return unpermute(rows_GRD, weight_GSX, slots), (rows_GRD, weight_GSX, slots)


def _unpermute_bwd(residuals, dy_GSD):
  rows_GRD, weight_GSX, slots = residuals
  G, S, X = weight_GSX.shape
  flat_GK = weight_GSX.reshape(G, S * X)
  index_GR = jnp.where(slots.token_GR == S, S * X, slots.token_GR * X + slots.choice_GR)
  weight_GR1 = _rows(flat_GK[..., None], index_GR)
  d_rows_GRD = _rows(dy_GSD, slots.token_GR) * weight_GR1.astype(dy_GSD.dtype)
  dot = lambda rows_GSD: jnp.einsum(
    "gsd,gsd->gs", rows_GSD, dy_GSD, preferred_element_type=jnp.float32
  )
  d_weight_GSX = jnp.stack([dot(_rows(rows_GRD, slots.slot_GSX[..., x])) for x in range(X)], -1)
  return d_rows_GRD, d_weight_GSX, None


unpermute.defvjp(_unpermute_fwd, _unpermute_bwd)
