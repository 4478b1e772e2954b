"""What configs of several families have in common."""

from typing import Any

from layers.spec import LayerSpec, LinearScaling, Llama3Scaling, RotarySpec, Segment, YarnScaling

from ...config import ConfigError


def grouped(layers: list[LayerSpec]) -> tuple[Segment, ...]:
  """Layers in as few segments as their order allows: a group that repeats, and what is left."""
  segments, start = [], 0
  while start < len(layers):
    best = (1, 1)  # length of the group, repeats
    for size in range(1, (len(layers) - start) // 2 + 1):
      group, count = layers[start : start + size], 1
      while layers[start + count * size : start + (count + 1) * size] == group:
        count += 1
      if count > 1 and size * count > best[0] * best[1]:
        best = (size, count)
    size, count = best
    segments.append(Segment(tuple(layers[start : start + size]), count))
    start += size * count
  return tuple(segments)


def rotary(c: dict[str, Any], *, theta: float = 10_000.0, dims: int | None = None) -> RotarySpec:
  """The rotary positions of a config.json, in the words of transformers 5 or those before.

  Raises:
    ConfigError: a scaling that is not known here.
  """
  new = c.get("rope_parameters") or {}
  old = c.get("rope_scaling") or {}
  said = {**old, **new}
  theta = float(said.get("rope_theta", c.get("rope_theta", theta)))
  kind = said.get("rope_type", said.get("type", "default"))
  if kind == "default":
    return RotarySpec(theta, dims)
  if kind == "linear":
    return RotarySpec(theta, dims, scaling=LinearScaling(float(said["factor"])))
  if kind == "llama3":
    return RotarySpec(theta, dims, scaling=Llama3Scaling(
      float(said["factor"]), float(said["low_freq_factor"]), float(said["high_freq_factor"]),
      int(said["original_max_position_embeddings"]),
    ))  # fmt: skip
  if kind == "yarn":
    return RotarySpec(theta, dims, scaling=YarnScaling(
      float(said["factor"]), int(said["original_max_position_embeddings"]),
      float(said.get("beta_fast") or 32.0), float(said.get("beta_slow") or 1.0),
      said.get("attention_factor"), bool(said.get("truncate", True)),
    ))  # fmt: skip
  raise ConfigError(
    f"rope_type={kind!r} in config.json is not known: default, linear, llama3, yarn"
  )


def activation(name: str) -> str:
  """Ours, of transformers' name.

  Raises:
    ConfigError: one that is not known here.
  """
  names = {
    "relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "silu": "silu", "swish": "silu", "quick_gelu": "quick_gelu",
  }  # fmt: skip
  if name not in names:
    raise ConfigError(f"activation {name!r} in config.json is not known: {', '.join(names)}")
  return names[name]
