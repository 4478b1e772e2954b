"""What configs and tables of several families have in common."""

import math
from typing import Any

from layers.spec import (
  AttentionSpec,
  LayerSpec,
  LinearScaling,
  Llama3Scaling,
  ModelSpec,
  MoeSpec,
  RotarySpec,
  Segment,
  YarnScaling,
)

from ...config import ConfigError
from ..table import Rule, rule

_ACTIVATIONS = {
  "relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_fast": "gelu_tanh", "silu": "silu", "swish": "silu", "quick_gelu": "quick_gelu",
  "relu2": "relu2",
}  # fmt: skip


class UnlikeError(Exception):
  """What a family has no words for."""


def projections(prefix: str, out: str, biases: bool = True) -> tuple[Rule, ...]:
  """Rules for queries, keys, values and what follows, of a tensor each."""
  heads, back = "(h k) d -> d h k", "d (h k) -> h k d"
  own = [(f"attention/{x}", f"{prefix}{x[0]}_proj") for x in ("query", "key", "value")]
  matrices = [rule(ours, f"{theirs}.weight", heads) for ours, theirs in own]
  matrices.append(rule("attention/out", f"{prefix}{out}.weight", back))
  if not biases:
    return tuple(matrices)
  vectors = [rule(f"{ours}_bias", f"{theirs}.bias", "(h k) -> h k") for ours, theirs in own]
  return *matrices, *vectors, rule("attention/out_bias", f"{prefix}{out}.bias")


def gated(prefix: str, ours: str = "mlp") -> tuple[Rule, ...]:
  """Rules for a gated MLP in the words of LLaMA."""
  return (
    rule(f"{ours}/gate", f"{prefix}gate_proj.weight", "f d -> d f"),
    rule(f"{ours}/up", f"{prefix}up_proj.weight", "f d -> d f"),
    rule(f"{ours}/down", f"{prefix}down_proj.weight", "d f -> f d"),
  )


def norms(attention: str, mlp: str) -> tuple[Rule, ...]:
  """Rules for a layer's two norms with biases."""
  own = (("attention_norm", attention), ("mlp_norm", mlp))
  names = (("scale", "weight"), ("bias", "bias"))
  return tuple(rule(f"{a}/{x}", f"{b}.{y}") for a, b in own for x, y in names)


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


def parts(spec: ModelSpec, attention: Any, mlp: Any) -> tuple[Any, Any]:
  """The first layer's, all layers being of these types.

  Raises:
    UnlikeError: one is of another.
  """
  for i, layer in enumerate(spec.layers):
    for name, part, kind in (("attention", layer.attention, attention), ("mlp", layer.mlp, mlp)):
      if not isinstance(part, kind):
        raise UnlikeError(f"{name} is {type(part).__name__} in layer {i}")
  return spec.layers[0].attention, spec.layers[0].mlp


def experts_of(spec: ModelSpec) -> MoeSpec:
  """The first layer's that has some.

  Raises:
    UnlikeError: none has.
  """
  found = next((x.mlp for x in spec.layers if isinstance(x.mlp, MoeSpec)), None)
  if found is None:
    raise UnlikeError("it has no experts")
  return found


def rotary(c: dict[str, Any], *, theta: float = 10_000.0) -> RotarySpec:
  """The rotary positions of a config.json, in the words of transformers 5 or those before.

  Raises:
    ConfigError: a scaling that is not known here.
  """
  said = rope_words(c)
  theta = float(said.get("rope_theta", c.get("rope_theta", theta)))
  kind = said.get("rope_type", said.get("type", "default"))
  if kind == "default":
    return RotarySpec(theta)
  if kind == "linear":
    return RotarySpec(theta, scaling=LinearScaling(float(said["factor"])))
  if kind == "llama3":
    return RotarySpec(theta, scaling=Llama3Scaling(
      float(said["factor"]), float(said["low_freq_factor"]), float(said["high_freq_factor"]),
      int(said["original_max_position_embeddings"]),
    ))  # fmt: skip
  if kind == "yarn":
    return RotarySpec(theta, scaling=YarnScaling(
      float(said["factor"]), int(said["original_max_position_embeddings"]),
      float(said.get("beta_fast") or 32.0), float(said.get("beta_slow") or 1.0),
      said.get("attention_factor"), bool(said.get("truncate", True)),
    ))  # fmt: skip
  raise ConfigError(
    f"rope_type={kind!r} in config.json is not known: default, linear, llama3, yarn"
  )


def rope_words(c: dict[str, Any]) -> dict[str, Any]:
  """What a config.json says of rotary positions beside their base, new words before old ones."""
  return {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}


def rope(position: Any) -> dict[str, Any]:
  """Rotary positions in the words before transformers 5, which it and others read.

  Raises:
    UnlikeError: positions of another kind.
  """
  if not isinstance(position, RotarySpec):
    kind = "none" if position is None else type(position).__name__
    raise UnlikeError(f"attention.position is {kind}")
  return {"rope_theta": position.theta, "rope_scaling": _scaling(position.scaling)}


def _scaling(scaling: Any) -> dict[str, Any] | None:
  if scaling is None:
    return None
  said: dict[str, Any] = {"factor": scaling.factor}
  if isinstance(scaling, LinearScaling):
    return {"rope_type": "linear", **said}
  said["original_max_position_embeddings"] = scaling.original_length
  if isinstance(scaling, Llama3Scaling):
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return {"rope_type": "llama3", **said, "low_freq_factor": low, "high_freq_factor": high}
  said |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
  if scaling.attention_factor is not None:
    said["attention_factor"] = scaling.attention_factor
  return {"rope_type": "yarn", **said, "truncate": scaling.truncate}


def kinds_of_layers(spec: ModelSpec) -> tuple[list[str], int | None]:
  """`layer_types`, and the window of those that have one."""
  own = [layer.attention for layer in spec.layers]
  windows = [a.window if isinstance(a, AttentionSpec) else None for a in own]
  kinds = ["sliding_attention" if window else "full_attention" for window in windows]
  return kinds, next(filter(None, windows), None)


def activation(name: str) -> str:
  """Ours, of transformers' name.

  Raises:
    ConfigError: one that is not known here.
  """
  if name not in _ACTIVATIONS:
    known = ", ".join(_ACTIVATIONS)
    raise ConfigError(f"activation {name!r} in config.json is not known: {known}")
  return _ACTIVATIONS[name]


def activation_name(ours: str) -> str:
  """transformers' name of ours."""
  return next(theirs for theirs, known in _ACTIVATIONS.items() if known == ours)


def whole(number: float) -> int:
  """A number that is whole but for rounding.

  Raises:
    UnlikeError: it is not.
  """
  if not math.isclose(number, round(number), rel_tol=1e-9):
    raise UnlikeError(f"{number} is no whole number")
  return round(number)
