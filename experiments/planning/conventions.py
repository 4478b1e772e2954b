"""FLOPs of a token of training, by the conventions that published figures use.

Model FLOPs (`6nd`, `palm`, `causal`) are what the mathematics takes and give MFU; hardware FLOPs
(`megatron`) are what a machine executes, recomputation included, and give HFU. OPT's 147 and
BLOOM's 150 TFLOP/s a GPU are of the second kind: a figure is printed with its convention's name.
"""

from typing import Literal, get_args

from layers.count import count_params, train_flops_per_token
from layers.spec import AttentionSpec, MlpSpec, ModelSpec

Convention = Literal["6nd", "palm", "causal", "megatron", "megatron recompute"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)


def flops_per_token(spec: ModelSpec, length: int, convention: Convention = "palm") -> float:
  """FLOPs of one token's forward and backward pass in rows of `length`.

  Args:
    convention: "6nd": 6 a parameter that a token passes, both tables counted, attention not.
      "palm": `layers.count.train_flops_per_token`: parameters without an input table that is only
      read, and attention to all keys (arXiv 2204.02311, appendix B). "causal": the same with the
      keys a query sees on average, half of them. "megatron": executed by GPT's layers (arXiv
      2104.04473, section 5.1), "megatron recompute" with every layer's forward pass run twice.

  Raises:
    ValueError: for a model Megatron's formula does not describe.
  """
  match convention:
    case "6nd":
      return 6.0 * count_params(spec).active
    case "palm":
      return train_flops_per_token(spec, length)
    case "causal":
      return train_flops_per_token(spec, length, mean_keys=True)
    case "megatron" | "megatron recompute":
      return _megatron(spec, length, recompute=convention == "megatron recompute")
  raise ValueError(f"FLOP convention {convention!r} is none of {', '.join(CONVENTIONS)}")


def _megatron(spec: ModelSpec, length: int, *, recompute: bool) -> float:
  """24 L h^2 (1 + s / 6h) forward and 6 V h for the logits in all three directions.

  With recomputation that is the paper's 96 L h^2 (1 + s / 6h + V / 16Lh). Without, 72 in place of
  96 is a little low: logits are not recomputed, and so are not saved either.
  """
  h, layers = spec.embed_dim, 0
  for layer in spec.layers:
    if not _is_gpt(layer.attention, layer.mlp, h):
      raise ValueError(
        "Megatron's formula is for dense GPT: as many key as query heads, together as wide as the "
        "model, and an ungated MLP four times as wide; take another convention"
      )
    layers += 1
  passes = 4 if recompute else 3
  return 24.0 * passes * layers * h * h * (1 + length / (6 * h)) + 6.0 * h * spec.vocab_size


def _is_gpt(attention: object, mlp: object, width: int) -> bool:
  return (
    isinstance(attention, AttentionSpec)
    and isinstance(mlp, MlpSpec)
    and attention.kv_heads == attention.num_heads
    and attention.num_heads * attention.head_dim == width
    and not mlp.gated
    and mlp.hidden == 4 * width
  )


def mfu(tokens_per_second: float, flops_per_token: float, chips: float, peak: float) -> float:
  """Share of the chips' peak FLOP/s; HFU where the FLOPs are a hardware figure."""
  return tokens_per_second * flops_per_token / (chips * peak)


def days(flops: float, chips: float, achieved: float) -> float:
  """Of a run, at `achieved` FLOP/s a chip, of the same convention as `flops`."""
  return flops / (chips * achieved) / 86400
