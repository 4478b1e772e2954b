"""The masks that others are made of (survey: arXiv 2106.04554)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .algebra import Array, Mask, Reach, require


def _inside(low, high, least, most) -> tuple[Any, Any]:
  """(some, every) of the integers low..high that lie in least..most; None is no bound."""
  some = every = np.asarray(True)
  if least is not None:
    some, every = some & (high >= least), every & (low >= least)
  if most is not None:
    some, every = some & (low <= most), every & (high <= most)
  return some, every


# ---- rules of the distance alone ----


class _Relative(Mask):
  @property
  def relative(self) -> bool:
    return True


@dataclass(frozen=True)
class Full(_Relative):
  """Everything."""

  def visible(self, i: Array, j: Array) -> Any:
    return i - j == i - j

  def blocks(self, i0: Array, i1: Array, j0: Array, j1: Array) -> tuple[Any, Any]:
    return _inside(j0 - i1, j1 - i0, None, None)

  @property
  def reach(self) -> Reach:
    return None, None

  @property
  def interval(self) -> Reach | None:
    return self.reach


@dataclass(frozen=True)
class Causal(_Relative):
  """j <= i."""

  def visible(self, i: Array, j: Array) -> Any:
    return j <= i

  def blocks(self, i0: Array, i1: Array, j0: Array, j1: Array) -> tuple[Any, Any]:
    return _inside(j0 - i1, j1 - i0, None, 0)

  @property
  def reach(self) -> Reach:
    return None, 0

  @property
  def interval(self) -> Reach | None:
    return self.reach


@dataclass(frozen=True)
class Local(_Relative):
  """The `left` positions before the query, its own, and `right` after it: i-left <= j <= i+right.

  A causal window of W tokens, the query's own included, is `Local(W - 1)`.
  """

  left: int
  right: int = 0

  def __post_init__(self):
    require(
      self.left >= 0 and self.right >= 0,
      f"a local mask needs left and right of at least 0, got {self.left} and {self.right}",
    )

  def visible(self, i: Array, j: Array) -> Any:
    return (j >= i - self.left) & (j <= i + self.right)

  def blocks(self, i0: Array, i1: Array, j0: Array, j1: Array) -> tuple[Any, Any]:
    return _inside(j0 - i1, j1 - i0, -self.left, self.right)

  @property
  def reach(self) -> Reach:
    return self.left, self.right

  @property
  def interval(self) -> Reach | None:
    return self.reach


@dataclass(frozen=True)
class Dilated(_Relative):
  """Every `step`-th position: j = i + k * step with -left <= k <= right."""

  step: int
  left: int
  right: int = 0

  def __post_init__(self):
    require(
      self.step >= 1 and self.left >= 0 and self.right >= 0,
      f"a dilated mask needs step >= 1 and left, right >= 0, got {self}",
    )

  def visible(self, i: Array, j: Array) -> Any:
    near = (j >= i - self.left * self.step) & (j <= i + self.right * self.step)
    return near & ((i - j) % self.step == 0)

  def blocks(self, i0: Array, i1: Array, j0: Array, j1: Array) -> tuple[Any, Any]:
    if self.step == 1:
      return _inside(j0 - i1, j1 - i0, -self.left, self.right)
    low, high = -((i1 - j0) // self.step), (j1 - i0) // self.step  # of k, rounded inwards
    some = (low <= high) & (low <= self.right) & (high >= -self.left)
    return some, some & (i0 == i1) & (j0 == j1)

  @property
  def reach(self) -> Reach:
    return self.left * self.step, self.right * self.step

  @property
  def interval(self) -> Reach | None:
    return self.reach if self.step == 1 else None


@dataclass(frozen=True)
class Strided(_Relative):
  """Every `stride`-th position, at any distance: (i - j) % stride == 0."""

  stride: int

  def __post_init__(self):
    require(self.stride >= 1, f"a strided mask needs stride >= 1, got {self.stride}")

  def visible(self, i: Array, j: Array) -> Any:
    return (i - j) % self.stride == 0

  def blocks(self, i0: Array, i1: Array, j0: Array, j1: Array) -> tuple[Any, Any]:
    some = -((i1 - j0) // self.stride) <= (j1 - i0) // self.stride
    return some, some & ((self.stride == 1) | ((i0 == i1) & (j0 == j1)))

  @property
  def reach(self) -> Reach:
    return None, None


# ---- rules of the place ----


@dataclass(frozen=True)
class BlockLocal(Mask):
  """The query's own run of `size` positions, and whole runs to its left and right."""

  size: int
  left: int = 0
  right: int = 0

  def __post_init__(self):
    require(
      self.size >= 1 and self.left >= 0 and self.right >= 0,
      f"a block-local mask needs size >= 1 and left, right >= 0, got {self}",
    )

  def visible(self, i: Array, j: Array) -> Any:
    apart = j // self.size - i // self.size
    return (apart >= -self.left) & (apart <= self.right)

  def blocks(self, i0: Array, i1: Array, j0: Array, j1: Array) -> tuple[Any, Any]:
    i0, i1, j0, j1 = (x // self.size for x in (i0, i1, j0, j1))
    return _inside(j0 - i1, j1 - i0, -self.left, self.right)

  @property
  def reach(self) -> Reach:
    return (self.left + 1) * self.size - 1, (self.right + 1) * self.size - 1


@dataclass(frozen=True)
class Fixed(Mask):
  """The `last` positions of each run of `stride`: j % stride >= stride - last."""

  stride: int
  last: int = 1

  def __post_init__(self):
    require(1 <= self.last <= self.stride, f"a fixed mask needs 1 <= last <= stride, got {self}")

  def visible(self, i: Array, j: Array) -> Any:
    return (j % self.stride >= self.stride - self.last) & (i == i)

  def blocks(self, i0: Array, i1: Array, j0: Array, j1: Array) -> tuple[Any, Any]:
    rest = self.stride - self.last
    over = lambda j: j % self.stride - rest
    before = lambda j: j // self.stride * self.last + (over(j) > 0) * over(j)
    count = before(j1 + 1) - before(j0) + 0 * i0
    return count > 0, count == j1 + 1 - j0

  @property
  def reach(self) -> Reach:
    return None, None


@dataclass(frozen=True)
class Global(Mask):
  """`tokens` positions from `start` on see all and are seen by all."""

  tokens: int
  start: int = 0

  def __post_init__(self):
    require(self.tokens >= 1 and self.start >= 0, f"needs tokens >= 1 and start >= 0, got {self}")

  def visible(self, i: Array, j: Array) -> Any:
    one = lambda x: (x >= self.start) & (x < self.start + self.tokens)
    return one(i) | one(j)

  def blocks(self, i0: Array, i1: Array, j0: Array, j1: Array) -> tuple[Any, Any]:
    ends = self.start, self.start + self.tokens - 1
    (some_i, every_i), (some_j, every_j) = _inside(i0, i1, *ends), _inside(j0, j1, *ends)
    return some_i | some_j, every_i | every_j

  @property
  def reach(self) -> Reach:
    return None, None


@dataclass(frozen=True)
class RandomBlocks(Mask):
  """For each run of `size` queries `count` runs of keys, drawn once and for all from `seed`.

  The draw is a hash of (seed, the queries' run, which of the `count`): the same on every host, and
  a kernel computes it from the ids. Runs to choose from are those of `num_blocks` that `edges` at
  either end of the row and `near` to each side of the queries leave; they are cut into `count`
  equal strata, and one of each is drawn, so that no run is drawn twice.
  """

  seed: int
  size: int
  count: int
  num_blocks: int
  edges: int = 0
  near: int = -1  # -1: the queries' own run too

  def __post_init__(self):
    require(
      self.size >= 1 and self.count >= 1 and self.edges >= 0 and self.near >= -1,
      f"random blocks need size, count >= 1, edges >= 0, near >= -1, got {self}",
    )
    require(self.num_blocks < 2**15, f"at most {2**15 - 1} random blocks, got {self.num_blocks}")

  def _draw(self, a: Array, k: int) -> Any:
    """The k-th run that run `a` of queries sees; -1 if nothing is left to choose from."""
    first, last = self.edges, max(self.num_blocks - self.edges, self.edges)
    clip = lambda x: (x < first) * first + (x > last) * last + ((x >= first) & (x <= last)) * x
    before, after = clip(a - self.near), clip(a + self.near + 1)
    if self.near < 0:
      before = after = a * 0 + last
    num_before = before - first
    left = num_before + last - after
    low, high = left * k // self.count, left * (k + 1) // self.count
    drawn = low + ((_hash(a, self.seed, k) & 0xFFFF) * (high - low) >> 16)
    place = first + drawn + (drawn >= num_before) * (after - before)
    return place * (high > low) - (high <= low)

  def visible(self, i: Array, j: Array) -> Any:
    a, b = i.astype(np.int32) // self.size, j // self.size
    seen = self._draw(a, 0) == b
    for k in range(1, self.count):
      seen = seen | (self._draw(a, k) == b)
    return seen

  def blocks(self, i0: Array, i1: Array, j0: Array, j1: Array) -> tuple[Any, Any]:
    # Runs drawn before each run of queries and of keys. No key beyond the last run is drawn;
    # queries beyond it are not counted and may see anything.
    n, arange = self.num_blocks, (jnp if isinstance(i0, jax.Array) else np).arange
    a, b = arange(-1, n, dtype=np.int32)[:, None], arange(-1, n, dtype=np.int32)[None]
    drawn = (self._draw(a, 0) == b) & (a >= 0) & (b >= 0)
    for k in range(1, self.count):
      drawn = drawn | ((self._draw(a, k) == b) & (a >= 0) & (b >= 0))
    before = drawn.astype(np.int32).cumsum(0).cumsum(1)
    i0, i1, j0, j1 = (x // self.size for x in (i0, i1, j0, j1))
    at = lambda i, j: before[i.clip(0, n), j.clip(0, n)]
    count = at(i1 + 1, j1 + 1) - at(i0, j1 + 1) - at(i1 + 1, j0) + at(i0, j0)
    beyond = i1 >= n
    return (count > 0) | beyond, (count == (i1 - i0 + 1) * (j1 - j0 + 1)) & ~beyond

  @property
  def reach(self) -> Reach:
    return None, None


def _hash(x: Array, *salts: int) -> Any:
  """Sixteen well-mixed low bits and more of int32 ids; int32 throughout, which wraps."""
  for salt in salts:
    x = x + np.int32((salt * 0x9E3779B9 + 0x7F4A7C15) % 2**31)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x2C1B3C6D)):
      x = x ^ ((x >> shift) & ((1 << (32 - shift)) - 1))
      x = x * np.int32(factor)
    x = x ^ ((x >> 16) & 0xFFFF)
  return x
