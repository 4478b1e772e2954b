"""Experts over devices: dropless ones over the `expert` axis, hidden units over `tensor`.

M tokens of this device, X choices a token, E experts, L experts of this device, P devices along
the axis, K = M * X choices, R rows, W rows received, D width.

Two ways meet rows and experts that lie on different devices:

- all_to_all: every chosen row travels to its expert and back. `ragged_all_to_all` moves just these
  rows where the platform has it (TPU, GPU); elsewhere blocks of the worst case travel. The buffer
  for what arrives has room for the worst case: every token of every device.
- ring: all tokens visit all devices, one step at a time, and take what each device's experts
  add to them along. Memory is that of one device's tokens, at any skew.

`bounded` is an all_to_all with blocks of `buffer_factor` times the balanced load: rows beyond are
dropped and counted.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.custom_batching
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from mesh.collectives import (
  manual_size,
  plan_exchange,
  ring_shift,
  send,
  send_back,
  vary,
)

from .dispatch import permute, slot_weights, sort_slots, unpermute
from .experts import ExpertWeights
from .kernels.partition import auto_partitioned, replicated_like, sharding_like, vary_with
from .kernels.select import current_platform

Exchange = Literal["auto", "all_to_all", "bounded", "ring"]

# (rows_RD, size_E, weights, weight_R, seed_R) -> rows_RD
Experts = Callable[[jax.Array, jax.Array, ExpertWeights, jax.Array, jax.Array | None], jax.Array]

# A worst-case buffer of at most so many times the balanced load; beyond it the ring.
_BUFFER_LIMIT = 8


class Choices(NamedTuple):
  """A device's tokens and what they chose."""

  x_MD: jax.Array
  weight_MX: jax.Array
  expert_MX: Any  # int32, 0..E-1, or 0..L-1 of this device's where `experts_here` reads it
  chosen_MX: Any  # bool
  seed_M: jax.Array | None = None  # uint32 for the expert dropout


def choose_exchange(devices: int, local_experts: int, k: int, ragged: bool) -> Exchange:
  """The rule behind "auto".

  all_to_all sends k (P-1)/P rows a token each way where rows travel alone, the ring P-1: so
  all_to_all, unless k reaches P, its worst-case buffer of P min(k, L) rows a token exceeds eight
  times the k that a token needs, or the platform would have to send the whole buffer.
  """
  worst = devices * min(k, local_experts)
  return "all_to_all" if ragged and k < devices and worst <= _BUFFER_LIMIT * k else "ring"


def has_ragged() -> bool:
  """Whether the platform sends rows alone."""
  return current_platform() in ("tpu", "gpu", "cuda")


def dropless(
  choices: Choices,
  weights: ExpertWeights,
  run: Experts,
  *,
  exchange: Exchange = "auto",
  buffer_factor: float = 2.0,
) -> tuple[jax.Array, jax.Array]:
  """Every choice computed, and summed by weight: y_MD, and the count of dropped choices.

  Inside a `shard_map` over `expert`, `weights` are this device's L experts, and `choices` name
  experts of all devices.

  Args:
    run: the experts, see `layers.experts.grouped_expert_mlp`.
    exchange: see above; "auto" is `choose_exchange`. Only "bounded" drops.
    buffer_factor: of "bounded".
  """
  devices = manual_size("expert")
  none = jnp.zeros((), jnp.float32)
  if devices == 1:
    return experts_here(choices, weights, run), none
  L, (M, X) = weights.up_EDF.shape[0], choices.expert_MX.shape
  if exchange == "auto":
    exchange = choose_exchange(devices, L, X, has_ragged())
  if exchange == "ring":
    return _ring(choices, weights, run), none
  block = M * min(X, L)
  if exchange == "bounded":
    block = min(block, math.ceil(buffer_factor * M * X / devices))
  return _all_to_all(choices, weights, run, block, ragged=exchange != "bounded" and has_ragged())


