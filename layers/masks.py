"""Which key a query may see, as predicates on position ids.

A mask is a small frozen value: hashable, so it can be a static argument, and callable on ids of
numpy, JAX or a Pallas kernel alike, because its rule is comparisons and integer arithmetic only.
Masks combine: `Causal() & BlockLocal(8192)`. To add a pattern, write a frozen dataclass with
`__call__` and `reach`. "Visible" below means query position i may attend to key position j.
"""

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
  def __call__(self, q_ids: Array, kv_ids: Array) -> Any:
    """True where the key is visible; integer ids of broadcastable shapes, bools of the result."""

  @property
  @abc.abstractmethod
  def reach(self) -> Reach:
    """Bounds on how far before and after the query a visible key can lie.

    A visible j satisfies `i - before <= j <= i + after`; kernels skip blocks and caches drop keys
    by it. It may be wider than the rule, never narrower.
    """

  def __and__(self, other: "Mask") -> "And":
    return And(self, other)


@dataclass(frozen=True)
class Causal(Mask):
  """j <= i."""

  def __call__(self, q_ids: Array, kv_ids: Array) -> Any:
    return kv_ids <= q_ids

  @property
  def reach(self) -> Reach:
    return None, 0


@dataclass(frozen=True)
class Local(Mask):
  """The last `window` positions, the query's own included: 0 <= i - j < window."""

  window: int

  def __post_init__(self):
    if self.window < 1:
      raise ValueError(f"a local mask needs window >= 1, got {self.window}")

  def __call__(self, q_ids: Array, kv_ids: Array) -> Any:
    distance = q_ids - kv_ids
    return (distance >= 0) & (distance < self.window)

  @property
  def reach(self) -> Reach:
    return self.window - 1, 0


@dataclass(frozen=True)
class BlockLocal(Mask):
  """The same run of `chunk` positions, on both sides of the query: i // chunk == j // chunk."""

  chunk: int

  def __post_init__(self):
    if self.chunk < 1:
      raise ValueError(f"a block-local mask needs chunk >= 1, got {self.chunk}")

  def __call__(self, q_ids: Array, kv_ids: Array) -> Any:
    return q_ids // self.chunk == kv_ids // self.chunk

  @property
  def reach(self) -> Reach:
    return self.chunk - 1, self.chunk - 1


@dataclass(frozen=True)
class And(Mask):
  """Visible under both masks; written `first & second`."""

  first: Mask
  second: Mask

  def __call__(self, q_ids: Array, kv_ids: Array) -> Any:
    return self.first(q_ids, kv_ids) & self.second(q_ids, kv_ids)

  @property
  def reach(self) -> Reach:
    (before, after), (other_before, other_after) = self.first.reach, self.second.reach
    return _nearer(before, other_before), _nearer(after, other_after)


def _nearer(a: int | None, b: int | None) -> int | None:
  if a is None or b is None:
    return b if a is None else a
  return min(a, b)
