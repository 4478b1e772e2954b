"""GPT-J: attention and MLP side by side, interleaved rotation of part of a head."""

from typing import Any

from layers.spec import AttentionSpec, HeadSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec, RotarySpec

from ..table import Table, rule
from .common import activation, grouped

TYPES = ("gptj",)

TABLE = Table(
  layer="transformer.h.{n}.",
  top=(
    rule("embedding/table", "transformer.wte.weight"),
    rule("final_norm/scale", "transformer.ln_f.weight"),
    rule("final_norm/bias", "transformer.ln_f.bias"),
    rule("head", "lm_head.weight", "v d -> d v"),
    rule("head_bias", "lm_head.bias"),
  ),
  layers=(
    rule("norm/scale", "ln_1.weight"),
    rule("norm/bias", "ln_1.bias"),
    rule("attention/query", "attn.q_proj.weight", "(h k) d -> d h k"),
    rule("attention/key", "attn.k_proj.weight", "(h k) d -> d h k"),
    rule("attention/value", "attn.v_proj.weight", "(h k) d -> d h k"),
    rule("attention/out", "attn.out_proj.weight", "d (h k) -> h k d"),
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
