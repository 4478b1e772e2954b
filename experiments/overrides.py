"""Configs by path: typed overrides, flat views, differences, JSON, and what a resume may change.

A path is field names and tuple indices joined by dots; in overrides `*` stands for every index:
`model.segments.*.layers.-1.mlp.hidden=512`. Types come from the dataclasses' annotations, so a
new field needs nothing here.
"""

import dataclasses
import difflib
import functools
import itertools
import math
import typing
from collections.abc import Iterable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, NamedTuple

from .config import Config, ConfigError
from .fields import (
  NONE,
  build,
  field_types,
  is_section,
  item_type,
  join,
  section_types,
  suggest,
  type_name,
  union_members,
)

_TYPE_KEY = "type"  # names a dataclass in `flatten` and in JSON
_WRONG = object()  # what reading text gives when it is not of the wanted type


class _Absent:
  """The value, in a difference, of a path that only the other config has."""

  def __repr__(self) -> str:
    return "absent"


ABSENT = _Absent()


class _Override(NamedTuple):
  path: str
  rest: tuple[str, ...]  # what remains of the path below the present value
  text: str
  wildcards: int

  @property
  def head(self) -> str:
    return self.rest[0]

  def below(self) -> "_Override":
    return self._replace(rest=self.rest[1:])


class _Progress:
  """Which overrides found a place, and why one did not."""

  def __init__(self):
    self.used: set[str] = set()
    self._refused: dict[str, tuple[bool, str]] = {}

  def refuse(self, override: _Override, why: str, near: bool = False) -> None:
    """Keep the first reason, but rather one from a place that has a field of a similar name."""
    known = self._refused.get(override.path)
    if known is None or (near and not known[0]):
      self._refused[override.path] = (near, f"{override.path}: {why}")

  def why(self, override: _Override) -> str:
    return self._refused[override.path][1]


def apply_overrides(config: Config, overrides: Iterable[tuple[str, str]]) -> Config:
  """`config` with fields replaced, each value read by its field's annotation.

  All are applied together and every dataclass is rebuilt once, innermost first, so values that
  are only valid in combination may come in any order. Where several reach one field, the path
  with the fewest wildcards wins. A wildcard is applied wherever the rest of the path exists; it
  must exist somewhere. Integers may be written 1_000 or 1e6, tuples as `a,b`, None as `none`.

  Args:
    config: the config to start from.
    overrides: (path, text) pairs.

  Raises:
    ConfigError: an unknown field, with the nearest names; a value of the wrong type; two
      values for one field; a whole section as value; or what a section's own check says.
  """
  pending = [
    _Override(path, tuple(path.split(".")), text, path.split(".").count("*"))
    for path, text in overrides
  ]
  progress = _Progress()
  result = _replace_section(config, pending, "", progress)
  for override in pending:
    if override.path not in progress.used:
      raise ConfigError(progress.why(override) + _nearest_paths(config, override.path))
  return result


def _replace_section(section: Any, overrides: list[_Override], at: str, progress: _Progress) -> Any:
  types = field_types(type(section))
  groups: dict[str, list[_Override]] = {}
  for override in overrides:
    if override.head in types:
      groups.setdefault(override.head, []).append(override.below())
    else:
      where = f"{at or 'the config'} ({type(section).__name__})"
      hint, near = suggest(override.head, types)
      progress.refuse(override, f"{where} has no field {override.head!r}; {hint}", near)
  changed = {
    name: _replace(getattr(section, name), types[name], group, join(at, name), progress)
    for name, group in groups.items()
  }
  if not changed:
    return section
  return build(functools.partial(dataclasses.replace, section), changed, at)


def _replace_items(
  items: tuple, annotation: Any, overrides: list[_Override], at: str, progress: _Progress
) -> tuple:
  groups: dict[int, list[_Override]] = {}
  for override in overrides:
    indices = _indices(override.head, len(items))
    for index in indices:
      groups.setdefault(index, []).append(override.below())
    if not indices:
      span = f"from {-len(items)} to {len(items) - 1}"
      why = f"{at} has {len(items)} elements; give an index {span}, or *, not {override.head!r}"
      progress.refuse(override, why)
  replaced = list(items)
  for index, group in groups.items():
    replaced[index] = _replace(items[index], annotation, group, join(at, str(index)), progress)
  return tuple(replaced)


