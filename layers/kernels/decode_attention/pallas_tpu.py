"""Attention over a cache as a Pallas kernel for TPUs.

The grid walks over (row, block of its keys); its second size is the longest row's need, known only
when the program runs. Blocks that a row does not need are neither fetched nor computed: the index
maps stay at its last block. Key heads are not taken apart: positions and heads of a block together
are the rows of one matrix, and all queries meet all of them. Of the products a K-th is kept. Where
tokens are few this costs nothing, since time is that of reading the cache; from about T * N = 128
query rows on, the matrix unit is slower. The matrix is the cache as compilers lay it in memory, for
the least padding of tiles: `[B, S * K, H]`; with an odd number of heads they come first,
`[B, K, S, H]`; with heads that fill no tile positions come last, `[B, K, H, S]`.

Small pages are joined: a step reads several, each by an index map of its own.

Letters: B batch, T query tokens, N query heads, K key/value heads, H head size, U that of values,
S cached positions, P pages, R positions a page, J pages a row; in kernels M query rows (token by
token, head by head); columns are rows of the matrix of keys.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..attention.blocks import shown
from ..attention.tiles import LOG2E, MASKED
from ..partition import vary_with, varying_shape
from ..select import LANES
from ..tpu import dot, fast_memory
from .inputs import Inputs, Static, bounds, needed_pages

STEP_BYTES = 2**20  # of keys, and of values, that a step reads; more than hides its start
PAGES = 16  # read in a step at most, if they have 8 positions or more
COLUMNS = 1024  # in work at a time
LOGITS = 2**18  # in work at a time
CHUNKS = 4  # of them in a step of a cache that is one piece; more takes long to compile
ROWS = 2048  # T * N at most

f32 = jnp.float32


class _Blocks(NamedTuple):
  """How a step reads keys: `pieces` arrays of `piece` columns each, by `chunk` columns."""

  heads: int  # K
  ahead: bool  # a piece goes head by head, not position by position
  across: bool  # and positions come last in it
  pieces: int
  piece: int
  chunk: int

  @property
  def positions(self) -> int:
    return self.pieces * self.piece // self.heads

  def columns(self) -> tuple[jax.Array, jax.Array]:
    """(position in the chunk, head) of its columns, int32 [1, chunk]."""
    column = jnp.arange(self.chunk, dtype=jnp.int32)[None]
    if not self.ahead:
      return column // self.heads, column % self.heads
    each = self.piece // self.heads
    head, position = column % self.piece // each, column % each
    return column // self.piece * each + position, head


class _Rows(NamedTuple):
  """Of each query row: [M, 1] each, positions [B, M, 1]."""

  position: jax.Array
  head: jax.Array  # of its keys
  which: jax.Array | None  # of the masks
  slope: jax.Array | None
  sink: jax.Array | None


class _Columns(NamedTuple):
  """Of the columns of a chunk [1, chunk], alike in all; positions [B, 1, columns] of all."""

  offset: jax.Array
  head: jax.Array
  position: jax.Array | None


def supports(q_BTNH, k, v, inputs: Inputs) -> str | None:
  """Why a TPU can't run these arguments, or None."""
  for x in (q_BTNH, k, v):
    if x.dtype not in (jnp.bfloat16, jnp.float32):
      return f"arrays must be bfloat16 or float32, not {x.dtype}"
  rows = q_BTNH.shape[1] * q_BTNH.shape[2]
  if rows > ROWS:
    return f"tokens times heads go up to {ROWS}, not {rows}"
  blocks = _blocks(q_BTNH, k, v, inputs)
  if inputs.page_table_BJ is not None:
    tile, rows_of_page = _tile(k), k.shape[1] * (1 if blocks.ahead else k.shape[2])
    if rows_of_page % tile:
      what = "positions" if blocks.ahead else "positions times heads"
      return f"{what} of a page must be a multiple of {tile}, not {rows_of_page}"
    if inputs.page_table_BJ.size > 2**17:
      return f"a page table of {inputs.page_table_BJ.size} entries is too large for scalar memory"
  width = sum(-(-x.shape[-1] // LANES) * LANES for x in (k, v))
  # Two of each, logits and probabilities, and what is kept of the queries.
  need = 2 * blocks.positions * k.shape[2] * width * k.dtype.itemsize
  need += 4 * _padded_rows(rows, k) * (4 * blocks.chunk + 4 * width)
  if need > fast_memory():
    return f"a step needs {need >> 20} MiB of fast memory"
  return None


def _tile(x) -> int:
  """Rows of a tile."""
  return 32 // x.dtype.itemsize


def _padded_rows(rows: int, x) -> int:
  return -(-rows // _tile(x)) * _tile(x)


def _order(k, v, inputs: Inputs) -> tuple[bool, bool]:
  """(ahead, across) of the caches."""
  K, width = k.shape[2], max(k.shape[3], v.shape[3])
  if inputs.page_table_BJ is None and (k.shape[3] % LANES or v.shape[3] % LANES):
    return True, True
  return not (K % 8 == 0 or K == 1 or (K in (2, 4) and width <= LANES)), False


def _blocks(q_BTNH, k, v, inputs: Inputs) -> _Blocks:
  (T, N, H), K, (ahead, across) = q_BTNH.shape[1:], k.shape[2], _order(k, v, inputs)
  width = H if across else -(-H // LANES) * LANES
  bytes_of = lambda columns: columns * width * k.dtype.itemsize
  most = max(min(COLUMNS, LOGITS // (T * N)), LANES)
  divisor = lambda n, limit: max(d for d in range(1, n + 1) if n % d == 0 and d <= max(limit, 1))
  if inputs.page_table_BJ is not None:
    piece = k.shape[1] * K
    wanted = min(PAGES, -(-STEP_BYTES // bytes_of(piece)))
    pieces = min(max(wanted, -(-128 // k.shape[1])), inputs.page_table_BJ.shape[1])
    if piece <= most or ahead:
      return _Blocks(K, ahead, across, pieces, piece, piece * divisor(pieces, most // piece))
    unit = math.lcm(LANES, K)
    if piece % unit:
      unit = K * divisor(k.shape[1], most // K)
    return _Blocks(K, ahead, across, pieces, piece, unit * divisor(piece // unit, most // unit))
  if ahead:
    most = min(STEP_BYTES // bytes_of(1), LOGITS // (T * N))  # in one piece
    tiles = min(max(most // (K * LANES), 1), -(-k.shape[1] // LANES))
    return _Blocks(K, ahead, across, 1, K * tiles * LANES, K * tiles * LANES)
  unit = math.lcm(LANES, K)  # whole tiles of logits, and whole positions
  units = max(min(STEP_BYTES // bytes_of(unit), -(-k.shape[1] * K // unit)), 1)
  chunk = max(min(units, most // unit), 1)
  return _Blocks(K, ahead, across, 1, min(units // chunk, CHUNKS) * chunk * unit, chunk * unit)


def attention(
  static: Static, q_BTNH: jax.Array, k: jax.Array, v: jax.Array, inputs: Inputs
) -> jax.Array:
  """k and v are [B or more, S, K, .], or pages [P, R, K, .] if `inputs` has their table."""
  arrays, one = (q_BTNH, k, v, inputs), k is v
  q_BTNH, k, v, inputs = vary_with(arrays, arrays)
  (B, T, N), K, U = q_BTNH.shape[:3], k.shape[2], v.shape[-1]
  blocks, M = _blocks(q_BTNH, k, v, inputs), T * N
  padding = _padded_rows(M, k) - M
  scalars = [*bounds(static.mask, inputs)]
  if inputs.page_table_BJ is not None:
    table_BJ = needed_pages(inputs.page_table_BJ, k.shape[1], *scalars)
    scalars.append(jnp.pad(table_BJ, ((0, 0), (0, -table_BJ.shape[1] % blocks.pieces))))
  else:
    row_B = jnp.arange(B, dtype=jnp.int32) if inputs.row_B is None else inputs.row_B
    scalars.append(row_B)
  pad = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, padding), (0, 0)])
  by_row = lambda x_N: pad(jnp.tile(x_N, T)[:, None])
  maybe = lambda x_N: None if x_N is None else by_row(x_N)
  rows = _Rows(
    pad(jnp.repeat(inputs.q_positions_BT, N, axis=1)[..., None]),
    by_row(jnp.arange(N, dtype=jnp.int32) // (N // K)),
    maybe(inputs.mask_N),
    maybe(inputs.slopes_N),
    maybe(inputs.sink_N),
  )
  positions = inputs.kv_positions_BS
  if positions is not None and blocks.ahead:
    positions = jnp.pad(positions, ((0, 0), (0, -positions.shape[1] % blocks.positions)))
    positions = jnp.tile(positions.reshape(B, -1, 1, blocks.positions), (1, 1, K, 1))
    positions = positions.reshape(B, 1, -1)
  elif positions is not None:
    positions = jnp.repeat(positions, K, axis=1)[:, None]
  columns = vary_with(q_BTNH, _Columns(*blocks.columns(), positions))
  rows = vary_with(q_BTNH, rows)
  flat = lambda x: x.reshape(x.shape[0], -1, x.shape[-1])
  q = pad(flat(q_BTNH.astype(k.dtype)))
  order = (0, 2, 3, 1) if blocks.across else (0, 2, 1, 3)
  k, v = (x.transpose(order) if blocks.ahead else flat(x) for x in (k, v))
  arrays = (rows, columns, q, k, None if one else v, U)
  return _call(static, blocks, scalars, *arrays, q_BTNH.dtype)[:, :M].reshape(B, T, N, U)


def _call(static, blocks: _Blocks, scalars, rows: _Rows, columns: _Columns, q, k, v, U, dtype):
  """[B, M, U]; without v, of which U is the width, k serves as that."""
  B, M, H = q.shape
  paged = scalars[2].ndim == 2

  def block(b, j, first_B, end_B):
    """What a row reads in step j: when it has all, nothing new."""
    begin, count = _need(blocks, first_B[b], end_B[b])
    return begin + jnp.minimum(j, jnp.maximum(count - 1, 0))

  def keys(width, i):
    if paged:
      place = lambda b, j, *s: (s[2][b, block(b, j, *s[:2]) * blocks.pieces + i], 0, 0)
    else:
      place = lambda b, j, *s: (s[2][b], block(b, j, *s[:2]), 0)
    if not blocks.ahead:
      return pl.BlockSpec((1, blocks.piece, width), place)
    each = blocks.piece // blocks.heads
    if blocks.across:
      shape = (1, blocks.heads, width, each)
      return pl.BlockSpec(shape, lambda *a: (place(*a)[0], 0, 0, place(*a)[1]))
    shape = (1, blocks.heads, each, width)
    return pl.BlockSpec(shape, lambda *a: (place(*a)[0], 0, *place(*a)[1:]))

  of_row = lambda width: pl.BlockSpec((1, M, width), lambda b, *_: (b, 0, 0))
  same = lambda x: pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)
  columns_specs = jax.tree.map(same, columns._replace(position=None))
  if columns.position is not None:
    ids = pl.BlockSpec((1, 1, blocks.piece), lambda b, j, *s: (b, 0, block(b, j, *s[:2])))
    columns_specs = columns_specs._replace(position=ids)
  pieces = range(blocks.pieces)
  steps = jnp.max(_need(blocks, *scalars[:2])[1], initial=1)
  call = pl.pallas_call(
    partial(_kernel, static, blocks),
    name="decode_attention",
    out_shape=varying_shape((B, M, U), dtype, q),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(B, steps),
      in_specs=(
        jax.tree.map(same, rows)._replace(position=of_row(1)),
        columns_specs,
        of_row(H),
        [keys(H, i) for i in pieces],
        [] if v is None else [keys(U, i) for i in pieces],
      ),
      out_specs=of_row(U),
      scratch_shapes=[pltpu.VMEM((M, LANES), f32), pltpu.VMEM((M, LANES), f32)]
      + [pltpu.VMEM((M, U), f32)],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=fast_memory()
    ),
    cost_estimate=_cost(q, k, U, v is None, scalars[2].shape[1] if paged else 1),
  )
  values = [] if v is None else [v] * blocks.pieces
  return call(*scalars, rows, columns, q, [k] * blocks.pieces, values)


def _cost(q, k, U: int, one_array: bool, pieces: int) -> pl.CostEstimate:
  """Of rows whose caches are full and seen whole."""
  B, M, H = q.shape
  columns = pieces * (math.prod(k.shape[1:]) // H)
  width = H if one_array else H + U
  return pl.CostEstimate(
    flops=2 * B * M * columns * (H + U),
    bytes_accessed=B * columns * width * k.dtype.itemsize,
    transcendentals=B * M * columns,
  )


def _need(blocks: _Blocks, first: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The first block of keys that a row reads, and how many."""
  begin = jax.lax.div(first, blocks.positions)
  return begin, jax.lax.div(end + blocks.positions - 1, blocks.positions) - begin


def _kernel(
  static, blocks, first_B, end_B, _, rows, columns, q_ref, k_refs, v_refs, o_ref, m_ref, total_ref,
  acc_ref,
):  # fmt: skip
  b, j = pl.program_id(0), pl.program_id(1)

  @pl.when(j == 0)
  def _():
    m_ref[...] = jnp.full(m_ref.shape, MASKED, f32)
    total_ref[...] = jnp.full(total_ref.shape, 0.0 if rows.sink is None else 1.0, f32)
    if rows.sink is not None:
      m_ref[...] = jnp.broadcast_to(rows.sink[...] * LOG2E, m_ref.shape)
    acc_ref[...] = jnp.zeros(acc_ref.shape, f32)

  first, end = first_B[b], end_B[b]
  begin, count = _need(blocks, first, end)
  here = (begin + j) * blocks.positions  # where the block begins
  cut = (here < first) | (here + blocks.positions > end)

  def body(cut: bool):
    m, total, acc = m_ref[:, :1], total_ref[:, :1], acc_ref[...]
    q = q_ref[0]
    for start in range(0, blocks.pieces * blocks.piece, blocks.chunk):
      need = (first - here, end - here) if cut else None  # what is not needed may be NaN
      k, v = _read(blocks, k_refs, start), _read(blocks, v_refs or k_refs, start, need)
      base = here + start // blocks.heads
      s = _logits(static, blocks, rows, columns, q, k, base, start)
      if cut:
        index = base + columns.offset[...]
        s = jnp.where((index >= first) & (index < end), s, MASKED)
      m_next = jnp.maximum(m, jnp.max(s, axis=1, keepdims=True))
      # Where nothing was visible yet, MASKED less anything but itself is 0 in powers of two.
      top = jnp.where(m_next == MASKED, 0.0, m_next)
      p = jnp.exp2(s - top)
      decay = jnp.exp2(m - top)
      total = total * decay + jnp.sum(p, axis=1, keepdims=True)
      acc = acc * decay + _mixed(blocks, p.astype(v.dtype), v)
      m = m_next
    m_ref[...] = jnp.broadcast_to(m, m_ref.shape)
    total_ref[...] = jnp.broadcast_to(total, total_ref.shape)
    acc_ref[...] = acc

  pl.when((j < count) & cut)(lambda: body(True))
  pl.when((j < count) & jnp.logical_not(cut))(lambda: body(False))

  @pl.when(j == pl.num_programs(1) - 1)
  def _():
    total = total_ref[:, :1]
    o_ref[0] = (acc_ref[...] / jnp.where(total > 0, total, 1.0)).astype(o_ref.dtype)


def _read(blocks: _Blocks, refs, start: int, need=None):
  """Columns from `start` as one array [chunk, width], or [K, width, positions] with positions last;
  with `need` zeros outside these positions of the step."""
  if blocks.chunk <= blocks.piece:
    places = [divmod(start, blocks.piece)]
  else:
    i = start // blocks.piece
    places = [(i + n, 0) for n in range(blocks.chunk // blocks.piece)]
  size, parts = min(blocks.chunk, blocks.piece), []
  for i, within in places:
    if blocks.ahead:
      dim = 2 if blocks.across else 1
      x, begin, each = refs[i][0], i * blocks.piece // blocks.heads, 1
    else:
      x, dim, begin = refs[i][0, pl.ds(within, size)], 0, i * blocks.piece + within
      each = blocks.heads
    if need is not None:
      index = begin + jax.lax.broadcasted_iota(jnp.int32, x.shape, dim)
      keep = (index >= need[0] * each) & (index < need[1] * each)
      x = jnp.where(keep, x, jnp.zeros_like(x))
    parts.append(x if blocks.across else x.reshape(size, x.shape[-1]))
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)


def _products(blocks: _Blocks, q, k):
  """[M, chunk] of all queries with all columns."""
  if not blocks.across:
    return dot(q, k, ((1,), (1,)))
  return jnp.concatenate([dot(q, k[h], ((1,), (0,))) for h in range(blocks.heads)], axis=1)


def _mixed(blocks: _Blocks, p, v):
  """Sums of the columns' values, [M, U]."""
  if not blocks.across:
    return dot(p, v, ((1,), (0,)))
  each = p.shape[1] // blocks.heads
  parts = [dot(p[:, h * each : (h + 1) * each], v[h], ((1,), (1,))) for h in range(blocks.heads)]
  return sum(parts[1:], parts[0])


def _logits(static, blocks, rows, columns, q, k, base, start: int) -> Any:
  """Base-2 logits [M, chunk], MASKED where nothing is to be seen."""
  s = _products(blocks, q, k)
  if static.softcap is not None:
    s = jnp.tanh(s * (static.scale / static.softcap)) * (static.softcap * LOG2E)
  else:
    s = s * (static.scale * LOG2E)
  i, j = rows.position[0], base + columns.offset[...]
  seen = []
  if columns.position is not None:
    j = columns.position[0, :, pl.ds(start, blocks.chunk)]
    seen.append(j >= 0)
  if rows.slope is not None:
    s = s - (rows.slope[...] * LOG2E) * (i - j).astype(f32)
  if blocks.heads > 1:
    seen.append(rows.head[...] == columns.head[...])
  if static.mask is not None:
    which = None if rows.which is None else rows.which[...]
    seen.append(shown(static.mask.distinct, which, i, j))
  for each in seen[1:]:
    seen[0] = seen[0] & each
  return jnp.where(seen[0], s, MASKED) if seen else s
