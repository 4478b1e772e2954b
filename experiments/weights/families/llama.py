"""LLaMA 1 to 3, Mistral, SmolLM2, Qwen3: grouped attention, rotary positions, gated SiLU."""

from typing import Any

from layers.spec import (
  AttentionSpec,
  HeadSpec,
  LayerSpec,
  MlpSpec,
  ModelSpec,
  MoeSpec,
  NormSpec,
)

from ..table import Table, rule
from .common import (
  activation,
  activation_name,
  gated,
  grouped,
  kinds_of_layers,
  parts,
  projections,
  rope,
  rotary,
)

TYPES = ("llama", "mistral", "qwen3")

_ATTENTION = (
  rule("attention_norm/scale", "input_layernorm.weight"),
  *projections("self_attn.", "o_proj"),
  rule("attention/query_norm/scale", "self_attn.q_norm.weight"),
  rule("attention/key_norm/scale", "self_attn.k_norm.weight"),
  rule("mlp_norm/scale", "post_attention_layernorm.weight"),
)
TABLE = Table(
  layer="model.layers.{n}.",
  top=(
    rule("embedding/table", "model.embed_tokens.weight"),
    rule("final_norm/scale", "model.norm.weight"),
    rule("head", "lm_head.weight", "v d -> d v"),
  ),
  layers=_ATTENTION + gated("mlp."),
  ignored=("rotary_emb.inv_freq",),
)


def spec(c: dict[str, Any]) -> ModelSpec:
  """Of a config.json."""
  norm = NormSpec(eps=float(c.get("rms_norm_eps", 1e-6)))
  heads, width = c["num_attention_heads"], c["hidden_size"]
  own = c["model_type"] == "qwen3"
  bias = bool(c.get("attention_bias", False))
  types = c.get("layer_types") or []
  window = c.get("sliding_window") if c.get("use_sliding_window", True) else None

  def layer(i: int) -> LayerSpec:
    local = types[i] == "sliding_attention" if types else c["model_type"] == "mistral"
    attention = AttentionSpec(
      heads,
      c.get("head_dim") or width // heads,
      c.get("num_key_value_heads") or heads,
      window=window if local else None,
      position=rotary(c),
      qkv_bias=bias,
      out_bias=bias,
      qk_norm=norm if own else None,
    )
    gate = activation(c.get("hidden_act", "silu"))
    return LayerSpec(attention, MlpSpec(c["intermediate_size"], gate), norm)

  return ModelSpec(
    c["vocab_size"],
    width,
    grouped([layer(i) for i in range(c["num_hidden_layers"])]),
    max_length=c["max_position_embeddings"],
    final_norm=norm,
    head=HeadSpec(tied=bool(c.get("tie_word_embeddings", False))),
  )


def config(spec: ModelSpec, kind: str) -> dict[str, Any]:
  """The config.json of a model like `spec`; of one with experts, what is not about them."""
  attention, mlp = parts(spec, AttentionSpec, MlpSpec | MoeSpec)
  mlp = mlp.expert if isinstance(mlp, MoeSpec) else mlp
  types, window = kinds_of_layers(spec)
  said = {
    "model_type": kind,
    "vocab_size": spec.vocab_size,
    "hidden_size": spec.embed_dim,
    "intermediate_size": mlp.hidden,
    "num_hidden_layers": spec.num_layers,
    "num_attention_heads": attention.num_heads,
    "num_key_value_heads": attention.kv_heads,
    "head_dim": attention.head_dim,
    "hidden_act": activation_name(mlp.activation),
    "max_position_embeddings": spec.max_length,
    "rms_norm_eps": spec.layers[0].norm.eps,
    "tie_word_embeddings": spec.head.tied,
    "attention_bias": attention.qkv_bias,
    "attention_dropout": 0.0,
    **rope(attention.position),
  }
  if kind == "mistral":
    del said["attention_bias"]  # it has none, whatever is said
    said["sliding_window"] = window
  if kind == "qwen3":
    said |= {"layer_types": types, "sliding_window": window, "use_sliding_window": bool(window)}
  return said
