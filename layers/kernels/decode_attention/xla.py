"""Attention over a cache on any platform: a loop over blocks of the keys that rows can see.

In each step every row reads its own next block, so that a step costs the same wherever in the cache
rows stand, and the number of steps follows the longest stretch that one row sees: its length or its
window, not S. A running maximum and sum join the steps (FlashAttention, arXiv 2205.14135). A cache
of one block, or one that is cut along S over devices, is read whole in one step: then a compiler
partitions two products and some sums, where slices at places of its own for each row would gather
the cache.

Letters: B batch, T query tokens, N query heads, K key/value heads, G = N // K, H head size, U that
of values, S cached positions (in a block: of it), P pages, R positions a page, J pages a row.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..attention.blocks import shown
from ..partition import vary_with
from .inputs import Inputs, Static, bounds, needed_pages

BLOCK = 512  # positions a step

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite: differences of it are not NaN

f32 = jnp.float32


class _Block(NamedTuple):
  """Of each row's cache."""

  k_BSKH: jax.Array
  v_BSKU: jax.Array
  index_BS: jax.Array  # of its entries in the cache
  positions_BS: jax.Array


# begin [B] -> entries from there on, and at the cache's end also some from before.
_Read = Callable[[jax.Array], _Block]


def attention(
  static: Static,
  q_BTNH: jax.Array,
  k: jax.Array,
  v: jax.Array,
  inputs: Inputs,
  *,
  seq_sharded: bool = False,
) -> jax.Array:
  """k and v are [B or more, S, K, .], or pages [P, R, K, .] if `inputs` has their table."""
  (B, T, N, H), K = q_BTNH.shape, k.shape[2]
  first_B, end_B = bounds(static.mask, inputs)
  q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).astype(k.dtype)
  by_head = lambda x: None if x is None else x.reshape(1, K, N // K, 1, 1)
  heads = {"slopes": by_head(inputs.slopes_N), "which": by_head(inputs.mask_N)}
  shape = (*q_BKGTH.shape[:4], 1)
  if (sink := by_head(inputs.sink_N)) is None:
    m, total = jnp.full(shape, MASKED, f32), jnp.zeros(shape, f32)
  else:
    m, total = jnp.broadcast_to(sink, shape), jnp.ones(shape, f32)
  acc = jnp.zeros((*shape[:4], v.shape[-1]), f32)
  carry = vary_with(q_BTNH, (m, total, acc))
  step = partial(_step, static, q_BKGTH, inputs.q_positions_BT, (first_B, end_B), **heads)

  if inputs.page_table_BJ is not None:
    block, read = _pages(k, v, needed_pages(inputs.page_table_BJ, k.shape[1], first_B, end_B))
  else:
    block = k.shape[1] if seq_sharded else min(BLOCK, k.shape[1])
    read = partial(_slice, k, v, inputs.row_B, inputs.kv_positions_BS, block)
  begin_B = first_B // block * block
  if inputs.page_table_BJ is None and block == k.shape[1]:
    _, total, acc = step(begin_B, read(begin_B), carry)
  else:
    steps = jnp.max(-(-(end_B - begin_B) // block), initial=0)
    body = lambda n, carry: step(begin_B + n * block, read(begin_B + n * block), carry)
    _, total, acc = jax.lax.fori_loop(0, steps, body, carry)
  o_BKGTU = acc / jnp.where(total > 0, total, 1)
  return o_BKGTU.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1).astype(q_BTNH.dtype)


def _step(static, q_BKGTH, q_positions_BT, need, begin_B, block: _Block, carry, *, slopes, which):
  """(m, total, acc) after the block from `begin_B`; `need` are the `bounds`."""
  m_before, total, acc = carry
  k_BSKH, v_BSKU, index_BS, kv_positions_BS = block
  first_B, end_B = jnp.maximum(need[0], begin_B), need[1]
  kept_BS = (index_BS >= first_B[:, None]) & (index_BS < end_B[:, None]) & (kv_positions_BS >= 0)
  logits = static.scale * jnp.einsum(
    "bkgth,bskh->bkgts", q_BKGTH, k_BSKH, preferred_element_type=f32
  )
  if static.softcap is not None:
    logits = static.softcap * jnp.tanh(logits / static.softcap)
  i, j = q_positions_BT[:, None, None, :, None], kv_positions_BS[:, None, None, None, :]
  if slopes is not None:
    logits -= slopes * (i - j).astype(f32)
  seen = kept_BS[:, None, None, None]
  if static.mask is not None:
    seen = seen & shown(static.mask.distinct, which, i, j)
  m = jnp.maximum(m_before, jnp.max(jnp.where(seen, logits, MASKED), axis=-1, keepdims=True))
  p = jnp.where(seen, jnp.exp(logits - m), 0)
  decay = jnp.exp(m_before - m)
  total = total * decay + jnp.sum(p, axis=-1, keepdims=True)
  v_BSKU = jnp.where(kept_BS[:, :, None, None], v_BSKU, 0)  # what is not kept may be NaN
  mixed = jnp.einsum(
    "bkgts,bsku->bkgtu", p.astype(v_BSKU.dtype), v_BSKU, preferred_element_type=f32
  )
  return m, total, acc * decay + mixed


def _slice(k_BSKH, v_BSKU, row_B, kv_positions_BS, block, begin_B) -> _Block:
  B, S = begin_B.shape[0], k_BSKH.shape[1]
  start_B = jnp.minimum(begin_B, S - block)
  index_BS = start_B[:, None] + jnp.arange(block, dtype=jnp.int32)[None]
  if block == S:
    of_rows = lambda x: x
    take = lambda x: x if row_B is None else jax.lax.dynamic_slice_in_dim(x, row_B[0], B)
  else:
    one = lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, block)
    of_rows = lambda x: jax.vmap(one)(x, start_B)

    def in_stack(x):
      # As a matrix: with a single head the compiler would turn the stack, which copies it.
      flat = x.reshape(-1, x.shape[2] * x.shape[3])
      return jax.vmap(partial(one, flat))(row_B * S + start_B).reshape(B, block, *x.shape[2:])

    take = of_rows if row_B is None else in_stack
  positions_BS = index_BS if kv_positions_BS is None else of_rows(kv_positions_BS)
  return _Block(take(k_BSKH), take(v_BSKU), index_BS, positions_BS)


def _pages(k_PRKH, v_PRKU, table_BJ) -> tuple[int, _Read]:
  """(positions of a block, which is as many pages as fit, how to read one)."""
  R, (B, J) = k_PRKH.shape[1], table_BJ.shape
  count = min(max(BLOCK // R, 1), J)

  def read(begin_B):
    page_BJ = begin_B[:, None] // R + jnp.arange(count, dtype=jnp.int32)[None]
    index_BS = begin_B[:, None] + jnp.arange(count * R, dtype=jnp.int32)[None]
    # Beyond the table nothing is kept.
    page_BJ = jnp.take_along_axis(table_BJ, jnp.minimum(page_BJ, J - 1), axis=1)
    take = lambda x: x[page_BJ].reshape(B, -1, *x.shape[2:])
    return _Block(take(k_PRKH), take(v_PRKU), index_BS, index_BS)

  return count * R, read
