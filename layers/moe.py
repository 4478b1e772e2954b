"""Mixture of experts: route, dispatch, experts, combine.

B batch, T positions, D model width, F expert width, E experts, X choices a token, C slots an
expert, G routing groups, S tokens of a group, M tokens of this device.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.sharding import AxisType

from mesh.collectives import from_experts, manual_size, to_experts
from mesh.constrain import constrain

from .dispatch import (
  Priority,
  Slots,
  assign_slots,
  expert_capacity,
  one_hot_slots,
  permute,
  slot_weights,
  unpermute,
)
from .expert_parallel import Choices, Exchange, dropless, over_tensor, row_seeds
from .experts import ExpertMath, ExpertWeights, expert_mlp, grouped_expert_mlp
from .kernels.partition import free_axes
from .linear import regroup
from .mlp import Mlp
from .noise import draw_rows, fold, jitter_BTD
from .params import declare, kernel_init
from .router import (
  Routing,
  expert_choice_route,
  gshard_route,
  hash_route,
  hash_table,
  no_token_left_behind_route,
  switch_route,
  top_k_route,
)
from .spec import InitSpec, MoeSpec

Dispatch = Literal["dropless", "capacity", "einsum"]


_SILU = ExpertMath()


class MoeStats(NamedTuple):
  """What a MoE layer reports; all sums over the rows given, so that shards and microbatches add."""

  aux_loss: jax.Array  # weighted losses: mean over groups, times rows
  balance: jax.Array  # load-balancing loss without coefficient: mean over groups, times rows
  z: jax.Array  # router z-loss without coefficient: mean over groups, times rows
  load_E: jax.Array  # choices an expert received
  dropped: jax.Array  # choices without a slot
  entropy: jax.Array  # router entropy in nats, summed over tokens
  gate: jax.Array  # first choice's score, summed over tokens
  tokens: jax.Array  # valid tokens
  nonfinite: jax.Array  # valid tokens whose router logits hold a NaN or an infinity


def route_groups(
  x_BTD: jax.Array, valid_BT: jax.Array, group_size: int | None
) -> tuple[jax.Array, jax.Array]:
  """Rows cut into routing groups: x_GSD and valid_GS.

  Raises:
    ValueError: when the row length is not a multiple of `group_size`, or positions are spread over
      devices and a group would be too.
  """
  _, T, D = x_BTD.shape
  devices = manual_size("context")
  if devices > 1 and (group_size is None or T // 2 % group_size):
    raise ValueError(
      f"on a mesh with context={devices} a routing group must lie on one device: set "
      f"moe.group_size to a divisor of {T // 2} (half the positions of a device), not {group_size}"
    )
  S = group_length(T, group_size)
  if T % S:
    raise ValueError(f"a row of {T} tokens does not divide into routing groups of {S}")
  G = x_BTD.shape[0] * T // S
  return regroup(x_BTD, (G, S, D)), regroup(valid_BT, (G, S))


def group_length(length: int, group_size: int | None) -> int:
  """Tokens of a routing group in rows of `length`."""
  return length if group_size is None else min(group_size, length)


def moe(
  x_BTD: jax.Array,
  w_router_DE: jax.Array,
  weights: ExpertWeights,
  *,
  route: Callable[..., Routing] = switch_route,
  router_x_BTD: jax.Array | None = None,
  valid_BT: jax.Array | None = None,
  seed_BT: jax.Array | None = None,
  math: ExpertMath = _SILU,
  dispatch: Dispatch = "dropless",
  capacity_factor: float = 1.25,
  min_capacity: int = 4,
  group_size: int | None = None,
  k: int | None = None,
  priority: Priority = "choice",
  scale_input: bool = False,
  exchange: Exchange = "auto",
  buffer_factor: float = 2.0,
) -> tuple[jax.Array, Routing, jax.Array]:
  """Sparse MLP over tokens.

  Args:
    x_BTD: what the experts see.
    route: `(x_GSD, w_DE, valid_GS=) -> Routing`.
    router_x_BTD: what the router sees (the jittered copy); None is `x_BTD`.
    valid_BT: False for padding, which goes to no expert and returns zeros.
    seed_BT: uint32 of each token for the expert dropout; None is none.
    math: what an expert computes.
    dispatch: "dropless": every choice is computed, and work follows the choices. "capacity": each
      expert has slots for every group of tokens, a choice beyond them is dropped and counted.
      "einsum": the same by one-hot products, the readable reference. A token's result depends on
      the others of its group where slots are short, so decoding token by token equals the whole
      sequence only without drops.
    capacity_factor, min_capacity, k: see `expert_capacity`; k=None is the choices a token has.
    group_size: tokens that compete for slots and are balanced together; None is a whole row.
    priority: see `assign_slots`.
    scale_input: the weight multiplies what the expert reads, not what it says (Llama 4).
    exchange, buffer_factor: see `layers.expert_parallel`.

  Returns:
    y_BTD in the dtype of x, the Routing, and the number of dropped choices.

  Raises:
    ValueError: routing groups that do not divide the row, or lie on several devices.

  Source: Switch Transformer, arXiv 2101.03961, section 2; dropless as in MegaBlocks, arXiv
  2211.15841.
  """
  B, T, D = x_BTD.shape
  valid_BT = jnp.ones_like(x_BTD[..., 0], bool) if valid_BT is None else valid_BT
  x_GSD, valid_GS = route_groups(x_BTD, valid_BT, group_size)
  router_x_GSD = x_GSD if router_x_BTD is None else regroup(router_x_BTD, x_GSD.shape)
  with jax.named_scope("route"):
    routing = route(router_x_GSD, w_router_DE, valid_GS=valid_GS)
  weight_GSX = routing.weight_GSX
  if scale_input:
    # Llama 4: one choice a token, so the weight can multiply before the token travels.
    x_GSD = x_GSD * weight_GSX.astype(x_GSD.dtype)
    weight_GSX = routing.chosen_GSX.astype(jnp.float32)
  if dispatch == "dropless" and not _compiler_partitions():
    compute = partial(_dropless, math=math, exchange=exchange, buffer_factor=buffer_factor)
  else:
    (_, S, _), E = x_GSD.shape, w_router_DE.shape[-1]
    C = expert_capacity(S, E, k or weight_GSX.shape[-1], capacity_factor, min_capacity)
    # The compiler can place rows in equal blocks, not in runs: with S slots nothing is dropped.
    C = S if dispatch == "dropless" else C
    compute = partial(
      _in_slots, math=math, capacity=C, priority=priority, one_hot=dispatch == "einsum"
    )
  seed_GS = None if seed_BT is None else regroup(seed_BT, valid_GS.shape)
  chosen = (routing.expert_GSX, routing.chosen_GSX)
  y_GSD, dropped = over_tensor(compute, x_GSD, weight_GSX, chosen, seed_GS, weights)
  return regroup(y_GSD, (B, T, D)), routing, dropped


def _compiler_partitions() -> bool:
  """Whether there are devices to which no `shard_map` gives their own tokens."""
  free = free_axes()
  region = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
  return bool(free) and not (region and free == ["tensor"])


def _dropless(x_GSD, weight_GSX, chosen, seed_GS, weights, *, math, exchange, buffer_factor):
  """All of this device's tokens as one list."""
  flat = lambda a: a.reshape(-1, *a.shape[2:])
  expert_MX, chosen_MX = map(flat, chosen)
  seed_M = None if seed_GS is None else flat(seed_GS)
  choices = Choices(flat(x_GSD), flat(weight_GSX), expert_MX, chosen_MX, seed_M)
  run = lambda rows_RD, size_E, weights, weight_R, seed_R: grouped_expert_mlp(
    rows_RD, size_E, weights, math, weight_R, seed_R
  )
  y_MD, dropped = dropless(choices, weights, run, exchange=exchange, buffer_factor=buffer_factor)
  return y_MD.reshape(x_GSD.shape), dropped


