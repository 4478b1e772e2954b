"""How a GGUF file scales rotary positions, in the words of a config.json."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..config import ConfigError
from .source import Tensor

_TABLE = "rope_freqs.weight"
_CLOSE = 1e-3  # relative; the table was computed in float32


def scaling(
  said: Any, config: dict[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any] | None:
  """A `rope_scaling`, or None.

  Raises:
    ConfigError: a scaling, or a part of one, that is not read.
  """
  kind = said.get("rope.scaling.type", "none")
  old = said.get("rope.scale_linear")
  if kind == "none" and old not in (None, 1.0):
    return {"type": "linear", "factor": float(old)}
  if _TABLE in tensors:
    if kind != "none":
      raise ConfigError(f"{said.path}: a table of rotary factors and {kind} scaling, not both")
    return _from_table(said, config, tensors[_TABLE])
  if kind == "none":
    return None
  factor = said.get("rope.scaling.factor")
  if not isinstance(factor, float) or not math.isfinite(factor) or factor <= 0:
    raise ConfigError(f"{said.path}: {said.kind}.rope.scaling.factor is {factor!r}, no factor")
  if kind == "linear":
    return {"type": "linear", "factor": factor}
  if kind != "yarn":
    raise ConfigError(f"{said.path}: rotary positions scaled as {kind!r} are not read")
  return _yarn(said, config, factor)


def _yarn(said: Any, config: dict[str, Any], factor: float) -> dict[str, Any]:
  for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
    # Converters and llama.cpp disagree on what the first two multiply.
    if said.get(f"rope.scaling.{name}") not in (None, 1.0):
      raise ConfigError(f"{said.path}: YaRN with rope.scaling.{name} is not read")
  length = said.need("rope.scaling.original_context_length")
  found = {
    "type": "yarn",
    "factor": factor,
    "original_max_position_embeddings": length,
    "beta_fast": said.get("rope.scaling.yarn_beta_fast"),
    "beta_slow": said.get("rope.scaling.yarn_beta_slow"),
  }
  slope = said.get("rope.scaling.yarn_log_multiplier")
  if said.kind == "deepseek2":
    # A tenth of mscale_all_dim; mscale, which is not kept, is taken to equal it.
    all_dims = 10.0 * (slope or 0.0)
    found |= {"mscale": all_dims, "mscale_all_dim": all_dims}
  elif slope not in (None, 0.0):
    raise ConfigError(f"{said.path}: YaRN with a yarn_log_multiplier is not read")
  if said.kind == "gpt-oss":
    found["truncate"] = False  # as it was trained
  return found


def _from_table(said: Any, config: dict[str, Any], tensor: Tensor) -> dict[str, Any] | None:
  """Llama 3.1's scaling as the table of factors that frequencies are divided by.

  Its four numbers are not in the file. Between the wavelengths original / high and original / low
  the inverse factor is a straight line in the frequency, so two points of it give both, up to a
  common unit: low is 1 here. Of fewer points several numbers make the same table.
  """
  table = tensor.read().astype(np.float64).ravel()
  head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
  if len(table) != head // 2:
    raise ConfigError(f"{said.path}: {_TABLE} is [{len(table)}], a head needs [{head // 2}]")
  if np.allclose(table, table[0], rtol=_CLOSE):
    return None if math.isclose(table[0], 1.0) else {"type": "linear", "factor": float(table[0])}
  theta, factor = float(config.get("rope_theta", 10_000.0)), float(table.max())
  turns = theta ** (-np.arange(len(table)) * 2 / head) / (2 * math.pi)  # per position
  for low, high, length in [(1.0, 4.0, 8192), *_fits(table, turns, factor)]:
    if np.allclose(_llama3(turns, factor, low, high, length), table, rtol=_CLOSE):
      return {
        "type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": length,
      }  # fmt: skip
  raise ConfigError(f"{said.path}: the factors in {_TABLE} are not those of Llama 3.1's scaling")


def _llama3(turns: np.ndarray, factor: float, low: float, high: float, length: float) -> np.ndarray:
  part = np.clip((length * turns - low) / (high - low), 0.0, 1.0)
  return 1.0 / ((1.0 - part) / factor + part)


def _fits(table: np.ndarray, turns: np.ndarray, factor: float) -> list[tuple[float, float, int]]:
  """(low, high, original length) that may have made the table."""
  inside = (table > 1 + 1e-6) & (table < factor * (1 - 1e-6))
  part = (1 / table[inside] - 1 / factor) / (1 - 1 / factor)
  x = turns[inside]
  if len(x) >= 2 and np.ptp(part) > 0:
    slope, start = np.polyfit(x, part, 1)
    if slope > 0 and start < 0:  # slope = length / (high - low), start = -low / (high - low)
      length = round(slope / -start)
      return [(1.0, 1.0 - 1.0 / start, length)]
  if len(x) == 1:  # with Llama's own ratio of 4
    return [(1.0, 4.0, round((1 + 3 * part[0]) / x[0]))]
  return []
