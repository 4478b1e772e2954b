"""Attention as Pallas kernels for TPUs: forward, and gradients by queries and by keys and values.

The grid walks over visits (`blocks`): the pairs of a block of queries and a block of keys in which
something is visible, row after row (forward, dq) or column after column (dk, dv), so that each
result stays in fast memory until it is complete. A visit where the mask cuts computes it from
indices, one where it does not skips that. Time follows the number of visits.

Ids of queries are [B, 1, T], of keys [B, 1, S]; what each head has is [1, N], scalars in a kernel.

Letters: B batch, T query positions, S key positions, N query heads, K key/value heads, G = N // K,
H head size of queries and keys, U that of values, I and J positions in a block of queries and of
keys, V visits, L lists of visits: one for each distinct mask and, where positions or segments
decide, for each row of the batch.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..partition import vary_with, varying_shape
from ..select import LANES
from ..tpu import dot, fast_memory
from .bias import Alibi
from .blocks import (
  COLUMN,
  FULL,
  PARTIAL,
  Order,
  block_kinds,
  by_position,
  even_blocks,
  for_all,
  kinds_at_run_time,
  masks_of,
  ranges,
  unpack,
  walk,
  walk_at_run_time,
  walks,
)
from .tiles import (
  LOG2E,
  MASKED,
  Heads,
  Ids,
  logits,
  natural,
  needs_positions,
  sink_gradient,
  visible,
)

# Positions of a block, and of those the keys (or queries, for the gradients by keys) whose logits
# are in work at a time. Estimated on v5p at head size 128 as shares of the matrix unit's bound:
# forward 79 / 81 / 60 % with steps of 512 / 256 / 128, dq 92 / 90, dkv 94 / 91 with 512 / 256.
BLOCK = 1024
FORWARD_STEP, BACKWARD_STEP = 256, 512
# Bytes of the lists of visits, which lie in a core's scalar memory of 1 MiB.
LISTS = 512 * 2**10

f32 = jnp.float32


class _Static(NamedTuple):
  mask: Any
  scale: float
  softcap: float | None
  length: int  # S, before padding
  q_block: int
  kv_block: int
  each_row: bool  # of the batch has lists of its own

  @property
  def masks(self) -> tuple[Any, ...]:
    return masks_of(self.mask)


class _Plan(NamedTuple):
  """Words of the visits, int32 [L, V]: row after row, and column after column for all masks."""

  rows: jax.Array
  columns: jax.Array


def supports(q_BTNH, k_BSKH, v_BSKU, bias, mask, order: Order) -> str | None:
  """Why a TPU can't run these arguments, or None."""
  if bias is not None and not isinstance(bias, Alibi):
    return f"of the biases only Alibi is computed in the kernel, not {type(bias).__name__}"
  for x in (q_BTNH, k_BSKH, v_BSKU):
    if x.dtype not in (jnp.bfloat16, jnp.float32):
      return f"arrays must be bfloat16 or float32, not {x.dtype}"
    if x.shape[-1] > 256:
      return f"head sizes go up to 256, not {x.shape[-1]}"
  kinds = _kinds(mask, order, q_BTNH.shape[1], k_BSKH.shape[1])
  size = 4 * len(kinds) * max(int((k > 0).sum()) + max(k.shape) for k in kinds)
  if size > LISTS:
    return f"its list of blocks takes {size:,} bytes of scalar memory, of {LISTS:,}"
  return None