def _replace(
  value: Any, annotation: Any, overrides: list[_Override], at: str, progress: _Progress
) -> Any:
  deeper = [override for override in overrides if override.rest]
  here = [override for override in overrides if not override.rest]
  if here:
    if deeper:
      raise ConfigError(f"{at} is set as a whole and {deeper[0].path} below it: give one of them")
    progress.used.update(override.path for override in here)
    return _parse(_winner(here, at), annotation, at)
  if dataclasses.is_dataclass(value):
    return _replace_section(value, deeper, at, progress)
  if isinstance(value, tuple):
    return _replace_items(value, item_type(annotation), deeper, at, progress)
  for override in deeper:
    shown = "none" if value is None else type_name(annotation)
    progress.refuse(override, f"{at} is {shown}, it has no fields")
  return value


def _winner(overrides: list[_Override], at: str) -> str:
  fewest = min(override.wildcards for override in overrides)
  texts = {override.text: override for override in overrides if override.wildcards == fewest}
  if len(texts) > 1:
    raise ConfigError(f"{at} is set to both {' and '.join(texts)}: give one value")
  return next(iter(texts))


def _indices(head: str, length: int) -> range | list[int]:
  if head == "*":
    return range(length)
  try:
    index = int(head)
  except ValueError:
    return []
  return [index % length] if -length <= index < length else []


def _nearest_paths(config: Config, path: str) -> str:
  """A hint where else the last name of `path` occurs, such as the section that was left out."""
  last = path.rpartition(".")[2]
  same = [known for known in flatten(config) if known.rpartition(".")[2] == last != _TYPE_KEY]
  near = difflib.get_close_matches(path, same, n=3, cutoff=0)
  return f" (there is {', '.join(near)})" if near else ""


def _parse(text: str, annotation: Any, path: str) -> Any:
  members, item = union_members(annotation), item_type(annotation)
  if NONE in members and text.strip().lower() == "none":
    return None
  if is_section(annotation):
    names = [name for section in section_types(annotation) for name in field_types(section)]
    paths = ", ".join(join(path, name) for name in dict.fromkeys(names)) or join(path, "*")
    none = ", or give none" if NONE in members else ""
    raise ConfigError(f"{path} is a section; set one of its fields: {paths}{none}")
  if item is not None and ("," in text or str not in members):
    parts = (part.strip() for part in text.split(","))
    return tuple(_parse(part, item, path) for part in parts if part)
  readings = (_read(text, member) for member in members)
  value = next((reading for reading in readings if reading is not _WRONG), _WRONG)
  if value is _WRONG:
    raise ConfigError(f"{path} must be {type_name(annotation)}, got {text!r}")
  return value


def _read(text: str, scalar: Any) -> Any:
  """`text` as this type, or `_WRONG`."""
  if typing.get_origin(scalar) is Literal:
    return next((choice for choice in typing.get_args(scalar) if str(choice) == text), _WRONG)
  if scalar is str:
    return text
  if scalar is bool:
    return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), _WRONG)
  if scalar not in (int, float):
    return _WRONG
  try:
    number = Decimal(text)
  except InvalidOperation:
    return _WRONG
  if not number.is_finite():
    return _WRONG
  if scalar is float:
    return float(text) if math.isfinite(float(text)) else _WRONG
  # copy_abs and the bound first: the rest would take forever on 1e999999999.
  whole = number.copy_abs() < 2**63 and number == number.to_integral_value()
  return int(number) if whole else _WRONG


def flatten(config: Any) -> dict[str, Any]:
  """{path: value} of every field that is not a section: numbers, text, None, tuples of those.

  Where a field may hold one of several dataclasses, `<path>.type` is the name of the one it does.
  """
  return dict(_walk(config, type(config), ""))


def _walk(value: Any, annotation: Any, path: str) -> Iterable[tuple[str, Any]]:
  if dataclasses.is_dataclass(value):
    if len(section_types(annotation)) > 1:
      yield join(path, _TYPE_KEY), type(value).__name__
    for name, hint in field_types(type(value)).items():
      yield from _walk(getattr(value, name), hint, join(path, name))
  elif section_types(item_type(annotation)):
    for index, item in enumerate(value):
      yield from _walk(item, item_type(annotation), join(path, str(index)))
  else:
    yield path, value


def difference(a: Any, b: Any) -> list[tuple[str, Any, Any]]:
  """(path, value in a, value in b) wherever they differ; `ABSENT` where one has no such path."""
  flat_a, flat_b = flatten(a), flatten(b)
  pairs = (
    (path, flat_a.get(path, ABSENT), flat_b.get(path, ABSENT)) for path in {**flat_a, **flat_b}
  )
  return [(path, old, new) for path, old, new in pairs if old != new]


