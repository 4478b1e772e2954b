"""LLaMA 1 to 3, Mistral, SmolLM2, Qwen3: grouped attention, rotary positions, gated SiLU."""

from typing import Any

from layers.spec import AttentionSpec, HeadSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec

from ..table import Table, rule
from .common import activation, grouped, rotary

TYPES = ("llama", "mistral", "qwen3")

_ATTENTION = (
  rule("attention_norm/scale", "input_layernorm.weight"),
  rule("attention/query", "self_attn.q_proj.weight", "(h k) d -> d h k"),
  rule("attention/key", "self_attn.k_proj.weight", "(h k) d -> d h k"),
  rule("attention/value", "self_attn.v_proj.weight", "(h k) d -> d h k"),
  rule("attention/out", "self_attn.o_proj.weight", "d (h k) -> h k d"),
  rule("attention/query_bias", "self_attn.q_proj.bias", "(h k) -> h k"),
  rule("attention/key_bias", "self_attn.k_proj.bias", "(h k) -> h k"),
  rule("attention/value_bias", "self_attn.v_proj.bias", "(h k) -> h k"),
  rule("attention/out_bias", "self_attn.o_proj.bias"),
  rule("attention/query_norm/scale", "self_attn.q_norm.weight"),
  rule("attention/key_norm/scale", "self_attn.k_norm.weight"),
  rule("mlp_norm/scale", "post_attention_layernorm.weight"),
)
_MLP = (
  rule("mlp/gate", "mlp.gate_proj.weight", "f d -> d f"),
  rule("mlp/up", "mlp.up_proj.weight", "f d -> d f"),
  rule("mlp/down", "mlp.down_proj.weight", "d f -> f d"),
)
TABLE = Table(
  layer="model.layers.{n}.",
  top=(
    rule("embedding/table", "model.embed_tokens.weight"),
    rule("final_norm/scale", "model.norm.weight"),
    rule("head", "lm_head.weight", "v d -> d v"),
  ),
  layers=_ATTENTION + _MLP,
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
