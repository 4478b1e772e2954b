"""Qwen3-MoE: Qwen3's attention, eight of 128 experts."""

from dataclasses import replace
from typing import Any

from layers.spec import MlpSpec, ModelSpec, MoeSpec

from ..table import rule
from . import llama
from .common import activation, experts_of, grouped
from .experts import experts

TYPES = ("qwen3_moe",)

TABLE = llama.TABLE._replace(
  layers=(
    *llama.TABLE.layers,
    rule("moe/router", "mlp.gate.weight", "e d -> d e"),
    *experts("mlp.experts.{e}.", "gate_proj", "up_proj", "down_proj"),
  )
)


def spec(c: dict[str, Any]) -> ModelSpec:
  """Of a config.json, which may make every n-th layer sparse and name dense ones."""
  base = llama.spec(c | {"model_type": "qwen3"})
  moe = MoeSpec(
    c.get("num_experts") or c["num_local_experts"],
    MlpSpec(c["moe_intermediate_size"], activation(c.get("hidden_act", "silu"))),
    c["num_experts_per_tok"],
    router="top_k",
    normalize=bool(c.get("norm_topk_prob", False)),
    jitter=0.0,
    balance_loss=float(c.get("router_aux_loss_coef", 0.001)),
  )
  every, dense = c.get("decoder_sparse_step", 1), c.get("mlp_only_layers") or []
  sparse = lambda i: i not in dense and (i + 1) % every == 0
  layers = [replace(x, mlp=moe) if sparse(i) else x for i, x in enumerate(base.layers)]
  return replace(base, segments=grouped(layers))


def config(spec: ModelSpec, kind: str) -> dict[str, Any]:
  """The config.json of a model like `spec`."""
  moe, mlps = experts_of(spec), [layer.mlp for layer in spec.layers]
  dense = [i for i, mlp in enumerate(mlps) if not isinstance(mlp, MoeSpec)]
  said = llama.config(spec, "qwen3")
  for word in ("layer_types", "sliding_window", "use_sliding_window"):
    del said[word]  # a window, here, would be one of all layers
  return said | {
    "model_type": kind,
    "intermediate_size": next(
      (x.hidden for x in mlps if isinstance(x, MlpSpec)), moe.expert.hidden
    ),
    "moe_intermediate_size": moe.expert.hidden,
    "num_experts": moe.num_experts,
    "num_experts_per_tok": moe.experts_per_token,
    "norm_topk_prob": moe.normalize,
    "decoder_sparse_step": 1,
    "mlp_only_layers": dense,
    "router_aux_loss_coef": moe.balance_loss,
  }