def block_size(length: int) -> int:
  """Positions of a block, as many as fast memory has room for."""
  return even_blocks(length, BLOCK if fast_memory() > 32 * 2**20 else BLOCK // 2, LANES)


def attention(
  q_BTNH, k_BSKH, v_BSKU, q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS, bias,
  sink_N, mask_N, *, mask, scale, softcap, order,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
  """Arguments as in the package, where None stands for a default; see there."""
  kv_positions_BS = q_positions_BT if kv_positions_BS is None else kv_positions_BS
  ids = (q_positions_BT, q_segments_BT), (kv_positions_BS, kv_segments_BS)
  static = (mask, scale, softcap, order)
  arguments = _arguments(q_BTNH, k_BSKH, v_BSKU, bias, sink_N, mask_N, *ids, *static)
  return _cut(q_BTNH.shape[1], *_attend(*arguments))


def forward(
  q_BTNH, k_BSKH, v_BSKU, bias, sink_N, q_ids, kv_ids, *, mask, scale, softcap, own_row=False
) -> tuple[jax.Array, jax.Array]:
  """As of `xla`."""
  static = (mask, scale, softcap, "gaps" if own_row else "any")
  arguments = _arguments(q_BTNH, k_BSKH, v_BSKU, bias, sink_N, None, q_ids, kv_ids, *static)
  return _cut(q_BTNH.shape[1], *_forward(*arguments, dtype=f32))


def backward(
  q_BTNH, k_BSKH, v_BSKU, bias, sink_N, q_ids, kv_ids, o_BTNU, lse_BTN, do_BTNU, *,
  mask, scale, softcap, own_row=False,
) -> tuple[Any, ...]:  # fmt: skip
  """As of `xla`."""
  static = (mask, scale, softcap, "gaps" if own_row else "any")
  static, *rest = _arguments(q_BTNH, k_BSKH, v_BSKU, bias, sink_N, None, q_ids, kv_ids, *static)
  ahead = lambda x: _padded(x, static.q_block).swapaxes(1, 2)
  lse_BTN = jnp.where(jnp.isneginf(lse_BTN), -MASKED, LOG2E * lse_BTN)
  saved = (*rest, ahead(o_BTNU), ahead(lse_BTN)[:, :, None])
  dq, dk, dv, _, dheads, *_ = _backward(static, saved, (ahead(do_BTNU), 0.0), dtype=f32)
  back = lambda dx, x: dx[:, :, : x.shape[1]].swapaxes(1, 2)
  dsink_N, dslope_N = jax.tree.map(lambda d_1N: d_1N[0], dheads)
  dbias = None if bias is None else Alibi(dslope_N)
  return back(dq, q_BTNH), back(dk, k_BSKH), back(dv, v_BSKU), dbias, dsink_N


def _cut(T: int, o_BNTU, lse_BN1T):
  """(o, log-sum-exp) as callers know them."""
  return o_BNTU[:, :, :T].swapaxes(1, 2), natural(lse_BN1T[:, :, 0, :T]).swapaxes(1, 2)


def _arguments(
  q_BTNH, k_BSKH, v_BSKU, bias, sink_N, mask_N, q_ids, kv_ids, mask, scale, softcap, order
) -> tuple[Any, ...]:
  """Those of `_attend`; ids are (positions, segments)."""
  (B, T, N, _), S = q_BTNH.shape, k_BSKH.shape[1]
  q_block, kv_block = block_size(T), block_size(S)
  static = _Static(mask, scale, softcap, S, q_block, kv_block, each_row=False)
  plan, each_row = _plan(static, order, q_ids, kv_ids, T)
  static = static._replace(each_row=each_row)
  absolute = needs_positions(static.masks, order)
  row = lambda x, block: None if x is None else _padded(x, block)[:, None]
  of_row = lambda x: jnp.broadcast_to(x, (B, x.shape[1])) if absolute else None
  q_ids = Ids(row(of_row(q_ids[0]), q_block), row(q_ids[1], q_block))
  kv_ids = Ids(row(of_row(kv_ids[0]), kv_block), row(kv_ids[1], kv_block))
  to_1N = lambda x: None if x is None else x.astype(f32)[None]
  heads = Heads(to_1N(sink_N), None if bias is None else to_1N(bias.slopes_N))
  mask_N = jnp.zeros(N, jnp.int32) if mask_N is None else mask_N
  ahead = lambda x, block: _padded(x, block).swapaxes(1, 2)
  q, k, v = ahead(q_BTNH, q_block), ahead(k_BSKH, kv_block), ahead(v_BSKU, kv_block)
  return static, q, k, v, plan, heads, q_ids, kv_ids, mask_N


def _padded(x, block):
  extra = -x.shape[1] % block
  return jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2)) if extra else x


