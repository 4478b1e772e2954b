"""What annotations say of a config's fields: sections, unions, tuples, and how to name them."""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from .config import ConfigError

NONE = type(None)


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
  """{field: annotation}, resolved."""
  return typing.get_type_hints(cls)


def union_members(annotation: Any) -> tuple[Any, ...]:
  """The members of a union; anything else is its own only member."""
  if typing.get_origin(annotation) in (typing.Union, types.UnionType):
    return typing.get_args(annotation)
  return (annotation,)


def section_types(annotation: Any) -> tuple[type, ...]:
  """The dataclasses that the field may hold."""
  return tuple(option for option in union_members(annotation) if dataclasses.is_dataclass(option))


def item_type(annotation: Any) -> Any:
  """X of the `tuple[X, ...]` among the options, or None."""
  for option in union_members(annotation):
    if typing.get_origin(option) is tuple:
      return typing.get_args(option)[0]
  return None


def is_section(annotation: Any) -> bool:
  """Is this a dataclass, or a tuple of them: something with fields of its own?"""
  return bool(section_types(annotation) or section_types(item_type(annotation)))


def type_name(annotation: Any) -> str:
  """The annotation in words, for messages."""
  if typing.get_origin(annotation) is Literal:
    return "one of " + ", ".join(map(str, typing.get_args(annotation)))
  names = {int: "an integer", float: "a number", bool: "true or false", str: "text", NONE: "none"}
  item = item_type(annotation)
  if len(union_members(annotation)) > 1:
    return " or ".join(map(type_name, union_members(annotation)))
  if item is not None:
    return f"a comma-separated list, each {type_name(item)}"
  return names.get(annotation) or annotation.__name__


def build(make: Callable[..., Any], fields: Mapping[str, Any], path: str) -> Any:
  """`make(**fields)`; a section's own complaint becomes a ConfigError that names `path`."""
  try:
    return make(**fields)
  except ConfigError:
    raise  # names its field already
  except ValueError as error:
    raise ConfigError(f"{path or 'config'}: {error}") from error


def join(at: str, name: str) -> str:
  """The path of field or index `name` of what is at `at`."""
  return f"{at}.{name}" if at else name


def suggest(name: str, names: Iterable[str]) -> tuple[str, bool]:
  """A hint with the names nearest to a mistaken one, or all of them; and whether any is near."""
  near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
  hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(names)}"
  return hint, bool(near)
