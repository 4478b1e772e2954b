"""A model as data: frozen, hashable, validated dataclasses.

A model is `ModelSpec(segments=...)`. Each segment repeats a short group of unlike layers and
becomes one `lax.scan`; a prefix or suffix is a segment with `repeats=1`. Nothing here touches an
array: `layers.transformer` reads these values to declare weights and to run them.
"""

from dataclasses import dataclass
from typing import Literal

from .attention_spec import (
  AlibiSpec,
  AttentionSpec,
  BucketedSpec,
  LatentAttentionSpec,
  LinearAttentionSpec,
  LinearScaling,
  Llama3Scaling,
  NormSpec,
  PositionSpec,
  RotarySpec,
  TransformerXLSpec,
  YarnScaling,
  require,
)

__all__ = [
  "Activation", "AlibiSpec", "AttentionSpec", "BucketedSpec", "EmbeddingSpec", "HeadSpec",
  "InitSpec", "LatentAttentionSpec", "LayerSpec", "LearnedPositionSpec", "LinearAttentionSpec",
  "LinearScaling", "Llama3Scaling", "MlpSpec", "ModelSpec", "MoeSpec", "NormSpec", "PositionSpec",
  "RotarySpec", "Router", "Segment", "TransformerXLSpec", "YarnScaling",
]  # fmt: skip

Activation = Literal["relu", "relu2", "gelu", "gelu_tanh", "quick_gelu", "silu"]
Router = Literal["switch", "top_k", "gshard", "expert_choice", "hash", "no_token_left_behind"]


@dataclass(frozen=True)
class MlpSpec:
  """down(act(up x)), or down(act(gate x) * (up x + up_offset)) when gated."""

  hidden: int
  activation: Activation = "silu"
  gated: bool = True
  bias: bool = False
  clamp: float | None = None  # gate <= clamp, |up| <= clamp (gpt-oss)
  up_offset: float = 0.0

  def __post_init__(self):
    require(self.hidden > 0, f"mlp hidden must be positive, got {self.hidden}")
    require(self.gated or self.up_offset == 0.0, "up_offset needs a gated MLP")


