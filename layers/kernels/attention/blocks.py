"""What a mask leaves of a grid of blocks, as the lists that kernels walk.

A block of queries and a block of keys is empty, partial (the mask is applied to it) or full (it is
not). Planned with numpy while a program is traced, from the mask's own account of whole blocks:
nothing of size T x S is made. Where positions or segments decide, the lists are cut down when the
program runs, from the lowest and highest of them in each block.

Letters: B batch, T query positions, S key positions, I blocks of queries, J blocks of keys,
V visits.
"""

from functools import lru_cache, reduce
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

EMPTY, PARTIAL, FULL = 0, 1, 2

# What the indices of a row say of its positions: they are the positions; they differ as positions
# do inside a document; they have the order of positions, which may lie further apart; nothing.
Order = Literal["index", "document", "gaps", "any"]


class Visits(NamedTuple):
  """Blocks to visit, row by row: those of row i are start[i] .. start[i + 1] of `column`."""

  start: np.ndarray  # int32 [I + 1]
  column_V: np.ndarray  # int32


def even_blocks(length: int, most: int, multiple: int = 128) -> int:
  """Positions of a block: a multiple of so many, as few blocks as there can be, and even ones."""
  tiles = -(-length // multiple)
  blocks = -(-tiles // (most // multiple))
  return -(-tiles // blocks) * multiple


@lru_cache(maxsize=64)
def block_kinds(
  mask: Any, num_queries: int, num_keys: int, q_block: int, kv_block: int,
  order: Order = "index",
) -> np.ndarray:  # fmt: skip
  """EMPTY, PARTIAL or FULL, int8 [I, J].

  Args:
    mask: see the package; None shows all. Of several a block is empty or full if it is for each.
    order: see `Order`.
  """
  i0, j0 = np.arange(0, num_queries, q_block)[:, None], np.arange(0, num_keys, kv_block)[None]
  i1, j1 = np.minimum(i0 + q_block, num_queries) - 1, np.minimum(j0 + kv_block, num_keys) - 1
  kinds = np.full((i0.size, j0.size), FULL, np.int8)
  if mask is not None:
    each = [_kinds(m, (i0, i1, j0, j1), order) for m in mask.distinct]
    lowest, highest = np.min(each, axis=0), np.max(each, axis=0)
    kinds = np.where(lowest == highest, lowest, PARTIAL).astype(np.int8)
  if num_keys % kv_block:  # the last block holds places that are no keys
    kinds[:, -1] = np.minimum(kinds[:, -1], PARTIAL)
  return kinds


def _kinds(mask: Any, bounds: tuple[np.ndarray, ...], order: Order) -> np.ndarray:
  i0, i1, j0, j1 = bounds
  if not by_position(mask, order):
    some, every = mask.blocks(i0, i1, j0, j1)
  else:  # no two positions lie nearer to each other than their indices do
    before, after = (None, None) if order == "any" else mask.reach
    some, every = np.asarray(True), np.asarray(False)
    if before is not None:
      some = some & (j1 >= i0 - before)
    if after is not None:
      some = some & (j0 <= i1 + after)
  kinds = np.where(some, np.where(every, FULL, PARTIAL), EMPTY)
  return np.broadcast_to(kinds, (i0.size, j0.size))


def by_position(mask: Any, order: Order) -> bool:
  """Whether positions, not indices alone, tell what the mask shows."""
  return mask is not None and order != "index" and not (order == "document" and mask.relative)


def masks_of(mask: Any) -> tuple[Any, ...]:
  """The distinct masks of all heads; None shows all."""
  return (None,) if mask is None else mask.distinct


def reach_of(mask: Any) -> tuple[int | None, int | None]:
  """How far before and after a query any head sees, as `Mask.reach`; None is unbounded."""
  if mask is None:
    return None, None
  before, after = zip(*(each.reach for each in mask.distinct), strict=True)
  farthest = lambda side: None if None in side else max(side)
  return farthest(before), farthest(after)


def shown(masks: tuple[Any, ...], which: Any, i: Any, j: Any) -> Any:
  """What the masks show of position ids and the number of each head's mask, which broadcast."""
  seen = masks[0].visible(i, j)
  for n, mask in enumerate(masks[1:], 1):
    seen = (seen & (which != n)) | (mask.visible(i, j) & (which == n))
  return seen


# ---- when the program runs ----


class Ranges(NamedTuple):
  """The lowest and highest position and segment of each block, int32 [B or 1, I]."""

  low: jax.Array
  high: jax.Array
  low_segment: jax.Array | None
  high_segment: jax.Array | None


def ranges(ids: tuple[jax.Array, jax.Array | None], block: int) -> Ranges:
  """Of (positions, segments) [B or 1, T] in blocks of so many; the last one may be shorter."""
  positions_BT, segments_BT = ids

  def ends(x):
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)], mode="edge")
    x = x.reshape(x.shape[0], -1, block)
    return x.min(-1), x.max(-1)

  segments = (None, None) if segments_BT is None else ends(segments_BT)
  return Ranges(*ends(positions_BT), *segments)


