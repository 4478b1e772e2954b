"""Attention over a cache as a Triton kernel for GPUs.

A program reads a part of the keys that one row and key head needs, so that few rows still occupy
the whole chip (flash-decoding); XLA joins the parts. Nothing here has been timed: sizes are the
usual ones.

Letters: B batch, T query tokens, N query heads, K key/value heads, G = N // K, H head size, U that
of values, S cached positions, P pages, R positions a page, J pages a row, L parts; in the kernel
M query rows of a key head (token by token), C positions in work at a time.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..attention.blocks import shown
from ..partition import vary_with, varying_shape
from .inputs import Inputs, Static, bounds, needed_pages

POSITIONS = 64
PROGRAMS = 2 * 132  # enough that each multiprocessor of an H100 has two
WARPS, STAGES = 4, 2

MASKED = -0.7 * float(np.finfo(np.float32).max)
LOG2E = float(np.log2(np.e))

f32, i32 = jnp.float32, jnp.int32


class _Heads(NamedTuple):
  """Of each query row of a key head [K, M]."""

  which: jax.Array | None
  slope: jax.Array | None


def supports(q_BTNH, k, v, inputs: Inputs) -> str | None:
  """Why a GPU can't run these arguments, or None."""
  for x in (q_BTNH, k, v):
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
      return f"arrays must be bfloat16, float16 or float32, not {x.dtype}"
    if x.shape[-1] not in (16, 32, 64, 128, 256):
      return f"head sizes must be powers of 2 from 16 to 256, not {x.shape[-1]}"
  rows = q_BTNH.shape[1] * q_BTNH.shape[2] // k.shape[2]
  if rows > 128:
    return f"tokens times query heads of a key head go up to 128, not {rows}"
  if inputs.page_table_BJ is not None and k.shape[1] % 16:
    return f"pages must have a multiple of 16 positions, not {k.shape[1]}"
  return None


