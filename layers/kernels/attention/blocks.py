"""What a mask leaves of a grid of blocks, as the lists that kernels walk.

A block of queries and a block of keys is empty, partial (the mask is applied to it) or full (it is
not). Planned with numpy while a program is traced, from the mask's own account of whole blocks:
nothing of size T x S is made.

Letters: T query positions, S key positions, I blocks of queries, J blocks of keys, V visits.
"""

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

EMPTY, PARTIAL, FULL = 0, 1, 2

# What the indices of a row say of its positions: they are the positions; they differ as positions
# do inside a document; they have the order of positions, which may lie further apart; nothing.
Order = Literal["index", "document", "gaps", "any"]


class Visits(NamedTuple):
  """Blocks to visit, row by row: those of row i are start[i] .. start[i + 1] of `column`."""

  start: np.ndarray  # int32 [I + 1]
  column_V: np.ndarray  # int32


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
  if order == "index" or (order == "document" and mask.relative):
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


def visits(chosen: np.ndarray) -> Visits:
  """Of the blocks where `chosen` [I, J] is True."""
  start = np.concatenate([[0], chosen.sum(1).cumsum()]).astype(np.int32)
  return Visits(start, np.nonzero(chosen)[1].astype(np.int32))


# A visit in one word, as a kernel reads it: row, column, kind, and whether it is the first or last
# of its row.
_COLUMN, _ROW, _PLACES = 4, 17, 2**13


class Visit(NamedTuple):
  """Of a word; traced or numpy."""

  row: Any
  column: Any
  kind: Any
  first: Any
  last: Any


def unpack(word: Any) -> Visit:
  place = lambda shift: (word >> shift) & (_PLACES - 1)
  return Visit(place(_ROW), place(_COLUMN), (word >> 2) & 3, word & 1, (word >> 1) & 1)


def walk(kinds: np.ndarray) -> np.ndarray:
  """The words, int32 [V], of all blocks that are not empty, row after row.

  A row without any has one empty visit, in which its result, zeros, is written.

  Raises:
    ValueError: more than 8192 blocks a side.
  """
  if max(kinds.shape) > _PLACES:
    raise ValueError(f"{kinds.shape[0]} x {kinds.shape[1]} blocks: at most {_PLACES} a side")
  shown = kinds.copy()
  nothing = ~kinds.any(1)
  shown[nothing, 0] = -1  # kept for its row alone
  row_V, column_V = (x.astype(np.int32) for x in np.nonzero(shown))
  kind_V = np.maximum(shown[row_V, column_V], EMPTY).astype(np.int32)
  turn_V = np.diff(row_V, prepend=-1) != 0
  first_V, last_V = turn_V.astype(np.int32), np.append(turn_V[1:], True).astype(np.int32)
  return row_V << _ROW | column_V << _COLUMN | kind_V << 2 | last_V << 1 | first_V


def walks(each: list[np.ndarray]) -> np.ndarray:
  """Several walks as [L, V]; the shorter ones end in empty visits of their last block."""
  length = max(map(len, each))
  done = lambda word: word >> _COLUMN << _COLUMN
  return np.stack([np.append(w, np.full(length - len(w), done(w[-1]), np.int32)) for w in each])
