"""Mixtral and Qwen3-MoE have LLaMA's attention; their experts, and those of DeepSeek, lie alike."""

from ..table import Rule, rule


def experts(prefix: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
  """Rules for a layer's gated experts.

  Args:
    prefix: of an expert's tensors, with `{e}`, as files of the hub have them; else all experts of a
      layer are in one tensor, as transformers 5 keeps them in memory.
    gate, up, down: names behind it.
  """
  return (
    rule("moe/gate", f"{prefix}{gate}.weight", "f d -> d f"),
    rule("moe/up", f"{prefix}{up}.weight", "f d -> d f"),
    rule("moe/down", f"{prefix}{down}.weight", "d f -> f d"),
    rule(("moe/gate", "moe/up"), "mlp.experts.gate_up_proj", "e (p f) d -> p e d f"),
    rule("moe/down", "mlp.experts.down_proj", "e d f -> e f d"),
  )
