"""Grouped matrix products as Triton kernels for GPUs.

A program multiplies a block of rows of one group by a block of its weights. Blocks start where
their group starts and masks end them where it ends, so that a group wastes less than one block.
Nothing here has been timed: the block sizes are the usual ones for Hopper.

Letters: R rows, D and F widths, E groups, G = E + 1 with the rows of no group, V blocks of rows;
in a kernel M rows, K of the contracted dim, N columns.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..partition import vary_with, varying_shape

M, N, K = 128, 128, 64
WIDTH = 128  # both widths are multiples
WARPS = 8
SHARED = 200 * 2**10  # bytes of shared memory for operands that are on their way

f32, i32 = jnp.float32, jnp.int32


def supports(x_RD: jax.Array, w_EDF: jax.Array, platform: str) -> str | None:
  """Why these arguments can't run on `platform`, or None."""
  if platform not in ("gpu", "cuda"):
    return f"the kernel is for GPUs, not for {platform}"
  if x_RD.dtype not in (jnp.bfloat16, jnp.float32):
    return f"rows must be bfloat16 or float32, not {x_RD.dtype}"
  if w_EDF.shape[1] % WIDTH or w_EDF.shape[2] % WIDTH:
    return f"both widths must be multiples of {WIDTH}, got {w_EDF.shape[1:]}"
  return None


def outer(x_RD: jax.Array, dy_RF: jax.Array, group_sizes_E: jax.Array, *, dtype: Any) -> jax.Array:
  """[E, D, F] in `dtype`: the sum over each group's rows of x^T dy; zeros for empty groups."""
  operands = (x_RD, dy_RF, group_sizes_E)
  x_RD, dy_RF, group_sizes_E = vary_with(operands, operands)
  (R, D), F, (E,) = x_RD.shape, dy_RF.shape[1], group_sizes_E.shape
  if R == 0:
    return vary_with(x_RD, jnp.zeros((E, D, F), dtype))
  call = pl.pallas_call(
    _outer_kernel,
    name="grouped_matmul_outer",
    out_shape=varying_shape((E, D, F), dtype, x_RD),
    grid=(F // N, D // M, E),
    compiler_params=_params(x_RD, 1),
  )
  return call(_starts(group_sizes_E, R), x_RD, dy_RF)


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
  (R, _), F, (E,) = x_RD.shape, ws[0].shape[1 if transposed else 2], group_sizes_E.shape
  outputs = 2 * len(ws) - 1
  if R == 0:
    return (vary_with(x_RD, jnp.zeros((R, F), x_RD.dtype)),) * outputs
  # At most so many: each group, and the rows of none, has one block that is not full.
  blocks = -(-R // M) + E + 1
  call = pl.pallas_call(
    partial(_row_kernel, transposed, finish, len(ws)),
    name="grouped_matmul_gated" if len(ws) > 1 else "grouped_matmul_product",
    out_shape=(varying_shape((R, F), x_RD.dtype, x_RD),) * outputs,
    grid=(F // N, blocks),
    compiler_params=_params(x_RD, len(ws)),
  )
  start_G = _starts(group_sizes_E, R)
  return tuple(call(start_G, *_blocks(start_G, R, blocks), x_RD, *ws))


def _params(x_RD: jax.Array, weights: int) -> plgpu.CompilerParams:
  stage = (M + weights * N) * K * x_RD.dtype.itemsize
  return plgpu.CompilerParams(num_warps=WARPS, num_stages=min(3, SHARED // stage))


def _starts(group_sizes_E: jax.Array, rows: int) -> jax.Array:
  """[G], int32: where each group starts, and where the last one ends."""
  return jnp.minimum(jnp.pad(jnp.cumsum(group_sizes_E), (1, 0)), rows).astype(i32)


def _blocks(start_G: jax.Array, rows: int, blocks: int) -> tuple[jax.Array, jax.Array]:
  """(group, first row) of each block of rows, int32; past the last, blocks beyond all rows."""
  end_G = jnp.append(start_G[1:], rows)
  count_G = -(-(end_G - start_G) // M)
  begin_G = jnp.cumsum(count_G) - count_G
  v_V = jnp.arange(blocks, dtype=i32)
  # Empty groups begin where the next one does: the last that has begun is the one with rows.
  group_V = jnp.sum(begin_G[None] <= v_V[:, None], axis=1, dtype=i32) - 1
  return group_V, (start_G[group_V] + (v_V - begin_G[group_V]) * M).astype(i32)


def _row_kernel(transposed, finish, weights, start_ref, group_ref, first_ref, x_ref, *refs):
  w_refs, out_refs = refs[:weights], refs[weights:]
  v = pl.program_id(1)
  group, first = group_ref[v], first_ref[v]
  E, R, D = start_ref.shape[0] - 1, *x_ref.shape
  # Rows of no group are stored as the zeros that the sums start with.
  none = group == E
  end = jnp.where(none, R, start_ref[jnp.minimum(group + 1, E)])
  keep_M = first + jnp.arange(M, dtype=i32) < end
  rows, columns = pl.ds(first, M), pl.ds(pl.program_id(0) * N, N)
  w_group = jnp.minimum(group, E - 1)

  def step(i, sums):
    inner = pl.ds(i * K, K)
    x = plgpu.load(x_ref.at[rows, inner], mask=keep_M[:, None], other=0.0)
    at = (w_group, columns, inner) if transposed else (w_group, inner, columns)
    return tuple(
      total + _dot(x, plgpu.load(w_ref.at[at]), trans_b=transposed)
      for total, w_ref in zip(sums, w_refs, strict=True)
    )

  zeros = (jnp.zeros((M, N), f32),) * weights
  sums = jax.lax.fori_loop(0, jnp.where(none, 0, D // K), step, zeros)
  values = finish(*sums)
  for out_ref, value in zip(out_refs, values, strict=True):
    # An activation of zeros need not be zero.
    value = jnp.where(none, 0.0, value)
    plgpu.store(out_ref.at[rows, columns], value.astype(out_ref.dtype), mask=keep_M[:, None])


def _outer_kernel(start_ref, x_ref, dy_ref, out_ref):
  group = pl.program_id(2)
  first, end = start_ref[group], start_ref[group + 1]
  d, f = pl.ds(pl.program_id(1) * M, M), pl.ds(pl.program_id(0) * N, N)

  def step(i, total):
    begin = first + i * K
    rows = pl.ds(begin, K)
    keep = (begin + jnp.arange(K, dtype=i32) < end)[:, None]
    x = plgpu.load(x_ref.at[rows, d], mask=keep, other=0.0)
    dy = plgpu.load(dy_ref.at[rows, f], mask=keep, other=0.0)
    return total + _dot(x, dy, trans_a=True)

  steps = jax.lax.div(end - first + K - 1, K)
  total = jax.lax.fori_loop(0, steps, step, jnp.zeros((M, N), f32))
  plgpu.store(out_ref.at[group, d, f], total.astype(out_ref.dtype))


def _dot(a, b, *, trans_a: bool = False, trans_b: bool = False):
  # By default a GPU rounds float32 operands to TF32.
  return plgpu.dot(a, b, trans_a=trans_a, trans_b=trans_b, allow_tf32=False)