def _kinds(mask, order: Order, T: int, S: int) -> list[np.ndarray]:
  sizes = (T, S, block_size(T), block_size(S))
  return [block_kinds(each, *sizes, order) for each in masks_of(mask)]


def _plan(static: _Static, order: Order, q_ids, kv_ids, T: int) -> tuple[_Plan, bool]:
  """The visits, and whether each row of the batch has its own."""
  S, sizes = static.length, (static.q_block, static.kv_block)
  known = _kinds(static.mask, order, T, S)
  known_to_all = block_kinds(static.mask, T, S, *sizes, order)
  segments = q_ids[1] is not None
  batch = max(x.shape[0] for x in (*q_ids, *kv_ids) if x is not None)
  told = segments or any(by_position(m, order) for m in static.masks)
  if not told or 4 * batch * len(known) * max(walk(k).size for k in known) > LISTS:
    at_most = PARTIAL if segments else FULL  # their borders may lie in any block
    rows = walks([walk(np.minimum(k, at_most)) for k in known])
    columns = walk(np.minimum(known_to_all, at_most).T)[None]
    return _Plan(jnp.asarray(rows), jnp.asarray(columns)), False
  blocks = ranges(q_ids, sizes[0]), ranges(kv_ids, sizes[1])
  kinds = kinds_at_run_time(static.masks, known, order, *blocks, S, sizes[1])
  kinds = [jnp.broadcast_to(k, (batch, *k.shape[1:])) for k in kinds]
  each = [walk_at_run_time(walk(k), now) for k, now in zip(known, kinds, strict=True)]
  length = max(w.shape[1] for w in each)
  done = lambda w: w[:, -1:] >> COLUMN << COLUMN
  each = [jnp.concatenate([w, done(w).repeat(length - w.shape[1], 1)], 1) for w in each]
  columns = walk_at_run_time(walk(known_to_all.T), for_all(kinds).swapaxes(1, 2))
  return _Plan(jnp.stack(each, 1).reshape(-1, length), columns), batch > 1


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, q, k, v, plan, heads, q_ids, kv_ids, mask_N):
  return _forward(static, q, k, v, plan, heads, q_ids, kv_ids, mask_N)


def _attend_fwd(static, q, k, v, plan, heads, q_ids, kv_ids, mask_N):
  o, lse = _forward(static, q, k, v, plan, heads, q_ids, kv_ids, mask_N)
  o, lse = checkpoint_name(o, "attention_out"), checkpoint_name(lse, "attention_lse")
  return (o, lse), (q, k, v, plan, heads, q_ids, kv_ids, mask_N, o, lse)


def _backward(static, saved, given, dtype=None):
  do, dlse = given
  q, k, v, plan, heads, q_ids, kv_ids, mask_N, o, lse = saved
  delta = jnp.sum(do.astype(f32) * o.astype(f32), axis=-1)[:, :, None] - LOG2E * dlse
  arrays = (q, k, v, do, lse, delta, plan, heads, q_ids, kv_ids, mask_N)
  dq, drow = _backward_queries(static, *arrays, dtype=dtype)
  dk, dv = _backward_keys(static, *arrays, dtype=dtype)
  dsink = None
  if heads.sink is not None:
    dsink = sink_gradient(heads.sink[0], lse[:, :, 0], delta[:, :, 0])[None]
  dslope = None if drow is None else jnp.sum(drow, axis=(0, 2, 3))[None]
  return dq, dk, dv, None, Heads(dsink, dslope), None, None, None


_attend.defvjp(_attend_fwd, _backward)


# ---- the kernels ----


def _list(static: _Static, b, which, *, turned: bool):
  """Which list of visits a step of the grid reads."""
  if turned:
    return b if static.each_row else 0
  several = len(static.masks) > 1
  return (b * len(static.masks) if static.each_row else 0) + (which() if several else 0)


