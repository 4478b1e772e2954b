"""What a layer's tensors measure: those a backward pass keeps, and those a layer works with.

From the spec alone; sizes are of the whole batch, and logical axes say how a mesh cuts them.

B rows, T positions, D model width, N heads, K key/value heads, H head size, F hidden width, E
experts.
"""

from typing import NamedTuple

from layers.dispatch import expert_capacity
from layers.moe import group_length
from layers.spec import (
  AttentionSpec,
  LatentAttentionSpec,
  LayerSpec,
  LinearAttentionSpec,
  MlpSpec,
  MoeSpec,
)

from ..training.setup import Setup

LANES = 128  # of a TPU's registers: what an array's last dim is padded to


class Tensor(NamedTuple):
  """An array of a layer."""

  name: str  # what `train.remat` calls it; "" has no name
  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  itemsize: int = 2


ROWS = ("act_batch", "act_seq")


def layer_input(B: int, T: int, D: int) -> Tensor:
  """What each layer keeps whatever the policy."""
  return Tensor("", (B, T, D), ("act_batch", "act_norm_seq", "act_embed"))


def in_runs(setup: Setup) -> bool:
  """Whether dropless experts get runs of rows of any length, or a slot for every token each.

  The compiler places rows in equal blocks alone: on a mesh with nothing but `tensor`, or with
  Explicit axes and `tensor` (mesh/region.py, layers/moe.py).
  """
  sizes = setup.mesh.shape
  tensor, others = sizes["tensor"] > 1, any(n > 1 for a, n in sizes.items() if a != "tensor")
  if setup.config.mesh.axis_types == "explicit":
    return not tensor
  return others or not tensor


def named(layer: LayerSpec, B: int, T: int, D: int, *, in_runs: bool = True) -> list[Tensor]:
  """Every tensor of a layer that a policy can name, and that its backward pass has a use for."""
  branch = lambda name: Tensor(name, (B, T, D), ("act_batch", "act_norm_seq", "act_embed"))
  mlp = layer.mlp
  found = _attention(layer.attention, B, T)
  if not layer.parallel:  # what the MLP reads is their sum with the layer's input
    found.append(branch("attention_branch"))
  if layer.norm_placement != "pre":  # what a norm reads
    found.append(branch("mlp_branch"))
  if isinstance(mlp, MlpSpec):
    return found + _mlp(mlp, B, T)
  if mlp.shared is not None:
    found += _mlp(mlp.shared, B, T)
  rows = expert_rows(mlp, B, T, in_runs=in_runs)
  hidden = lambda name: Tensor(name, (rows, mlp.expert.hidden), ("act_batch", "expert_mlp"))
  found += [Tensor("router_logits", (B, T, mlp.num_experts), (*ROWS, None), 4), hidden("expert_up")]
  return found + ([hidden("expert_gate")] if mlp.expert.gated else [])


def expert_rows(moe: MoeSpec, B: int, T: int, *, in_runs: bool = True) -> int:
  """Rows that experts compute, padding of slots included."""
  if moe.dispatch == "dropless":
    return B * T * (moe.experts_per_token if in_runs else moe.num_experts)
  S = group_length(T, moe.group_size)
  slots = expert_capacity(
    S, moe.num_experts, moe.experts_per_token, moe.capacity_factor, moe.min_capacity
  )
  return B * (T // S) * moe.num_experts * slots


def _mlp(mlp: MlpSpec, B: int, T: int) -> list[Tensor]:
  hidden = lambda name: Tensor(name, (B, T, mlp.hidden), (*ROWS, "act_mlp"))
  return [hidden("mlp_up"), *([hidden("mlp_gate")] if mlp.gated else [])]


def _attention(spec, B: int, T: int) -> list[Tensor]:
  heads = lambda name, n, size, kind="act_heads": Tensor(
    name, (B, T, n, _lanes(size)), (*ROWS, kind, None)
  )
  N = spec.num_heads
  if isinstance(spec, AttentionSpec):
    H, K = spec.head_dim, spec.kv_heads
    value = Tensor("value", (B, T, K * H), (*ROWS, "act_kv_heads"))
    return [heads("query", N, H), heads("key", K, H, "act_kv_heads"), value, *_results(N, H, B, T)]
  if isinstance(spec, LatentAttentionSpec):
    widths = (spec.kv_lora, spec.rope_dim, *([spec.q_lora] if spec.q_lora else []))
    latents = [Tensor("latent", (B, T, width), (*ROWS, None)) for width in widths]
    query = heads("query", N, spec.nope_dim + spec.rope_dim)
    keys = [heads("key", N, spec.nope_dim), heads("value", N, spec.value_dim)]
    return [query, *latents, *keys, *_results(N, spec.value_dim, B, T)]
  assert isinstance(spec, LinearAttentionSpec), spec
  H, U = spec.head_dim, spec.value_size
  same = [heads("query", N, H), heads("key", N, H), heads("value", N, U)]
  return [*same, heads("attention_out", N, U), heads("gate", N, U)]


def _results(N: int, U: int, B: int, T: int) -> list[Tensor]:
  """As layers name them, and as kernels do: heads before positions."""
  return [
    Tensor("attention_out", (B, T, N * U), (*ROWS, "act_heads")),
    Tensor("attention_out", (B, N, T, _lanes(U)), ("act_batch", "act_heads", "act_seq", None)),
    Tensor("attention_lse", (B, N, 1, T), ("act_batch", "act_heads", None, "act_seq"), 4),
  ]


def _lanes(size: int) -> int:
  """As kernels read heads."""
  return -(-size // LANES) * LANES
