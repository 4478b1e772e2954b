"""GPT-Neo: global and local layers in turn, no factor on the logits."""

from dataclasses import replace
from typing import Any

from layers.spec import (
  AttentionSpec,
  EmbeddingSpec,
  HeadSpec,
  LayerSpec,
  LearnedPositionSpec,
  MlpSpec,
  ModelSpec,
  NormSpec,
)

from ..table import Table, rule
from .common import activation, grouped

TYPES = ("gpt_neo",)

TABLE = Table(
  layer="transformer.h.{n}.",
  top=(
    rule("embedding/table", "transformer.wte.weight"),
    rule("embedding/position_table", "transformer.wpe.weight"),
    rule("final_norm/scale", "transformer.ln_f.weight"),
    rule("final_norm/bias", "transformer.ln_f.bias"),
    rule("head", "lm_head.weight", "v d -> d v"),
  ),
  layers=(
    rule("attention_norm/scale", "ln_1.weight"),
    rule("attention_norm/bias", "ln_1.bias"),
    rule("attention/query", "attn.attention.q_proj.weight", "(h k) d -> d h k"),
    rule("attention/key", "attn.attention.k_proj.weight", "(h k) d -> d h k"),
    rule("attention/value", "attn.attention.v_proj.weight", "(h k) d -> d h k"),
    rule("attention/out", "attn.attention.out_proj.weight", "d (h k) -> h k d"),
    rule("attention/out_bias", "attn.attention.out_proj.bias"),
    rule("mlp_norm/scale", "ln_2.weight"),
    rule("mlp_norm/bias", "ln_2.bias"),
    rule("mlp/up", "mlp.c_fc.weight", "f d -> d f"),
    rule("mlp/up_bias", "mlp.c_fc.bias"),
    rule("mlp/down", "mlp.c_proj.weight", "d f -> f d"),
    rule("mlp/down_bias", "mlp.c_proj.bias"),
  ),
  ignored=(".attn.attention.bias", ".attn.attention.masked_bias"),
)


def spec(c: dict[str, Any]) -> ModelSpec:
  """Of a config.json."""
  norm = NormSpec("layer", eps=float(c.get("layer_norm_epsilon", 1e-5)), bias=True)
  width, heads, length = c["hidden_size"], c["num_heads"], c["max_position_embeddings"]
  attention = AttentionSpec(heads, width // heads, out_bias=True, scale=1.0)
  act = activation(c.get("activation_function", "gelu_new"))
  mlp = MlpSpec(c.get("intermediate_size") or 4 * width, act, gated=False, bias=True)
  local = replace(attention, window=c["window_size"])
  kinds = [kind for group, count in c["attention_types"] for _ in range(count) for kind in group]
  layers = [LayerSpec(local if kind == "local" else attention, mlp, norm) for kind in kinds]
  return ModelSpec(
    c["vocab_size"],
    width,
    grouped(layers),
    max_length=length,
    embedding=EmbeddingSpec(position=LearnedPositionSpec(length)),
    final_norm=norm,
    head=HeadSpec(tied=bool(c.get("tie_word_embeddings", True))),
  )
