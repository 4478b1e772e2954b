"""A family's table: which tensor of a checkpoint is which parameter, and how its axes lie.

    TABLE = Table(
      layer="model.layers.{n}.",
      top=(rule("embedding/table", "model.embed_tokens.weight"), ...),
      layers=(rule("attention/query", "self_attn.q_proj.weight", "(h k) d -> d h k"), ...),
    )

A rule names a parameter of ours, or several that one tensor of theirs holds, then the tensor, then
how its axes become ours, as `einops` has it; read backwards it exports. In a pattern `p` counts the
parameters of the rule, on the first axis of the right side; `two` is 2. With `join` they follow
each other on the axis of that name, in lengths of their own. `{n}` is a layer's number, `{e}` an
expert's: such a tensor is one expert's part. Of several rules for a parameter, the first whose
tensors are there is taken; the first of all is written. A rule with `beside` is for layers that
have that parameter too.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import einops

from layers.spec import ModelSpec


class Rule(NamedTuple):
  ours: tuple[str, ...]
  theirs: str
  pattern: str
  join: str = ""
  beside: str = ""

  @property
  def unnamed(self) -> "Rule":
    """What it does to axes, by which a compiled program is found again."""
    return Rule(("",) * len(self.ours), "", self.pattern, self.join)


def rule(
  ours: str | tuple[str, ...], theirs: str, pattern: str = "", join: str = "", beside: str = ""
) -> Rule:
  """One line of a table; without a pattern the axes are the same."""
  return Rule((ours,) if isinstance(ours, str) else ours, theirs, pattern, join, beside)


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
  prefix: str  # of their paths

  def shapes(self, leaves: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Of (the same part of) all parameters of the rule."""
    return [leaves[self.prefix + name].shape[len(self.at) :] for name in self.rule.ours]


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
    here = lambda r: not r.beside or prefix + r.beside in own
    found = [r for r in rules if path.removeprefix(prefix) in r.ours and here(r)]
    if not found:
      raise KeyError(path)
    known = lambda r: names is None or (theirs + r.theirs).format(e=0) in names
    chosen = next(filter(known, found), found[0])
    part = chosen.ours.index(path.removeprefix(prefix))
    if "{e}" not in chosen.theirs:
      yield Piece(path, at, theirs + chosen.theirs, chosen, part, prefix)
      continue
    for e in range(shape[len(at)]):
      name = theirs + chosen.theirs.format(e=e)
      yield Piece(path, (*at, e), name, chosen, part, prefix)


def grouped(all_pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
  """Pieces by their tensor, tensors in their order."""
  found: dict[str, list[Piece]] = {}
  for piece in all_pieces:
    found.setdefault(piece.name, []).append(piece)
  return found


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


def _sizes(rule: Rule, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
  """The length of each named axis, from the shapes of the rule's parameters."""
  _, right = _sides(rule.pattern)
  sizes = {"two": 2, "p": len(rule.ours)}
  for axis, size in zip(right[1:] if right[0] == ["p"] else right, shapes[0], strict=True):
    known = math.prod(sizes[name] for name in axis if name in sizes)
    for name in axis:
      sizes.setdefault(name, size // known)
  if rule.join:
    axis = right.index([rule.join])
    sizes[rule.join] = sum(shape[axis] for shape in shapes)
  named = {name for axis in right for name in axis}
  return {name: size for name, size in sizes.items() if name in named}


def their_shape(rule: Rule, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
  """The shape of their tensor, from those of (parts of) our parameters of the rule."""
  if not rule.pattern:
    return shapes[0]
  sizes = _sizes(rule, shapes)
  return tuple(math.prod(sizes[name] for name in axis) for axis in _sides(rule.pattern)[0])


def to_ours(rule: Rule, part: int, tensor: Any, shapes: Sequence[tuple[int, ...]]) -> Any:
  """One of our parameters, from their tensor, an array of numpy (then a view of it) or JAX."""
  if not rule.pattern:
    return tensor
  found = einops.rearrange(tensor, rule.pattern, **_sizes(rule, shapes))
  right = _sides(rule.pattern)[1]
  if rule.join:
    axis = right.index([rule.join])
    first = sum(shape[axis] for shape in shapes[:part])
    return found[(slice(None),) * axis + (slice(first, first + shapes[part][axis]),)]
  return found[part] if right[0] == ["p"] else found


def to_theirs(rule: Rule, parts: list[Any]) -> Any:
  """Their tensor, from all parameters of the rule, arrays of numpy or JAX."""
  if not rule.pattern:
    return parts[0]
  left, _, text = rule.pattern.partition("->")
  right = _sides(rule.pattern)[1]
  if rule.join:
    axis = right.index([rule.join])
    axes = [f"a{i}" for i in range(len(right))]
    value, _ = einops.pack(parts, " ".join(axes[:axis] + ["*"] + axes[axis + 1 :]))
  else:
    value = parts if right[0] == ["p"] else parts[0]
  sizes = _sizes(rule, [part.shape for part in parts])
  return einops.rearrange(value, f"{text} -> {left}", **sizes)
