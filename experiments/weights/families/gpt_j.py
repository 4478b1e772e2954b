"""GPT-J: attention and MLP side by side, interleaved rotation of part of a head."""

from typing import Any

from layers.spec import AttentionSpec, HeadSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec, RotarySpec

from ..table import Table, rule
from .common import UnlikeError, activation, activation_name, grouped, parts, projections
from .gpt2 import TOP

TYPES = ("gptj",)

TABLE = Table(
  layer="transformer.h.{n}.",
  top=(*TOP, rule("head_bias", "lm_head.bias")),
  layers=(
    rule("norm/scale", "ln_1.weight"),
    rule("norm/bias", "ln_1.bias"),
    *projections("attn.", "out_proj", biases=False),
    rule("mlp/up", "mlp.fc_in.weight", "f d -> d f"),
    rule("mlp/up_bias", "mlp.fc_in.bias"),
    rule("mlp/down", "mlp.fc_out.weight", "d f -> f d"),
    rule("mlp/down_bias", "mlp.fc_out.bias"),
  ),
  ignored=(".attn.bias", ".attn.masked_bias", ".attn.embed_positions"),
)


def spec(c: dict[str, Any]) -> ModelSpec:
  """Of a config.json."""
  norm = NormSpec("layer", eps=float(c.get("layer_norm_epsilon", 1e-5)), bias=True)
  width, heads = c["n_embd"], c["n_head"]
  position = RotarySpec(dims=c.get("rotary_dim") or width // heads, interleaved=True)
  attention = AttentionSpec(heads, width // heads, position=position)
  act = activation(c.get("activation_function", "gelu_new"))
  mlp = MlpSpec(c.get("n_inner") or 4 * width, act, gated=False, bias=True)
  return ModelSpec(
    c["vocab_size"],
    width,
    grouped([LayerSpec(attention, mlp, norm, parallel=True)] * c["n_layer"]),
    max_length=c["n_positions"],
    final_norm=norm,
    head=HeadSpec(bias=True),
  )


def config(spec: ModelSpec, kind: str) -> dict[str, Any]:
  """The config.json of a model like `spec`."""
  attention, mlp = parts(spec, AttentionSpec, MlpSpec)
  first = spec.layers[0]
  if not isinstance(attention.position, RotarySpec):
    raise UnlikeError("attention.position is not rotary")
  return {
    "model_type": kind,
    "vocab_size": spec.vocab_size,
    "n_embd": spec.embed_dim,
    "n_layer": spec.num_layers,
    "n_head": attention.num_heads,
    "n_positions": spec.max_length,
    "n_inner": mlp.hidden,
    "rotary_dim": attention.position.dims or attention.head_dim,
    "activation_function": activation_name(mlp.activation),
    "layer_norm_epsilon": first.norm.eps,
    "tie_word_embeddings": False,
    "resid_pdrop": first.dropout,
    "embd_pdrop": spec.embedding.dropout,
    "attn_pdrop": 0.0,
  }
