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
from .common import (
  UnlikeError,
  activation,
  activation_name,
  experts_of,
  gated,
  grouped,
  parts,
  rope,
  rope_words,
  rotary,
)
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
    rule(
      "attention/query",
      "self_attn.q_b_proj.weight",
      "(h k) r -> r h k",
      beside="attention/query_down",
    ),
    rule("attention/query", "self_attn.q_proj.weight", "(h k) r -> r h k"),
    rule(_LATENT, "self_attn.kv_a_proj_with_mqa.weight", "r d -> d r", join="r"),
    rule(_KEY_VALUE, "self_attn.kv_b_proj.weight", "(h k) r -> r h k", join="k"),
    rule("attention/latent_norm/scale", "self_attn.kv_a_layernorm.weight"),
    rule("attention/out", "self_attn.o_proj.weight", "d (h k) -> h k d"),
    rule("mlp_norm/scale", "post_attention_layernorm.weight"),
    *gated("mlp."),
    rule("moe/router", "mlp.gate.weight", "e d -> d e"),
    rule("moe/selection_bias", "mlp.gate.e_score_correction_bias"),
    *gated("mlp.shared_experts.", "moe/shared"),
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
  all_dims = rope_words(c).get("mscale_all_dim")
  if isinstance(position.scaling, YarnScaling) and all_dims:
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
  said, scaling = rope_words(c), position.scaling
  if not isinstance(scaling, YarnScaling) or scaling.attention_factor is not None:
    return position
  each, all_dims = said.get("mscale"), said.get("mscale_all_dim")
  grown = _grown(scaling.factor, 1.0)
  if each and all_dims:
    grown = _grown(scaling.factor, each) / _grown(scaling.factor, all_dims)
  return replace(position, scaling=replace(scaling, attention_factor=grown))


def _grown(factor: float, by: float) -> float:
  return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0


def config(spec: ModelSpec, kind: str) -> dict[str, Any]:
  """The config.json of a model like `spec`, whose dense layers come first."""
  attention, first = parts(spec, LatentAttentionSpec, MlpSpec | MoeSpec)
  moe = experts_of(spec)
  sparse = [isinstance(layer.mlp, MoeSpec) for layer in spec.layers]
  if moe.shared is None or moe.shared.hidden % moe.expert.hidden:
    raise UnlikeError("no shared experts, or not a whole number of them")
  return {
    "model_type": kind,
    "vocab_size": spec.vocab_size,
    "hidden_size": spec.embed_dim,
    "intermediate_size": first.hidden if isinstance(first, MlpSpec) else moe.expert.hidden,
    "moe_intermediate_size": moe.expert.hidden,
    "num_hidden_layers": spec.num_layers,
    "first_k_dense_replace": sparse.index(True),
    "num_attention_heads": attention.num_heads,
    "num_key_value_heads": attention.num_heads,
    "q_lora_rank": attention.q_lora,
    "kv_lora_rank": attention.kv_lora,
    "qk_nope_head_dim": attention.nope_dim,
    "qk_rope_head_dim": attention.rope_dim,
    "v_head_dim": attention.value_dim,
    "n_routed_experts": moe.num_experts,
    "n_shared_experts": moe.shared.hidden // moe.expert.hidden,
    "num_experts_per_tok": moe.experts_per_token,
    "n_group": moe.num_groups,
    "topk_group": moe.keep_groups,
    "norm_topk_prob": moe.normalize,
    "routed_scaling_factor": moe.routed_scale,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": activation_name(moe.expert.activation),
    "max_position_embeddings": spec.max_length,
    "rms_norm_eps": spec.layers[0].norm.eps,
    "tie_word_embeddings": spec.head.tied,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_interleave": attention.position.interleaved,
    **_rope(attention),
  }


def _rope(attention: LatentAttentionSpec) -> dict[str, Any]:
  """With the factor on the logits, which `mscale_all_dim` says."""
  said, scaling = rope(attention.position), attention.position.scaling
  if not isinstance(scaling, YarnScaling) or scaling.factor <= 1:
    return said
  ratio = (attention.scale or 1.0) * (attention.nope_dim + attention.rope_dim) ** 0.5
  by = round((math.sqrt(ratio) - 1.0) / (0.1 * math.log(scaling.factor)), 9)
  if attention.scale is None or by == 0:
    return said
  said["rope_scaling"]["mscale_all_dim"] = by
  if scaling.attention_factor == 1.0:  # in the words of the published config
    del said["rope_scaling"]["attention_factor"]
    said["rope_scaling"]["mscale"] = by
  return said