def _logits(static, heads, n, q, k, distance):
  """(base-2 logits, their tanh if capped): q k^T, or k q^T, whichever comes first."""
  slope = None if heads.slope is None else heads.slope[0, n]
  return logits(dot(q, k, ((1,), (1,))), static.scale, static.softcap, slope, distance)


def _visible(static, which, tile) -> Any:
  """Bools of a tile."""
  in_row = tile.index_j < static.length if static.length % static.kv_block else None
  ids = (tile.i, tile.j, tile.q_segment, tile.kv_segment)
  return visible(static.masks, which, *ids, in_row)


def _column(row):
  """[1, n] -> [n, 1]."""
  return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


class _Tile(NamedTuple):
  """Ids of a block of queries (column or row) and of some keys (row or column)."""

  i: Any
  j: Any
  q_segment: Any
  kv_segment: Any
  index_j: Any

  @property
  def distance(self):
    return self.i - self.j


def _tile(static, visit, q_ids, kv_ids, q_range, kv_range, *, queries_down: bool) -> _Tile:
  """For parts (start, size) of the two blocks; queries go down and keys across, or the reverse."""

  def ids(refs, block, first, part, down):
    start, size = part
    shape = (size, 1) if down else (1, size)
    index = first * block + start + jax.lax.broadcasted_iota(jnp.int32, shape, 0 if down else 1)
    rows = (None if ref is None else ref[0, :, pl.ds(start, size)] for ref in refs)
    position, segment = (_column(x) if down and x is not None else x for x in rows)
    return index, index if position is None else position, segment

  _, i, q_segment = ids(q_ids, static.q_block, visit.row, q_range, queries_down)
  index_j, j, kv_segment = ids(kv_ids, static.kv_block, visit.column, kv_range, not queries_down)
  return _Tile(i, j, q_segment, kv_segment, index_j)


def _steps(block: int, most: int) -> list[tuple[int, int]]:
  """(start, size) of even parts of a block, `most` or less each."""
  size = max(n for n in range(LANES, most + 1, LANES) if block % n == 0)
  return [(start, size) for start in range(0, block, size)]


def _bodies(visit, body):
  """Runs `body(cut)` for this visit."""
  pl.when(visit.kind == PARTIAL)(lambda: body(True))
  pl.when(visit.kind == FULL)(lambda: body(False))


