"""GGUF of the families that llama.cpp has: its names, of which all architectures have the same.

After `conversion/*.py` in github.com/ggml-org/llama.cpp.
"""

from ..table import Rule, Table, rule

_LATENT = ("attention/latent_down", "attention/rotary_key")
_KEY_VALUE = ("attention/key", "attention/value")
_QKV = ("attention/query", "attention/key", "attention/value")
_QKV_BIAS = ("attention/query_bias", "attention/key_bias", "attention/value_bias")

_TOP = (
  rule("embedding/table", "token_embd.weight"),
  rule("final_norm/scale", "output_norm.weight"),
  rule("head", "output.weight", "v d -> d v"),
)
_ATTENTION = (
  rule("attention_norm/scale", "attn_norm.weight"),
  rule("attention/query", "attn_q.weight", "(h k) d -> d h k"),
  rule("attention/key", "attn_k.weight", "(h k) d -> d h k"),
  rule("attention/value", "attn_v.weight", "(h k) d -> d h k"),
  rule("attention/out", "attn_output.weight", "d (h k) -> h k d"),
  rule("attention/query_bias", "attn_q.bias", "(h k) -> h k"),
  rule("attention/key_bias", "attn_k.bias", "(h k) -> h k"),
  rule("attention/value_bias", "attn_v.bias", "(h k) -> h k"),
  rule("attention/out_bias", "attn_output.bias"),
  rule("attention/query_norm/scale", "attn_q_norm.weight"),
  rule("attention/key_norm/scale", "attn_k_norm.weight"),
)
_MLP = (
  rule("mlp_norm/scale", "ffn_norm.weight"),
  rule("mlp/gate", "ffn_gate.weight", "f d -> d f"),
  rule("mlp/up", "ffn_up.weight", "f d -> d f"),
  rule("mlp/down", "ffn_down.weight", "d f -> f d"),
)
_EXPERTS = (
  rule("moe/router", "ffn_gate_inp.weight", "e d -> d e"),
  rule("moe/gate", "ffn_gate_exps.weight", "e f d -> e d f"),
  rule("moe/up", "ffn_up_exps.weight", "e f d -> e d f"),
  rule("moe/down", "ffn_down_exps.weight", "e d f -> e f d"),
  # Before April 2024, and with --fuse-gate-up-exps.
  rule("moe/gate", "ffn_gate.{e}.weight", "f d -> d f"),
  rule("moe/up", "ffn_up.{e}.weight", "f d -> d f"),
  rule("moe/down", "ffn_down.{e}.weight", "d f -> f d"),
  rule(("moe/gate", "moe/up"), "ffn_gate_up_exps.weight", "e (p f) d -> p e d f"),
)


def _table(*layers: Rule, top: tuple[Rule, ...] = _TOP, ignored: tuple[str, ...] = ()) -> Table:
  return Table("blk.{n}.", top, layers, ignored)


# Files of architecture `llama` have the pairs of a rotation side by side; ours, and those of all
# other files, are halves of a head. The config has what the ignored table says.
_PAIRS = (
  rule("attention/query", "attn_q.weight", "(h k two) d -> d h (two k)"),
  rule("attention/key", "attn_k.weight", "(h k two) d -> d h (two k)"),
  rule("attention/query_bias", "attn_q.bias", "(h k two) -> h (two k)"),
  rule("attention/key_bias", "attn_k.bias", "(h k two) -> h (two k)"),
)
_LLAMA = _table(
  *_PAIRS,
  *(r for r in _ATTENTION if r.ours not in {p.ours for p in _PAIRS}),
  *_MLP,
  *_EXPERTS,
  ignored=("rope_freqs.weight",),
)
_PLAIN = _table(*_ATTENTION, *_MLP, *_EXPERTS)
_GEMMA = _table(
  *_ATTENTION,
  *_MLP,
  rule("attention_post_norm/scale", "post_attention_norm.weight"),
  rule("mlp_post_norm/scale", "post_ffw_norm.weight"),
)
_GPT_OSS = _table(
  *_ATTENTION,
  *_EXPERTS,
  rule("attention/sink", "attn_sinks.weight"),
  rule("mlp_norm/scale", "post_attention_norm.weight"),
  rule("moe/router_bias", "ffn_gate_inp.bias"),
  rule("moe/gate_bias", "ffn_gate_exps.bias"),
  rule("moe/up_bias", "ffn_up_exps.bias"),
  rule(("moe/gate_bias", "moe/up_bias"), "ffn_gate_up_exps.bias", "e (p f) -> p e f"),
  rule("moe/down_bias", "ffn_down_exps.bias"),
)
_DEEPSEEK = _table(
  rule("attention_norm/scale", "attn_norm.weight"),
  rule("attention/query_down", "attn_q_a.weight", "r d -> d r"),
  rule("attention/query_norm/scale", "attn_q_a_norm.weight"),
  rule("attention/query", "attn_q_b.weight", "(h k) r -> r h k"),
  rule("attention/query", "attn_q.weight", "(h k) r -> r h k"),
  rule(_LATENT, "attn_kv_a_mqa.weight", "r d -> d r", join="r"),
  rule("attention/latent_norm/scale", "attn_kv_a_norm.weight"),
  rule("attention/key", "attn_k_b.weight", "h r k -> r h k"),
  rule("attention/value", "attn_v_b.weight", "h k r -> r h k"),
  rule(_KEY_VALUE, "attn_kv_b.weight", "(h k) r -> r h k", join="k"),  # until April 2025
  rule("attention/out", "attn_output.weight", "d (h k) -> h k d"),
  *_MLP,
  *_EXPERTS,
  rule("moe/selection_bias", "exp_probs_b.bias"),
  rule("moe/shared/gate", "ffn_gate_shexp.weight", "f d -> d f"),
  rule("moe/shared/up", "ffn_up_shexp.weight", "f d -> d f"),
  rule("moe/shared/down", "ffn_down_shexp.weight", "d f -> f d"),
)
# Of BLOOM the converter sorts queries, keys and values as GPT-2 has them.
_GPT_2 = _table(
  rule("attention_norm/scale", "attn_norm.weight"),
  rule("attention_norm/bias", "attn_norm.bias"),
  rule(_QKV, "attn_qkv.weight", "(p h k) d -> p d h k"),
  rule(_QKV_BIAS, "attn_qkv.bias", "(p h k) -> p h k"),
  rule("attention/out", "attn_output.weight", "d (h k) -> h k d"),
  rule("attention/out_bias", "attn_output.bias"),
  *_MLP,
  rule("mlp_norm/bias", "ffn_norm.bias"),
  rule("mlp/up_bias", "ffn_up.bias"),
  rule("mlp/down_bias", "ffn_down.bias"),
  top=(
    *_TOP,
    rule("final_norm/bias", "output_norm.bias"),
    rule("embedding/position_table", "position_embd.weight"),
    rule("embedding/norm/scale", "token_embd_norm.weight"),
    rule("embedding/norm/bias", "token_embd_norm.bias"),
  ),
)

# By model_type.
TABLES = {
  "llama": _LLAMA, "mixtral": _LLAMA, "qwen3": _PLAIN, "qwen3_moe": _PLAIN, "gemma2": _GEMMA,
  "gemma3_text": _GEMMA, "gpt_oss": _GPT_OSS, "deepseek_v3": _DEEPSEEK, "gpt2": _GPT_2,
  "bloom": _GPT_2,
}  # fmt: skip
