"""Mixture of experts: route, dispatch, experts, combine.

B batch, T positions, D model width, F expert width, E experts, X choices a token, C slots.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mesh.collectives import from_experts, manual_size, to_experts
from mesh.constrain import constrain

from .dispatch import assign_slots, expert_capacity, permute, unpermute
from .experts import expert_mlp
from .linear import regroup
from .mlp import Mlp
from .noise import jitter_BTD
from .params import declare, kernel_init
from .router import Routing, switch_route, top_k_route
from .spec import Activation, InitSpec, MoeSpec


class MoeStats(NamedTuple):
  """What a MoE layer reports; all sums over the rows given, so that shards and microbatches add."""

  aux_loss: jax.Array  # weighted losses: mean over groups, times rows
  balance: jax.Array  # load-balancing loss without coefficient: mean over groups, times rows
  z: jax.Array  # router z-loss without coefficient: mean over groups, times rows
  load_E: jax.Array  # choices an expert received
  dropped: jax.Array  # choices without a slot
  entropy: jax.Array  # router entropy in nats, summed over tokens
  gate: jax.Array  # first choice's probability, summed over tokens
  tokens: jax.Array  # valid tokens


class ExpertWeights(NamedTuple):
  """Stacked expert MLP weights; `gate` and biases may be None."""

  up_EDF: jax.Array
  down_EFD: jax.Array
  gate_EDF: jax.Array | None = None
  up_bias_EF: jax.Array | None = None
  gate_bias_EF: jax.Array | None = None
  down_bias_ED: jax.Array | None = None


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
  S = T if group_size is None else min(group_size, T)
  if T % S:
    raise ValueError(f"a row of {T} tokens does not divide into routing groups of {S}")
  G = x_BTD.shape[0] * T // S
  return regroup(x_BTD, (G, S, D)), regroup(valid_BT, (G, S))


def moe(
  x_BTD: jax.Array,
  w_router_DE: jax.Array,
  experts: ExpertWeights,
  *,
  route=switch_route,
  router_x_BTD: jax.Array | None = None,
  valid_BT: jax.Array | None = None,
  capacity_factor: float = 1.25,
  min_capacity: int = 4,
  group_size: int | None = None,
  activation: Activation = "silu",
  clamp: float | None = None,
  up_offset: float = 0.0,
) -> tuple[jax.Array, Routing, jax.Array]:
  """Sparse MLP over tokens; a choice beyond an expert's capacity is dropped and counted.

  Args:
    x_BTD: what the experts see.
    route: `(x_GSD, w_DE, valid_GS=) -> Routing`.
    router_x_BTD: what the router sees (the jittered copy); None is `x_BTD`.
    valid_BT: False for padding, which takes no slot and returns zeros.

  Returns:
    y_BTD in the dtype of x, the Routing, and the number of dropped choices.
  """
  B, T, D = x_BTD.shape
  E = w_router_DE.shape[-1]
  valid_BT = jnp.ones_like(x_BTD[..., 0], bool) if valid_BT is None else valid_BT
  x_GSD, valid_GS = route_groups(x_BTD, valid_BT, group_size)
  router_x_GSD = x_GSD if router_x_BTD is None else regroup(router_x_BTD, x_GSD.shape)
  with jax.named_scope("route"):
    routing = route(router_x_GSD, w_router_DE, valid_GS=valid_GS)
  _, S, X = routing.expert_GSX.shape
  C = expert_capacity(S, E, X, capacity_factor, min_capacity)
  with jax.named_scope("dispatch"):
    slots = assign_slots(routing.expert_GSX, valid_GS, num_experts=E, capacity=C)
    # Sharded over groups before, over experts after; without a region the compiler finds that.
    rows_EGCD = rearrange(permute(x_GSD, slots), "g (e c) d -> e g c d", e=E)
    rows_EGCD = constrain(rows_EGCD, "act_expert", "act_batch", None, None)
    rows_EGCD = to_experts(rows_EGCD)
  with jax.named_scope("experts"):
    out_ERD = expert_mlp(
      rows_EGCD.reshape(rows_EGCD.shape[0], -1, D),
      experts.up_EDF,
      experts.down_EFD,
      w_gate_EDF=experts.gate_EDF,
      b_up_EF=experts.up_bias_EF,
      b_gate_EF=experts.gate_bias_EF,
      b_down_ED=experts.down_bias_ED,
      activation=activation,
      clamp=clamp,
      up_offset=up_offset,
    )
  with jax.named_scope("combine"):
    out_EGCD = from_experts(out_ERD.reshape(rows_EGCD.shape))
    out_EGCD = constrain(out_EGCD, "act_expert", "act_batch", None, None)
    out_GRD = rearrange(out_EGCD, "e g c d -> g (e c) d")
    out_GRD = constrain(out_GRD, "act_batch", None, None)
    y_GSD = unpermute(out_GRD, routing.weight_GSX, slots)
  return regroup(y_GSD, (B, T, D)), routing, slots.dropped


class SwitchMoE(nn.Module):
  """Linen shell: router and expert weights; `x -> (y, MoeStats)`.

  Attributes:
    spec: experts, router, capacity, coefficients (`layers.spec.MoeSpec`).
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
    key_B: jax.Array | None = None,
    place_T: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[jax.Array, MoeStats]:
    spec, D = self.spec, self.embed_dim
    router_init = nn.initializers.normal(self.init_spec.stddev)
    shape, axes = (D, spec.num_experts), ("embed", None)
    w_router_DE = declare(self, "router", shape, axes, router_init, exact=True)
    jittered = key_B is not None and spec.jitter > 0
    route = (
      switch_route
      if spec.router == "switch"
      else partial(top_k_route, k=spec.experts_per_token, normalize=spec.normalize)
    )
    if spec.router_bias:
      zeros = nn.initializers.zeros
      route = partial(route, b_E=declare(self, "router_bias", (spec.num_experts,), (None,), zeros))
    y_BTD, routing, dropped = moe(
      x_BTD,
      w_router_DE,
      self._experts(),
      route=route,
      router_x_BTD=jitter_BTD(x_BTD, spec.jitter, key_B, place_T) if jittered else None,
      valid_BT=valid_BT,
      capacity_factor=spec.capacity_factor if train else spec.eval_capacity_factor,
      min_capacity=spec.min_capacity,
      group_size=spec.group_size,
      activation=spec.expert.activation,
      clamp=spec.expert.clamp,
      up_offset=spec.expert.up_offset,
    )
    if spec.shared is not None:
      y_BTD += Mlp(spec.shared, D, self.init_spec, self.gain, name="shared")(x_BTD)
    groups_per_row = routing.expert_GSX.shape[0] / x_BTD.shape[0] * manual_size("context")
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
    )

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
