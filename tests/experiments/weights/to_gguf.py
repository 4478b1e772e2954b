"""A folder that transformers saved, as a GGUF: what llama.cpp's converters do, written anew.

Names are those of the `gguf` package (`get_tensor_name_map`), metadata and changes to tensors those
of `conversion/*.py` in github.com/ggml-org/llama.cpp as of 2026: llama's `permute` (pairs of a
rotation side by side), gemma's norms plus 1, gpt2's transposes, bloom's sorted queries, keys and
values, deepseek's split and transposed `kv_b_proj`, gpt-oss's gate and up in turn, experts stacked.
"""

import json
import math
import re

import gguf
import numpy as np
from safetensors.numpy import load_file

ARCHITECTURES = {
  "llama": "LLAMA", "mixtral": "LLAMA", "qwen3": "QWEN3", "qwen3_moe": "QWEN3MOE",
  "gemma2": "GEMMA2", "gemma3_text": "GEMMA3", "gpt_oss": "GPT_OSS", "deepseek_v3": "DEEPSEEK2",
  "gpt2": "GPT2", "bloom": "BLOOM",
}  # fmt: skip


def convert(folder, path, *, old_experts=False, old_latent=False):
  """Write `path`; `old_...`: as files of before April 2024 and 2025 had them."""
  config = json.loads((folder / "config.json").read_text())
  kind = config["model_type"]
  arch = getattr(gguf.MODEL_ARCH, ARCHITECTURES[kind])
  writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
  (_gpt2_metadata if kind in ("gpt2", "bloom") else _metadata)(writer, config, old_latent)
  names = gguf.get_tensor_name_map(arch, 64)
  tensors = load_file(folder / "model.safetensors")
  for name, value in _changed(kind, config, tensors, old_experts, old_latent).items():
    if name.startswith("blk.") or name == "rope_freqs.weight":
      writer.add_tensor(name, np.ascontiguousarray(value))
      continue
    theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert theirs, name
    writer.add_tensor(theirs, np.ascontiguousarray(value))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def _gpt2_metadata(w, c, _):
  width = c.get("n_embd") or c["hidden_size"]
  w.add_block_count(c["n_layer"])
  w.add_context_length(c.get("n_positions") or c.get("seq_length", width))
  w.add_embedding_length(width)
  w.add_feed_forward_length(4 * width)
  w.add_head_count(c["n_head"])
  w.add_layer_norm_eps(c["layer_norm_epsilon"])


