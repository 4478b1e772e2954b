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
from .common import (
  activation,
  activation_name,
  grouped,
  kinds_of_layers,
  norms,
  parts,
  projections,
)
from .gpt2 import TOP

TYPES = ("gpt_neo",)

TABLE = Table(
  layer="transformer.h.{n}.",
  top=TOP,
  layers=(
    *norms("ln_1", "ln_2"),
    *projections("attn.attention.", "out_proj"),
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


def config(spec: ModelSpec, kind: str) -> dict[str, Any]:
  """The config.json of a model like `spec`."""
  attention, mlp = parts(spec, AttentionSpec, MlpSpec)
  first = spec.layers[0]
  types, window = kinds_of_layers(spec)
  named = {"full_attention": "global", "sliding_attention": "local"}
  return {
    "model_type": kind,
    "vocab_size": spec.vocab_size,
    "hidden_size": spec.embed_dim,
    "num_layers": spec.num_layers,
    "num_heads": attention.num_heads,
    "intermediate_size": mlp.hidden,
    "activation_function": activation_name(mlp.activation),
    "max_position_embeddings": spec.max_length,
    "attention_types": [[[named[t] for t in types], 1]],
    "window_size": window or spec.max_length,
    "layer_norm_epsilon": first.norm.eps,
    "tie_word_embeddings": spec.head.tied,
    "resid_dropout": first.dropout,
    "embed_dropout": spec.embedding.dropout,
    "attention_dropout": 0.0,
  }
