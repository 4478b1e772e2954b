"""What the two implementations for GPUs share: arguments, derivatives and what a program visits.

Letters: B batch, T query positions, S key positions, N query heads, K key/value heads, H head size
of queries and keys, U that of values, L distinct masks, V visits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from .bias import Alibi
from .blocks import FULL, PARTIAL, Order, block_kinds, masks_of, visits
from .tiles import (
  LOG2E,
  MASKED,
  Heads,
  Ids,
  logits,
  natural,
  needs_positions,
  sink_gradient,
  spread,
  visible,
)

PART = 16  # the smallest side of a product of blocks

f32, i32 = jnp.float32, jnp.int32


class Static(NamedTuple):
  mask: Any
  scale: float
  softcap: float | None
  order: Order
  T: int  # a kernel's arrays may be longer
  S: int

  @property
  def masks(self) -> tuple[Any, ...]:
    return masks_of(self.mask)

  def which(self, mask_N, n) -> Any:
    """The number of head n's mask."""
    return mask_N[n] if len(self.masks) > 1 else 0


def supports(q_BTNH, k_BSKH, v_BSKU, bias, order: Order, dtypes: tuple[Any, ...]) -> str | None:
  """Why kernels for these dtypes can't run these arguments, or None."""
  if order == "any":
    return "the keys must be those of the queries' own row"
  if bias is not None and not isinstance(bias, Alibi):
    return f"of the biases only Alibi is computed in the kernel, not {type(bias).__name__}"
  if q_BTNH.dtype not in dtypes:
    names = " or ".join(jnp.dtype(x).name for x in dtypes)
    return f"arrays must be {names}, not {q_BTNH.dtype}"
  if not q_BTNH.dtype == k_BSKH.dtype == v_BSKU.dtype:
    return f"q, k and v need one dtype, not {q_BTNH.dtype}, {k_BSKH.dtype} and {v_BSKU.dtype}"
  for x in (q_BTNH, v_BSKU):
    if x.shape[-1] % PART or x.shape[-1] > 256:
      return f"head sizes must be multiples of {PART} up to 256, not {x.shape[-1]}"
  return None


def of_kernels(forward: Callable, backward_queries: Callable, backward_keys: Callable) -> Callable:
  """The `attention` of an implementation.

  Args:
    forward: of (static, (q, k, v), heads, q_ids, kv_ids, mask_N), gives (o [B, T, N, U],
      log2-sum-exp [B, N, T]).
    backward_queries: of (static, (q, k, v, do, lse, delta), ...), gives (dq, what the slope gains
      from each query [B, N, T] or None).
    backward_keys: of the same, gives (dk, dv).
  """

  @partial(jax.custom_vjp, nondiff_argnums=(0,))
  def attend(static, q, k, v, heads, q_ids, kv_ids, mask_N):
    return forward(static, (q, k, v), heads, q_ids, kv_ids, mask_N)

  def keeping(static, q, k, v, heads, q_ids, kv_ids, mask_N):
    o, lse = forward(static, (q, k, v), heads, q_ids, kv_ids, mask_N)
    o, lse = checkpoint_name(o, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (o, lse), (q, k, v, heads, q_ids, kv_ids, mask_N, o, lse)

  def back(static, saved, given):
    do, dlse = given
    q, k, v, heads, q_ids, kv_ids, mask_N, o, lse = saved
    delta = jnp.sum(do.astype(f32) * o.astype(f32), axis=-1).swapaxes(1, 2) - LOG2E * dlse
    arrays, rest = (q, k, v, do, lse, delta), (heads, q_ids, kv_ids, mask_N)
    dq, drow = backward_queries(static, arrays, *rest)
    dk, dv = backward_keys(static, arrays, *rest)
    dsink = None if heads.sink is None else sink_gradient(heads.sink, lse, delta)
    dslope = None if drow is None else jnp.sum(drow, axis=(0, 2))
    return dq, dk, dv, Heads(dsink, dslope), None, None, None

  attend.defvjp(keeping, back)

  def attention(
    q_BTNH, k_BSKH, v_BSKU, q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS, bias,
    sink_N, mask_N, *, mask, scale, softcap, order,
  ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Arguments as in the package, where None stands for a default; see there."""
    del kv_positions_BS
    B, T, N, _ = q_BTNH.shape
    static = Static(mask, scale, softcap, order, T, k_BSKH.shape[1])
    positions_BT = None
    if needs_positions(static.masks, order):
      positions_BT = jnp.broadcast_to(q_positions_BT, (B, T))
    q_ids, kv_ids = Ids(positions_BT, q_segments_BT), Ids(positions_BT, kv_segments_BS)
    as_f32 = lambda x: None if x is None else x.astype(f32)
    heads = Heads(as_f32(sink_N), None if bias is None else as_f32(bias.slopes_N))
    mask_N = jnp.zeros(N, i32) if mask_N is None else mask_N
    o_BTNU, lse_BNT = attend(static, q_BTNH, k_BSKH, v_BSKU, heads, q_ids, kv_ids, mask_N)
    return o_BTNU, natural(lse_BNT).swapaxes(1, 2)

  return attention


class Side(NamedTuple):
  """A block of queries or of keys, as a column or a row of a tile."""

  position: Any
  segment: Any  # or None
  index: Any
  in_row: Any  # where indices are those of the row, None if all are


def tile_logits(
  static: Static, heads: Heads, n, product, queries: Side, keys: Side, which, cut: bool
) -> tuple[jax.Array, jax.Array | None]:
  """(base-2 logits, MASKED where the key is not seen; their tanh if capped).

  Args:
    cut: whether the mask or the end of the row cuts this tile.
  """
  slope = None if heads.slope is None else heads.slope[n]
  distance = lambda: queries.index - keys.index
  s, tanh = logits(product, static.scale, static.softcap, slope, distance)
  seen = visible(
    static.masks if cut else (), which, queries.position, keys.position, queries.segment,
    keys.segment, keys.in_row if cut else None,
  )  # fmt: skip
  return s if seen is None else jnp.where(spread(seen), s, MASKED), tanh


class Plan(NamedTuple):
  """Blocks to visit, by mask: for block n those of number start[n] .. end[n], or `block` of it."""

  start: jax.Array  # int32 [L, blocks]
  end: jax.Array
  block: jax.Array | None  # int32 [L, V]; None where each run of numbers has no gaps


def plans(
  static: Static, sizes: tuple[int, int], *, by_column: bool
) -> tuple[Plan | None, Plan | None]:
  """The blocks that the mask cuts and those that are full; None where none are.

  Args:
    sizes: of the blocks that the programs own and of those that they visit.
    by_column: programs own keys, not queries.
  """
  sizes = sizes[::-1] if by_column else sizes
  each = [block_kinds(mask, static.T, static.S, *sizes, static.order) for mask in static.masks]

  def plan(kind) -> Plan | None:
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
    as_i32 = lambda x: jnp.asarray(x, jnp.int32)
    return Plan(as_i32(start), as_i32(start + count), None if block is None else as_i32(block))

  return plan(PARTIAL), plan(FULL)
