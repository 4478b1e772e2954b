"""Grouped matrix products as Pallas kernels for TPUs.

The grid walks over visits (visits.py): the rows that a tile of rows and a group share. Each visit
multiplies a window of a few hundred rows by the group's weights, of which a block with the whole
contracted dim lies in fast memory, so that no partial sum leaves it. A visit's work grows with
its rows, not with the tile: windows start and end at multiples of a few rows.

What is measured below is libtpu's estimate (benchmarks/grouped_matmul.py), not a device's time.

Letters: R rows, D and F widths, E groups, V visits; in a kernel H rows of a window, N columns.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..partition import vary_with, varying_shape
from ..select import LANES, current_platform
from ..tpu import dot
from .visits import ALIGN, usual, visit, visits, windows

# Heights of windows. Below 64 rows a product takes as long as with 64: loading the weights into
# the matrix unit bounds it. More heights waste fewer rows and compile longer; higher ones use a
# loaded weight more often.
HEIGHTS = (64, 128, 192, 256, 288, 320)
HIGH = 512  # rows a group on average from which on these serve:
HIGH_HEIGHTS = (64, 128, 192, 256, 384, 512)
# Rows are the contracted dim of `outer`, which the matrix unit takes 128 at a time.
OUTER_HEIGHTS = (128, 256, 384, 512)

MAX_TILE = 1024  # rows; each border between tiles that cuts a group costs one more visit
# Entries of a block of weights, or of a result of `outer`, that one step of a loop works on: larger
# steps fill the matrix unit better, smaller ones make less code, one copy of it a height.
CHUNK = 3 * 2**19

TOO_LONG = "a block of weights {} long does not fit into fast memory"

f32 = jnp.float32


class Chip(NamedTuple):
  """What tiles depend on. `budget` is fast memory for blocks, bytes a core."""

  budget: int
  limit: int  # what the compiler may use in all
  cores: int  # that share a grid
  outer: int  # entries of an output block of `outer`, at most


# By fast memory of a core, MiB; estimated, see benchmarks/results/grouped_matmul.md.
# Of blocks that fit the largest are best: what a step costs beside its work is spread.
CHIPS = {
  16: Chip(11 * 2**20, 15 * 2**20, 2, 2**19),  # v4; also where the chip is not known
  64: Chip(44 * 2**20, 58 * 2**20, 2, 2**21),  # v5p, tpu7x
  128: Chip(90 * 2**20, 112 * 2**20, 1, 2**21),  # v5e, v6e
}


def chip() -> Chip:
  """The chip that a jit here would run on; the smallest if that is not a TPU."""
  if current_platform() != "tpu":
    return CHIPS[16]._replace(cores=1)
  info = pltpu.get_tpu_info()
  size = max(mib for mib in CHIPS if mib * 2**20 <= info.vmem_capacity_bytes)
  return CHIPS[size]._replace(cores=info.num_cores)


class Tiles(NamedTuple):
  """Of `product` and `gated`: rows of a tile, columns of a block, columns of a step."""

  rows: int
  columns: int
  step: int


class OuterTiles(NamedTuple):
  """Rows of a tile, the [D, F] block of the result, and how much of D is a step."""

  rows: int
  d: int
  f: int
  step: int


def product_tiles(
  rows: int, inner: int, outer: int, itemsize: int, target: Chip, *, weights: int = 1
) -> Tiles | None:
  """Tiles for [rows, inner] x [inner, outer]; `weights` is 2 for `gated`. None: nothing fits."""
  outputs = 2 * weights - 1
  found = []
  for columns in _blocks(outer, 2048, target.cores):
    # Wider blocks read the rows less often; taller tiles cut fewer groups.
    if 2 * inner * columns * weights * itemsize > 0.7 * target.budget:
      continue
    for height in (1024, 512, 256, 128, 64):
      size = height * inner + inner * columns * weights + height * columns * outputs
      if 2 * size * itemsize <= target.budget:
        found.append((columns, min(height, _round_up(rows, ALIGN))))
        break
  if not found:
    return None
  # Each block costs about as much as 64 columns more.
  columns, height = min(found, key=lambda pair: -(-outer // pair[0]) * (pair[0] + 64))
  return Tiles(height, columns, _step(columns, inner * weights, itemsize))


def outer_tiles(rows: int, d: int, f: int, itemsize: int, out: int, target: Chip) -> OuterTiles:
  """Tiles for [rows, d]^T x [rows, f]; `out` is the itemsize of the result."""
  pairs = [
    (d_block, f_block)
    for f_block in _blocks(f, 1024, 1)
    for d_block in _blocks(d, 2048, 1)
    if d_block * f_block <= target.outer
  ]

  def cost(pair):
    d_count, f_count = -(-d // pair[0]), -(-f // pair[1])
    idle = target.cores > 1 and d_count * f_count % target.cores and d * f > LANES**2
    # Beside its work a block costs a constant, and reads its share of the rows.
    return (1 + idle) * d_count * f_count * (pair[0] * pair[1] + 2**17 + 2**8 * sum(pair))

  d_block, f_block = min(pairs, key=cost)
  fixed = d_block * f_block * (2 * out + (4 if out != 4 else 0))
  height = MAX_TILE
  while height > LANES and 2 * height * (d_block + f_block) * itemsize + fixed > target.budget:
    height //= 2
  height = min(height, _round_up(rows, ALIGN))
  return OuterTiles(height, d_block, f_block, _step(d_block, f_block, itemsize))


def _blocks(width: int, most: int, multiple: int) -> list[int]:
  """Sizes of equal blocks up to `most` that cover `width`, as many as a multiple of `multiple`."""
  sizes = {_round_up(-(-width // count), LANES) for count in range(1, width // LANES + 1)}
  whole = lambda size: -(-width // size) % multiple == 0 or width == LANES
  return sorted(size for size in sizes if size <= most and whole(size))


def _step(total: int, other: int, itemsize: int) -> int:
  step = LANES
  # A float32 product is six of bfloat16.
  while 2 * step <= total and 2 * step * other <= (CHUNK if itemsize < 4 else CHUNK // 6):
    step *= 2
  return step


def supports(x_RD: jax.Array, w_EDF: jax.Array, platform: str, *, weights: int = 1) -> str | None:
  """Why these arguments can't run on `platform`, or None: all that a layer's gradients need too.

  `weights` is 2 for `gated`.
  """
  if platform != "tpu":
    return f"the kernel is for TPUs, not for {platform}"
  if x_RD.dtype not in (jnp.bfloat16, jnp.float32):
    return f"rows must be bfloat16 or float32, not {x_RD.dtype}"
  if w_EDF.shape[1] % LANES or w_EDF.shape[2] % LANES:
    return f"both widths must be multiples of {LANES}, got {w_EDF.shape[1:]}"
  (R, itemsize), (D, F) = (x_RD.shape[0], x_RD.dtype.itemsize), w_EDF.shape[1:]
  for inner, outer, count in ((D, F, weights), (F, D, 1)):
    if not product_tiles(R, inner, outer, itemsize, chip(), weights=count):
      return TOO_LONG.format(inner)
  return None


def outer(x_RD: jax.Array, dy_RF: jax.Array, group_sizes_E: jax.Array, *, dtype: Any) -> jax.Array:
  """[E, D, F] in `dtype`: the sum over each group's rows of x^T dy; zeros for empty groups."""
  operands = (x_RD, dy_RF, group_sizes_E)
  x_RD, dy_RF, group_sizes_E = vary_with(operands, operands)
  (R, D), F, dtype = x_RD.shape, dy_RF.shape[1], jnp.dtype(dtype)
  out_shape = varying_shape((group_sizes_E.shape[0], D, F), dtype, x_RD)
  if R == 0:
    return vary_with(x_RD, jnp.zeros(out_shape.shape, dtype))
  target = chip()
  tiles = outer_tiles(R, D, F, x_RD.dtype.itemsize, dtype.itemsize, target)
  heights = fitting(OUTER_HEIGHTS, tiles.rows)
  plan = visits(group_sizes_E, R, tiles.rows, each_group=True)
  at = partial(visit, rows=R, tile=tiles.rows)
  call = pl.pallas_call(
    partial(_outer_kernel, heights, at, tiles.step),
    name="grouped_matmul_outer",
    out_shape=out_shape,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(-(-D // tiles.d), -(-F // tiles.f), plan.number),
      in_specs=[
        pl.BlockSpec((tiles.rows, tiles.d), lambda d, f, v, *t: (at(v, *t).tile, d)),
        pl.BlockSpec((tiles.rows, tiles.f), lambda d, f, v, *t: (at(v, *t).tile, f)),
      ],
      out_specs=pl.BlockSpec((None, tiles.d, tiles.f), lambda d, f, v, *t: (at(v, *t).group, d, f)),
      # A float32 result is its own accumulator.
      scratch_shapes=[] if dtype == f32 else [pltpu.VMEM((tiles.d, tiles.f), f32)],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=target.limit
    ),
    cost_estimate=_cost(R, D, F, x_RD, dy_RF, out_shape),
  )
  return call(*plan[1:], x_RD, dy_RF)


def row_products(
  x_RD: jax.Array,
  ws: tuple[jax.Array, ...],
  group_sizes_E: jax.Array,
  finish: Callable[..., tuple[jax.Array, ...]],
  *,
  transposed: bool = False,
) -> tuple[jax.Array, ...]:
  """[R, F] each, rounded: `finish` of the float32 products of x with each of `ws`, read once.

  The rows of group e meet w[e] ([E, F, D] with `transposed`); zeros past the last group.
  """
  operands = (x_RD, ws, group_sizes_E)
  x_RD, ws, group_sizes_E = vary_with(operands, operands)
  (R, D), F = x_RD.shape, ws[0].shape[1 if transposed else 2]
  outputs = 2 * len(ws) - 1
  out_shape = (varying_shape((R, F), x_RD.dtype, x_RD),) * outputs
  if R == 0:
    return (vary_with(x_RD, jnp.zeros((R, F), x_RD.dtype)),) * outputs
  target = chip()
  tiles = product_tiles(R, D, F, x_RD.dtype.itemsize, target, weights=len(ws))
  if tiles is None:
    raise NotImplementedError(TOO_LONG.format(D))
  heights = product_heights(R, group_sizes_E.shape[0], tiles.rows)
  plan = visits(group_sizes_E, R, tiles.rows, each_group=False)
  at = partial(visit, rows=R, tile=tiles.rows)
  if transposed:
    weights = pl.BlockSpec((None, tiles.columns, D), lambda f, v, *t: (at(v, *t).group, f, 0))
  else:
    weights = pl.BlockSpec((None, D, tiles.columns), lambda f, v, *t: (at(v, *t).group, 0, f))
  result = pl.BlockSpec((tiles.rows, tiles.columns), lambda f, v, *t: (at(v, *t).tile, f))
  call = pl.pallas_call(
    partial(_row_kernel, heights, at, tiles.step, transposed, finish, len(ws)),
    name="grouped_matmul_gated" if len(ws) > 1 else "grouped_matmul_product",
    out_shape=out_shape,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(-(-F // tiles.columns), plan.number),
      in_specs=[
        pl.BlockSpec((tiles.rows, D), lambda f, v, *t: (at(v, *t).tile, 0)),
        *[weights] * len(ws),
      ],
      out_specs=(result,) * outputs,
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=target.limit
    ),
    cost_estimate=_cost(R, D, F * len(ws), x_RD, *ws, *out_shape),
  )
  return tuple(call(*plan[1:], x_RD, *ws))


def _row_kernel(heights, at, step, transposed, finish, weights, next_, start, begin, x_ref, *refs):
  _, _, low, high, rest = at(pl.program_id(1), next_, start, begin)
  window = partial(row_window, x_ref, refs[:weights], refs[weights:], step, transposed, finish)

  def one(height, first):
    # Windows that overlap write the same.
    first = jnp.minimum(first, x_ref.shape[0] - height)
    window(pl.multiple_of(first, ALIGN), height, low, high)

  _each_window(heights, low, high, one)

  def clear(i, _):
    rows = pl.ds(pl.multiple_of(i * ALIGN, ALIGN), ALIGN)
    for out_ref in refs[weights:]:
      old = out_ref[rows, :].astype(f32)
      row = i * ALIGN + jax.lax.broadcasted_iota(jnp.int32, old.shape, 0)
      out_ref[rows, :] = jnp.where(row >= low, 0, old).astype(out_ref.dtype)

  @pl.when(rest)
  def _():
    jax.lax.fori_loop(jax.lax.div(low, ALIGN), x_ref.shape[0] // ALIGN, clear, None)


def _each_window(heights, low, high, one):
  """Calls one(height, first row) for each window in order, in code of its own for each height."""
  start, full, last = windows(low, high, heights)
  height = usual(heights)
  # A last window of the usual height shares the code of those before it.
  number = full + ((high > low) & (last == heights.index(height))).astype(jnp.int32)
  jax.lax.fori_loop(0, number, lambda i, _: one(height, start + i * height), None)
  for kind, other in enumerate(heights):
    if other != height:
      pl.when((high > low) & (last == kind))(partial(one, other, start + full * height))


def row_window(x_ref, w_refs, out_refs, step, transposed, finish, first, height, low, high):
  """Multiplies `height` rows from `first` on; stores those in low..high."""
  rows = pl.ds(first, height)

  def columns(begin, width):
    at = pl.ds(begin, width)
    sums = []
    for w_ref in w_refs:
      w = w_ref[at, :] if transposed else w_ref[:, at]
      sums.append(dot(x_ref[rows, :], w, ((1,), (1 if transposed else 0,))))
    row = first + jax.lax.broadcasted_iota(jnp.int32, (height, width), 0)
    keep = (row >= low) & (row < high)
    for out_ref, value in zip(out_refs, finish(*sums), strict=True):
      old = out_ref[rows, at].astype(f32)
      out_ref[rows, at] = jnp.where(keep, value, old).astype(out_ref.dtype)

  _each_step(out_refs[0].shape[1], step, columns)


def _each_step(total, step, one):
  """Calls one(begin, width) for pieces of 0..total, in a loop, and for what remains."""
  if total == step:
    one(0, step)
    return
  jax.lax.fori_loop(0, total // step, lambda i, _: one(pl.multiple_of(i * step, LANES), step), None)
  if total % step:
    one(total - total % step, total % step)


def _outer_kernel(heights, at, step, next_, start, begin, x_ref, dy_ref, out_ref, *scratch):
  v = pl.program_id(2)
  group, _, low, high, _ = at(v, next_, start, begin)
  begins = v == begin[group]

  def one(height, begin):
    first = pl.multiple_of(jnp.minimum(begin, x_ref.shape[0] - height), ALIGN)
    # Where windows overlap each row counts once.
    rows = (jnp.maximum(low, begin), high)
    fresh = begins & (begin <= low)
    outer_window(x_ref, dy_ref, out_ref, *scratch, step, first, height, *rows, fresh)

  _each_window(heights, low, high, one)

  @pl.when(high <= low)
  def _():
    out_ref[...] = jnp.zeros_like(out_ref)


def outer_window(x_ref, dy_ref, out_ref, *args):
  """Adds the product of rows low..high, all in `height` rows from `first` on. `fresh`: the first
  of a group. A reference after out_ref holds the float32 sum, if the result does not."""
  *sum_refs, step, first, height, low, high, fresh = args
  sum_ref = sum_refs[0] if sum_refs else out_ref
  rows = pl.ds(first, height)
  row = first + jax.lax.broadcasted_iota(jnp.int32, (height, 1), 0)
  keep = (row >= low) & (row < high)

  def part(begin, width):
    at = pl.ds(begin, width)
    # Both: zero times the NaN of a row that belongs to no group would be NaN.
    x = jnp.where(keep, x_ref[rows, at], 0).astype(x_ref.dtype)
    dy = jnp.where(keep, dy_ref[rows, :], 0).astype(dy_ref.dtype)
    total = jnp.where(fresh, 0, sum_ref[at, :]) + dot(x, dy, ((0,), (0,)))
    sum_ref[at, :] = total
    if sum_refs:
      out_ref[at, :] = total.astype(out_ref.dtype)

  _each_step(out_ref.shape[0], step, part)


def product_heights(rows: int, groups: int, tile: int) -> tuple[int, ...]:
  return fitting(HIGH_HEIGHTS if rows >= HIGH * groups else HEIGHTS, tile)


def fitting(heights: tuple[int, ...], tile: int) -> tuple[int, ...]:
  """Those of `heights` that fit into a tile; where the largest does not, the tile is one too."""
  fit = tuple(height for height in heights if height < tile)
  return fit if len(fit) == len(heights) else (*fit, tile)


def _round_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


def _cost(rows: int, d: int, f: int, *arrays) -> pl.CostEstimate:
  size = sum(a.size * jnp.dtype(a.dtype).itemsize for a in arrays)
  return pl.CostEstimate(flops=2 * rows * d * f, bytes_accessed=size, transcendentals=0)
