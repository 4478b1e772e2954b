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
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..partition import vary_with, varying_shape
from . import gpu
from .blocks import Order
from .tiles import LOG2E, MASKED, Ids

f32, i32 = jnp.float32, jnp.int32


class _Blocks(NamedTuple):
  """Positions that a program owns, those that it visits at a time, and its warps."""

  own: int
  visited: int
  warps: int


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
  dtypes = jnp.bfloat16, jnp.float16, f32
  return gpu.supports(q_BTNH, k_BSKH, v_BSKU, bias, order, dtypes)


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


def _side(run: _Run, ids: Ids, b, *, down: bool) -> gpu.Side:
  position, segment = (None if ref is None else run.numbers(ref, b) for ref in ids)
  turn = lambda x: None if x is None else x[:, None] if down else x[None]
  position = run.index if position is None else position
  return gpu.Side(*map(turn, (position, segment, run.index, run.in_row)))


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


def _forward_kernel(static, blocks, plans, mask_N, heads, q_ids, kv_ids, *refs):
  q_ref, k_ref, v_ref, o_ref, lse_ref = refs
  T, N, S, K = *q_ref.shape[1:3], *k_ref.shape[1:3]
  b, n, i = _place(N)
  kv_head, which = jax.lax.div(n, N // K), static.which(mask_N, n)
  run = _run(i, blocks.own, T)
  queries = _side(run, q_ids, b, down=True)
  q = run.columns(q_ref, b, n)

  def body(cut):
    def step(j, carry):
      m, total, acc = carry
      visited = _run(j, blocks.visited, S)
      keys = _side(visited, kv_ids, b, down=False)
      product = _product(q, visited.columns(k_ref, b, kv_head))
      s, _ = gpu.tile_logits(static, heads, n, product, queries, keys, which, cut)
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
  kv_head, which = jax.lax.div(n, N // K), static.which(mask_N, n)
  run = _run(i, blocks.own, T)
  queries = _side(run, q_ids, b, down=True)
  q, do = run.columns(q_ref, b, n), run.columns(do_ref, b, n)
  lse, delta = (run.numbers(ref, b, n)[:, None] for ref in (lse_ref, delta_ref))

  def body(cut):
    def step(j, carry):
      dq, drow = carry
      visited = _run(j, blocks.visited, S)
      keys = _side(visited, kv_ids, b, down=False)
      k = visited.columns(k_ref, b, kv_head)
      s, tanh = gpu.tile_logits(static, heads, n, _product(q, k), queries, keys, which, cut)
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
  keys = _side(run, kv_ids, b, down=True)
  k, v = run.columns(k_ref, b, kv_head), run.columns(v_ref, b, kv_head)

  def head(g, carry):
    n = kv_head * (N // K) + g
    which = static.which(mask_N, n)

    def body(cut):
      def step(i, carry):
        dk, dv = carry
        visited = _run(i, blocks.visited, T)
        queries = _side(visited, q_ids, b, down=False)
        q, do = visited.columns(q_ref, b, n), visited.columns(do_ref, b, n)
        s, tanh = gpu.tile_logits(static, heads, n, _product(k, q), queries, keys, which, cut)
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


def _call(kernel, name, static, operands, shapes, *, by_column: bool = False):
  """Runs a kernel; `operands` are (q, k, v, what else has rows), heads, q_ids, kv_ids, mask_N."""
  arrays, heads, q_ids, kv_ids, mask_N = operands
  q, k, v = arrays[:3]
  blocks = _blocks(q, v, backward=len(arrays) > 3)
  own = k if by_column else q
  plans = gpu.plans(static, (blocks.own, blocks.visited), by_column=by_column)
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


attention = gpu.of_kernels(_forward, _backward_queries, _backward_keys)
