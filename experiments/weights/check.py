"""What a config.json may say, before a model is made of it: a number too many would take hours, and
one of another type fails far from here."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import ConfigError
from .source import Tensor

_LAYERS = ("num_hidden_layers", "num_layers", "n_layer")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "n_shared_experts")
_SIZES = (  # a tensor has an axis at least as long
  "vocab_size", "hidden_size", "n_embd", "n_embed", "intermediate_size", "n_inner", "ffn_dim",
  "moe_intermediate_size", "num_attention_heads", "num_key_value_heads", "num_heads", "n_head",
  "head_dim", "word_embed_proj_dim", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim",
  "qk_nope_head_dim", "v_head_dim", "rotary_dim",
)  # fmt: skip
_COUNTS = (
  "max_position_embeddings",
  "n_positions",
  "seq_length",
  "sliding_window",
  "window_size",
  "num_experts_per_tok",
  "n_group",
  "topk_group",
  "decoder_sparse_step",
  "sliding_window_pattern",
  "first_k_dense_replace",
)
_FACTORS = (
  "rms_norm_eps", "layer_norm_epsilon", "rope_theta", "rope_local_base_freq",
  "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
  "routed_scaling_factor", "swiglu_limit",
)  # fmt: skip
_MAPS = ("rope_scaling", "rope_parameters")
_MAY_BE_ZERO = ("first_k_dense_replace",)
_LARGEST = (1 << 31) - 1


def check_config(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
  """That the numbers which models are made of can be those of this checkpoint.

  Args:
    path: for messages.

  Raises:
    ConfigError: one of them can't.
  """
  longest = max((n for tensor in tensors.values() for n in tensor.shape), default=0)
  for name in (*_LAYERS, *_EXPERTS, *_SIZES, *_COUNTS):
    least = 0 if name in _MAY_BE_ZERO else 1
    value = config.get(name)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (whole and least <= value <= _LARGEST):
      raise ConfigError(
        f"the config of {path}: {name} is {_shown(value)}, not a whole number from {least} to "
        f"{_LARGEST:,}"
      )
    if name in _LAYERS and value is not None and value > len(tensors):
      raise ConfigError(
        f"the config of {path} says {name}={value:,}, but there are only {len(tensors):,} tensors"
      )
    if (name in _SIZES or name in _EXPERTS) and value is not None and value > longest:
      raise ConfigError(
        f"the config of {path} says {name}={value:,}, but no tensor is longer than {longest:,}"
      )
  for name in _FACTORS:
    value = config.get(name)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and math.isfinite(value) and value > 0):
      raise ConfigError(f"the config of {path}: {name} is {_shown(value)}, not a positive number")
  for name in _MAPS:
    if not isinstance(config.get(name) or {}, dict):
      raise ConfigError(f"the config of {path}: {name} is {_shown(config[name])}, no object")
  _check_pattern(path, config.get("attention_types"), len(tensors))
  kinds = config.get("layer_types")
  if kinds is not None and not (isinstance(kinds, list) and all(isinstance(k, str) for k in kinds)):
    raise ConfigError(f"the config of {path}: layer_types is {_shown(kinds)}, no list of names")


def _check_pattern(path: Path, groups: Any, num_tensors: int) -> None:
  """GPT-Neo's [[["global", "local"], 12]]."""
  if groups is None:
    return
  good = lambda g: (
    isinstance(g, list) and len(g) == 2 and isinstance(g[0], list)
    and isinstance(g[1], int) and 0 <= g[1] <= num_tensors
  )  # fmt: skip
  if not isinstance(groups, list) or not all(map(good, groups)):
    raise ConfigError(
      f"the config of {path}: attention_types is {_shown(groups)}, no list of [kinds, times]"
    )


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:57]}..."
