"""Which rows of which tokens each expert gets, and the way there and back.

G routing groups, S tokens of a group, X choices a token, E experts, C slots an expert, R slots in
all, K = S * X choices, D width.

Both directions, forward and backward, are row gathers: the slot of a choice and the choice of a
slot are inverse maps, so no gradient needs a scatter-add of rows (slow on CPU and TPU alike).
"""

import functools
import math
import operator
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Priority = Literal["choice", "token", "gate"]


class Slots(NamedTuple):
  """Where each choice went: slots lie expert after expert."""

  slot_GSX: jax.Array  # int32; R where the choice has none
  choice_GR: jax.Array  # int32, s * X + x; K where the slot is empty
  size_GE: jax.Array  # int32 slots in use
  dropped: jax.Array  # float32 count of choices made without a slot

  @property
  def token_GR(self) -> jax.Array:  # noqa: N802 (an array, named as one)
    """S where the slot is empty."""
    return self.choice_GR // self.slot_GSX.shape[2]


def expert_capacity(
  num_tokens: int, num_experts: int, k: int, capacity_factor: float, min_capacity: int
) -> int:
  """Slots an expert has for a group: ceil(factor * k * S / E), at least `min_capacity`, at most S.

  The number of choices k is included: factor 1 is exactly enough under perfect balance.
  """
  wanted = math.ceil(capacity_factor * k * num_tokens / num_experts)
  return min(num_tokens, max(wanted, min_capacity))


def assign_slots(
  expert_GSX: jax.Array,
  chosen_GSX: jax.Array,
  *,
  num_experts: int,
  capacity: int,
  priority: Priority = "choice",
  gate_GS: jax.Array | None = None,
) -> Slots:
  """`capacity` slots an expert and group; slot e * C + c is the c-th of expert e.

  A choice whose expert is full is dropped: its token contributes nothing there, and the residual
  branch carries it. What is not chosen (padding) takes no slot.

  Args:
    priority: who is first. "choice": every first choice before any second, tokens in order (GShard,
      arXiv 2006.16668, algorithm 1); "token": a token's choices together (MegaBlocks, MaxText);
      "gate": as "choice", but tokens by falling `gate_GS` (V-MoE, arXiv 2106.05974, section 4: not
      causal, since a later token can take an earlier one's slot).
  """
  G, S, X = expert_GSX.shape
  E, C, K = num_experts, capacity, S * X
  key_GK, choice_GK, size_GE = _sorted(expert_GSX, chosen_GSX, E, priority, gate_GS)
  first_GE = jnp.cumsum(size_GE, axis=1) - size_GE
  first_GK = jnp.take_along_axis(first_GE, jnp.minimum(key_GK, E - 1), axis=1)
  place_GK = jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32), (G, K)) - first_GK
  kept_GK = (key_GK < E) & (place_GK < C)
  slot_GK = jnp.where(kept_GK, key_GK * C + place_GK, E * C)
  step_GEC = jnp.broadcast_to(jnp.arange(C, dtype=jnp.int32), (G, E, C))
  from_GR = jnp.minimum(first_GE[..., None] + step_GEC, K - 1).reshape(G, E * C)
  used_GR = (step_GEC < size_GE[..., None]).reshape(G, E * C)
  return Slots(
    slot_GSX=_unsorted(slot_GK, choice_GK).reshape(G, S, X),
    choice_GR=jnp.where(used_GR, jnp.take_along_axis(choice_GK, from_GR, axis=1), K),
    size_GE=jnp.minimum(size_GE, C),
    dropped=jnp.sum(jnp.maximum(size_GE - C, 0)).astype(jnp.float32),
  )


def sort_slots(
  expert_GSX: jax.Array, chosen_GSX: jax.Array, *, num_experts: int, num_rows: int | None = None
) -> Slots:
  """As many slots as choices, those of an expert side by side: nothing is dropped.

  Args:
    num_rows: slots, when it is known that fewer choices than S * X can have been made.
  """
  G, S, X = expert_GSX.shape
  R = S * X if num_rows is None else num_rows
  key_GK, choice_GK, size_GE = _sorted(expert_GSX, chosen_GSX, num_experts, "token", None)
  row_GK = jnp.broadcast_to(jnp.arange(S * X, dtype=jnp.int32), key_GK.shape)
  slot_GK = jnp.where(key_GK < num_experts, row_GK, R)
  choice_GK = jnp.where(key_GK < num_experts, choice_GK, S * X)
  slot_GSX = _unsorted(slot_GK, choice_GK, empty=R).reshape(G, S, X)
  return Slots(slot_GSX, choice_GK[:, :R], size_GE, jnp.zeros((), jnp.float32))


