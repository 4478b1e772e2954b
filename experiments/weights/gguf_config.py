"""GGUF's metadata in the words of a config.json, by architecture.

What llama.cpp's converters write and its loaders assume where nothing is written: `conversion/*.py`
and `src/models/*.cpp` of github.com/ggml-org/llama.cpp. What they do not keep, and what cannot be
told from it, is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ConfigError
from .gguf_rope import scaling
from .source import Tensor

_SIZES = {
  "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
  "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
  "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
  "attention.key_length": "head_dim", "vocab_size": "vocab_size",
  "expert_used_count": "num_experts_per_tok",
}  # fmt: skip
_FACTORS = {
  "attention.layer_norm_rms_epsilon": "rms_norm_eps",
  "attention.layer_norm_epsilon": "layer_norm_epsilon", "rope.freq_base": "rope_theta",
}  # fmt: skip
_SIGMOID = 2  # of expert_gating_func


class Metadata:
  """What a file says of its architecture."""

  def __init__(self, path: Path, kind: str, values: Mapping[str, Any]):
    self.path, self.kind, self._values = path, kind, values

  def get(self, name: str, default: Any = None) -> Any:
    return self._values.get(f"{self.kind}.{name}", default)

  def size(self, name: str, default: int | None = None) -> int | None:
    """A whole number; a list of equal ones counts as one.

    Raises:
      ConfigError: it is something else.
    """
    found = self.get(name, default)
    if isinstance(found, np.ndarray) and found.size and (found == found[0]).all():
      found = found[0].item()
    if found is None or (isinstance(found, int) and not isinstance(found, bool) and found >= 0):
      return found
    shown = "a list of unlike numbers" if isinstance(found, np.ndarray) else repr(found)
    raise ConfigError(
      f"{self.path}: {self.kind}.{name} is {shown}; one whole number for all layers is read"
    )

  def need(self, name: str) -> int:
    """Raises ConfigError if it is not there."""
    if (found := self.size(name)) is None:
      raise ConfigError(f"{self.path} lacks {self.kind}.{name} in its metadata")
    return found


def config_of(
  path: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
  """All that families ask of a config.json.

  Raises:
    ConfigError: no or another architecture than those that are read, or something of it is not.
  """
  kind = values.get("general.architecture")
  if not isinstance(kind, str):
    raise ConfigError(f"{path} names no architecture")
  if kind not in _KINDS:
    raise ConfigError(f"{path} is of architecture {kind!r}; of GGUF are read {', '.join(_KINDS)}")
  said = Metadata(path, kind, values)
  for name in ("context_length", "embedding_length", "block_count", "attention.head_count"):
    said.need(name)
  config: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in tensors}
  for theirs, ours in _SIZES.items():
    if (size := said.size(theirs)) is not None:
      config[ours] = size
  for theirs, ours in _FACTORS.items():
    if (factor := said.get(theirs)) is not None:
      config[ours] = factor
  if "token_embd.weight" in tensors:
    config["vocab_size"] = tensors["token_embd.weight"].shape[0]
  if (end := values.get("tokenizer.ggml.eos_token_id")) is not None:
    config["eos_token_id"] = end
  config |= _KINDS[kind](said, config, tensors)
  rope = scaling(said, config, tensors)
  return config | ({"rope_scaling": rope} if rope else {})


def _llama(said: Metadata, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
  _whole_heads(said, config)
  own = {"model_type": "llama", "attention_bias": "blk.0.attn_q.bias" in tensors}
  if experts := said.size("expert_count"):
    own |= {"model_type": "mixtral", "num_local_experts": experts}
  return own


def _gpt2(said: Metadata, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
  return {
    "model_type": "gpt2",
    "n_embd": config["hidden_size"],
    "n_head": config["num_attention_heads"],
    "n_layer": config["num_hidden_layers"],
    "n_positions": config["max_position_embeddings"],
    "n_inner": config.get("intermediate_size"),
  }


def _bloom(said: Metadata, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
  return {
    "model_type": "bloom",
    "n_head": config["num_attention_heads"],
    "n_layer": config["num_hidden_layers"],
    "seq_length": config["max_position_embeddings"],
  }


def _qwen3(said: Metadata, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
  _whole_heads(said, config)
  return {"model_type": "qwen3", "head_dim": _head(config)}


def _qwen3_moe(
  said: Metadata, config: dict[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
  _whole_heads(said, config)
  hidden = said.need("expert_feed_forward_length")
  return {
    "model_type": "qwen3_moe",
    "head_dim": _head(config),
    "num_experts": said.need("expert_count"),
    "moe_intermediate_size": hidden,
    "intermediate_size": config.get("intermediate_size", hidden),
    "norm_topk_prob": True,  # as llama.cpp has it, whatever config.json said
  }


def _gemma(said: Metadata, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
  _whole_heads(said, config)
  third = said.kind == "gemma3"
  count, head = config["num_hidden_layers"], _head(config)
  # The file has no factor for the logits: by its number of layers llama.cpp knows the 27B models,
  # whose factor is another.
  large = count == (62 if third else 46)
  window = said.size("attention.sliding_window", None if third else 4096)
  return {
    "model_type": "gemma3_text" if third else "gemma2",
    "head_dim": head,
    "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]
    if large
    else head,
    "sliding_window": window,
    "layer_types": _kinds(said, count, 6 if third else 2, window),
    "attn_logit_softcapping": None if third else said.get("attn_logit_softcapping", 50.0),
    "final_logit_softcapping": said.get("final_logit_softcapping", None if third else 30.0),
    "rope_local_base_freq": said.get("rope.freq_base_swa", 10_000.0),
  }


def _kinds(said: Metadata, count: int, period: int, window: int | None) -> list[str]:
  """Of each layer; the file gives a period, or says of each layer whether it is local."""
  pattern = said.get("attention.sliding_window_pattern", period)
  if isinstance(pattern, np.ndarray):
    local = [bool(x) for x in pattern[:count]]
  else:
    each = said.size("attention.sliding_window_pattern", period)
    local = [bool(each) and i % each != each - 1 for i in range(count)]
  if len(local) != count:
    raise ConfigError(f"{said.path}: attention.sliding_window_pattern is not of {count} layers")
  return ["sliding_attention" if x and window else "full_attention" for x in local]


def _deepseek(
  said: Metadata, config: dict[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
  if said.get("expert_gating_func") != _SIGMOID:
    raise ConfigError(
      f"{said.path}: of deepseek2 only DeepSeek-V3 and R1 are read, whose router is a sigmoid"
    )
  rope = said.need("rope.dimension_count")
  latent = "blk.0.attn_k_b.weight" in tensors  # else keys and values are unpacked, as of old
  key = said.need("attention.key_length_mla" if latent else "attention.key_length")
  value = said.need("attention.value_length_mla" if latent else "attention.value_length")
  return {
    "model_type": "deepseek_v3",
    "head_dim": rope,
    "qk_rope_head_dim": rope,
    "qk_nope_head_dim": key - rope,
    "v_head_dim": value,
    "kv_lora_rank": said.need("attention.kv_lora_rank"),
    "q_lora_rank": said.size("attention.q_lora_rank"),
    "first_k_dense_replace": said.size("leading_dense_block_count", 0),
    "moe_intermediate_size": said.need("expert_feed_forward_length"),
    "n_routed_experts": said.need("expert_count"),
    "n_shared_experts": said.need("expert_shared_count"),
    "n_group": said.size("expert_group_count", 1),
    "topk_group": said.size("expert_group_used_count", 1),
    "routed_scaling_factor": said.get("expert_weights_scale", 1.0),
    "norm_topk_prob": bool(said.get("expert_weights_norm", False)),
  }


def _gpt_oss(
  said: Metadata, config: dict[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
  _whole_heads(said, config)
  count, window = config["num_hidden_layers"], said.need("attention.sliding_window")
  return {
    "model_type": "gpt_oss",
    "head_dim": _head(config),
    "sliding_window": window,
    "layer_types": _kinds(said, count, 2, window),
    "num_local_experts": said.need("expert_count"),
    "intermediate_size": said.need("expert_feed_forward_length"),
  }


def _head(config: dict[str, Any]) -> int:
  return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _whole_heads(said: Metadata, config: dict[str, Any]) -> None:
  """That all of a head is rotated."""
  rotated = said.size("rope.dimension_count", _head(config))
  if rotated != _head(config):
    raise ConfigError(
      f"{said.path}: {rotated} of the {_head(config)} dimensions of a head are rotated, which is "
      f"not read of {said.kind}"
    )


_KINDS = {
  "llama": _llama, "gpt2": _gpt2, "bloom": _bloom, "gemma2": _gemma, "gemma3": _gemma,
  "qwen3": _qwen3, "qwen3moe": _qwen3_moe, "deepseek2": _deepseek, "gpt-oss": _gpt_oss,
}  # fmt: skip