def _in_slots(x_GSD, weight_GSX, chosen, seed_GS, weights, *, math, capacity, priority, one_hot):
  """A fixed number of slots an expert and group."""
  expert_GSX, chosen_GSX = chosen
  E = weights.up_EDF.shape[0] * manual_size("expert")
  with jax.named_scope("dispatch"):
    slots = assign_slots(
      expert_GSX,
      chosen_GSX,
      num_experts=E,
      capacity=capacity,
      priority=priority,
      gate_GS=weight_GSX.max(-1) if priority == "gate" else None,
    )
    # Sharded over groups before, over experts after; without a region the compiler finds that.
    by_expert = lambda rows: rearrange(rows, "g (e c) ... -> e g c ...", e=E)
    rows_EGCD = by_expert((_one_hot_there if one_hot else permute)(x_GSD, slots))
    rows_EGCD = to_experts(constrain(rows_EGCD, "act_expert", "act_batch", None, None))
    numbers = lambda a_GR: to_experts(by_expert(a_GR)).reshape(rows_EGCD.shape[0], -1)
    weight_ER = None if one_hot else numbers(slot_weights(weight_GSX, slots))
    seed_ER = None
    if seed_GS is not None:
      seed_ER = numbers(jax.vmap(row_seeds)(seed_GS, slots.token_GR))
  with jax.named_scope("experts"):
    rows_ERD = rows_EGCD.reshape(rows_EGCD.shape[0], -1, rows_EGCD.shape[-1])
    out_ERD = expert_mlp(rows_ERD, weights, math, weight_ER, seed_ER)
  with jax.named_scope("combine"):
    out_EGCD = from_experts(out_ERD.reshape(rows_EGCD.shape))
    out_EGCD = constrain(out_EGCD, "act_expert", "act_batch", None, None)
    out_GRD = rearrange(out_EGCD, "e g c d -> g (e c) d")
    out_GRD = constrain(out_GRD, "act_batch", None, None)
    y_GSD = _one_hot_back(out_GRD, weight_GSX, slots) if one_hot else unpermute(out_GRD, slots)
    return y_GSD, slots.dropped


