"""Attention as Triton kernels for GPUs: forward, and gradients by queries and by keys and values.

A program owns a block of queries of one head (forward, dq) or a block of keys of one key/value
head (dk, dv) and loops over the blocks in which the mask leaves something (`blocks`): first those
that it cuts, where the kernel computes it from indices, then those that it does not. Nothing is
padded in memory: ends of rows are masked where they are read and written, and a head size that is
no power of two is worked on in parts that are. Nothing here has been timed.

Ids of queries are [B, T], of keys [B, S]; what each head has is [N].

Letters: B batch, T query positions, S key positions, N query heads, K key/value heads, G = N // K,
H head size of queries and keys, U that of values, I query positions and J key positions in a block,
L distinct masks, V visits.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..partition import vary_with, varying_shape
from .bias import Alibi
from .blocks import FULL, PARTIAL, Order, block_kinds, visits
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

PART = 16  # the smallest side of a product of blocks

f32, i32 = jnp.float32, jnp.int32


class _Blocks(NamedTuple):
  """Positions that a program owns, those that it visits at a time, and its warps."""

  own: int
  visited: int
  warps: int


class _Static(NamedTuple):
  mask: Any
  scale: float
  softcap: float | None
  order: Order

  @property
  def masks(self) -> tuple[Any, ...]:
    return () if self.mask is None else self.mask.distinct


class _Plan(NamedTuple):
  """Blocks to visit, by mask: for block n those of number start[n] .. end[n], or `block` of it."""

  start: jax.Array  # int32 [L, blocks]
  end: jax.Array
  block: jax.Array | None  # int32 [L, V]; None where each run of numbers has no gaps


def _blocks(q, v, *, backward: bool) -> _Blocks:
  """Chosen so that Triton 3.9 finds registers for nearly all sums on Hopper; not by measuring."""
  if q.dtype == f32:  # without tensor cores
    return _Blocks(32, 16, 4)
  if max(q.shape[-1], v.shape[-1]) > 128:
    return _Blocks(64, 32, 8)
  return _Blocks(64, 32, 4) if backward else _Blocks(128, 64, 8)


def supports(q_BTNH, k_BSKH, v_BSKU, bias, mask, order: Order) -> str | None:
  """Why a GPU can't run these arguments, or None."""
  del mask
  if order == "any":
    return "the keys must be those of the queries' own row"
  if bias is not None and not isinstance(bias, Alibi):
    return f"of the biases only Alibi is computed in the kernel, not {type(bias).__name__}"
  if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16, f32):
    return f"arrays must be bfloat16, float16 or float32, not {q_BTNH.dtype}"
  if not q_BTNH.dtype == k_BSKH.dtype == v_BSKU.dtype:
    return f"q, k and v need one dtype, not {q_BTNH.dtype}, {k_BSKH.dtype} and {v_BSKU.dtype}"
  for x in (q_BTNH, v_BSKU):
    if x.shape[-1] % PART or x.shape[-1] > 256:
      return f"head sizes must be multiples of {PART} up to 256, not {x.shape[-1]}"
  return None


def attention(
  q_BTNH, k_BSKH, v_BSKU, q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS, bias,
  sink_N, mask_N, *, mask, scale, softcap, order,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
  """Arguments as in the package, where None stands for a default; see there."""
  del kv_positions_BS
  B, T, N, _ = q_BTNH.shape
  static = _Static(mask, scale, softcap, order)
  positions_BT = None
  if needs_positions(static.masks, order):
    positions_BT = jnp.broadcast_to(q_positions_BT, (B, T))
  q_ids, kv_ids = Ids(positions_BT, q_segments_BT), Ids(positions_BT, kv_segments_BS)
  as_f32 = lambda x: None if x is None else x.astype(f32)
  heads = Heads(as_f32(sink_N), None if bias is None else as_f32(bias.slopes_N))
  mask_N = jnp.zeros(N, i32) if mask_N is None else mask_N
  o_BTNU, lse_BNT = _attend(static, q_BTNH, k_BSKH, v_BSKU, heads, q_ids, kv_ids, mask_N)
  return o_BTNU, natural(lse_BNT).swapaxes(1, 2)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, q, k, v, heads, q_ids, kv_ids, mask_N):
  return _forward(static, (q, k, v), heads, q_ids, kv_ids, mask_N)


def _attend_fwd(static, q, k, v, heads, q_ids, kv_ids, mask_N):
  o, lse = _forward(static, (q, k, v), heads, q_ids, kv_ids, mask_N)
  o, lse = checkpoint_name(o, "attention_out"), checkpoint_name(lse, "attention_lse")
  return (o, lse), (q, k, v, heads, q_ids, kv_ids, mask_N, o, lse)


