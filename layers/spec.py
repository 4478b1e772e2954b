"""A model as data: frozen, hashable, validated dataclasses.

A decoder is `ModelSpec(segments=...)`. Each segment repeats a short group of unlike layers and
becomes one `lax.scan`; a prefix or suffix is a segment with `repeats=1`. Nothing here touches an
array: `layers.transformer` reads these values to declare weights and to run them.
"""

from dataclasses import dataclass
from typing import Literal

from .masks import parse_mask

Activation = Literal["relu", "relu2", "gelu", "gelu_tanh", "quick_gelu", "silu"]
Router = Literal["switch", "top_k", "gshard", "expert_choice", "hash", "no_token_left_behind"]


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ValueError(message)


@dataclass(frozen=True)
class NormSpec:
  """RMSNorm or LayerNorm over the model width."""

  kind: Literal["rms", "layer"] = "rms"
  eps: float = 1e-6
  bias: bool = False  # LayerNorm's additive term
  unit_offset: bool = False  # the stored weight is w - 1 (Gemma)

  def __post_init__(self):
    _require(self.eps > 0, f"norm eps must be positive, got {self.eps}")
    _require(self.kind == "layer" or not self.bias, "an RMSNorm has no bias")


@dataclass(frozen=True)
class LinearScaling:
  """Rotary positions divided by `factor` (position interpolation)."""

  factor: float


@dataclass(frozen=True)
class Llama3Scaling:
  """Llama 3.1: long wavelengths divided by `factor`, short ones kept, linear blend between."""

  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_length: int = 8192


@dataclass(frozen=True)
class YarnScaling:
  """YaRN (arXiv 2309.00071). `attention_factor=None` means 0.1 ln(factor) + 1."""

  factor: float
  original_length: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  truncate: bool = True  # round the band limits to whole dims (gpt-oss does not)


@dataclass(frozen=True)
class RotarySpec:
  """Rotary positions on the first `dims` of each head (all of them when None)."""

  theta: float = 10_000.0
  dims: int | None = None
  interleaved: bool = False  # pairs (0,1),(2,3).. as in GPT-J; otherwise rotate-half
  scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None

  def __post_init__(self):
    _require(self.theta > 0, f"rotary theta must be positive, got {self.theta}")
    _require(self.dims is None or self.dims % 2 == 0, f"rotary dims must be even, got {self.dims}")


@dataclass(frozen=True)
class AlibiSpec:
  """ALiBi: a fixed slope a head times the distance (arXiv 2108.12409)."""


@dataclass(frozen=True)
class TransformerXLSpec:
  """Relative positions of Transformer-XL (arXiv 1901.02860): sinusoids projected to keys."""

  biases: bool = True  # the learned u and v added to the queries


@dataclass(frozen=True)
class BucketedSpec:
  """T5's learned bias a head and distance bucket. `shared`: one table for the whole model."""

  num_buckets: int = 32
  max_distance: int = 128
  bidirectional: bool = False
  shared: bool = True


PositionSpec = RotarySpec | AlibiSpec | TransformerXLSpec | BucketedSpec


@dataclass(frozen=True)
class AttentionSpec:
  """Causal self-attention; `num_kv_heads` below `num_heads` gives GQA, 1 gives MQA."""

  num_heads: int
  head_dim: int
  num_kv_heads: int | None = None  # None: as many as query heads
  window: int | None = None  # keys seen, self included: 0 <= i - j < window
  chunk: int | None = None  # keys of the same run of `chunk` positions only
  mask: str | None = None  # `layers.masks` as text: also needed to see a key, Local(9) | Global(4)
  position: PositionSpec | None = None
  qkv_bias: bool = False
  out_bias: bool = False
  qk_norm: NormSpec | None = None  # over head_dim, before the rotation
  scale: float | None = None  # logit factor; None is head_dim ** -0.5
  softcap: float | None = None  # c * tanh(logit / c)
  sink: bool = False  # one learned logit a head in the denominator (gpt-oss)
  implementation: str | None = None  # a kernel by name; None chooses by platform

  def __post_init__(self):
    for name in ("num_heads", "head_dim", "num_kv_heads", "window", "chunk"):
      value = getattr(self, name)
      _require(value is None or value > 0, f"attention {name} must be positive, got {value}")
    _require(
      self.num_heads % self.kv_heads == 0,
      f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}",
    )
    heads = parse_mask(self.mask).by_head if self.mask else None
    _require(not heads or len(heads) == self.num_heads, f"PerHead needs {self.num_heads} masks")
    if isinstance(self.position, RotarySpec):
      dims = self.position.dims or self.head_dim
      _require(
        dims <= self.head_dim and dims % 2 == 0,
        f"rotary dims={dims} do not fit an even part of head_dim={self.head_dim}",
      )

  @property
  def kv_heads(self) -> int:
    return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

  @property
  def cached(self) -> tuple[tuple[int, int], tuple[int, int]]:
    """(heads, size) of what a position's key and value put into the cache."""
    return (self.kv_heads, self.head_dim), (self.kv_heads, self.head_dim)


