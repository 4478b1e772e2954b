"""Experts with a gate, which lie alike in the files of Mixtral, Qwen3-MoE and DeepSeek."""

from ..table import Rule, rule


def experts(prefix: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
  """Rules for a layer's gated experts: a tensor each, as files of the hub have them, or all experts
  of a layer in one, as transformers 5 keeps them in memory.

  Args:
    prefix: of an expert's tensors, with `{e}`.
    gate, up, down: names behind it.
  """
  return (
    rule("moe/gate", f"{prefix}{gate}.weight", "f d -> d f"),
    rule("moe/up", f"{prefix}{up}.weight", "f d -> d f"),
    rule("moe/down", f"{prefix}{down}.weight", "d f -> f d"),
    rule(("moe/gate", "moe/up"), "mlp.experts.gate_up_proj", "e (p f) d -> p e d f"),
    rule("moe/down", "mlp.experts.down_proj", "e d f -> e f d"),
  )
