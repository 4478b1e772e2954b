"""Which family can hold a model: the one whose config, read again, gives the same model."""

import math
from dataclasses import fields, is_dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

from layers.spec import (
  AttentionSpec,
  InitSpec,
  LatentAttentionSpec,
  LayerSpec,
  ModelSpec,
  MoeSpec,
  RotarySpec,
)

from ..config import ConfigError
from .families.common import UnlikeError, grouped
from .open import FAMILIES
from .table import Table

_SHOWN = 4  # differences in a message
_DROPLESS = {
  "capacity_factor": 1.25, "eval_capacity_factor": 2.0, "min_capacity": 4, "group_size": None,
}  # fmt: skip


class Expressed(NamedTuple):
  """A model in the words of a family."""

  kind: str  # model_type
  table: Table
  config: dict[str, Any]  # of config.json, but for what is not about the model


def kinds() -> list[str]:
  """Families by their `model_type`, in the order in which they are tried."""
  return [kind for family in FAMILIES for kind in family.TYPES]


def express(spec: ModelSpec, kind: str = "auto") -> Expressed:
  """The model as one of `kind`, or of the first kind that can hold it.

  Raises:
    ConfigError: none can, or not this one: what of the model it has no word for.
  """
  if kind != "auto" and kind not in kinds():
    raise ConfigError(f"--family={kind}: known are auto, {', '.join(kinds())}")
  why: dict[str, tuple[int, list[str]]] = {}
  for family in FAMILIES:
    for name in family.TYPES:
      if kind not in ("auto", name):
        continue
      config, distance, differences = _try(family, name, spec)
      if not differences:
        return Expressed(name, family.TABLE, config)
      why[name] = distance, differences
  nearest = min(why, key=lambda name: why[name][0])
  differences = why[nearest][1]
  more = len(differences) - _SHOWN
  shown = "; ".join(differences[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
  if kind != "auto":
    raise ConfigError(f"--family={kind} can't hold this model: {shown}")
  raise ConfigError(f"no known family can hold this model; the nearest is {nearest}, but {shown}")


def essence(spec: ModelSpec) -> ModelSpec:
  """What the model computes when it is used: without its first draw, dropout, losses of routers and
  the choice of kernels; what has two spellings in one of them."""
  return replace(
    spec,
    segments=grouped([_layer(layer) for layer in spec.layers]),
    embedding=replace(spec.embedding, dropout=0.0),
    init=InitSpec(),
  )


def _layer(layer: LayerSpec) -> LayerSpec:
  attention, mlp = layer.attention, layer.mlp
  if isinstance(attention, AttentionSpec):
    attention = replace(
      attention,
      num_kv_heads=attention.kv_heads,
      scale=attention.scale or attention.head_dim**-0.5,
      position=_position(attention.position, attention.head_dim),
      implementation=None,
    )
  elif isinstance(attention, LatentAttentionSpec):
    scale = attention.scale or (attention.nope_dim + attention.rope_dim) ** -0.5
    attention = replace(attention, scale=scale, implementation=None)
  if isinstance(mlp, MoeSpec):
    # Devices that exchange rows may drop some of them in training; one device has them all.
    mlp = replace(
      mlp, jitter=0.0, expert_dropout=0.0, balance_loss=0.0, z_loss=0.0, exchange="auto",
      buffer_factor=2.0, implementation=None,
      bias_rate=None if mlp.bias_rate is None else 1e-3,
      **(_DROPLESS if mlp.dispatch == "dropless" else {}),
    )  # fmt: skip
  return replace(layer, attention=attention, mlp=mlp, dropout=0.0)


def _position(position: Any, head_dim: int) -> Any:
  if isinstance(position, RotarySpec) and position.dims == head_dim:
    return replace(position, dims=None)
  return position


def _try(family: ModuleType, kind: str, spec: ModelSpec) -> tuple[dict[str, Any], int, list[str]]:
  """The config, how far away the model is that it describes, and where that is another."""
  try:
    config = family.config(spec, kind)
    differences = _differences(essence(spec), essence(family.spec(config)))
  except (UnlikeError, ConfigError) as e:
    return {}, 1000, [str(e)]
  kinds = sum("Spec, not " in text for text in differences)
  return config, len(differences) + 10 * kinds, differences


def _differences(ours: ModelSpec, theirs: ModelSpec) -> list[str]:
  """In words, one for all layers that differ alike."""
  found: dict[str, list[int]] = {}
  for i, pair in enumerate(zip(ours.layers, theirs.layers, strict=True)):
    for text in _unequal(*pair):
      found.setdefault(text, []).append(i)
  told = [text + _where(layers, ours.num_layers) for text, layers in found.items()]
  return told + _unequal(replace(ours, segments=theirs.segments), theirs)


def _unequal(ours: Any, theirs: Any, path: str = "") -> list[str]:
  if is_dataclass(ours) and type(ours) is type(theirs):
    names = [field.name for field in fields(ours)]
    below = lambda name: (getattr(ours, name), getattr(theirs, name), f"{path}.{name}".strip("."))
    return [text for name in names for text in _unequal(*below(name))]
  if ours == theirs or _close(ours, theirs):
    return []
  return [f"{path} is {_word(ours)}, not {_word(theirs)}"]


def _close(a: Any, b: Any) -> bool:
  """Numbers that a config said in other words come back but for rounding."""
  return isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-8)


def _word(value: Any) -> str:
  if is_dataclass(value):
    return type(value).__name__
  return "none" if value is None else str(value)


def _where(layers: list[int], count: int) -> str:
  if len(layers) == count:
    return ""
  shown = ", ".join(map(str, layers[:3]))
  return f" in layer {shown}" if len(layers) == 1 else f" in layers {shown}" + (
    ", ..." if len(layers) > 3 else ""
  )  # fmt: skip
