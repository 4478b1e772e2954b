"""Which rows a kernel's step works on: the visits of row tiles by groups.

Rows are cut into tiles of equal height, so that they move in large aligned pieces. Groups end
anywhere; a visit is one (tile, group) pair that share rows, and multiplies only windows of the
tile that cover the shared rows. Windows start at a multiple of ALIGN rows and have one of a few
heights, since a kernel's code is specialised by height.

Letters: E groups, G = E + 1 with the rows of no group as the last, V visits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

ALIGN = 16  # rows of a packed bfloat16 register

i32 = jnp.int32


class Visits(NamedTuple):
  """int32. Visits are ordered by group, then by tile."""

  number: jax.Array  # scalar: how many there are
  next_V: jax.Array  # the group after that of each visit, so 1..G; garbage past `number`
  start_G: jax.Array  # first row of a group; of no group: where the last one ends
  begin_G: jax.Array  # first visit of a group


class Visit(NamedTuple):
  """int32 scalars. Rows are counted from the start of the tile."""

  group: jax.Array  # whose weights; the last group that has rows for rows of no group
  tile: jax.Array  # which tile of rows
  low: jax.Array  # first row of the group in the tile
  high: jax.Array  # one past its last row; not above `low` where there is nothing to multiply
  rest: jax.Array  # bool: rows from `low` on belong to no group


def visits(group_sizes_E: jax.Array, rows: int, tile: int, *, each_group: bool) -> Visits:
  """The visits of `rows` rows in tiles of `tile`.

  Args:
    group_sizes_E: int32; rows past their sum belong to no group, rows past `rows` do not exist.
    each_group: True visits an empty group once (its result is zero) and rows of no group never;
      False visits rows of no group (their result is zero) and empty groups never.

  Sums over comparisons in place of cumsum, repeat and gather: XLA makes few fusions of them, and
  launching one costs a TPU more than its work, [V, G] with V <= rows / tile + E + 1.
  """
  (E,), tiles = group_sizes_E.shape, -(-rows // tile)
  column = lambda a: jax.lax.broadcasted_iota(i32, a, 1)
  row = lambda a: jax.lax.broadcasted_iota(i32, a, 0)
  total = lambda keep, a: jnp.sum(jnp.where(keep, a[None], 0), axis=1, dtype=i32)

  GE, GG, VG = (E + 1, E), (E + 1, E + 1), (tiles + E + 1, E + 1)
  start_G = jnp.minimum(total(column(GE) < row(GE), group_sizes_E), rows)
  end_G = jnp.minimum(total(column(GE) <= row(GE), group_sizes_E), rows)
  g_G = jnp.arange(E + 1, dtype=i32)
  if each_group:
    least_G = jnp.where(g_G == E, 0, 1)
  else:
    end_G, least_G = jnp.where(g_G == E, rows, end_G), 0
  touched_G = (end_G - 1) // tile - start_G // tile + 1
  touched_G = jnp.where(end_G > start_G, touched_G, least_G)
  begin_G = total(column(GG) < row(GG), touched_G)
  next_V = jnp.sum((begin_G[None] <= row(VG)).astype(i32), axis=1)
  return Visits(jnp.sum(touched_G, dtype=i32), next_V, start_G, begin_G)


def visit(v, next_V, start_G, begin_G, *, rows: int, tile: int) -> Visit:
  """Visit `v` of those made with the same `rows` and `tile`; from arrays or references."""
  E = start_G.shape[0] - 1
  of = next_V[v] - 1
  rest = of == E
  # So that no other weights are fetched. Where no group has rows there is no such visit.
  last = next_V[jnp.clip(begin_G[E] - 1, 0, v)] - 1
  start, end = start_G[of], start_G[jnp.minimum(of + 1, E)]
  # An empty group at the very end would start in a tile that does not exist.
  at = jnp.minimum(jax.lax.div(start, tile) + v - begin_G[of], -(-rows // tile) - 1)
  low, high = jnp.maximum(start - at * tile, 0), jnp.minimum(end - at * tile, tile)
  return Visit(jnp.minimum(last, E - 1), at, low, high, rest)


class Windows(NamedTuple):
  """int32 scalars: `full` windows of the usual height and below them one of heights[last]."""

  start: jax.Array  # first row of the first window
  full: jax.Array
  last: jax.Array


def usual(heights: Sequence[int]) -> int:
  """The height of all windows but the last; tiles of 1024 rows are whole numbers of it."""
  return max((height for height in heights if height % 256 == 0), default=heights[-1])


def windows(low: jax.Array, high: jax.Array, heights: Sequence[int]) -> Windows:
  """The windows that cover rows low..high of a tile; none where high <= low.

  `heights` rise and are multiples of ALIGN. The last window may stick out of the tile; it is then
  to be moved up.
  """
  start = jax.lax.div(low, ALIGN) * ALIGN
  height = usual(heights)
  # The last window is there even where usual ones would do, and as high as can be.
  full = jax.lax.div(jnp.maximum(high - start - heights[-1] + height - 1, 0), height)
  rows = high - start - full * height
  last = sum(((rows > height).astype(i32) for height in heights[:-1]), jnp.int32(0))
  return Windows(start, full, last)
