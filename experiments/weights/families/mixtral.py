"""Mixtral: LLaMA's attention, two of eight experts, whose weights are made to sum to one."""

from dataclasses import replace
from typing import Any

from layers.spec import AttentionSpec, MlpSpec, ModelSpec, MoeSpec

from ..table import rule
from . import llama
from .common import activation, grouped, parts
from .experts import experts

TYPES = ("mixtral",)

TABLE = llama.TABLE._replace(
  layers=(
    *llama.TABLE.layers,
    rule("moe/router", "block_sparse_moe.gate.weight", "e d -> d e"),
    rule("moe/router", "mlp.gate.weight", "e d -> d e"),
    *experts("block_sparse_moe.experts.{e}.", "w1", "w3", "w2"),
  )
)


def spec(c: dict[str, Any]) -> ModelSpec:
  """Of a config.json."""
  base = llama.spec(c | {"model_type": "mistral"})
  moe = MoeSpec(
    c["num_local_experts"],
    MlpSpec(c["intermediate_size"], activation(c.get("hidden_act", "silu"))),
    c["num_experts_per_tok"],
    router="top_k",
    normalize=True,
    jitter=float(c.get("router_jitter_noise", 0.0)),
    balance_loss=float(c.get("router_aux_loss_coef", 0.001)),
  )
  return replace(base, segments=grouped([replace(layer, mlp=moe) for layer in base.layers]))


def config(spec: ModelSpec, kind: str) -> dict[str, Any]:
  """The config.json of a model like `spec`."""
  _, moe = parts(spec, AttentionSpec, MoeSpec)
  return llama.config(spec, "mistral") | {
    "model_type": kind,
    "num_local_experts": moe.num_experts,
    "num_experts_per_tok": moe.experts_per_token,
    "router_aux_loss_coef": moe.balance_loss,
    "router_jitter_noise": moe.jitter,
  }