def _attend_bwd(static, saved, given):
  do, dlse = given
  q, k, v, heads, q_ids, kv_ids, mask_N, o, lse = saved
  delta = jnp.sum(do.astype(f32) * o.astype(f32), axis=-1).swapaxes(1, 2) - LOG2E * dlse
  arrays = (q, k, v, do, lse, delta)
  dq, drow = _backward_queries(static, arrays, heads, q_ids, kv_ids, mask_N)
  dk, dv = _backward_keys(static, arrays, heads, q_ids, kv_ids, mask_N)
  dsink = None if heads.sink is None else sink_gradient(heads.sink, lse, delta)
  dslope = None if drow is None else jnp.sum(drow, axis=(0, 2))
  return dq, dk, dv, Heads(dsink, dslope), None, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


# ---- the kernels ----


def _parts(ref) -> list[Any]:
  """Slices of the last dim, each a power of two long."""
  width = ref.shape[-1]
  sizes = [1 << bit for bit in reversed(range(width.bit_length())) if width >> bit & 1]
  return [pl.ds(sum(sizes[:n]), size) for n, size in enumerate(sizes)]


class _Run(NamedTuple):
  """Positions of a block."""

  rows: Any  # a slice
  index: jax.Array
  in_row: jax.Array | None  # None: all are

  def numbers(self, ref, *place, other=0):
    """One a position, of ref[*place, rows]."""
    return _load(ref.at[(*place, self.rows)], self.in_row, other)

  def columns(self, ref, b, head):
    """ref[b, rows, head] in parts, zeros beyond the end of the row."""
    in_row = self._down()
    return [_load(ref.at[b, self.rows, head, part], in_row, 0.0) for part in _parts(ref)]

  def store(self, ref, b, head, values):
    for part, value in zip(_parts(ref), values, strict=True):
      at = ref.at[b, self.rows, head, part]
      plgpu.store(at, value.astype(ref.dtype), mask=self._down())

  def _down(self):
    return None if self.in_row is None else self.in_row[:, None]


def _load(ref, mask, other):
  return plgpu.load(ref, mask=mask, other=None if mask is None else other)


def _run(block, size: int, length: int) -> _Run:
  index = block * size + jnp.arange(size, dtype=i32)
  return _Run(pl.ds(block * size, size), index, index < length if length % size else None)


class _Side(NamedTuple):
  """A block of queries or of keys, as a column or a row of a tile."""

  position: Any
  segment: Any
  index: Any
  in_row: Any

  @classmethod
  def of(cls, run: _Run, ids: Ids, b, *, down: bool):
    position, segment = (None if ref is None else run.numbers(ref, b) for ref in ids)
    turn = lambda x: None if x is None else x[:, None] if down else x[None]
    position = run.index if position is None else position
    return cls(*map(turn, (position, segment, run.index, run.in_row)))


def _tile_logits(static, heads, n, product, queries: _Side, keys: _Side, which, cut: bool):
  """(base-2 logits, MASKED where the key is not seen; their tanh if capped)."""
  slope = None if heads.slope is None else heads.slope[n]
  distance = lambda: queries.index - keys.index
  s, tanh = logits(product, static.scale, static.softcap, slope, distance)
  seen = visible(
    static.masks if cut else (), which, queries.position, keys.position, queries.segment,
    keys.segment, keys.in_row if cut else None,
  )  # fmt: skip
  return s if seen is None else jnp.where(seen, s, MASKED), tanh


def _product(a, b):
  """[m, n] of a [m, H] and b [n, H], in parts of H."""
  products = [_dot(x, y, trans_b=True) for x, y in zip(a, b, strict=True)]
  return sum(products[1:], products[0])


def _add_product(sums, a, b):
  """Adds a [m, n] times b [n, H] to sums [m, H], in parts of H."""
  return [total + _dot(a.astype(x.dtype), x) for total, x in zip(sums, b, strict=True)]


def _dot(a, b, *, trans_b: bool = False):
  # By default a GPU rounds float32 operands to TF32.
  return plgpu.dot(a, b, trans_b=trans_b, allow_tf32=False)


def _zeros(size: int, ref) -> list[jax.Array]:
  return [jnp.zeros((size, part.size), f32) for part in _parts(ref)]


def _loops(plans, which, block, body, carry):
  """`body(cut)(visited, carry)` over the visits of a block, first those that the mask cuts."""
  for cut, plan in zip((True, False), plans, strict=True):
    if plan is not None:
      step = body(cut)
      of = lambda v, plan=plan: v if plan.block is None else plan.block[which, v]
      one = lambda v, carry, step=step, of=of: step(of(v), carry)
      carry = jax.lax.fori_loop(plan.start[which, block], plan.end[which, block], one, carry)
  return carry


