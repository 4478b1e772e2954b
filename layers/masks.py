"""Which key a query may see: frozen, hashable values that combine with `&`, `|` and `~`.

A mask is a rule on position ids, of numpy, JAX or a Pallas kernel alike: comparisons and int32
arithmetic only. It can be a static argument of `jax.jit` and a field of a config. Kernels also ask
what it says of whole blocks (`blocks`), and skip those that hold nothing. "Visible" below means
that query position i may attend to key position j. Sources: arXiv 2106.04554 for the patterns that
others are made of; those with a model's name give their own.

To add a pattern, write a frozen dataclass with `visible`, `blocks` and `reach`, or, if it is made
of others, a `Pattern` with `rule`.
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
  def visible(self, i: Array, j: Array) -> Any:
    """True where the key is visible; int32 ids from 0, of broadcastable shapes; bools."""

  @abc.abstractmethod
  def blocks(self, i0: Array, i1: Array, j0: Array, j1: Array) -> tuple[Any, Any]:
    """(some, every): of queries i0..i1 and keys j0..j1, both ends included, numpy arrays.

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


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ValueError(message)


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


@dataclass(frozen=True)
class Local(_Relative):
  """The `left` positions before the query, its own, and `right` after it: i-left <= j <= i+right.

  A causal window of W tokens, the query's own included, is `Local(W - 1)`.
  """

  left: int
  right: int = 0

  def __post_init__(self):
    _require(
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


@dataclass(frozen=True)
class Dilated(_Relative):
  """Every `step`-th position: j = i + k * step with -left <= k <= right."""

  step: int
  left: int
  right: int = 0

  def __post_init__(self):
    _require(
      self.step >= 1 and self.left >= 0 and self.right >= 0,
      f"a dilated mask needs step >= 1 and left, right >= 0, got {self}",
    )

  def visible(self, i: Array, j: Array) -> Any:
    near = (j >= i - self.left * self.step) & (j <= i + self.right * self.step)
    return near & ((i - j) % self.step == 0)

  def blocks(self, i0: Array, i1: Array, j0: Array, j1: Array) -> tuple[Any, Any]:
    low, high = -((i1 - j0) // self.step), (j1 - i0) // self.step  # of k, rounded inwards
    low, high = np.maximum(low, -self.left), np.minimum(high, self.right)
    return low <= high, (low <= high) & (i0 == i1) & (j0 == j1)

  @property
  def reach(self) -> Reach:
    return self.left * self.step, self.right * self.step


@dataclass(frozen=True)
class Strided(_Relative):
  """Every `stride`-th position, at any distance: (i - j) % stride == 0."""

  stride: int

  def __post_init__(self):
    _require(self.stride >= 1, f"a strided mask needs stride >= 1, got {self.stride}")

  def visible(self, i: Array, j: Array) -> Any:
    return (i - j) % self.stride == 0

  def blocks(self, i0: Array, i1: Array, j0: Array, j1: Array) -> tuple[Any, Any]:
    some = -((i1 - j0) // self.stride) <= (j1 - i0) // self.stride
    return some, some & (i0 == i1) & (j0 == j1)

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
    _require(
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
    _require(1 <= self.last <= self.stride, f"a fixed mask needs 1 <= last <= stride, got {self}")

  def visible(self, i: Array, j: Array) -> Any:
    return (j % self.stride >= self.stride - self.last) & (i == i)

  def blocks(self, i0: Array, i1: Array, j0: Array, j1: Array) -> tuple[Any, Any]:
    rest = self.stride - self.last
    before = lambda j: j // self.stride * self.last + np.maximum(j % self.stride - rest, 0)
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
    _require(self.tokens >= 1 and self.start >= 0, f"needs tokens >= 1 and start >= 0, got {self}")

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
    _require(
      self.size >= 1 and self.count >= 1 and self.edges >= 0 and self.near >= -1,
      f"random blocks need size, count >= 1, edges >= 0, near >= -1, got {self}",
    )
    _require(self.num_blocks < 2**15, f"at most {2**15 - 1} random blocks, got {self.num_blocks}")

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
    i0, i1, j0, j1 = (x // self.size for x in (i0, i1, j0, j1))
    a = np.arange(int(i1.max()) + 1, dtype=np.int32)
    drawn = np.zeros((a.size + 1, max(int(j1.max()) + 1, self.num_blocks) + 1), np.int32)
    for k in range(self.count):
      place = self._draw(a, k)
      drawn[a[place >= 0] + 1, place[place >= 0] + 1] = 1
    drawn = drawn.cumsum(0).cumsum(1)
    count = drawn[i1 + 1, j1 + 1] - drawn[i0, j1 + 1] - drawn[i1 + 1, j0] + drawn[i0, j0]
    return count > 0, count == (i1 - i0 + 1) * (j1 - j0 + 1)

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


# ---- combinations ----


@dataclass(frozen=True)
class And(Mask):
  """Visible under both; written `first & second`."""

  first: Mask
  second: Mask

  def visible(self, i: Array, j: Array) -> Any:
    return self.first.visible(i, j) & self.second.visible(i, j)

  def blocks(self, i0: Array, i1: Array, j0: Array, j1: Array) -> tuple[Any, Any]:
    (a, all_a), (b, all_b) = (m.blocks(i0, i1, j0, j1) for m in (self.first, self.second))
    return a & b, all_a & all_b

  @property
  def reach(self) -> Reach:
    sides = zip(self.first.reach, self.second.reach, strict=True)
    before, after = (min((x for x in side if x is not None), default=None) for side in sides)
    return before, after

  @property
  def relative(self) -> bool:
    return self.first.relative and self.second.relative


@dataclass(frozen=True)
class Or(Mask):
  """Visible under either; written `first | second`."""

  first: Mask
  second: Mask

  def visible(self, i: Array, j: Array) -> Any:
    return self.first.visible(i, j) | self.second.visible(i, j)

  def blocks(self, i0: Array, i1: Array, j0: Array, j1: Array) -> tuple[Any, Any]:
    (a, all_a), (b, all_b) = (m.blocks(i0, i1, j0, j1) for m in (self.first, self.second))
    return a | b, all_a | all_b

  @property
  def reach(self) -> Reach:
    sides = zip(self.first.reach, self.second.reach, strict=True)
    before, after = (None if None in side else max(side) for side in sides)
    return before, after

  @property
  def relative(self) -> bool:
    return self.first.relative and self.second.relative


@dataclass(frozen=True)
class Not(Mask):
  """Visible where the other is not; written `~mask`."""

  mask: Mask

  def visible(self, i: Array, j: Array) -> Any:
    return ~self.mask.visible(i, j)

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
    _require(len(self.masks) > 0, "PerHead needs a mask for each query head")

  @property
  def distinct(self) -> tuple[Mask, ...]:
    """The different ones, in order of first use."""
    return tuple(dict.fromkeys(self.masks))

  @property
  def any(self) -> Mask:
    """Visible to any head."""
    first, *rest = self.distinct
    for mask in rest:
      first = first | mask
    return first


# ---- patterns that have names ----


class Pattern(Mask):
  """A mask made of others."""

  @property
  @abc.abstractmethod
  def rule(self) -> Mask:
    """What it is made of."""

  def visible(self, i: Array, j: Array) -> Any:
    return self.rule.visible(i, j)

  def blocks(self, i0: Array, i1: Array, j0: Array, j1: Array) -> tuple[Any, Any]:
    return self.rule.blocks(i0, i1, j0, j1)

  @property
  def reach(self) -> Reach:
    return self.rule.reach

  @property
  def relative(self) -> bool:
    return self.rule.relative


@dataclass(frozen=True)
class Chunked(Pattern):
  """Causal, within runs of `size` positions (Llama 4)."""

  size: int

  @property
  def rule(self) -> Mask:
    return Causal() & BlockLocal(self.size)


@dataclass(frozen=True)
class MistralWindow(Pattern):
  """The last `window` positions, the query's own included (arXiv 2310.06825)."""

  window: int = 4096

  @property
  def rule(self) -> Mask:
    return Local(self.window - 1)


@dataclass(frozen=True)
class GemmaLocal(Pattern):
  """The local layers of Gemma: 4096 in Gemma 2 (arXiv 2408.00118), 512 or 1024 in Gemma 3."""

  window: int = 1024

  @property
  def rule(self) -> Mask:
    return Local(self.window - 1)


@dataclass(frozen=True)
class GPT3Banded(Pattern):
  """The locally banded layers of GPT-3 (arXiv 2005.14165), whose width was not published."""

  width: int = 256

  @property
  def rule(self) -> Mask:
    return Local(self.width - 1)


@dataclass(frozen=True)
class SparseTransformer(Pattern):
  """Factorised attention (arXiv 1904.10509, section 4.3), causal.

  strided: the last `stride` positions and one's own, and every `stride`-th; fixed: one's own run of
  `stride` positions, and the `last` positions of all runs. `part` is what one head or layer of
  those that alternate sees: "local", "far", or "both".
  """

  stride: int = 128
  kind: str = "strided"
  last: int = 8  # fixed only
  part: str = "both"

  def __post_init__(self):
    _require(self.kind in ("strided", "fixed"), f"kind {self.kind!r} is neither strided nor fixed")
    _require(
      self.part in ("local", "far", "both"), f"part {self.part!r} is none of local, far, both"
    )

  @property
  def rule(self) -> Mask:
    if self.kind == "strided":
      near, far = Local(self.stride), Strided(self.stride)
    else:
      near, far = BlockLocal(self.stride), Fixed(self.stride, self.last)
    return Causal() & {"local": near, "far": far, "both": near | far}[self.part]


@dataclass(frozen=True)
class Longformer(Pattern):
  """A window to both sides, `dilation` apart, and tokens at the start that see and are seen by all
  (arXiv 2004.05150); not causal."""

  window: int = 512
  tokens: int = 0
  dilation: int = 1

  @property
  def rule(self) -> Mask:
    near = Dilated(self.dilation, self.window // 2, self.window // 2)
    return near | Global(self.tokens) if self.tokens else near


@dataclass(frozen=True)
class BigBird(Pattern):
  """Three runs around the query's, the first and the last, and some at random (arXiv 2007.14062,
  internal form); not causal, and not circular."""

  num_blocks: int
  size: int = 64
  random: int = 3
  seed: int = 0

  @property
  def rule(self) -> Mask:
    last = (self.num_blocks - 1) * self.size
    rule = BlockLocal(self.size, 1, 1) | Global(self.size) | Global(self.size, start=last)
    if not self.random:
      return rule
    return rule | RandomBlocks(self.seed, self.size, self.random, self.num_blocks, edges=1, near=1)
