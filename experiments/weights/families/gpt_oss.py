"""gpt-oss: sinks, biases everywhere, clamped experts whose gate and up columns take turns."""

from typing import Any

from layers.spec import AttentionSpec, HeadSpec, LayerSpec, MlpSpec, ModelSpec, MoeSpec, NormSpec

from ..table import rule
from . import llama
from .common import UnlikeError, grouped, kinds_of_layers, parts, rope, rotary

TYPES = ("gpt_oss",)

_UP = ("moe/gate", "moe/up")
_UP_BIAS = ("moe/gate_bias", "moe/up_bias")
TABLE = llama.TABLE._replace(
  layers=(
    *llama.TABLE.layers,
    rule("attention/sink", "self_attn.sinks"),
    rule("moe/router", "mlp.router.weight", "e d -> d e"),
    rule("moe/router_bias", "mlp.router.bias"),
    rule(_UP, "mlp.experts.gate_up_proj", "e d (f p) -> p e d f"),
    rule(_UP_BIAS, "mlp.experts.gate_up_proj_bias", "e (f p) -> p e f"),
    rule("moe/down", "mlp.experts.down_proj"),
    rule("moe/down_bias", "mlp.experts.down_proj_bias"),
  )
)


def spec(c: dict[str, Any]) -> ModelSpec:
  """Of a config.json."""
  norm = NormSpec(eps=float(c.get("rms_norm_eps", 1e-5)))
  expert = MlpSpec(
    c["intermediate_size"],
    "quick_gelu",
    bias=True,
    clamp=float(c.get("swiglu_limit", 7.0)),
    up_offset=1.0,
  )
  moe = MoeSpec(
    c["num_local_experts"],
    expert,
    c["num_experts_per_tok"],
    router="top_k",
    normalize=True,
    router_bias=True,
    jitter=0.0,
    balance_loss=float(c.get("router_aux_loss_coef", 0.9)),
  )
  count = c["num_hidden_layers"]
  kinds = c.get("layer_types") or ["sliding_attention", "full_attention"] * count

  def layer(kind: str) -> LayerSpec:
    attention = AttentionSpec(
      c["num_attention_heads"],
      c.get("head_dim", 64),
      c["num_key_value_heads"],
      window=c["sliding_window"] if kind == "sliding_attention" else None,
      position=rotary(c, theta=150_000.0),
      qkv_bias=bool(c.get("attention_bias", True)),
      out_bias=bool(c.get("attention_bias", True)),
      sink=True,
    )
    return LayerSpec(attention, moe, norm)

  return ModelSpec(
    c["vocab_size"],
    c["hidden_size"],
    grouped([layer(kind) for kind in kinds[:count]]),
    max_length=c["max_position_embeddings"],
    final_norm=norm,
    head=HeadSpec(tied=bool(c.get("tie_word_embeddings", False))),
  )


def config(spec: ModelSpec, kind: str) -> dict[str, Any]:
  """The config.json of a model like `spec`."""
  attention, moe = parts(spec, AttentionSpec, MoeSpec)
  if moe.expert.clamp is None:
    raise UnlikeError("experts without a clamp")
  types, window = kinds_of_layers(spec)
  return {
    "model_type": kind,
    "vocab_size": spec.vocab_size,
    "hidden_size": spec.embed_dim,
    "intermediate_size": moe.expert.hidden,
    "num_hidden_layers": spec.num_layers,
    "num_attention_heads": attention.num_heads,
    "num_key_value_heads": attention.kv_heads,
    "head_dim": attention.head_dim,
    "num_local_experts": moe.num_experts,
    "num_experts_per_tok": moe.experts_per_token,
    "router_aux_loss_coef": moe.balance_loss,
    "swiglu_limit": moe.expert.clamp,
    "max_position_embeddings": spec.max_length,
    "layer_types": types,
    "sliding_window": window or spec.max_length,
    "rms_norm_eps": spec.layers[0].norm.eps,
    "tie_word_embeddings": spec.head.tied,
    "attention_bias": attention.qkv_bias,
    "attention_dropout": 0.0,
    **rope(attention.position),
  }