def _metadata(w, c, old_latent):
  kind, rope = c["model_type"], c.get("rope_parameters") or {}
  rope = rope.get("full_attention", rope)
  w.add_block_count(c["num_hidden_layers"])
  w.add_context_length(c["max_position_embeddings"])
  w.add_embedding_length(c["hidden_size"])
  w.add_feed_forward_length(c["intermediate_size"])
  w.add_head_count(c["num_attention_heads"])
  w.add_layer_norm_rms_eps(c["rms_norm_eps"])
  if kind == "deepseek_v3":
    _deepseek_metadata(w, c, rope, old_latent)
  else:
    w.add_head_count_kv(c["num_key_value_heads"])
    if c.get("head_dim"):
      w.add_key_length(c["head_dim"])
      w.add_value_length(c["head_dim"])
  if kind in ("llama", "mixtral"):
    w.add_vocab_size(c["vocab_size"])
    w.add_rope_dimension_count(c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"])
  if experts := c.get("num_local_experts") or c.get("num_experts") or c.get("n_routed_experts"):
    w.add_expert_count(experts)
    w.add_expert_used_count(c["num_experts_per_tok"])
  if kind in ("qwen3_moe", "deepseek_v3"):
    w.add_expert_feed_forward_length(c["moe_intermediate_size"])
  if kind == "gpt_oss":
    w.add_expert_feed_forward_length(c["intermediate_size"])
  if kind in ("gemma2", "gemma3_text", "gpt_oss"):
    w.add_sliding_window(c["sliding_window"])
  if kind == "gemma2":
    w.add_attn_logit_softcapping(c["attn_logit_softcapping"])
    w.add_final_logit_softcapping(c["final_logit_softcapping"])
    return  # and nothing of rotations
  w.add_rope_freq_base(rope["rope_theta"])
  if rope.get("rope_type") in ("linear", "yarn"):
    w.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
    w.add_rope_scaling_factor(rope["factor"])
  if rope.get("rope_type") == "yarn":
    w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    for name in ("beta_fast", "beta_slow"):
      if rope.get(name) is not None:
        getattr(w, f"add_rope_scaling_yarn_{name}")(rope[name])


def _deepseek_metadata(w, c, rope, old_latent):
  key = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
  if old_latent:
    w.add_head_count_kv(c["num_attention_heads"])
    w.add_key_length(key)
    w.add_value_length(c["v_head_dim"])
  else:
    w.add_head_count_kv(1)
    w.add_key_length(c["kv_lora_rank"] + c["qk_rope_head_dim"])
    w.add_value_length(c["kv_lora_rank"])
    w.add_key_length_mla(key)
    w.add_value_length_mla(c["v_head_dim"])
  w.add_kv_lora_rank(c["kv_lora_rank"])
  if c["q_lora_rank"]:
    w.add_q_lora_rank(c["q_lora_rank"])
  w.add_leading_dense_block_count(c["first_k_dense_replace"])
  w.add_expert_shared_count(c["n_shared_experts"])
  w.add_expert_weights_scale(c["routed_scaling_factor"])
  w.add_expert_weights_norm(c["norm_topk_prob"])
  w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
  w.add_expert_group_count(c["n_group"])
  w.add_expert_group_used_count(c["topk_group"])
  w.add_rope_dimension_count(c["qk_rope_head_dim"])
  if rope.get("mscale_all_dim") is not None:
    w.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def _changed(kind, c, tensors, old_experts, old_latent):
  """All tensors as the file has them, some already by its names."""
  made = {}
  for name, x in tensors.items():
    name = name.removeprefix("transformer.") if kind == "bloom" else name
    block = re.match(r"(?:model\.layers|transformer\.h|h)\.(\d+)\.", name)
    blk = f"blk.{block[1]}." if block else ""
    if kind in ("llama", "mixtral") and ".q_proj." in name:
      x = _pairs(x, c["num_attention_heads"])
    elif kind in ("llama", "mixtral") and ".k_proj." in name:
      x = _pairs(x, c["num_key_value_heads"])
    elif kind.startswith("gemma") and name.endswith("norm.weight"):
      x = x + np.float32(1)
    elif kind == "gpt2" and re.search(r"\.c_(attn|proj|fc)\.weight", name):
      x = x.T
    elif kind == "bloom" and "query_key_value" in name:
      each = x.reshape(c["n_head"], 3, -1, *x.shape[1:])
      x = np.concatenate([each[:, i].reshape(-1, *x.shape[1:]) for i in range(3)])
    elif kind == "deepseek_v3" and "kv_b_proj" in name and not old_latent:
      each = x.reshape(c["num_attention_heads"], -1, x.shape[-1])
      made[blk + "attn_k_b.weight"] = each[:, : c["qk_nope_head_dim"]].swapaxes(1, 2)
      made[blk + "attn_v_b.weight"] = each[:, c["qk_nope_head_dim"] :]
      continue
    elif kind == "gpt_oss" and ".experts." in name:
      made |= _gpt_oss_experts(blk, name, x)
      continue
    name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    made[name + ".weight" if name.endswith("sinks") else name] = x
  _stack_experts(made, old_experts)
  rope = c.get("rope_parameters") or {}
  if rope.get("rope_type") == "llama3":
    made["rope_freqs.weight"] = rope_table(c, rope)
  return made


def _pairs(x, heads):
  return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def _gpt_oss_experts(blk, name, x):
  end = "bias" if name.endswith("_bias") else "weight"
  x = x if end == "bias" else x.swapaxes(-1, -2)
  if "down_proj" in name:
    return {f"{blk}ffn_down_exps.{end}": x}
  axis = 1
  return {
    f"{blk}ffn_gate_exps.{end}": x.take(range(0, x.shape[axis], 2), axis),
    f"{blk}ffn_up_exps.{end}": x.take(range(1, x.shape[axis], 2), axis),
  }


def _stack_experts(made, old):
  words = {"w1": "gate", "w2": "down", "w3": "up", "gate_proj": "gate", "up_proj": "up",
           "down_proj": "down"}  # fmt: skip
  groups: dict = {}
  for name in list(made):
    if found := re.match(r"model\.layers\.(\d+)\..*experts\.(\d+)\.(\w+)\.weight", name):
      groups.setdefault((found[1], words[found[3]]), {})[int(found[2])] = made.pop(name)
  for (layer, part), own in groups.items():
    if old:
      made |= {f"blk.{layer}.ffn_{part}.{e}.weight": x for e, x in own.items()}
    else:
      made[f"blk.{layer}.ffn_{part}_exps.weight"] = np.stack([own[e] for e in range(len(own))])


def rope_table(c, rope):
  """What Llama 3.1's frequencies are divided by, from Meta's reference."""
  dims = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
  length, factor = rope["original_max_position_embeddings"], rope["factor"]
  low, high = rope["low_freq_factor"], rope["high_freq_factor"]
  found = []
  for i in range(0, dims, 2):
    wavelength = 2 * math.pi * rope["rope_theta"] ** (i / dims)
    if wavelength < length / high:
      found.append(1.0)
    elif wavelength > length / low:
      found.append(factor)
    else:
      smooth = (length / wavelength - low) / (high - low)
      found.append(1 / ((1 - smooth) / factor + smooth))
  return np.array(found, np.float32)
