"""BLOOM: ALiBi, a norm on the embedding; queries, keys and values of a head lie together."""

from typing import Any

from layers.spec import (
  AlibiSpec,
  AttentionSpec,
  EmbeddingSpec,
  HeadSpec,
  LayerSpec,
  MlpSpec,
  ModelSpec,
  NormSpec,
)

from ...config import ConfigError
from ..table import Table, rule
from .common import grouped, norms, parts

TYPES = ("bloom",)

_QKV = ("attention/query", "attention/key", "attention/value")
_QKV_BIAS = ("attention/query_bias", "attention/key_bias", "attention/value_bias")
TABLE = Table(
  layer="transformer.h.{n}.",
  top=(
    rule("embedding/table", "transformer.word_embeddings.weight"),
    rule("embedding/norm/scale", "transformer.word_embeddings_layernorm.weight"),
    rule("embedding/norm/bias", "transformer.word_embeddings_layernorm.bias"),
    rule("final_norm/scale", "transformer.ln_f.weight"),
    rule("final_norm/bias", "transformer.ln_f.bias"),
    rule("head", "lm_head.weight", "v d -> d v"),
  ),
  layers=(
    *norms("input_layernorm", "post_attention_layernorm"),
    rule(_QKV, "self_attention.query_key_value.weight", "(h p k) d -> p d h k"),
    rule(_QKV_BIAS, "self_attention.query_key_value.bias", "(h p k) -> p h k"),
    rule("attention/out", "self_attention.dense.weight", "d (h k) -> h k d"),
    rule("attention/out_bias", "self_attention.dense.bias"),
    rule("mlp/up", "mlp.dense_h_to_4h.weight", "f d -> d f"),
    rule("mlp/up_bias", "mlp.dense_h_to_4h.bias"),
    rule("mlp/down", "mlp.dense_4h_to_h.weight", "d f -> f d"),
    rule("mlp/down_bias", "mlp.dense_4h_to_h.bias"),
  ),
)


def spec(c: dict[str, Any]) -> ModelSpec:
  """Of a config.json, which names no length: ALiBi has none, 2,048 were trained."""
  if c.get("apply_residual_connection_post_layernorm"):
    raise ConfigError("BLOOM with residuals after the norm is not known")
  norm = NormSpec("layer", eps=float(c.get("layer_norm_epsilon", 1e-5)), bias=True)
  width = c.get("hidden_size") or c["n_embed"]
  heads, layers = c["n_head"], c["n_layer"]
  attention = AttentionSpec(
    heads, width // heads, position=AlibiSpec(), qkv_bias=True, out_bias=True
  )
  mlp = MlpSpec(4 * width, "gelu_tanh", gated=False, bias=True)
  return ModelSpec(
    c["vocab_size"],
    width,
    grouped([LayerSpec(attention, mlp, norm)] * layers),
    max_length=c.get("seq_length", 2048),
    embedding=EmbeddingSpec(norm=norm),
    final_norm=norm,
    head=HeadSpec(tied=bool(c.get("tie_word_embeddings", True))),
  )


def config(spec: ModelSpec, kind: str) -> dict[str, Any]:
  """The config.json of a model like `spec`."""
  attention, _ = parts(spec, AttentionSpec, MlpSpec)
  first = spec.layers[0]
  return {
    "model_type": kind,
    "vocab_size": spec.vocab_size,
    "hidden_size": spec.embed_dim,
    "n_layer": spec.num_layers,
    "n_head": attention.num_heads,
    "layer_norm_epsilon": first.norm.eps,
    "seq_length": spec.max_length,
    "tie_word_embeddings": spec.head.tied,
    "hidden_dropout": first.dropout,
    "attention_dropout": 0.0,
  }