@dataclass(frozen=True)
class MoeSpec:
  """Routed experts in place of an MLP (Switch: arXiv 2101.03961)."""

  num_experts: int
  expert: MlpSpec
  experts_per_token: int = 1
  router: Router = "switch"
  scores: Literal["softmax", "sigmoid"] = "softmax"  # top_k: what weights are made of
  normalize: bool = False  # top_k: divide the chosen weights by their sum (Mixtral)
  routed_scale: float = 1.0  # top_k: factor on the weights (DeepSeek-V3: 2.5)
  num_groups: int = 1  # top_k: experts fall into so many groups, of which
  keep_groups: int = 1  # only so many are open to a token (DeepSeek-V3: 4 of 8)
  router_bias: bool = False  # learned, on the router's logits (gpt-oss)
  bias_rate: float | None = None  # top_k: step of a selection bias (DeepSeek-V3: 1e-3)
  hash_vocab: int | None = None  # hash: token ids, each with a fixed expert
  scale_input: bool = False  # the weight multiplies what the expert reads (Llama 4)
  dispatch: Literal["dropless", "capacity", "einsum"] = "dropless"
  capacity_factor: float = 1.25  # training
  eval_capacity_factor: float = 2.0
  min_capacity: int = 4
  group_size: int | None = None  # tokens that compete for slots; None is a whole row
  priority: Literal["choice", "token", "gate"] = "choice"  # who gets a slot first
  noncausal: bool = False  # allow routing that reads later tokens: expert_choice, priority=gate
  jitter: float = 0.01  # router input times U[1 - jitter, 1 + jitter] in training
  expert_dropout: float = 0.0  # on the experts' hidden units
  balance_loss: float = 0.01
  z_loss: float = 0.0
  shared: MlpSpec | None = None  # an expert every token passes, unweighted
  exchange: Literal["auto", "all_to_all", "bounded", "ring"] = "auto"  # dropless over devices
  buffer_factor: float = 2.0  # exchange=bounded: rows beyond so many times the mean are dropped
  implementation: str | None = None  # of the grouped products; None chooses by platform

  def __post_init__(self):
    require(self.num_experts > 0, f"num_experts must be positive, got {self.num_experts}")
    require(
      0 < self.experts_per_token <= self.num_experts,
      f"experts_per_token={self.experts_per_token} must lie in 1..num_experts={self.num_experts}",
    )
    require(
      self.router not in ("switch", "hash") or self.experts_per_token == 1,
      f"the {self.router} router sends a token to one expert; use router=top_k for more",
    )
    require(
      self.router != "gshard" or self.experts_per_token == 2,
      f"the gshard router sends a token to two experts, not {self.experts_per_token}",
    )
    require(
      self.num_experts % self.num_groups == 0 and 0 < self.keep_groups <= self.num_groups,
      f"num_groups={self.num_groups} must divide num_experts={self.num_experts} and "
      f"keep_groups={self.keep_groups} lie in 1..num_groups",
    )
    require(
      self.experts_per_token <= self.keep_groups * (self.num_experts // self.num_groups),
      f"{self.keep_groups} groups of {self.num_experts // self.num_groups} experts are fewer than "
      f"experts_per_token={self.experts_per_token}",
    )
    require(
      (self.router == "hash") == (self.hash_vocab is not None),
      "hash_vocab, the number of token ids, belongs to router=hash, which needs it",
    )
    own = self.scores != "softmax" or self.num_groups > 1 or self.bias_rate is not None
    require(
      self.router == "top_k" or not (own or self.normalize or self.routed_scale != 1.0),
      "scores, normalize, routed_scale, num_groups and bias_rate belong to router=top_k",
    )
    require(
      not self.scale_input or self.experts_per_token == 1,
      "scale_input needs one expert a token: several weights can't multiply one input",
    )
    slots = self.router in ("expert_choice", "no_token_left_behind") or self.priority == "gate"
    require(
      self.dispatch != "dropless" or not slots,
      "expert_choice, no_token_left_behind and priority=gate share out slots: use "
      "dispatch=capacity",
    )
    require(
      self.noncausal or not (self.router == "expert_choice" or self.priority == "gate"),
      "expert_choice and priority=gate let a later token change an earlier one, so a decoder "
      "trained with them can't generate; noncausal=true allows it",
    )
    for name in ("capacity_factor", "eval_capacity_factor", "buffer_factor"):
      require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
    for name in ("jitter", "expert_dropout"):
      value = getattr(self, name)
      require(0 <= value < 1, f"{name} must lie in [0, 1), got {value}")


@dataclass(frozen=True)
class LayerSpec:
  """A residual block: attention, then an MLP or experts."""

  attention: AttentionSpec | LatentAttentionSpec | LinearAttentionSpec
  mlp: MlpSpec | MoeSpec
  norm: NormSpec = NormSpec()
  norm_placement: Literal["pre", "post", "both"] = "pre"  # "both": Gemma's four norms a layer
  parallel: bool = False  # x + attention(norm x) + mlp(norm x), one shared norm
  dropout: float = 0.0  # on what each branch adds to the residual

  def __post_init__(self):
    require(not self.parallel or self.norm_placement == "pre", "a parallel block normalises before")
    require(0 <= self.dropout < 1, f"dropout must lie in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class Segment:
  """A group of layers, repeated; each repeat has weights of its own."""

  layers: tuple[LayerSpec, ...]
  repeats: int = 1

  def __post_init__(self):
    require(len(self.layers) > 0, "a segment needs at least one layer")
    require(self.repeats > 0, f"segment repeats must be positive, got {self.repeats}")


@dataclass(frozen=True)
class LearnedPositionSpec:
  """A table of absolute positions with `length + offset` rows (OPT: offset 2)."""

  length: int
  offset: int = 0


@dataclass(frozen=True)
class EmbeddingSpec:
  """Token table and what happens before the first block."""

  width: int | None = None  # narrower table projected to the model width (OPT-350M)
  scale_by_sqrt_dim: bool = False
  position: LearnedPositionSpec | None = None
  norm: NormSpec | None = None
  dropout: float = 0.0


@dataclass(frozen=True)
class HeadSpec:
  """From the last hidden state to logits."""

  tied: bool = False
  bias: bool = False
  scale: float = 1.0  # factor on the logits
  softcap: float | None = None
  transform: Activation | None = None  # BERT: a biased dense layer with it before the final norm


@dataclass(frozen=True)
class InitSpec:
  """Initialisers. `fan_in`: truncated normal of variance scale / fan_in; `normal`: stddev."""

  kind: Literal["fan_in", "normal"] = "fan_in"
  scale: float = 1.0
  stddev: float = 0.02
  embed_stddev: float = 0.02
  depth_scaled: bool = True  # weights that write to the residual times (2 * layers) ** -0.5


@dataclass(frozen=True)
class ModelSpec:
  """A language model: a decoder, or with attention that is not causal, an encoder."""

  vocab_size: int
  embed_dim: int
  segments: tuple[Segment, ...]
  max_length: int = 2048
  embedding: EmbeddingSpec = EmbeddingSpec()
  final_norm: NormSpec | None = NormSpec()
  head: HeadSpec = HeadSpec()
  init: InitSpec = InitSpec()

  def __post_init__(self):
    for name in ("vocab_size", "embed_dim", "max_length"):
      require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
    require(len(self.segments) > 0, "a model needs at least one segment")
    table = self.embedding.position
    require(
      table is None or table.length >= self.max_length,
      f"max_length={self.max_length} exceeds the position table"
      + (f" of {table.length} rows" if table else ""),
    )
    attentions = [layer.attention for layer in self.layers]
    tables = {
      (a.num_heads, a.position)
      for a in attentions
      if isinstance(a.position, BucketedSpec) and a.position.shared
    }
    require(
      len(tables) <= 1,
      "layers that share a distance-bucket table need equal num_heads and position: "
      f"got {sorted(map(str, tables))}",
    )

  @property
  def layers(self) -> tuple[LayerSpec, ...]:
    """Every layer in order, repeats written out."""
    return tuple(layer for s in self.segments for _ in range(s.repeats) for layer in s.layers)

  @property
  def causal(self) -> bool:
    """Whether no attention sees later tokens, so that the model can learn to predict them."""
    return all(getattr(layer.attention, "causal", True) for layer in self.layers)

  @property
  def num_layers(self) -> int:
    return sum(len(s.layers) * s.repeats for s in self.segments)
