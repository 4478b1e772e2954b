"""What a compiled program sends between devices, read from its optimized text.

Counted is what one device receives, by mesh axes: a gather of n parts of S bytes in all brings it
S (n - 1) / n, a reduce-scatter as much, an all-reduce twice that, a permute S.
"""

import itertools
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from .program import Line, lines, op_name, result

_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1,
          "f64": 8, "s64": 8, "u64": 8, "s16": 2, "u16": 2}  # fmt: skip
_KINDS = {
  "all-gather": lambda n: (n - 1) / n,
  "reduce-scatter": lambda n: n - 1,  # of the result, which is one part
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "ragged-all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1.0,
}
_OP = re.compile(rf"^(?:ROOT )?%\S+ = (.*?) ({'|'.join(_KINDS)})(-start)?\(")


class Collective(NamedTuple):
  """One collective operation of a program."""

  kind: str  # one of _KINDS
  axes: tuple[str, ...]  # mesh axes along which its groups extend
  dtype: str
  received: float  # bytes a device receives each time
  times: int  # how often a step runs it
  name: str  # where in the model it comes from

  @property
  def total(self) -> float:
    """Bytes a device receives in a step."""
    return self.received * self.times


def collectives(text: str, mesh: Mesh) -> list[Collective]:
  """Every collective of a program, in no particular order."""
  listed = list(lines(text))
  shapes = {made[0]: made[2] for line in listed if (made := result(line.text))}
  found = []
  for line in listed:
    if (match := _OP.match(line.text)) and (one := _collective(line, match, mesh, shapes)):
      found.append(one)
  return found


def _collective(line: Line, match, mesh, shapes: Mapping[str, tuple]) -> Collective | None:
  groups = _groups(line.text, mesh.size)
  coordinates = np.stack(np.unravel_index(groups, mesh.devices.shape), -1)
  spread = (coordinates != coordinates[:, :1]).any((0, 1))
  axes = tuple(a for a, used in zip(mesh.axis_names, spread, strict=True) if used)
  if not axes:
    return None
  kind, n = match[2], groups.shape[1]
  written = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
  sizes = [
    _BYTES[d] * math.prod(map(int, filter(None, s.split(",")))) for d, s in written if d in _BYTES
  ]
  size = sum(sizes)
  if match[3]:  # asynchronous: operands, results, and flags of a few bytes
    size = max(sizes)
  if operand := re.search(r" ragged-all-to-all\(%([\w.\-]+)", line.text):
    size = min(size, _BYTES[written[0][0]] * math.prod(shapes[operand[1]]))
  if kind == "all-reduce" and "reduce-scatter" in line.computation:
    kind, size = "reduce-scatter", size / n  # a fused one holds its all-reduce and a slice of it
  return Collective(
    kind, axes, written[0][0], size * _KINDS[kind](n), line.times, op_name(line.text)
  )


def _groups(line: str, count: int) -> np.ndarray:
  """Devices of each group [groups, members]; of a permute, the pairs."""
  if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", line):
    return np.array([[int(i) for i in p.split(",")] for p in re.findall(r"\{([\d,]+)\}", pairs[1])])
  if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
    groups = [[int(i) for i in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", listed[1])]
    return np.array(groups)
  if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
    shape, dims = ([int(i) for i in iota[k].split(",")] for k in (1, 2))
    order = [int(i) for i in iota[3].split(",")] if iota[3] else range(len(dims))
    return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)
  if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
    sizes = [int(i) for i in re.findall(r"=(\d+)", named[1])]
    names = re.findall(r"'(\w+)'=", named[1])
    used = [names.index(n) for n in re.findall(r"'(\w+)'", named[2])]
    rest = [i for i in range(len(names)) if i not in used]
    members = math.prod(sizes[i] for i in used)
    return np.arange(count).reshape(sizes).transpose(*rest, *used).reshape(-1, members)
  return np.arange(count)[None]  # no groups: all devices


def by_axes(found: list[Collective]) -> dict[tuple[str, tuple[str, ...], str], float]:
  """(kind, axes, dtype) -> bytes a device receives in a step, largest first."""
  key = lambda c: (c.kind, c.axes, c.dtype)
  groups = itertools.groupby(sorted(found, key=key), key)
  totals = {k: sum(c.total for c in group) for k, group in groups}
  return dict(sorted(totals.items(), key=lambda item: -item[1]))
