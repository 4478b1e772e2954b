"""OPT: learned positions from row 2 on, ReLU; 350m normalises after the sums."""

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

from ...config import ConfigError
from ..table import Table, rule
from .common import activation, activation_name, grouped, norms, parts, projections

TYPES = ("opt",)

TABLE = Table(
  layer="model.decoder.layers.{n}.",
  top=(
    rule("embedding/table", "model.decoder.embed_tokens.weight"),
    rule("embedding/position_table", "model.decoder.embed_positions.weight"),
    rule("embedding/project_in", "model.decoder.project_in.weight", "d w -> w d"),
    rule("embedding/project_out", "model.decoder.project_out.weight", "w d -> d w"),
    rule("final_norm/scale", "model.decoder.final_layer_norm.weight"),
    rule("final_norm/bias", "model.decoder.final_layer_norm.bias"),
    rule("head", "lm_head.weight", "v d -> d v"),
  ),
  layers=(
    *norms("self_attn_layer_norm", "final_layer_norm"),
    *projections("self_attn.", "out_proj"),
    rule("mlp/up", "fc1.weight", "f d -> d f"),
    rule("mlp/up_bias", "fc1.bias"),
    rule("mlp/down", "fc2.weight", "d f -> f d"),
    rule("mlp/down_bias", "fc2.bias"),
  ),
)


def spec(c: dict[str, Any]) -> ModelSpec:
  """Of a config.json."""
  if not c.get("enable_bias", True) or not c.get("layer_norm_elementwise_affine", True):
    raise ConfigError("OPT without biases or norm weights is not known")
  norm = NormSpec("layer", eps=1e-5, bias=True)
  width, heads, length = c["hidden_size"], c["num_attention_heads"], c["max_position_embeddings"]
  attention = AttentionSpec(heads, width // heads, qkv_bias=True, out_bias=True)
  act = activation(c.get("activation_function", "relu"))
  layer = LayerSpec(attention, MlpSpec(c["ffn_dim"], act, gated=False, bias=True), norm)
  before = c.get("do_layer_norm_before", True)
  narrow = c.get("word_embed_proj_dim", width)
  return ModelSpec(
    c["vocab_size"],
    width,
    grouped([layer if before else replace(layer, norm_placement="post")] * c["num_hidden_layers"]),
    max_length=length,
    embedding=EmbeddingSpec(
      width=narrow if narrow != width else None, position=LearnedPositionSpec(length, offset=2)
    ),
    final_norm=norm if before and not c.get("_remove_final_layer_norm", False) else None,
    head=HeadSpec(tied=bool(c.get("tie_word_embeddings", True))),
  )


def config(spec: ModelSpec, kind: str) -> dict[str, Any]:
  """The config.json of a model like `spec`."""
  attention, mlp = parts(spec, AttentionSpec, MlpSpec)
  first = spec.layers[0]
  before = first.norm_placement == "pre"
  bare = {"_remove_final_layer_norm": True} if before and spec.final_norm is None else {}
  return {
    "model_type": kind,
    "vocab_size": spec.vocab_size,
    "hidden_size": spec.embed_dim,
    "word_embed_proj_dim": spec.embedding.width or spec.embed_dim,
    "num_hidden_layers": spec.num_layers,
    "num_attention_heads": attention.num_heads,
    "ffn_dim": mlp.hidden,
    "activation_function": activation_name(mlp.activation),
    "max_position_embeddings": spec.max_length,
    "do_layer_norm_before": before,
    **bare,
    "tie_word_embeddings": spec.head.tied,
    "dropout": first.dropout,
    "attention_dropout": 0.0,
  }
