"""Any platform: one batched product over the first rows of every group, then a loop over the rest.

The first tile of each group, a little more than the mean group, lies in one static product
[E, A, D] x [E, D, F], as fast as the platform multiplies and without a copy of any weight. Rows
that a fuller group has beyond it follow in small tiles, as many as there are when the loop runs.
Work: at most 1.15 times the rows plus small tiles for balanced groups; the rows twice at worst.

R rows sorted by expert, E experts, A rows of a first tile, D contracted width, F width of the
result, I small tiles.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..partition import vary_with

# Below this many rows XLA's CPU product takes twice the time if it must read the weights
# transposed; then the weights come first and the result is turned.
_FEW_ROWS = 64


class Plan(NamedTuple):
  """Which rows are multiplied where. An index of R means no row."""

  row_EA: jax.Array  # the rows of the first tiles
  place_R: jax.Array  # where in them each row lies; E * A where it does not
  expert_I: jax.Array  # of each small tile
  start_I: jax.Array  # its first row
  rows_I: jax.Array  # how many of its rows are its own
  count: jax.Array  # small tiles in use; the arrays have room for the worst case
  size: int  # rows of a small tile


def first_rows(num_rows: int, num_experts: int) -> int:
  """Rows of a first tile: an eighth more than the mean group, and four."""
  return min(-(-(num_rows * 9 // 8 // num_experts + 4) // 8) * 8, num_rows)


def make_plan(group_sizes_E: jax.Array, num_rows: int) -> Plan:
  """Cuts groups into first tiles and small ones."""
  E = group_sizes_E.shape[0]
  A = first_rows(num_rows, E)
  size = min(max(1 << max(A // 4, 1).bit_length(), 16), 128)
  end_E = jnp.cumsum(group_sizes_E)
  start_E = end_E - group_sizes_E
  step_EA = jnp.broadcast_to(jnp.arange(A, dtype=jnp.int32), (E, A))
  row_EA = jnp.where(step_EA < group_sizes_E[:, None], start_E[:, None] + step_EA, num_rows)

  left_E = jnp.maximum(group_sizes_E - A, 0)
  tiles_E = -(-left_E // size)
  last_E = jnp.cumsum(tiles_E)
  tile_I = jnp.arange(max(num_rows - A, 0) // size + E, dtype=jnp.int32)
  expert_I = _owner(last_E, tile_I)
  done_I = A + (tile_I - (last_E - tiles_E)[expert_I]) * size
  rows_I = jnp.clip(group_sizes_E[expert_I] - done_I, 0, size)

  row_R = jnp.arange(num_rows, dtype=jnp.int32)
  expert_R = _owner(end_E, row_R)
  step_R = row_R - start_E[expert_R]
  inside_R = (step_R < A) & (row_R < end_E[-1])
  place_R = jnp.where(inside_R, expert_R * A + step_R, E * A)
  return Plan(row_EA, place_R, expert_I, start_E[expert_I] + done_I, rows_I, last_E[-1], size)


def _owner(end_E: jax.Array, index_I: jax.Array) -> jax.Array:
  """The group in which each index lies; the last one beyond all."""
  found_I = jnp.searchsorted(end_E, index_I, side="right", method="compare_all")
  return jnp.minimum(found_I, end_E.shape[0] - 1).astype(jnp.int32)


def row_products(
  x_RD: jax.Array,
  ws: tuple[jax.Array, ...],
  group_sizes_E: jax.Array,
  finish: Callable[..., tuple[jax.Array, ...]],
  *,
  transposed: bool = False,
) -> tuple[jax.Array, ...]:
  """[R, F] each, rounded: `finish` of the float32 products of x with each of `ws`."""

  def multiply(x, weights):
    return finish(*(_dot(x, w, 1 if transposed else 0) for w in weights))

  R = x_RD.shape[0]
  plan = make_plan(group_sizes_E, R)
  E, A = plan.row_EA.shape
  first = [y.astype(x_RD.dtype) for y in multiply(_take(x_RD, plan.row_EA), ws)]
  ys = [_take(y.reshape(E * A, -1), plan.place_R) for y in first]
  ys = [_with_room(y, plan) for y in ys]
  x_RD = _with_room(x_RD, plan)

  def tile(i, ys):
    news = multiply(_tile(x_RD, plan, i), [_at(w, plan.expert_I[i]) for w in ws])
    mine_A1 = _mine(plan, i)

    def put(y, new):
      old = lax.dynamic_slice_in_dim(y, plan.start_I[i], plan.size)
      both = jnp.where(mine_A1, new.astype(y.dtype), old)
      return lax.dynamic_update_slice_in_dim(y, both, plan.start_I[i], 0)

    return [put(y, new) for y, new in zip(ys, news, strict=True)]

  ys = lax.fori_loop(0, plan.count, tile, vary_with((x_RD, ws, group_sizes_E), ys))
  return tuple(y[:R] for y in ys)


def outer(x_RD: jax.Array, dy_RF: jax.Array, group_sizes_E: jax.Array, *, dtype) -> jax.Array:
  """Sum over the rows of each group of x^T dy."""
  plan = make_plan(group_sizes_E, x_RD.shape[0])
  first = (_take(x_RD, plan.row_EA), _take(dy_RF, plan.row_EA))
  dims = (((1,), (1,)), ((0,), (0,)))
  dw_EDF = lax.dot_general(*first, dims, preferred_element_type=jnp.float32)
  x_RD, dy_RF = _with_room(x_RD, plan), _with_room(dy_RF, plan)

  def tile(i, dw_EDF):
    pair = _tile(x_RD, plan, i), _tile(dy_RF, plan, i)
    dims = (((0,), (0,)), ((), ()))
    dw_DF = lax.dot_general(*pair, dims, preferred_element_type=jnp.float32)
    expert = plan.expert_I[i]
    return lax.dynamic_update_index_in_dim(dw_EDF, _at(dw_EDF, expert) + dw_DF, expert, 0)

  return lax.fori_loop(0, plan.count, tile, dw_EDF).astype(dtype)


def _dot(x: jax.Array, w: jax.Array, columns: int) -> jax.Array:
  """[rows, D] times [D, F], or a batch of both; `columns` is where w has D."""
  batch = tuple(range(x.ndim - 2))
  into, out = (x.ndim - 1,), (len(batch) + columns,)
  dot = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
  if columns and batch and x.shape[-2] <= _FEW_ROWS:
    y_EDA = lax.optimization_barrier(dot(w, x, ((out, into), (batch, batch))))
    return jnp.swapaxes(y_EDA, 1, 2)
  return dot(x, w, ((into, out), (batch, batch)))


def _take(x_RD: jax.Array, row: jax.Array) -> jax.Array:
  """Rows of x; zeros where there is none."""
  return x_RD.at[row].get(mode="fill", fill_value=0)


def _with_room(x_RD: jax.Array, plan: Plan) -> jax.Array:
  """For a small tile that starts at the last row."""
  return jnp.pad(x_RD, ((0, plan.size), (0, 0)))


def _mine(plan: Plan, i: jax.Array) -> jax.Array:
  return jnp.arange(plan.size)[:, None] < plan.rows_I[i]


def _tile(x_RD: jax.Array, plan: Plan, i: jax.Array) -> jax.Array:
  """The rows of small tile i, zeros where another group's begin."""
  rows = lax.dynamic_slice_in_dim(x_RD, plan.start_I[i], plan.size)
  return jnp.where(_mine(plan, i), rows, 0)


def _at(w_EDF: jax.Array, expert: jax.Array) -> jax.Array:
  return lax.dynamic_index_in_dim(w_EDF, expert, keepdims=False)