def _sorted(expert_GSX, chosen_GSX, num_experts, priority, gate_GS):
  """Choices by expert (E: none), then by priority: their experts, indices s * X + x; counts."""
  G, S, X = expert_GSX.shape
  key_GSX = jnp.where(chosen_GSX, expert_GSX, num_experts)
  index_GSX = jnp.broadcast_to(jnp.arange(S * X, dtype=jnp.int32).reshape(S, X), (G, S, X))
  if priority == "gate":
    if gate_GS is None:
      raise ValueError("priority 'gate' needs the gate of each token")
    order_GS1 = jnp.argsort(-gate_GS, axis=1, stable=True)[..., None]
    key_GSX, index_GSX = (jnp.take_along_axis(a, order_GS1, 1) for a in (key_GSX, index_GSX))
  if priority != "token":
    key_GSX, index_GSX = (jnp.swapaxes(a, 1, 2) for a in (key_GSX, index_GSX))
  key_GK, index_GK = (a.reshape(G, S * X) for a in (key_GSX, index_GSX))
  sorted_GK, choice_GK = lax.sort((key_GK, index_GK), dimension=1, num_keys=1, is_stable=True)
  expert_E11 = jnp.arange(num_experts, dtype=jnp.int32)[:, None, None]
  size_EG = jnp.sum(key_GK[None] == expert_E11, axis=2, dtype=jnp.int32)
  return sorted_GK, choice_GK, size_EG.T


def _unsorted(value_GK: jax.Array, index_GK: jax.Array, empty: int = 0) -> jax.Array:
  """`out[g, index[g, k]] = value[g, k]`; an index beyond K is left out."""
  put = lambda value_K, index_K: jnp.full_like(value_K, empty).at[index_K].set(value_K, mode="drop")
  return jax.vmap(put)(value_GK, index_GK)


def take_rows(x_GN: jax.Array, index_GR: jax.Array, *, fill: bool = True) -> jax.Array:
  """x[g, index[g, r]], numbers or rows of them; an index beyond N gives zeros, or any row."""
  mode = "fill" if fill else "clip"
  take = lambda x_N, index_R: x_N.at[index_R].get(mode=mode, fill_value=0)
  return jax.vmap(take)(x_GN, index_GR)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def permute(x_GSD: jax.Array, slots: Slots, fill: bool = True) -> jax.Array:
  """Token rows in slot order [G, R, D].

  Args:
    fill: empty slots hold zeros. Grouped products never read rows past the last group: without
      `fill` any row may stand there, which saves a pass over all rows.
  """
  return take_rows(x_GSD, slots.token_GR, fill=fill)


def _permute_fwd(x_GSD, slots, fill):
  return permute(x_GSD, slots, fill), slots


def _permute_bwd(fill, slots, d_rows_GRD):
  del fill
  X = slots.slot_GSX.shape[-1]
  dx_GSD = sum(take_rows(d_rows_GRD, slots.slot_GSX[..., x]) for x in range(X))
  return dx_GSD, None


permute.defvjp(_permute_fwd, _permute_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def unpermute(rows_GRD: jax.Array, slots: Slots, fill: bool = True) -> jax.Array:
  """Sum over each token's kept choices [G, S, D], in the dtype of the rows.

  Args:
    fill: whether the gradient of empty slots is zeros, see `permute`.
  """
  del fill
  parts_XGSD = (
    take_rows(rows_GRD, slots.slot_GSX[..., x]).astype(jnp.float32)
    for x in range(slots.slot_GSX.shape[-1])
  )
  return functools.reduce(operator.add, parts_XGSD).astype(rows_GRD.dtype)


def _unpermute_fwd(rows_GRD, slots, fill):
  return unpermute(rows_GRD, slots, fill), slots


def _unpermute_bwd(fill, slots, dy_GSD):
  return take_rows(dy_GSD, slots.token_GR, fill=fill), None


unpermute.defvjp(_unpermute_fwd, _unpermute_bwd)


@jax.custom_vjp
def slot_weights(weight_GSX: jax.Array, slots: Slots) -> jax.Array:
  """The weight of the choice in each slot [G, R]; 0 where it is empty."""
  G = weight_GSX.shape[0]
  return take_rows(weight_GSX.reshape(G, -1), slots.choice_GR)


def _slot_weights_fwd(weight_GSX, slots):
  return slot_weights(weight_GSX, slots), slots


def _slot_weights_bwd(slots, d_weight_GR):
  G = d_weight_GR.shape[0]
  d_weight_GK = take_rows(d_weight_GR, slots.slot_GSX.reshape(G, -1))
  return d_weight_GK.reshape(slots.slot_GSX.shape), None


slot_weights.defvjp(_slot_weights_fwd, _slot_weights_bwd)


def one_hot_slots(slots: Slots, dtype) -> jax.Array:
  """1 where a choice has a slot [G, S, X, R]: the readable reference of both ways."""
  return jax.nn.one_hot(slots.slot_GSX, slots.choice_GR.shape[1], dtype=dtype)