@dataclass(frozen=True)
class LatentAttentionSpec:
  """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

  Keys and values of all heads come from one latent a token; one rotated key is shared by all.
  """

  num_heads: int
  kv_lora: int  # width of the latent behind keys and values
  nope_dim: int  # part of a query or key head without position
  rope_dim: int  # part that is rotated
  value_dim: int
  q_lora: int | None = None  # width of the latent behind queries; None: straight from the input
  position: RotarySpec = RotarySpec(interleaved=True)
  norm: NormSpec = NormSpec()  # over each latent
  scale: float | None = None  # logit factor; None is (nope_dim + rope_dim) ** -0.5
  implementation: str | None = None  # as in AttentionSpec

  def __post_init__(self):
    for name in ("num_heads", "kv_lora", "nope_dim", "rope_dim", "value_dim", "q_lora"):
      value = getattr(self, name)
      _require(value is None or value > 0, f"latent attention {name} must be positive, got {value}")
    _require(
      self.position.dims is None and self.rope_dim % 2 == 0,
      f"rope_dim={self.rope_dim} must be even and is rotated whole: leave position.dims out",
    )

  @property
  def cached(self) -> tuple[tuple[int, int], tuple[int, int]]:
    """(heads, size) of what a position puts into the cache: rotated key, latent."""
    return (1, self.rope_dim), (1, self.kv_lora)


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
    _require(self.hidden > 0, f"mlp hidden must be positive, got {self.hidden}")
    _require(self.gated or self.up_offset == 0.0, "up_offset needs a gated MLP")


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
    _require(self.num_experts > 0, f"num_experts must be positive, got {self.num_experts}")
    _require(
      0 < self.experts_per_token <= self.num_experts,
      f"experts_per_token={self.experts_per_token} must lie in 1..num_experts={self.num_experts}",
    )
    _require(
      self.router not in ("switch", "hash") or self.experts_per_token == 1,
      f"the {self.router} router sends a token to one expert; use router=top_k for more",
    )
    _require(
      self.router != "gshard" or self.experts_per_token == 2,
      f"the gshard router sends a token to two experts, not {self.experts_per_token}",
    )
    _require(
      self.num_experts % self.num_groups == 0 and 0 < self.keep_groups <= self.num_groups,
      f"num_groups={self.num_groups} must divide num_experts={self.num_experts} and "
      f"keep_groups={self.keep_groups} lie in 1..num_groups",
    )
    _require(
      self.experts_per_token <= self.keep_groups * (self.num_experts // self.num_groups),
      f"{self.keep_groups} groups of {self.num_experts // self.num_groups} experts are fewer than "
      f"experts_per_token={self.experts_per_token}",
    )
    _require(
      (self.router == "hash") == (self.hash_vocab is not None),
      "hash_vocab, the number of token ids, belongs to router=hash, which needs it",
    )
    own = self.scores != "softmax" or self.num_groups > 1 or self.bias_rate is not None
    _require(
      self.router == "top_k" or not (own or self.normalize or self.routed_scale != 1.0),
      "scores, normalize, routed_scale, num_groups and bias_rate belong to router=top_k",
    )
    _require(
      not self.scale_input or self.experts_per_token == 1,
      "scale_input needs one expert a token: several weights can't multiply one input",
    )
    slots = self.router in ("expert_choice", "no_token_left_behind") or self.priority == "gate"
    _require(
      self.dispatch != "dropless" or not slots,
      "expert_choice, no_token_left_behind and priority=gate share out slots: use "
      "dispatch=capacity",
    )
    _require(
      self.noncausal or not (self.router == "expert_choice" or self.priority == "gate"),
      "expert_choice and priority=gate let a later token change an earlier one, so a decoder "
      "trained with them can't generate; noncausal=true allows it",
    )
    for name in ("capacity_factor", "eval_capacity_factor", "buffer_factor"):
      _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
    for name in ("jitter", "expert_dropout"):
      value = getattr(self, name)
      _require(0 <= value < 1, f"{name} must lie in [0, 1), got {value}")


@dataclass(frozen=True)
class LayerSpec:
  """A residual block: attention, then an MLP or experts."""

  attention: AttentionSpec | LatentAttentionSpec
  mlp: MlpSpec | MoeSpec
  norm: NormSpec = NormSpec()
  norm_placement: Literal["pre", "post", "both"] = "pre"  # "both": Gemma's four norms a layer
  parallel: bool = False  # x + attention(norm x) + mlp(norm x), one shared norm
  dropout: float = 0.0  # on what each branch adds to the residual

  def __post_init__(self):
    _require(
      not self.parallel or self.norm_placement == "pre", "a parallel block normalises before"
    )
    _require(0 <= self.dropout < 1, f"dropout must lie in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class Segment:
  """A group of layers, repeated; each repeat has weights of its own."""

  layers: tuple[LayerSpec, ...]
  repeats: int = 1

  def __post_init__(self):
    _require(len(self.layers) > 0, "a segment needs at least one layer")
    _require(self.repeats > 0, f"segment repeats must be positive, got {self.repeats}")


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
  """A decoder-only language model."""

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
      _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
    _require(len(self.segments) > 0, "a model needs at least one segment")
    table = self.embedding.position
    _require(
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
    _require(
      len(tables) <= 1,
      "layers that share a distance-bucket table need equal num_heads and position: "
      f"got {sorted(map(str, tables))}",
    )

  @property
  def layers(self) -> tuple[LayerSpec, ...]:
    """Every layer in order, repeats written out."""
    return tuple(layer for s in self.segments for _ in range(s.repeats) for layer in s.layers)

  @property
  def num_layers(self) -> int:
    return sum(len(s.layers) * s.repeats for s in self.segments)
