"""DeepSeek-V3: latent attention, dense layers first, then experts in groups beside a shared one."""

import math
from dataclasses import replace
from typing import Any

from layers.spec import (
  HeadSpec,
  LatentAttentionSpec,
  LayerSpec,
  MlpSpec,
  ModelSpec,
  MoeSpec,
  NormSpec,
  RotarySpec,
  YarnScaling,
)

from ..table import Table, rule
from . import llama
from .common import activation, grouped, rotary
from .experts import experts

TYPES = ("deepseek_v3",)

_LATENT = ("attention/latent_down", "attention/rotary_key")
_KEY_VALUE = ("attention/key", "attention/value")
TABLE = Table(
  layer=llama.TABLE.layer,
  top=llama.TABLE.top,
  layers=(
    rule("attention_norm/scale", "input_layernorm.weight"),
    rule("attention/query_down", "self_attn.q_a_proj.weight", "r d -> d r"),
    rule("attention/query_norm/scale", "self_attn.q_a_layernorm.weight"),
    rule("attention/query", "self_attn.q_b_proj.weight", "(h k) r -> r h k"),
    rule("attention/query", "self_attn.q_proj.weight", "(h k) r -> r h k"),
    rule(_LATENT, "self_attn.kv_a_proj_with_mqa.weight", "r d -> d r", join="r"),
    rule(_KEY_VALUE, "self_attn.kv_b_proj.weight", "(h k) r -> r h k", join="k"),
    rule("attention/latent_norm/scale", "self_attn.kv_a_layernorm.weight"),
    rule("attention/out", "self_attn.o_proj.weight", "d (h k) -> h k d"),
    rule("mlp_norm/scale", "post_attention_layernorm.weight"),
    rule("mlp/gate", "mlp.gate_proj.weight", "f d -> d f"),
    rule("mlp/up", "mlp.up_proj.weight", "f d -> d f"),
    rule("mlp/down", "mlp.down_proj.weight", "d f -> f d"),
    rule("moe/router", "mlp.gate.weight", "e d -> d e"),
    rule("moe/selection_bias", "mlp.gate.e_score_correction_bias"),
    rule("moe/shared/gate", "mlp.shared_experts.gate_proj.weight", "f d -> d f"),
    rule("moe/shared/up", "mlp.shared_experts.up_proj.weight", "f d -> d f"),
    rule("moe/shared/down", "mlp.shared_experts.down_proj.weight", "d f -> f d"),
    *experts("mlp.experts.{e}.", "gate_proj", "up_proj", "down_proj"),
  ),
  ignored=llama.TABLE.ignored,
)


def spec(c: dict[str, Any]) -> ModelSpec:
  """Of a config.json. The heads that predict tokens further ahead are not known."""
  norm = NormSpec(eps=float(c.get("rms_norm_eps", 1e-6)))
  act = activation(c.get("hidden_act", "silu"))
  nope, rope = c["qk_nope_head_dim"], c["qk_rope_head_dim"]
  position, scale = _position(c), (nope + rope) ** -0.5
  said = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
  if isinstance(position.scaling, YarnScaling) and (all_dims := said.get("mscale_all_dim")):
    scale *= _grown(position.scaling.factor, all_dims) ** 2
  attention = LatentAttentionSpec(
    c["num_attention_heads"], c["kv_lora_rank"], nope, rope, c["v_head_dim"],
    q_lora=c.get("q_lora_rank"), position=position, norm=norm, scale=scale,
  )  # fmt: skip
  moe = MoeSpec(
    c["n_routed_experts"],
    MlpSpec(c["moe_intermediate_size"], act),
    c["num_experts_per_tok"],
    router="top_k",
    scores="sigmoid",
    normalize=bool(c.get("norm_topk_prob", True)),
    routed_scale=float(c.get("routed_scaling_factor", 1.0)),
    num_groups=c.get("n_group") or 1,
    keep_groups=c.get("topk_group") or 1,
    bias_rate=1e-3,
    jitter=0.0,
    balance_loss=float(c.get("aux_loss_alpha", 1e-4)),
    shared=MlpSpec(c["moe_intermediate_size"] * c["n_shared_experts"], act),
  )
  dense = LayerSpec(attention, MlpSpec(c["intermediate_size"], act), norm)
  first, count = c.get("first_k_dense_replace", 0), c["num_hidden_layers"]
  layers = [dense if i < first else replace(dense, mlp=moe) for i in range(count)]
  return ModelSpec(
    c["vocab_size"],
    c["hidden_size"],
    grouped(layers),
    max_length=c["max_position_embeddings"],
    final_norm=norm,
    head=HeadSpec(tied=bool(c.get("tie_word_embeddings", False))),
  )


def _position(c: dict[str, Any]) -> RotarySpec:
  """Interleaved; its YaRN grows cosines by a ratio of two factors."""
  position = replace(rotary(c), interleaved=bool(c.get("rope_interleave", True)))
  said = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
  scaling = position.scaling
  if not isinstance(scaling, YarnScaling) or scaling.attention_factor is not None:
    return position
  each, all_dims = said.get("mscale"), said.get("mscale_all_dim")
  grown = _grown(scaling.factor, 1.0)
  if each and all_dims:
    grown = _grown(scaling.factor, each) / _grown(scaling.factor, all_dims)
  return replace(position, scaling=replace(scaling, attention_factor=grown))


def _grown(factor: float, by: float) -> float:
  return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0