def attention(
  static: Static, q_BTNH: jax.Array, k: jax.Array, v: jax.Array, inputs: Inputs
) -> jax.Array:
  """k and v are [B or more, S, K, .], or pages [P, R, K, .] if `inputs` has their table."""
  arrays = (q_BTNH, k, v, inputs)
  q_BTNH, k, v, inputs = vary_with(arrays, arrays)
  (B, T, N, H), K, U = q_BTNH.shape, k.shape[2], v.shape[-1]
  G, M = N // K, max(pl.next_power_of_2(T * (N // K)), 16)
  first_B, end_B = bounds(static.mask, inputs)
  C, S, table = POSITIONS, k.shape[1], None
  if inputs.page_table_BJ is not None:
    C, S = min(C, S & -S), S * inputs.page_table_BJ.shape[1]  # the power of 2 in a page
    table = needed_pages(inputs.page_table_BJ, k.shape[1], first_B, end_B)
  pad = lambda x, dim: jnp.pad(x, [(0, M - T * G if d == dim else 0) for d in range(x.ndim)])
  q = q_BTNH.astype(k.dtype).reshape(B, T, K, G, H).swapaxes(1, 2).reshape(B, K, T * G, H)
  position_BM = pad(jnp.repeat(inputs.q_positions_BT, G, axis=1), 1)
  by_row = lambda x_N: jnp.tile(x_N.reshape(K, G), T)
  maybe = lambda x_N: None if x_N is None else pad(by_row(x_N), 1)
  heads = _Heads(maybe(inputs.mask_N), maybe(inputs.slopes_N))
  parts = min(-(-PROGRAMS // (B * K)), -(-S // (4 * C)))
  o, m, total = pl.pallas_call(
    partial(_kernel, static, C),
    name="decode_attention",
    out_shape=(
      varying_shape((B, K, parts, M, U), f32, q_BTNH),
      varying_shape((B, K, parts, M), f32, q_BTNH),
      varying_shape((B, K, parts, M), f32, q_BTNH),
    ),
    grid=(B, K, parts),
    compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
  )(
    first_B, end_B, table, inputs.row_B, inputs.kv_positions_BS, position_BM, heads, pad(q, 2), k, v
  )
  sink = None if inputs.sink_N is None else by_row(inputs.sink_N)
  o = _joined(o[..., : T * G, :], m[..., : T * G], total[..., : T * G], sink)
  o_BTNU = o.reshape(B, K, T, G, U).swapaxes(1, 2).reshape(B, T, N, U)
  return o_BTNU.astype(q_BTNH.dtype)


def _joined(o_BKLMU, m_BKLM, total_BKLM, sink_KM):
  """[B, K, M, U] of parts that are not normalised."""
  m, total = m_BKLM, total_BKLM
  if sink_KM is not None:
    one = jnp.broadcast_to(sink_KM[None, :, None] * LOG2E, m[:, :, :1].shape)
    m = jnp.concatenate([m, one], axis=2)
    total = jnp.concatenate([total, jnp.ones_like(one)], axis=2)
  weight = jnp.exp2(m - jnp.max(m, axis=2, keepdims=True))
  o = jnp.sum(o_BKLMU * weight[:, :, : o_BKLMU.shape[2], :, None], axis=2)
  total = jnp.sum(total * weight, axis=2)[..., None]
  return o / jnp.where(total > 0, total, 1)


def _kernel(
  static, C, first_ref, end_ref, table_ref, row_ref, kv_position_ref, position_ref, heads, q_ref,
  k_ref, v_ref, o_ref, m_ref, total_ref,
):  # fmt: skip
  b, h, part = (pl.program_id(i) for i in range(3))
  M, U = position_ref.shape[1], v_ref.shape[-1]
  first, end = first_ref[b], end_ref[b]
  begin = jax.lax.div(first, C)
  blocks = jax.lax.div(end + C - 1, C) - begin
  each = jax.lax.div(blocks + pl.num_programs(2) - 1, pl.num_programs(2))
  q = q_ref[b, h]
  position = position_ref[b][:, None]
  which, slope = (None if x is None else x[h][:, None] for x in heads)

  def step(n, carry):
    m, total, acc = carry
    start = (begin + n) * C
    place = (b if row_ref is None else row_ref[b], start)
    if table_ref is not None:
      R = k_ref.shape[1]
      place = (table_ref[b, jax.lax.div(start, R)], jax.lax.rem(start, R))
    j = start + jnp.arange(C, dtype=i32)
    kept = (j >= first) & (j < end)
    here = (place[0], pl.ds(place[1], C), h)
    load = lambda ref: plgpu.load(ref.at[here], mask=kept[:, None], other=0.0)
    if kv_position_ref is not None:
      j = plgpu.load(kv_position_ref.at[b, pl.ds(start, C)], mask=kept, other=-1)
      kept = kept & (j >= 0)
    s = _logits(static, _dot(q, load(k_ref), trans_b=True), position, j[None], slope)
    seen = kept[None]
    if static.mask is not None:
      seen = seen & shown(static.mask.distinct, which, position, j[None])
    s = jnp.where(seen, s, MASKED)
    m_next = jnp.maximum(m, jnp.max(s, axis=1))
    # Where nothing was visible yet, MASKED less anything but itself is 0 in powers of two.
    top = jnp.where(m_next == MASKED, 0.0, m_next)
    p = jnp.exp2(s - top[:, None])
    decay = jnp.exp2(m - top)
    v = load(v_ref)
    acc = acc * decay[:, None] + _dot(p.astype(v.dtype), v)
    return m_next, total * decay + jnp.sum(p, axis=1), acc

  start = jnp.full((M,), MASKED, f32), jnp.zeros((M,), f32), jnp.zeros((M, U), f32)
  low = part * each
  m, total, acc = jax.lax.fori_loop(low, jnp.minimum(low + each, blocks), step, start)
  o_ref[b, h, part] = acc
  m_ref[b, h, part] = m
  total_ref[b, h, part] = total


def _logits(static: Static, products, i, j, slope) -> Any:
  """In powers of two."""
  if static.softcap is not None:
    s = jnp.tanh(products * (static.scale / static.softcap)) * (static.softcap * LOG2E)
  else:
    s = products * (static.scale * LOG2E)
  return s if slope is None else s - (slope * LOG2E) * (i - j).astype(f32)


def _dot(a, b, *, trans_b: bool = False):
  # By default a GPU rounds float32 operands to TF32.
  return plgpu.dot(a, b, trans_b=trans_b, allow_tf32=False)