def experts_here(
  choices: Choices, weights: ExpertWeights, run: Experts, num_rows: int | None = None
) -> jax.Array:
  """What this device's experts add to each token [M, D].

  Args:
    num_rows: see `sort_slots`.
  """
  E = weights.up_EDF.shape[0]
  with jax.named_scope("dispatch"):
    slots = sort_slots(
      choices.expert_MX[None], choices.chosen_MX[None], num_experts=E, num_rows=num_rows
    )
    rows_RD = permute(choices.x_MD[None], slots, False)[0]
    weight_R = slot_weights(choices.weight_MX[None], slots)[0]
    seed_R = None
    if choices.seed_M is not None:
      seed_R = row_seeds(choices.seed_M, slots.token_GR[0])
  with jax.named_scope("experts"):
    out_RD = run(rows_RD, slots.size_GE[0], weights, weight_R, seed_R)
  with jax.named_scope("combine"):
    return unpermute(out_RD[None], slots, False)[0]


def row_seeds(seed_M: jax.Array, token_R: jax.Array) -> jax.Array:
  """The seed of each row's token; 0 where the row is empty."""
  return seed_M.at[token_R].get(mode="fill", fill_value=0)


# ring ------------------------------------------------------------------------


def _visit(choices: Choices, weights: ExpertWeights, run: Experts) -> jax.Array:
  """What this device's experts add to tokens of any device."""
  L, (M, X) = weights.up_EDF.shape[0], choices.expert_MX.shape
  local_MX = choices.expert_MX - lax.axis_index("expert") * L
  here_MX = choices.chosen_MX & (local_MX >= 0) & (local_MX < L)
  local_MX = jnp.clip(local_MX, 0, L - 1)
  choices = choices._replace(expert_MX=local_MX, chosen_MX=here_MX)
  return experts_here(choices, weights, run, num_rows=M * min(X, L))


def _ring(choices: Choices, weights: ExpertWeights, run: Experts) -> jax.Array:
  arguments = (choices, weights)
  return _ring_vjp(*vary_with(arguments, arguments), run)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _ring_vjp(choices: Choices, weights: ExpertWeights, run: Experts) -> jax.Array:
  """Steps are computed anew in backward: nothing is kept but what came in."""

  def step(carry, _):
    choices, y_MD = ring_shift(carry, "expert")
    return (choices, y_MD + _visit(choices, weights, run)), None

  start = (choices, _visit(choices, weights, run))
  (_, y_MD), _ = lax.scan(step, start, length=manual_size("expert") - 1)
  return ring_shift(y_MD, "expert")


def _ring_fwd(choices, weights, run):
  return _ring_vjp(choices, weights, run), (choices, weights)


def _ring_bwd(run, saved, dy_MD):
  choices, weights = saved

  def add(carry):
    choices, dy_MD, (dx_MD, d_weight_MX), d_weights = carry

    def visit(x_MD, weight_MX, weights):
      return _visit(choices._replace(x_MD=x_MD, weight_MX=weight_MX), weights, run)

    _, vjp = jax.vjp(visit, choices.x_MD, choices.weight_MX, weights)
    dx, d_weight, dw = vjp(dy_MD)
    d_tokens = (dx_MD + dx, d_weight_MX + d_weight)
    return choices, dy_MD, d_tokens, jax.tree.map(jnp.add, d_weights, dw)

  def step(carry, _):
    return add((*ring_shift(carry[:3], "expert"), carry[3])), None

  zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
  start = add((choices, dy_MD, zeros((choices.x_MD, choices.weight_MX)), zeros(weights)))
  (_, _, d_tokens, d_weights), _ = lax.scan(step, start, length=manual_size("expert") - 1)
  dx_MD, d_weight_MX = ring_shift(d_tokens, "expert")
  return Choices(dx_MD, d_weight_MX, None, None, None), d_weights


_ring_vjp.defvjp(_ring_fwd, _ring_bwd)


# all to all ------------------------------------------------------------------


def _all_to_all(choices: Choices, weights, run: Experts, block: int, *, ragged: bool):
  devices, L = manual_size("expert"), weights.up_EDF.shape[0]
  with jax.named_scope("dispatch"):
    slots = sort_slots(choices.expert_MX[None], choices.chosen_MX[None], num_experts=devices * L)
    R = slots.choice_GR.shape[1]
    size_PL = slots.size_GE[0].reshape(devices, L)
    kept_PL = jnp.diff(jnp.minimum(jnp.cumsum(size_PL, axis=1), block), axis=1, prepend=0)
    plan = plan_exchange(size_PL, kept_PL, num_rows=R, block=block, ragged=ragged, axis="expert")
    rows_WD = send(permute(choices.x_MD[None], slots, False)[0], plan, "expert")
    weight_R = slot_weights(choices.weight_MX[None], slots)[0]
    weight_W = send(weight_R[:, None], plan, "expert")[:, 0]
    seed_W = None
    if choices.seed_M is not None:
      seed_R = row_seeds(choices.seed_M, slots.token_GR[0])
      seed_W = send(seed_R[:, None], plan, "expert")[:, 0]
  with jax.named_scope("experts"):
    out_WD = run(rows_WD, plan.size_L, weights, weight_W, seed_W)
  with jax.named_scope("combine"):
    back_RD = send_back(out_WD, plan, R, "expert")
    y_MD = unpermute(back_RD[None], slots, False)[0]
  return y_MD, jnp.sum(size_PL - kept_PL).astype(jnp.float32)