def _wide(x, width):
  """[n, 128] of equal columns -> [n, width]."""
  return jnp.concatenate([x] * (width // LANES), axis=1) if width > LANES else x


def _forward_kernel(
  static, words, which_N, heads, q_ids, kv_ids, q_ref, k_ref, v_ref, o_ref, lse_ref, m_ref,
  total_ref, acc_ref,
):  # fmt: skip
  n = pl.program_id(1)
  row = _list(static, pl.program_id(0), lambda: which_N[n], turned=False)
  visit = unpack(words[row, pl.program_id(2)])

  @pl.when(visit.first == 1)
  def _():
    start = MASKED if heads.sink is None else heads.sink[0, n] * LOG2E
    m_ref[...] = jnp.full(m_ref.shape, start, f32)
    total_ref[...] = jnp.full(total_ref.shape, 0.0 if heads.sink is None else 1.0, f32)
    acc_ref[...] = jnp.zeros(acc_ref.shape, f32)

  def body(cut):
    q = q_ref[0, 0]
    m, total, acc = m_ref[...], total_ref[...], acc_ref[...]
    for part in _steps(static.kv_block, FORWARD_STEP):
      keys = pl.ds(*part)
      tile = _tile(static, visit, q_ids, kv_ids, (0, static.q_block), part, queries_down=True)
      s, _ = _logits(static, heads, n, q, k_ref[0, 0, keys], lambda tile=tile: tile.distance)
      if cut:
        s = jnp.where(_visible(static, which_N[n], tile), s, MASKED)
      m_next = jnp.maximum(m, jnp.max(s, axis=1, keepdims=True))
      # Where nothing was visible yet, MASKED less anything but itself is 0 in powers of two.
      top = jnp.where(m_next == MASKED, 0.0, m_next) if cut else m_next
      p = jnp.exp2(s - _wide(top, part[1]))
      decay = jnp.exp2(m - top)
      total = total * decay + jnp.sum(p, axis=1, keepdims=True)
      v = v_ref[0, 0, keys]
      acc = acc * _fit(decay, acc.shape[1]) + dot(p.astype(v.dtype), v, ((1,), (0,)))
      m = m_next
    m_ref[...], total_ref[...], acc_ref[...] = m, total, acc

  _bodies(visit, body)

  @pl.when(visit.last == 1)
  def _():
    seen = total_ref[...] > 0
    total = jnp.where(seen, total_ref[...], 1.0)
    o_ref[0, 0] = (acc_ref[...] / _fit(total, acc_ref.shape[1])).astype(o_ref.dtype)
    # Huge where nothing was seen: probabilities are then 0 in the backward pass.
    lse_ref[0, 0] = jnp.where(seen, m_ref[...] + jnp.log2(total), -MASKED).T[:1]


def _fit(x, width):
  """[n, 128] of equal columns -> [n, width]."""
  return x[:, :width] if width <= LANES else _wide(x, -(-width // LANES) * LANES)[:, :width]


def _dq_kernel(
  static, words, which_N, heads, q_ids, kv_ids, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref,
  *refs,
):  # fmt: skip
  drow_ref = drow_acc = None
  if heads.slope is None:
    dq_ref, lse_acc, delta_acc, dq_acc = refs
  else:
    dq_ref, drow_ref, lse_acc, delta_acc, dq_acc, drow_acc = refs
  n = pl.program_id(1)
  row = _list(static, pl.program_id(0), lambda: which_N[n], turned=False)
  visit = unpack(words[row, pl.program_id(2)])

  @pl.when(visit.first == 1)
  def _():
    for acc, ref in ((lse_acc, lse_ref), (delta_acc, delta_ref)):
      acc[...] = jnp.broadcast_to(ref[0, 0], (LANES, static.q_block)).T
    dq_acc[...] = jnp.zeros(dq_acc.shape, f32)
    if drow_acc is not None:
      drow_acc[...] = jnp.zeros(drow_acc.shape, f32)

  def body(cut):
    q, do, dq = q_ref[0, 0], do_ref[0, 0], dq_acc[...]
    for part in _steps(static.kv_block, BACKWARD_STEP):
      keys, width = pl.ds(*part), part[1]
      tile = _tile(static, visit, q_ids, kv_ids, (0, static.q_block), part, queries_down=True)
      k = k_ref[0, 0, keys]
      s, t = _logits(static, heads, n, q, k, lambda tile=tile: tile.distance)
      if cut:
        s = jnp.where(_visible(static, which_N[n], tile), s, MASKED)
      p = jnp.exp2(s - _wide(lse_acc[...], width))
      ds = p * (dot(do, v_ref[0, 0, keys], ((1,), (1,))) - _wide(delta_acc[...], width))
      if drow_acc is not None:
        lost = jnp.sum(ds * tile.distance.astype(f32), axis=1, keepdims=True)
        drow_acc[...] -= jnp.broadcast_to(lost, drow_acc.shape)
      if t is not None:
        ds = ds * (1 - t * t)
      dq = dq + dot(ds.astype(k.dtype), k, ((1,), (0,)))
    dq_acc[...] = dq

  _bodies(visit, body)

  @pl.when(visit.last == 1)
  def _():
    dq_ref[0, 0] = (dq_acc[...] * static.scale).astype(dq_ref.dtype)
    if drow_ref is not None and drow_acc is not None:
      drow_ref[0, 0] = drow_acc[...].T[:1]


def _dkv_kernel(
  static, words, which_N, heads, q_ids, kv_ids, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref,
  dk_ref, dv_ref, dk_acc, dv_acc,
):  # fmt: skip
  """Keys go down, queries across: what is one number a query is then a row."""
  G = pl.num_programs(3)
  g = pl.program_id(3)
  n = pl.program_id(1) * G + g
  row = _list(static, pl.program_id(0), lambda: 0, turned=True)
  turned = unpack(words[row, pl.program_id(2)])
  visit = turned._replace(row=turned.column, column=turned.row)

  @pl.when((visit.first == 1) & (g == 0))
  def _():
    dk_acc[...] = jnp.zeros(dk_acc.shape, f32)
    dv_acc[...] = jnp.zeros(dv_acc.shape, f32)

  def body(cut):
    k, v, dk, dv = k_ref[0, 0], v_ref[0, 0], dk_acc[...], dv_acc[...]
    for part in _steps(static.q_block, BACKWARD_STEP):
      queries = pl.ds(*part)
      tile = _tile(static, visit, q_ids, kv_ids, part, (0, static.kv_block), queries_down=False)
      q, do = q_ref[0, 0, queries], do_ref[0, 0, queries]
      s, t = _logits(static, heads, n, k, q, lambda tile=tile: tile.distance)
      if cut:
        s = jnp.where(_visible(static, which_N[n], tile), s, MASKED)
      p = jnp.exp2(s - lse_ref[0, 0, :, queries])
      dv = dv + dot(p.astype(do.dtype), do, ((1,), (0,)))
      ds = p * (dot(v, do, ((1,), (1,))) - delta_ref[0, 0, :, queries])
      if t is not None:
        ds = ds * (1 - t * t)
      dk = dk + dot(ds.astype(q.dtype), q, ((1,), (0,)))
    dk_acc[...], dv_acc[...] = dk, dv

  _bodies(visit, body)

  @pl.when((visit.last == 1) & (g == G - 1))
  def _():
    dk_ref[0, 0] = (dk_acc[...] * static.scale).astype(dk_ref.dtype)
    dv_ref[0, 0] = dv_acc[...].astype(dv_ref.dtype)


# ---- their calls ----


class _Specs(NamedTuple):
  """Which block of an array a step of the grid works on.

  The grid is (batch, query head, visit), or turned: (batch, key head, visit, head of its group).
  """

  static: _Static
  group: int
  turned: bool

  def _place(self, kind, b, h, v, *rest):
    """(batch, head, block) of a "q" or "kv" array."""
    *g, words, which_N = rest
    n = h * self.group + g[0] if self.turned else h
    visit = unpack(words[_list(self.static, b, lambda: which_N[n], turned=self.turned), v])
    row, column = (visit.column, visit.row) if self.turned else (visit.row, visit.column)
    return (b, n, row) if kind == "q" else (b, n // self.group, column)

  def _length(self, kind) -> int:
    return self.static.q_block if kind == "q" else self.static.kv_block

  def block(self, kind, width):
    """Of [B, heads, positions, width]."""
    place = partial(self._place, kind)
    return pl.BlockSpec((1, 1, self._length(kind), width), lambda *a: (*place(*a), 0))

  def row(self, kind):
    """Of [B, heads, 1, positions]."""

    def place(*a):
      b, head, block = self._place(kind, *a)
      return b, head, 0, block

    return pl.BlockSpec((1, 1, 1, self._length(kind)), place)

  def ids(self, kind):
    """Of [B, 1, positions]."""

    def place(*a):
      b, _, block = self._place(kind, *a)
      return b, 0, block

    return pl.BlockSpec((1, 1, self._length(kind)), place)


def _call(kernel, name, specs, words, arrays, results, scratch, *, flops):
  """Runs a kernel over the visits.

  Args:
    arrays: (q, k, v, *what each query has), heads, q_ids, kv_ids, mask_N.
    results: (shape, spec) of each.
    scratch: widths of the float32 sums of a block.
    flops: of a pair of a query and a key.
  """
  static = specs.static
  (q, k, v, *by_query), heads, q_ids, kv_ids, mask_N = arrays
  (B, N), K, V = q.shape[:2], k.shape[1], words.shape[1]
  rows = static.kv_block if specs.turned else static.q_block
  pairs = B * N * V * static.q_block * static.kv_block
  call = pl.pallas_call(
    partial(kernel, static),
    name=name,
    out_shape=[shape for shape, _ in results],
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(B, K, V, specs.group) if specs.turned else (B, N, V),
      in_specs=(
        jax.tree.map(lambda _: pl.BlockSpec(memory_space=pltpu.SMEM), heads),
        jax.tree.map(lambda _: specs.ids("q"), q_ids),
        jax.tree.map(lambda _: specs.ids("kv"), kv_ids),
        specs.block("q", q.shape[-1]),
        specs.block("kv", k.shape[-1]),
        specs.block("kv", v.shape[-1]),
        *(specs.row("q") if x.shape[2] == 1 else specs.block("q", x.shape[-1]) for x in by_query),
      ),
      out_specs=[spec for _, spec in results],
      scratch_shapes=[pltpu.VMEM((rows, width), f32) for width in scratch],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")[: 3 + specs.turned],
      vmem_limit_bytes=fast_memory(),
    ),
    cost_estimate=pl.CostEstimate(
      flops=flops * pairs,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in (q, k, v, *by_query)),
      transcendentals=pairs,
    ),
  )
  return call(words, mask_N, heads, q_ids, kv_ids, q, k, v, *by_query)


def _forward(static, q, k, v, plan, heads, q_ids, kv_ids, mask_N, dtype=None):
  """(o [B, N, T, U] in `dtype` or that of v, log2-sum-exp [B, N, 1, T])."""
  arrays = ((q, k, v), heads, q_ids, kv_ids, mask_N)
  arrays, plan = vary_with((arrays, plan), (arrays, plan))
  q = arrays[0][0]
  (B, N, T, H), U = q.shape, v.shape[-1]
  specs = _Specs(static, N // k.shape[1], turned=False)
  results = (
    (varying_shape((B, N, T, U), dtype or v.dtype, q), specs.block("q", U)),
    (varying_shape((B, N, 1, T), f32, q), specs.row("q")),
  )
  return _call(
    _forward_kernel, "attention_forward", specs, plan.rows, arrays,
    results, (LANES, LANES, U), flops=2 * (H + U),
  )  # fmt: skip


def _backward_queries(static, q, k, v, do, lse, delta, plan, heads, q_ids, kv_ids, mask_N, dtype):
  """(dq [B, N, T, H], what the slope gains from each query [B, N, 1, T] or None)."""
  arrays = ((q, k, v, do, lse, delta), heads, q_ids, kv_ids, mask_N)
  arrays, plan = vary_with((arrays, plan), (arrays, plan))
  q = arrays[0][0]
  (B, N, T, H), U = q.shape, v.shape[-1]
  specs = _Specs(static, N // k.shape[1], turned=False)
  results = [(varying_shape(q.shape, dtype or q.dtype, q), specs.block("q", H))]
  scratch = [LANES, LANES, H]
  if heads.slope is not None:
    results.append((varying_shape((B, N, 1, T), f32, q), specs.row("q")))
    scratch.append(LANES)
  out = _call(
    _dq_kernel, "attention_dq", specs, plan.rows, arrays, results,
    scratch, flops=2 * (2 * H + U),
  )  # fmt: skip
  return (*out, None)[:2]


def _backward_keys(static, q, k, v, do, lse, delta, plan, heads, q_ids, kv_ids, mask_N, dtype):
  """(dk [B, K, S, H], dv [B, K, S, U])."""
  arrays = ((q, k, v, do, lse, delta), heads, q_ids, kv_ids, mask_N)
  arrays, plan = vary_with((arrays, plan), (arrays, plan))
  q, k, v = arrays[0][:3]
  N, H, U = q.shape[1], q.shape[3], v.shape[-1]
  specs = _Specs(static, N // k.shape[1], turned=True)
  of = lambda x: varying_shape(x.shape, dtype or x.dtype, q)
  results = [(of(x), specs.block("kv", x.shape[-1])) for x in (k, v)]
  return _call(
    _dkv_kernel, "attention_dkv", specs, plan.columns, arrays, results,
    (H, U), flops=4 * (H + U),
  )  # fmt: skip
