"""Attention as data: norms, positions, and the kinds of attention a layer may have.

Frozen, hashable, validated dataclasses; `layers.spec` has the rest of a model and offers these too.
"""

from dataclasses import dataclass
from typing import Literal

from .masks import parse_mask


def require(condition: bool, message: str) -> None:
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
    require(self.eps > 0, f"norm eps must be positive, got {self.eps}")
    require(self.kind == "layer" or not self.bias, "an RMSNorm has no bias")


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
    require(self.theta > 0, f"rotary theta must be positive, got {self.theta}")
    require(self.dims is None or self.dims % 2 == 0, f"rotary dims must be even, got {self.dims}")


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


def _check_rotary(position: RotarySpec, head_dim: int) -> None:
  dims = position.dims or head_dim
  require(
    dims <= head_dim and dims % 2 == 0,
    f"rotary dims={dims} do not fit an even part of head_dim={head_dim}",
  )


@dataclass(frozen=True)
class AttentionSpec:
  """Self-attention; `num_kv_heads` below `num_heads` gives GQA, 1 gives MQA."""

  num_heads: int
  head_dim: int
  num_kv_heads: int | None = None  # None: as many as query heads
  window: int | None = None  # keys seen, self included: 0 <= i - j < window
  chunk: int | None = None  # keys of the same run of `chunk` positions only
  mask: str | None = None  # `layers.masks` as text: also needed to see a key, Local(9) | Global(4)
  causal: bool = True  # False, in encoders: `mask` alone decides, and none is all keys
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
      require(value is None or value > 0, f"attention {name} must be positive, got {value}")
    require(
      self.num_heads % self.kv_heads == 0,
      f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}",
    )
    back = self.window or self.chunk or isinstance(self.position, AlibiSpec | TransformerXLSpec)
    require(
      self.causal or not back,
      "window, chunk, ALiBi and Transformer-XL look back only: with causal=false use mask",
    )
    heads = parse_mask(self.mask).by_head if self.mask else None
    require(not heads or len(heads) == self.num_heads, f"PerHead needs {self.num_heads} masks")
    if isinstance(self.position, RotarySpec):
      _check_rotary(self.position, self.head_dim)

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
      require(value is None or value > 0, f"latent attention {name} must be positive, got {value}")
    require(
      self.position.dims is None and self.rope_dim % 2 == 0,
      f"rope_dim={self.rope_dim} must be even and is rotated whole: leave position.dims out",
    )

  @property
  def cached(self) -> tuple[tuple[int, int], tuple[int, int]]:
    """(heads, size) of what a position puts into the cache: latent and rotated key, and nothing."""
    return (1, self.kv_lora + self.rope_dim), (1, 0)


@dataclass(frozen=True)
class LinearAttentionSpec:
  """Linear attention: a head keeps one matrix, head_dim x value_dim, in place of keys and values.

  Its kinds (what a token writes and how the matrix fades, see `layers.kernels.linear_attention`):

  - elu: features elu(x) + 1 of queries and keys, normalised (arXiv 2006.16236, equation 7).
  - retention: a constant decay a head, 1 - 2^(-5 - h) (RetNet, arXiv 2307.08621, equation 8).
  - gla: a decay a channel, from the input by a narrow projection (arXiv 2312.06635, section 4.4).
  - delta: the gated delta rule (arXiv 2412.06464, equation 10): normalised queries and keys, a
    decay and a writing strength a head from the input.

  All but elu normalise each head's result and multiply it with a gate, silu(x W).
  """

  kind: Literal["elu", "retention", "gla", "delta"]
  num_heads: int
  head_dim: int  # of queries and keys
  value_dim: int | None = None  # None: head_dim
  position: RotarySpec | None = None  # of a retention; the others know order by their decays
  norm: NormSpec = NormSpec()  # over a head's result
  implementation: str | None = None  # a kernel by name; None chooses by platform
  conv: int = 0  # of a delta rule: tokens that its short convolutions of q, k, v see; 0: none

  def __post_init__(self):
    for name in ("num_heads", "head_dim", "value_dim"):
      value = getattr(self, name)
      require(value is None or value > 0, f"linear attention {name} must be positive, got {value}")
    require(
      self.position is None or self.kind == "retention",
      f"position belongs to kind=retention, not to kind={self.kind}",
    )
    if self.position is not None:
      _check_rotary(self.position, self.head_dim)
    require(
      self.conv == 0 or self.conv > 1,
      f"linear attention conv must be 0 (none) or 2 and more tokens, got {self.conv}",
    )
    require(
      self.conv == 0 or self.kind == "delta", f"conv belongs to kind=delta, not to kind={self.kind}"
    )

  @property
  def value_size(self) -> int:
    return self.head_dim if self.value_dim is None else self.value_dim

  @property
  def state(self) -> tuple[int, int, int]:
    """What a row of the batch keeps: (heads, rows, columns); for elu, a sum of features too."""
    return self.num_heads, self.head_dim, self.value_size + (self.kind == "elu")

  @property
  def conv_inputs(self) -> tuple[tuple[int, int, int], ...]:
    """And of the inputs of its convolutions, for q, k and v: (tokens, heads, size) each."""
    sizes = (self.head_dim, self.head_dim, self.value_size) if self.conv else ()
    return tuple((self.conv - 1, self.num_heads, size) for size in sizes)
