"""GPT-2: one matrix for queries, keys and values, which lies as ours do."""

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
from .common import activation, activation_name, grouped, norms, parts

TYPES = ("gpt2",)

TOP = (
  rule("embedding/table", "transformer.wte.weight"),
  rule("embedding/position_table", "transformer.wpe.weight"),
  rule("final_norm/scale", "transformer.ln_f.weight"),
  rule("final_norm/bias", "transformer.ln_f.bias"),
  rule("head", "lm_head.weight", "v d -> d v"),
)

_QKV = ("attention/query", "attention/key", "attention/value")
_QKV_BIAS = ("attention/query_bias", "attention/key_bias", "attention/value_bias")
TABLE = Table(
  layer="transformer.h.{n}.",
  top=TOP,
  layers=(
    *norms("ln_1", "ln_2"),
    rule(_QKV, "attn.c_attn.weight", "d (p h k) -> p d h k"),
    rule(_QKV_BIAS, "attn.c_attn.bias", "(p h k) -> p h k"),
    rule("attention/out", "attn.c_proj.weight", "(h k) d -> h k d"),
    rule("attention/out_bias", "attn.c_proj.bias"),
    rule("mlp/up", "mlp.c_fc.weight"),
    rule("mlp/up_bias", "mlp.c_fc.bias"),
    rule("mlp/down", "mlp.c_proj.weight"),
    rule("mlp/down_bias", "mlp.c_proj.bias"),
  ),
  ignored=(".attn.bias", ".attn.masked_bias"),
)


def spec(c: dict[str, Any]) -> ModelSpec:
  """Of a config.json."""
  norm = NormSpec("layer", eps=float(c.get("layer_norm_epsilon", 1e-5)), bias=True)
  width, heads, length = c["n_embd"], c["n_head"], c["n_positions"]
  attention = AttentionSpec(heads, width // heads, qkv_bias=True, out_bias=True)
  act = activation(c.get("activation_function", "gelu_new"))
  mlp = MlpSpec(c.get("n_inner") or 4 * width, act, gated=False, bias=True)
  return ModelSpec(
    c["vocab_size"],
    width,
    grouped([LayerSpec(attention, mlp, norm)] * c["n_layer"]),
    max_length=length,
    embedding=EmbeddingSpec(position=LearnedPositionSpec(length)),
    final_norm=norm,
    head=HeadSpec(tied=bool(c.get("tie_word_embeddings", True))),
  )


def config(spec: ModelSpec, kind: str) -> dict[str, Any]:
  """The config.json of a model like `spec`."""
  attention, mlp = parts(spec, AttentionSpec, MlpSpec)
  first = spec.layers[0]
  return {
    "model_type": kind,
    "vocab_size": spec.vocab_size,
    "n_embd": spec.embed_dim,
    "n_layer": spec.num_layers,
    "n_head": attention.num_heads,
    "n_positions": spec.max_length,
    "n_inner": mlp.hidden,
    "activation_function": activation_name(mlp.activation),
    "layer_norm_epsilon": first.norm.eps,
    "tie_word_embeddings": spec.head.tied,
    "resid_pdrop": first.dropout,
    "embd_pdrop": spec.embedding.dropout,
    "attn_pdrop": 0.0,
  }