def _place(heads: int) -> tuple[Any, Any, Any]:
  """(row of the batch, head, block) of this program."""
  x = pl.program_id(0)
  return jax.lax.div(x, heads), jax.lax.rem(x, heads), pl.program_id(1)


def _which(static, mask_N, n):
  return mask_N[n] if len(static.masks) > 1 else 0


def _forward_kernel(static, blocks, plans, mask_N, heads, q_ids, kv_ids, *refs):
  q_ref, k_ref, v_ref, o_ref, lse_ref = refs
  T, N, S, K = *q_ref.shape[1:3], *k_ref.shape[1:3]
  b, n, i = _place(N)
  kv_head, which = jax.lax.div(n, N // K), _which(static, mask_N, n)
  run = _run(i, blocks.own, T)
  queries = _Side.of(run, q_ids, b, down=True)
  q = run.columns(q_ref, b, n)

  def body(cut):
    def step(j, carry):
      m, total, acc = carry
      visited = _run(j, blocks.visited, S)
      keys = _Side.of(visited, kv_ids, b, down=False)
      product = _product(q, visited.columns(k_ref, b, kv_head))
      s, _ = _tile_logits(static, heads, n, product, queries, keys, which, cut)
      m_next = jnp.maximum(m, jnp.max(s, axis=1))
      # Where nothing was visible yet, MASKED less anything but itself is 0 in powers of two.
      top = jnp.where(m_next == MASKED, 0.0, m_next)
      p = jnp.exp2(s - top[:, None])
      decay = jnp.exp2(m - top)
      acc = [x * decay[:, None] for x in acc]
      acc = _add_product(acc, p, visited.columns(v_ref, b, kv_head))
      return m_next, total * decay + jnp.sum(p, axis=1), acc

    return step

  m = jnp.full((blocks.own,), MASKED if heads.sink is None else heads.sink[n] * LOG2E, f32)
  total = jnp.full((blocks.own,), 0.0 if heads.sink is None else 1.0, f32)
  start = (m, total, _zeros(blocks.own, v_ref))
  m, total, acc = _loops(plans, which, i, body, start)
  seen = total > 0
  total = jnp.where(seen, total, 1.0)
  run.store(o_ref, b, n, [x / total[:, None] for x in acc])
  # Huge where nothing was seen: probabilities are then 0 in the backward pass.
  lse = jnp.where(seen, m + jnp.log2(total), -MASKED)
  plgpu.store(lse_ref.at[b, n, run.rows], lse, mask=run.in_row)


def _dq_kernel(static, blocks, plans, mask_N, heads, q_ids, kv_ids, *refs):
  q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dq_ref, *drow_ref = refs
  T, N, S, K = *q_ref.shape[1:3], *k_ref.shape[1:3]
  b, n, i = _place(N)
  kv_head, which = jax.lax.div(n, N // K), _which(static, mask_N, n)
  run = _run(i, blocks.own, T)
  queries = _Side.of(run, q_ids, b, down=True)
  q, do = run.columns(q_ref, b, n), run.columns(do_ref, b, n)
  lse, delta = (run.numbers(ref, b, n)[:, None] for ref in (lse_ref, delta_ref))

  def body(cut):
    def step(j, carry):
      dq, drow = carry
      visited = _run(j, blocks.visited, S)
      keys = _Side.of(visited, kv_ids, b, down=False)
      k = visited.columns(k_ref, b, kv_head)
      s, tanh = _tile_logits(static, heads, n, _product(q, k), queries, keys, which, cut)
      p = jnp.exp2(s - lse)
      ds = p * (_product(do, visited.columns(v_ref, b, kv_head)) - delta)
      if drow is not None:
        drow = drow - jnp.sum(ds * (queries.index - keys.index).astype(f32), axis=1)
      if tanh is not None:
        ds = ds * (1 - tanh * tanh)
      return _add_product(dq, ds, k), drow

    return step

  drow = jnp.zeros((blocks.own,), f32) if drow_ref else None
  dq, drow = _loops(plans, which, i, body, (_zeros(blocks.own, q_ref), drow))
  run.store(dq_ref, b, n, [x * static.scale for x in dq])
  if drow is not None:
    plgpu.store(drow_ref[0].at[b, n, run.rows], drow, mask=run.in_row)


def _dkv_kernel(static, blocks, plans, mask_N, heads, q_ids, kv_ids, *refs):
  """Keys go down, queries across: what is one number a query is then a row."""
  q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dk_ref, dv_ref = refs
  T, N, S, K = *q_ref.shape[1:3], *k_ref.shape[1:3]
  b, kv_head, j = _place(K)
  run = _run(j, blocks.own, S)
  keys = _Side.of(run, kv_ids, b, down=True)
  k, v = run.columns(k_ref, b, kv_head), run.columns(v_ref, b, kv_head)

  def head(g, carry):
    n = kv_head * (N // K) + g
    which = _which(static, mask_N, n)

    def body(cut):
      def step(i, carry):
        dk, dv = carry
        visited = _run(i, blocks.visited, T)
        queries = _Side.of(visited, q_ids, b, down=False)
        q, do = visited.columns(q_ref, b, n), visited.columns(do_ref, b, n)
        s, tanh = _tile_logits(static, heads, n, _product(k, q), queries, keys, which, cut)
        # Past the end of the row there is no query: its probabilities are 0.
        p = jnp.exp2(s - visited.numbers(lse_ref, b, n, other=-MASKED)[None])
        dv = _add_product(dv, p, do)
        ds = p * (_product(v, do) - visited.numbers(delta_ref, b, n)[None])
        if tanh is not None:
          ds = ds * (1 - tanh * tanh)
        return _add_product(dk, ds, q), dv

      return step

    return _loops(plans, which, j, body, carry)

  start = (_zeros(blocks.own, k_ref), _zeros(blocks.own, v_ref))
  dk, dv = jax.lax.fori_loop(0, N // K, head, start)
  run.store(dk_ref, b, kv_head, [x * static.scale for x in dk])
  run.store(dv_ref, b, kv_head, dv)


# ---- their calls ----


def _plans(static: _Static, blocks: _Blocks, own: int, visited: int, *, by_column: bool):
  """Of `own` and `visited` positions, the blocks that the mask cuts and the full ones."""
  sizes = (own, visited, blocks.own, blocks.visited)
  if by_column:
    sizes = (visited, own, blocks.visited, blocks.own)
  each = [block_kinds(mask, *sizes, static.order) for mask in static.masks or (None,)]

  def plan(kind) -> _Plan | None:
    shown = np.stack([(kinds.T if by_column else kinds) == kind for kinds in each])
    if not shown.any():
      return None
    count = shown.sum(2)
    first = shown.argmax(2)
    last = shown.shape[2] - 1 - shown[:, :, ::-1].argmax(2)
    if np.all((count == 0) | (last - first + 1 == count)):  # as in windows: no list to read
      start, block = first, None
    else:
      start = np.cumsum(count, axis=1) - count
      lists = [visits(one).column_V for one in shown]
      longest = max(x.size for x in lists)
      block = np.stack([np.pad(x, (0, longest - x.size)) for x in lists])
    as_i32 = partial(jnp.asarray, dtype=i32)
    return _Plan(as_i32(start), as_i32(start + count), None if block is None else as_i32(block))

  return plan(PARTIAL), plan(FULL)


def _call(kernel, name, static, operands, shapes, *, by_column: bool = False):
  """Runs a kernel; `operands` are (q, k, v, what else has rows), heads, q_ids, kv_ids, mask_N."""
  arrays, heads, q_ids, kv_ids, mask_N = operands
  q, k, v = arrays[:3]
  blocks = _blocks(q, v, backward=len(arrays) > 3)
  own, visited = (k, q) if by_column else (q, k)
  plans = _plans(static, blocks, own.shape[1], visited.shape[1], by_column=by_column)
  arguments = (plans, mask_N, heads, q_ids, kv_ids, *arrays)
  arguments = vary_with(arguments, arguments)
  call = pl.pallas_call(
    partial(kernel, static, blocks),
    name=name,
    out_shape=[varying_shape(shape, dtype, arguments[-1]) for shape, dtype in shapes],
    # The first axis of a grid may be longest.
    grid=(own.shape[0] * own.shape[2], pl.cdiv(own.shape[1], blocks.own)),
    compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=2),
  )
  return call(*arguments)


def _forward(static, arrays, *rest):
  """(o [B, T, N, U], log2-sum-exp [B, N, T])."""
  q, v = arrays[0], arrays[2]
  B, T, N, _ = q.shape
  shapes = ((B, T, N, v.shape[-1]), q.dtype), ((B, N, T), f32)
  return _call(_forward_kernel, "attention_forward", static, (arrays, *rest), shapes)


def _backward_queries(static, arrays, heads, *rest):
  """(dq, what the slope gains from each query [B, N, T] or None)."""
  q, lse = arrays[0], arrays[4]
  shapes = [(q.shape, q.dtype)] + [(lse.shape, f32)] * (heads.slope is not None)
  out = _call(_dq_kernel, "attention_dq", static, (arrays, heads, *rest), shapes)
  return (*out, None)[:2]


def _backward_keys(static, arrays, *rest):
  """(dk, dv)."""
  shapes = [(x.shape, x.dtype) for x in arrays[1:3]]
  return _call(_dkv_kernel, "attention_dkv", static, (arrays, *rest), shapes, by_column=True)
