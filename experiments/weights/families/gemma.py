"""Gemma 2 and 3 (text): four norms a layer, local and global attention in turn."""

from typing import Any

from layers.spec import (
  AttentionSpec,
  EmbeddingSpec,
  HeadSpec,
  LayerSpec,
  MlpSpec,
  ModelSpec,
  NormSpec,
  RotarySpec,
)

from ..table import rule
from . import llama
from .common import (
  UnlikeError,
  activation,
  activation_name,
  grouped,
  kinds_of_layers,
  parts,
  rope,
  rotary,
  whole,
)

TYPES = ("gemma2", "gemma3_text")

_OTHER = ("mlp_norm/scale",)
TABLE = llama.TABLE._replace(
  layers=(
    *(r for r in llama.TABLE.layers if r.ours != _OTHER),
    rule("attention_post_norm/scale", "post_attention_layernorm.weight"),
    rule("mlp_norm/scale", "pre_feedforward_layernorm.weight"),
    rule("mlp_post_norm/scale", "post_feedforward_layernorm.weight"),
  )
)


def spec(c: dict[str, Any]) -> ModelSpec:
  """Of a config.json."""
  third = c["model_type"] == "gemma3_text"
  norm = NormSpec(eps=float(c.get("rms_norm_eps", 1e-6)), unit_offset=True)
  count = c["num_hidden_layers"]
  period = c.get("sliding_window_pattern", 6) if third else 2
  kinds = c.get("layer_types") or [
    "full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(count)
  ]

  def layer(kind: str) -> LayerSpec:
    local = kind == "sliding_attention"
    attention = AttentionSpec(
      c["num_attention_heads"],
      c.get("head_dim", 256),
      c.get("num_key_value_heads") or c["num_attention_heads"],
      window=c["sliding_window"] if local else None,
      position=_rotary(c, kind),
      qk_norm=norm if third else None,
      scale=float(c["query_pre_attn_scalar"]) ** -0.5,
      softcap=c.get("attn_logit_softcapping"),
      qkv_bias=bool(c.get("attention_bias", False)),
      out_bias=bool(c.get("attention_bias", False)),
    )
    act = c.get("hidden_activation") or c.get("hidden_act") or "gelu_pytorch_tanh"
    return LayerSpec(attention, MlpSpec(c["intermediate_size"], activation(act)), norm, "both")

  return ModelSpec(
    c["vocab_size"],
    c["hidden_size"],
    grouped([layer(kind) for kind in kinds]),
    max_length=c["max_position_embeddings"],
    embedding=EmbeddingSpec(scale_by_sqrt_dim=True),
    final_norm=norm,
    head=HeadSpec(
      tied=bool(c.get("tie_word_embeddings", True)), softcap=c.get("final_logit_softcapping")
    ),
  )


def _rotary(c: dict[str, Any], kind: str) -> RotarySpec:
  """Gemma 3 has frequencies for each kind of layer."""
  said = c.get("rope_parameters") or {}
  if kind in said:
    return rotary({"rope_parameters": said[kind]})
  if c["model_type"] == "gemma3_text" and kind == "sliding_attention":
    return RotarySpec(float(c.get("rope_local_base_freq", 10_000.0)))
  default = 1e6 if c["model_type"] == "gemma3_text" else 1e4
  return rotary(c, theta=default)


def config(spec: ModelSpec, kind: str) -> dict[str, Any]:
  """The config.json of a model like `spec`."""
  attention, mlp = parts(spec, AttentionSpec, MlpSpec)
  types, window = kinds_of_layers(spec)
  own = [layer.attention.position for layer in spec.layers]
  local, everywhere = (
    next((x for x, t in zip(own, types, strict=True) if t == name), own[0])
    for name in ("sliding_attention", "full_attention")
  )
  said = {
    "model_type": kind,
    "vocab_size": spec.vocab_size,
    "hidden_size": spec.embed_dim,
    "intermediate_size": mlp.hidden,
    "num_hidden_layers": spec.num_layers,
    "num_attention_heads": attention.num_heads,
    "num_key_value_heads": attention.kv_heads,
    "head_dim": attention.head_dim,
    "query_pre_attn_scalar": whole((attention.scale or attention.head_dim**-0.5) ** -2),
    "hidden_activation": activation_name(mlp.activation),
    "max_position_embeddings": spec.max_length,
    "layer_types": types,
    "sliding_window": window or spec.max_length,
    "rms_norm_eps": spec.layers[0].norm.eps,
    "attn_logit_softcapping": attention.softcap,
    "final_logit_softcapping": spec.head.softcap,
    "tie_word_embeddings": spec.head.tied,
    "attention_bias": attention.qkv_bias,
    "attention_dropout": 0.0,
    **rope(everywhere),
  }
  if kind == "gemma3_text":
    if not isinstance(local, RotarySpec) or local.scaling is not None:
      raise UnlikeError("local layers have no plain rotary positions")
    said["rope_local_base_freq"] = local.theta
  return said