# hidden units over `tensor` ----------------------------------------------------


def over_tensor(compute, x_GSD, weight_GSX, chosen, seed_GS, weights):
  """`compute` with each expert's hidden units spread over `tensor`, where a region has such an
  axis: each device adds up its part for all tokens, and the parts meet at the end."""
  mesh = jax.sharding.get_abstract_mesh()
  if AxisType.Explicit in mesh.axis_types:
    places = (sharding_like(x_GSD), replicated_like(x_GSD))
    return auto_partitioned(compute, places, x_GSD, weight_GSX, chosen, seed_GS, weights)
  regional = AxisType.Manual in mesh.axis_types and manual_size("tensor") == 1
  if not regional or mesh.shape.get("tensor", 1) == 1:
    return compute(x_GSD, weight_GSX, chosen, seed_GS, weights)
  return _spread(compute, (x_GSD, weight_GSX, weights), (chosen, seed_GS))


_WHOLE, _UNITS = PartitionSpec(), PartitionSpec(None, "tensor")
_WEIGHTS: Any = ExpertWeights._make(
  (PartitionSpec(None, None, "tensor"), _UNITS, PartitionSpec(None, None, "tensor"))
  + (_UNITS, _UNITS, _WHOLE)
)


def _specs(given):
  """How the arguments that have gradients lie."""
  present = lambda w, spec: None if w is None else spec
  *tokens, weights = given
  return (*(_WHOLE for _ in tokens), ExpertWeights._make(map(present, weights, _WEIGHTS)))


def _part(compute, given, chosen):
  """One device's part of the sum, of which it keeps the positions that are its own."""
  x_GSD, weight_GSX, weights = vary(given, ("tensor",))  # gradients are sums of parts
  y_GSD, dropped = compute(x_GSD, weight_GSX, *chosen, weights)
  if x_GSD.shape[1] % manual_size("tensor"):
    return lax.psum(y_GSD, "tensor"), dropped
  return lax.psum_scatter(y_GSD, "tensor", scatter_dimension=1, tiled=True), dropped


def _result_spec(x_GSD: jax.Array) -> PartitionSpec:
  ways = jax.sharding.get_abstract_mesh().shape["tensor"]
  return _WHOLE if x_GSD.shape[1] % ways else _UNITS


def _opaque(run: Callable) -> Callable:
  """`run` as one operation that `jax.checkpoint` keeps or repeats whole."""
  whole = jax.custom_batching.custom_vmap(run)

  @whole.def_vmap
  def refuse(*_):
    raise NotImplementedError("experts over `tensor` in a region have no vmap")

  return whole


# What JAX 0.10 keeps of a shard_map inside another for the backward pass it takes to be spread over
# the outer one's axes too, which fails. So nothing is kept, and backward computes the parts anew.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(compute, given, chosen):
  run = jax.shard_map(
    functools.partial(_part, compute),
    in_specs=(_specs(given), _WHOLE),
    out_specs=(_result_spec(given[0]), _WHOLE),
    axis_names={"tensor"},
  )
  return _opaque(run)(given, chosen)


def _spread_fwd(compute, given, chosen):
  return _spread(compute, given, chosen), (given, chosen)


def _spread_bwd(compute, saved, cotangents):
  given, chosen = saved

  def local(given, chosen, dy_GSD):
    part = lambda given: _part(compute, given, chosen)[0]
    return jax.vjp(part, given)[1](dy_GSD)[0]

  specs = _specs(given)
  run = jax.shard_map(
    local,
    in_specs=(specs, _WHOLE, _result_spec(given[0])),
    out_specs=specs,
    axis_names={"tensor"},
  )
  return _opaque(run)(given, chosen, cotangents[0]), None


_spread.defvjp(_spread_fwd, _spread_bwd)