def _one_hot_there(x_GSD: jax.Array, slots: Slots) -> jax.Array:
  return jnp.einsum("gsxr,gsd->grd", one_hot_slots(slots, x_GSD.dtype), x_GSD)


def _one_hot_back(out_GRD: jax.Array, weight_GSX: jax.Array, slots: Slots) -> jax.Array:
  mask_GSXR = one_hot_slots(slots, out_GRD.dtype)
  return jnp.einsum("gsxr,gsx,grd->gsd", mask_GSXR, weight_GSX.astype(out_GRD.dtype), out_GRD)


class SwitchMoE(nn.Module):
  """Linen shell: router and expert weights; `x -> (y, MoeStats)`.

  Attributes:
    spec: experts, router, dispatch, coefficients (`layers.spec.MoeSpec`).
    embed_dim: model width D.
    init_spec: initialisers; each expert's fan-in is that of one expert.
    gain: factor on the initial output weights (depth scaling).
  """

  spec: MoeSpec
  embed_dim: int
  init_spec: InitSpec = InitSpec()  # not `init`: every Linen module has that method
  gain: float = 1.0

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    *,
    valid_BT: jax.Array | None = None,
    tokens_BT: jax.Array | None = None,
    key_B: jax.Array | None = None,
    place_T: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[jax.Array, MoeStats]:
    spec, D, (B, T, _) = self.spec, self.embed_dim, x_BTD.shape
    router_init = nn.initializers.normal(self.init_spec.stddev)
    shape, axes = (D, spec.num_experts), ("embed", None)
    w_router_DE = declare(self, "router", shape, axes, router_init, exact=True)
    factor = spec.capacity_factor if train else spec.eval_capacity_factor
    jittered = key_B is not None and spec.jitter > 0
    second_BT = seed_BT = None
    if key_B is not None and spec.router == "gshard":
      second_BT = draw_rows(jax.random.uniform, (T,), fold(key_B, 1), place_T)
    if key_B is not None and spec.expert_dropout > 0:
      seed_BT = draw_rows(jax.random.bits, (T,), fold(key_B, 2), place_T)
    y_BTD, routing, dropped = moe(
      x_BTD,
      w_router_DE,
      self._experts(),
      route=self._route(T, factor, tokens_BT, second_BT),
      router_x_BTD=jitter_BTD(x_BTD, spec.jitter, key_B, place_T) if jittered else None,
      valid_BT=valid_BT,
      seed_BT=seed_BT,
      math=self._math(),
      dispatch=spec.dispatch,
      capacity_factor=factor,
      min_capacity=spec.min_capacity,
      group_size=spec.group_size,
      k=spec.experts_per_token,
      priority=spec.priority,
      scale_input=spec.scale_input,
      exchange=spec.exchange,
      buffer_factor=spec.buffer_factor,
    )
    if spec.router == "no_token_left_behind":  # where no round finds a slot nothing is chosen
      dropped += routing.tokens - jnp.sum(routing.chosen_GSX, dtype=jnp.float32)
    if spec.shared is not None:
      y_BTD += Mlp(spec.shared, D, self.init_spec, self.gain, name="shared")(x_BTD)
    groups_per_row = routing.expert_GSX.shape[0] / B * manual_size("context")
    balance, z = routing.balance / groups_per_row, routing.z / groups_per_row
    return y_BTD, MoeStats(
      aux_loss=spec.balance_loss * balance + spec.z_loss * z,
      balance=balance,
      z=z,
      load_E=routing.load_E,
      dropped=dropped,
      entropy=routing.entropy,
      gate=routing.gate,
      tokens=routing.tokens,
      nonfinite=routing.nonfinite,
    )

  def _route(self, length, factor, tokens_BT, second_BT) -> Callable[..., Routing]:
    """The router that the spec names, with its own arguments."""
    spec, E = self.spec, self.spec.num_experts
    S = group_length(length, spec.group_size)
    C = expert_capacity(S, E, spec.experts_per_token, factor, spec.min_capacity)
    if spec.router == "switch":
      route = switch_route
    elif spec.router == "top_k":
      route = partial(
        top_k_route,
        k=spec.experts_per_token,
        normalize=spec.normalize,
        scores=spec.scores,
        scale=spec.routed_scale,
        num_groups=spec.num_groups,
        keep_groups=spec.keep_groups,
        selection_bias_E=self._bias("selection_bias", trainable=False)
        if spec.bias_rate is not None
        else None,
      )
    elif spec.router == "gshard":
      by_group = lambda x_GSD: None if second_BT is None else regroup(second_BT, x_GSD.shape[:2])
      route = lambda x_GSD, w_DE, **kwargs: gshard_route(
        x_GSD, w_DE, second_GS=by_group(x_GSD), **kwargs
      )
    elif spec.router == "expert_choice":
      route = partial(expert_choice_route, capacity=C)
    elif spec.router == "no_token_left_behind":
      route = partial(no_token_left_behind_route, capacity=C, rounds=spec.experts_per_token)
    elif tokens_BT is None or spec.hash_vocab is None:
      raise ValueError("the hash router needs token ids: pass tokens_BT")
    else:
      table_V = hash_table(spec.hash_vocab, E, seed=0)
      route = lambda x_GSD, w_DE, **kwargs: hash_route(
        x_GSD, w_DE, ids_GS=regroup(tokens_BT, x_GSD.shape[:2]), table_V=table_V, **kwargs
      )
    return partial(route, b_E=self._bias("router_bias")) if spec.router_bias else route

  def _math(self) -> ExpertMath:
    spec, mlp = self.spec, self.spec.expert
    return ExpertMath(
      mlp.activation, mlp.clamp, mlp.up_offset, spec.expert_dropout, spec.implementation
    )

  def _bias(self, name: str, trainable: bool = True) -> jax.Array:
    zeros, E = nn.initializers.zeros, self.spec.num_experts
    return declare(self, name, (E,), (None,), zeros, trainable=trainable, exact=True)

  def _experts(self) -> ExpertWeights:
    E, D, F = self.spec.num_experts, self.embed_dim, self.spec.expert.hidden
    into, out = ("expert", "expert_embed", "expert_mlp"), ("expert", "expert_mlp", "expert_embed")
    init_in, zeros = kernel_init(self.init_spec, D), nn.initializers.zeros
    gated, bias = self.spec.expert.gated, self.spec.expert.bias
    vector = lambda name, dim, axis: (
      declare(self, name, (E, dim), ("expert", axis), zeros) if bias else None
    )
    return ExpertWeights(
      up_EDF=declare(self, "up", (E, D, F), into, init_in),
      down_EFD=declare(self, "down", (E, F, D), out, kernel_init(self.init_spec, F, self.gain)),
      gate_EDF=declare(self, "gate", (E, D, F), into, init_in) if gated else None,
      up_bias_EF=vector("up_bias", F, "expert_mlp"),
      gate_bias_EF=vector("gate_bias", F, "expert_mlp") if gated else None,
      down_bias_ED=vector("down_bias", D, "norm"),  # added to rows that are spread over fsdp
    )