def to_json(config: Any) -> Any:
  """`config` as dicts, lists and scalars; each dataclass carries its name under "type"."""
  if dataclasses.is_dataclass(config):
    fields = {name: to_json(getattr(config, name)) for name in field_types(type(config))}
    return {_TYPE_KEY: type(config).__name__, **fields}
  return [to_json(item) for item in config] if isinstance(config, tuple) else config


def from_json(tree: Any) -> Config:
  """The `Config` that `to_json` wrote. A field that was not stored takes its default.

  Raises:
    ConfigError: an unknown field or type name, a missing field, a value of the wrong type, or a
      value the section refuses.
  """
  return _decode(tree, Config, "")


def _decode(tree: Any, annotation: Any, path: str) -> Any:
  members, item = union_members(annotation), item_type(annotation)
  if tree is None and NONE in members:
    return None
  if isinstance(tree, dict) and section_types(annotation):
    return _decode_section(tree, {cls.__name__: cls for cls in section_types(annotation)}, path)
  if isinstance(tree, list) and item is not None:
    return tuple(_decode(child, item, join(path, str(i))) for i, child in enumerate(tree))
  for member in members:
    if typing.get_origin(member) is Literal and tree in typing.get_args(member):
      return tree
    if type(tree) is member:
      return tree
    if member is float and type(tree) is int:
      return float(tree)
  raise ConfigError(f"stored {path or 'config'} must be {type_name(annotation)}, got {tree!r}")


def _decode_section(tree: dict, sections: dict[str, type], path: str) -> Any:
  where = f"stored {path or 'config'}"
  name = tree.get(_TYPE_KEY)
  if name not in sections:
    raise ConfigError(f"{where} has type {name!r}; it must be {' or '.join(sections)}")
  types = field_types(sections[name])
  stored = {field: child for field, child in tree.items() if field != _TYPE_KEY}
  for field in stored:
    if field not in types:
      raise ConfigError(f"{where} has an unknown field {field!r}; {suggest(field, types)[0]}")
  for field in dataclasses.fields(sections[name]):
    if field.name not in stored and field.default is dataclasses.MISSING:
      raise ConfigError(f"{where} lacks the field {field.name!r}")
  decoded = {name: _decode(child, types[name], join(path, name)) for name, child in stored.items()}
  return build(sections[name], decoded, path)


class Change(NamedTuple):
  """A field that differs between the stored and the requested config."""

  path: str
  stored: Any
  requested: Any
  kind: Literal["free", "intervention", "identity"]


def change_class(path: str) -> Literal["free", "intervention", "identity"]:
  """What it takes to change this field of a run that has begun: see `experiments.config`.

  The model is its identity, save for which kernel computes it; the config's name is free.
  """
  section, _, rest = path.partition(".")
  if section == "model":
    return "free" if rest.rpartition(".")[2] == "implementation" else "identity"
  if path == "name":
    return "free"
  if section in field_types(Config):
    name = rest.partition(".")[0]
    for field in dataclasses.fields(field_types(Config)[section]):
      if field.name == name:
        return field.metadata["change"]
  raise ConfigError(f"{path}: the config has no such field")


def check_resume(
  stored: Config, requested: Config, *, reason: str | None = None, allow: bool = False
) -> list[Change]:
  """What resuming `stored` as `requested` changes, if that is permitted.

  Args:
    stored: the config in the work directory.
    requested: the config asked for.
    reason: `--reason`, which every intervention needs.
    allow: `--allow_config_change`, which a change of identity needs.

  Raises:
    ConfigError: for a change of identity without `allow` or an intervention without `reason`.
  """
  changes = [Change(*entry, change_class(entry[0])) for entry in difference(stored, requested)]
  identity = [change for change in changes if change.kind == "identity"]
  if identity and not allow:
    raise ConfigError(
      f"{_describe(identity)}: this would be another run; use a new --workdir, or "
      "--allow_config_change to go on regardless"
    )
  interventions = [change for change in changes if change.kind == "intervention"]
  if interventions and not (reason or "").strip():
    raise ConfigError(f"{_describe(interventions)}: say why with --reason=...")
  return changes


def _describe(changes: Sequence[Change]) -> str:
  shown = [f"{c.path} from {c.stored!r} to {c.requested!r}" for c in itertools.islice(changes, 3)]
  more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
  return f"resuming would change {', '.join(shown)}{more}"
