"""A family's table: which tensor of a checkpoint is which parameter, and how its axes lie.

    TABLE = Table(
      layer="model.layers.{n}.",
      top=(rule("embedding/table", "model.embed_tokens.weight"), ...),
      layers=(rule("attention/query", "self_attn.q_proj.weight", "(h k) d -> d h k"), ...),
    )

A rule names a parameter of ours, or several that one tensor of theirs holds, then the tensor, then
how its axes become ours, as `einops` has it; read backwards it exports. In a pattern `p` counts the
parameters of the rule, on the first axis of the right side; `two` is 2. `{n}` is a layer's number,
`{e}` an expert's: such a tensor is one expert's part. Of several rules for a parameter, the first
whose tensors are there is taken; the first of all is written.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import einops
import numpy as np

from layers.spec import ModelSpec


class Rule(NamedTuple):
  ours: tuple[str, ...]
  theirs: str
  pattern: str


def rule(ours: str | tuple[str, ...], theirs: str, pattern: str = "") -> Rule:
  """One line of a table; without a pattern the axes are the same."""
  return Rule((ours,) if isinstance(ours, str) else ours, theirs, pattern)


class Table(NamedTuple):
  """All lines of a family."""

  layer: str  # prefix of a layer's tensors
  top: tuple[Rule, ...]
  layers: tuple[Rule, ...]
  ignored: tuple[str, ...] = ()  # endings of names that are no weights: masks, frequencies


class Piece(NamedTuple):
  """A part of one of our parameters, and the tensor that it comes from."""

  leaf: str  # path, /-separated
  at: tuple[int, ...]  # where on its first axes: repeat of the segment, expert
  name: str  # theirs
  rule: Rule
  part: int  # which of the rule's parameters


def pieces(table: Table, spec: ModelSpec, leaves: dict[str, tuple[int, ...]],
           there: Iterable[str] | None = None) -> Iterator[Piece]:  # fmt: skip
  """All parts of a model's parameters, each with its tensor.

  Args:
    leaves: shape by path.
    there: names in the checkpoint; None to write one.

  Raises:
    KeyError: no rule for a parameter.
  """
  names = None if there is None else set(there)
  layer = 0
  for s, segment in enumerate(spec.segments):
    for r in range(segment.repeats):
      for j in range(len(segment.layers)):
        prefix = f"segment_{s}/layer_{j}/"
        own = {path: shape for path, shape in leaves.items() if path.startswith(prefix)}
        at, theirs = (r,), table.layer.format(n=layer)
        yield from _pieces(table.layers, own, prefix, theirs, at, names)
        layer += 1
  top = {path: shape for path, shape in leaves.items() if not path.startswith("segment_")}
  yield from _pieces(table.top, top, "", "", (), names)


def _pieces(rules, own, prefix, theirs, at, names) -> Iterator[Piece]:
  for path, shape in own.items():
    found = [r for r in rules if path.removeprefix(prefix) in r.ours]
    if not found:
      raise KeyError(path)
    chosen = found[0]
    for r in found[1:] if names is not None else ():
      if (theirs + chosen.theirs).format(e=0) in names:
        break
      chosen = r
    part = chosen.ours.index(path.removeprefix(prefix))
    if "{e}" not in chosen.theirs:
      yield Piece(path, at, theirs + chosen.theirs, chosen, part)
      continue
    for e in range(shape[len(at)]):
      yield Piece(path, (*at, e), theirs + chosen.theirs.format(e=e), chosen, part)


def _sides(pattern: str) -> tuple[list[list[str]], list[list[str]]]:
  """Axes of both sides, each the names that it is made of."""

  def axes(side: str) -> list[list[str]]:
    found, inside = [], None
    for word in side.replace("(", " ( ").replace(")", " ) ").split():
      if word == "(":
        inside = []
        found.append(inside)
      elif word == ")":
        inside = None
      elif inside is None:
        found.append([word])
      else:
        inside.append(word)
    return found

  left, _, right = pattern.partition("->")
  return axes(left), axes(right)


def _sizes(rule: Rule, ours: tuple[int, ...]) -> dict[str, int]:
  """The length of each named axis, from the shape of one of our parameters."""
  _, right = _sides(rule.pattern)
  sizes = {"two": 2, "p": len(rule.ours)}
  for axis, size in zip(right[1:] if right[0] == ["p"] else right, ours, strict=True):
    known = math.prod(sizes[name] for name in axis if name in sizes)
    for name in axis:
      sizes.setdefault(name, size // known)
  named = {name for axis in right for name in axis}
  return {name: size for name, size in sizes.items() if name in named}


def their_shape(rule: Rule, ours: tuple[int, ...]) -> tuple[int, ...]:
  """The shape of their tensor, from that of (a part of) one of our parameters."""
  if not rule.pattern:
    return ours
  sizes = _sizes(rule, ours)
  return tuple(math.prod(sizes[name] for name in axis) for axis in _sides(rule.pattern)[0])


def to_ours(rule: Rule, part: int, tensor: np.ndarray, ours: tuple[int, ...]) -> np.ndarray:
  """Our parameter, from their tensor; a view of it."""
  if not rule.pattern:
    return tensor
  found = einops.rearrange(tensor, rule.pattern, **_sizes(rule, ours))
  return found[part] if _sides(rule.pattern)[1][0] == ["p"] else found


def to_theirs(rule: Rule, parts: list[np.ndarray]) -> np.ndarray:
  """Their tensor, from all parameters of the rule."""
  if not rule.pattern:
    return parts[0]
  left, _, right = rule.pattern.partition("->")
  fused = _sides(rule.pattern)[1][0] == ["p"]
  value = np.stack(parts) if fused else parts[0]
  return einops.rearrange(value, f"{right} -> {left}", **_sizes(rule, parts[0].shape))
