"""Masks as values: what every mask can say, and how masks combine."""

import abc
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

Array = jax.Array | np.ndarray

# Positions (before, after) the query beyond which nothing is visible; None is unbounded.
Reach = tuple[int | None, int | None]


class Mask(abc.ABC):
  """A rule (i, j) -> bool."""

  @abc.abstractmethod
  def visible(self, i: Array, j: Array) -> Any:
    """True where the key is visible; int32 ids from 0, of broadcastable shapes; bools."""

  @abc.abstractmethod
  def blocks(self, i0: Array, i1: Array, j0: Array, j1: Array) -> tuple[Any, Any]:
    """(some, every): of queries i0..i1 and keys j0..j1, both ends included; arrays, traced or not.

    `some` may be True of a block that holds nothing and `every` False of one that is full, never
    the other way round.
    """

  @property
  @abc.abstractmethod
  def reach(self) -> Reach:
    """Bounds on how far before and after the query a visible key can lie.

    A visible j satisfies `i - before <= j <= i + after`; caches drop keys by it and devices ask
    their neighbours for them. It may be wider than the rule, never narrower.
    """

  @property
  def relative(self) -> bool:
    """Whether only the distance i - j matters: then row indices serve where positions restart."""
    return False

  @property
  def interval(self) -> Reach | None:
    """The reach, if it is the whole rule: j is visible just if `i - before <= j <= i + after`."""
    return None

  @property
  def distinct(self) -> tuple["Mask", ...]:
    """Itself: one mask for all heads, see `PerHead`."""
    return (self,)

  @property
  def by_head(self) -> tuple[int, ...] | None:
    """Which of `distinct` each head has; None: all the same."""
    return None

  def __and__(self, other: "Mask") -> "Mask":
    return And(self, other)

  def __or__(self, other: "Mask") -> "Mask":
    return Or(self, other)

  def __invert__(self) -> "Mask":
    return Not(self)

  def table(self, num_queries: int, num_keys: int | None = None) -> np.ndarray:
    """All of it as bools [T, S]; S = T if not given. For drawings and tests."""
    i = np.arange(num_queries, dtype=np.int32)[:, None]
    j = np.arange(num_keys or num_queries, dtype=np.int32)[None]
    return np.broadcast_to(self.visible(i, j), (i.size, j.size))

  def show(self, num_queries: int = 32, num_keys: int | None = None) -> str:
    """A drawing, a row a query: ■ is visible."""
    rows = self.table(num_queries, num_keys)
    return "\n".join(" ".join("■" if seen else "·" for seen in row) for row in rows)

  def density(self, num_queries: int, num_keys: int | None = None) -> float:
    """The visible share of all pairs; memory and time follow the blocks that are cut."""
    T, S, size = num_queries, num_keys or num_queries, 256
    i0, j0 = np.arange(0, T, size)[:, None], np.arange(0, S, size)[None]
    i1, j1 = np.minimum(i0 + size, T) - 1, np.minimum(j0 + size, S) - 1
    shape = (i0.size, j0.size)
    some, every = (np.broadcast_to(x, shape) for x in self.blocks(i0, i1, j0, j1))
    count = int(((i1 - i0 + 1) * (j1 - j0 + 1))[every].sum())
    for q, k in np.argwhere(some & ~every):
      i = np.arange(i0[q, 0], i1[q, 0] + 1, dtype=np.int32)[:, None]
      j = np.arange(j0[0, k], j1[0, k] + 1, dtype=np.int32)[None]
      count += int(np.broadcast_to(self.visible(i, j), (i.size, j.size)).sum())
    return count / (T * S)


def require(condition: bool, message: str) -> None:
  if not condition:
    raise ValueError(message)


# ---- combinations ----


@dataclass(frozen=True)
class _Pair(Mask):
  first: Mask
  second: Mask

  def __post_init__(self):
    for mask in (self.first, self.second):
      require(isinstance(mask, Mask), f"& and | need masks on both sides, got {mask!r}")

  @property
  def relative(self) -> bool:
    return self.first.relative and self.second.relative


class And(_Pair):
  """Visible under both; written `first & second`."""

  def visible(self, i: Array, j: Array) -> Any:
    return self.first.visible(i, j) & self.second.visible(i, j)

  def blocks(self, i0: Array, i1: Array, j0: Array, j1: Array) -> tuple[Any, Any]:
    (a, all_a), (b, all_b) = (m.blocks(i0, i1, j0, j1) for m in (self.first, self.second))
    return a & b, all_a & all_b

  @property
  def reach(self) -> Reach:
    nearer = lambda *side: min((x for x in side if x is not None), default=None)
    before, after = map(nearer, self.first.reach, self.second.reach)
    return before, after

  @property
  def interval(self) -> Reach | None:
    both = self.first.interval is not None and self.second.interval is not None
    return self.reach if both else None


class Or(_Pair):
  """Visible under either; written `first | second`."""

  def visible(self, i: Array, j: Array) -> Any:
    return self.first.visible(i, j) | self.second.visible(i, j)

  def blocks(self, i0: Array, i1: Array, j0: Array, j1: Array) -> tuple[Any, Any]:
    (a, all_a), (b, all_b) = (m.blocks(i0, i1, j0, j1) for m in (self.first, self.second))
    return a | b, all_a | all_b

  @property
  def reach(self) -> Reach:
    farther = lambda a, b: None if a is None or b is None else max(a, b)
    before, after = map(farther, self.first.reach, self.second.reach)
    return before, after


@dataclass(frozen=True)
class Not(Mask):
  """Visible where the other is not; written `~mask`."""

  mask: Mask

  def __post_init__(self):
    require(isinstance(self.mask, Mask), f"~ needs a mask, got {self.mask!r}")

  def visible(self, i: Array, j: Array) -> Any:
    return self.mask.visible(i, j) ^ True  # Mosaic for GPUs does not lower ~ of bools

  def blocks(self, i0: Array, i1: Array, j0: Array, j1: Array) -> tuple[Any, Any]:
    some, every = self.mask.blocks(i0, i1, j0, j1)
    return ~every, ~some

  @property
  def reach(self) -> Reach:
    return None, None

  @property
  def relative(self) -> bool:
    return self.mask.relative


@dataclass(frozen=True)
class PerHead:
  """A mask for each query head, in order."""

  masks: tuple[Mask, ...]

  def __post_init__(self):
    require(len(self.masks) > 0, "PerHead needs a mask for each query head")
    for mask in self.masks:
      require(isinstance(mask, Mask), f"PerHead holds masks, got {mask!r}")

  @property
  def distinct(self) -> tuple[Mask, ...]:
    """The different ones, in order of first use."""
    return tuple(dict.fromkeys(self.masks))

  @property
  def by_head(self) -> tuple[int, ...]:
    """Which of `distinct` each head has."""
    return tuple(map(self.distinct.index, self.masks))