def kinds_at_run_time(
  masks: tuple[Any, ...], static: list[np.ndarray], order: Order, q: Ranges, kv: Ranges,
  num_keys: int, kv_block: int,
) -> list[jax.Array]:  # fmt: skip
  """EMPTY, PARTIAL or FULL, int32 [B or 1, I, J], of each mask; FULL blocks lie in one segment.

  Args:
    masks: the distinct ones, or (None,).
    static: their `block_kinds`, which these never exceed.
  """
  over = lambda x, y: (x[:, :, None], y[:, None])
  found = []
  for mask, known in zip(masks, static, strict=True):
    kinds = jnp.asarray(known, jnp.int32)[None]
    if by_position(mask, order):
      (i0, j0), (i1, j1) = over(q.low, kv.low), over(q.high, kv.high)
      some, every = mask.blocks(i0, i1, j0, j1)
      kinds = jnp.where(some & (kinds != EMPTY), jnp.where(every, FULL, PARTIAL), EMPTY)
    if q.low_segment is not None:
      (i0, j0), (i1, j1) = (
        over(q.low_segment, kv.low_segment),
        over(q.high_segment, kv.high_segment),
      )
      meet = (i0 <= j1) & (j0 <= i1) & (i1 > 0) & (j1 > 0)
      one = (i0 == i1) & (j0 == j1) & (i0 == j0)
      kinds = jnp.where(meet, jnp.where(one, kinds, jnp.minimum(kinds, PARTIAL)), EMPTY)
    if num_keys % kv_block:  # the last block holds places that are no keys
      last = jnp.arange(kinds.shape[-1]) == kinds.shape[-1] - 1
      kinds = jnp.where(last[None, None], jnp.minimum(kinds, PARTIAL), kinds)
    found.append(kinds)
  return found


def for_all(each: list[jax.Array]) -> jax.Array:
  """One kind for several masks: empty or full where it is for each of them."""
  lowest, highest = reduce(jnp.minimum, each), reduce(jnp.maximum, each)
  return jnp.where(lowest == highest, lowest, PARTIAL)


# ---- lists ----


def visits(chosen: np.ndarray) -> Visits:
  """Of the blocks where `chosen` [I, J] is True."""
  start = np.concatenate([[0], chosen.sum(1).cumsum()]).astype(np.int32)
  return Visits(start, np.nonzero(chosen)[1].astype(np.int32))


# A visit in one word, as a kernel reads it: row, column, kind, and whether it is the first or last
# of its row.
COLUMN, ROW, PLACES = 4, 17, 2**13


class Visit(NamedTuple):
  """Of a word; traced or numpy."""

  row: Any
  column: Any
  kind: Any
  first: Any
  last: Any


def unpack(word: Any) -> Visit:
  place = lambda shift: (word >> shift) & (PLACES - 1)
  return Visit(place(ROW), place(COLUMN), (word >> 2) & 3, word & 1, (word >> 1) & 1)


def walk(kinds: np.ndarray) -> np.ndarray:
  """The words, int32 [V], of all blocks that are not empty, row after row.

  A row without any has one empty visit, in which its result, zeros, is written.

  Raises:
    ValueError: more than 8192 blocks a side.
  """
  if max(kinds.shape) > PLACES:
    raise ValueError(f"{kinds.shape[0]} x {kinds.shape[1]} blocks: at most {PLACES} a side")
  shown = kinds.copy()
  nothing = ~kinds.any(1)
  shown[nothing, 0] = -1  # kept for its row alone
  row_V, column_V = (x.astype(np.int32) for x in np.nonzero(shown))
  kind_V = np.maximum(shown[row_V, column_V], EMPTY).astype(np.int32)
  turn_V = np.diff(row_V, prepend=-1) != 0
  first_V, last_V = turn_V.astype(np.int32), np.append(turn_V[1:], True).astype(np.int32)
  return row_V << ROW | column_V << COLUMN | kind_V << 2 | last_V << 1 | first_V


def walk_at_run_time(candidates_V: np.ndarray, kinds_BIJ: jax.Array) -> jax.Array:
  """The words, int32 [B, V], of those candidates (a `walk`) that are not empty in each row.

  A row of blocks without any keeps an empty one; lists end in empty visits of their last block,
  for which nothing is fetched.
  """
  known = unpack(candidates_V)
  kind_BV = kinds_BIJ[:, known.row, known.column]
  none_BI = ~(kinds_BIJ != EMPTY).any(-1)
  kept_BV = (kind_BV != EMPTY) | (none_BI[:, known.row] & (known.first == 1)[None])
  count_B1 = kept_BV.sum(-1, keepdims=True)
  place_V = jnp.arange(len(candidates_V), dtype=jnp.int32)[None]
  order_BV = jnp.argsort(~kept_BV, axis=-1, stable=True)
  order_BV = jnp.take_along_axis(order_BV, jnp.minimum(place_V, count_B1 - 1), -1)
  row_BV, column_BV = jnp.asarray(known.row)[order_BV], jnp.asarray(known.column)[order_BV]
  live_BV = place_V < count_B1
  turn_BV = row_BV[:, 1:] != row_BV[:, :-1]
  ends = lambda first, last: jnp.pad(turn_BV, [(0, 0), (first, last)], constant_values=True)
  first_BV = ends(1, 0) & live_BV
  last_BV = (ends(0, 1) & live_BV) | (place_V == count_B1 - 1)
  kind_BV = jnp.where(live_BV, jnp.take_along_axis(kind_BV, order_BV, -1), EMPTY)
  bits = last_BV.astype(jnp.int32) << 1 | first_BV.astype(jnp.int32)
  return row_BV << ROW | column_BV << COLUMN | kind_BV << 2 | bits


def walks(each: list[np.ndarray]) -> np.ndarray:
  """Several walks as [L, V]; the shorter ones end in empty visits of their last block."""
  length = max(map(len, each))
  done = lambda word: word >> COLUMN << COLUMN
  return np.stack([np.append(w, np.full(length - len(w), done(w[-1]), np.int32)) for w in each])
