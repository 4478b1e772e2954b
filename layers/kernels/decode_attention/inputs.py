"""What every implementation gets beside queries, keys and values, and what they must read of it.

Letters: B batch, T query tokens, S cached positions, J pages a row, N query heads.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..attention.blocks import reach_of


class Static(NamedTuple):
  mask: Any
  scale: float
  softcap: float | None


class Inputs(NamedTuple):
  """Arrays of a call; integers are int32, sinks and slopes float32."""

  q_positions_BT: jax.Array
  lengths_B: jax.Array
  kv_positions_BS: jax.Array | None  # None: entry s holds position s
  page_table_BJ: jax.Array | None  # None: the cache of a row is one piece
  sink_N: jax.Array | None
  slopes_N: jax.Array | None
  mask_N: jax.Array | None  # which of the distinct masks each head has
  row_B: jax.Array | None = (
    None  # where in k and v the cache of each row is; None: there are no others
  )


def bounds(mask: Any, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
  """(first, end), int32 [B]: entries outside first..end - 1 are seen by no query of the row.

  Both are 0 for a row that sees nothing. By the mask's reach where entries are in the order of
  positions, else by the lengths alone.
  """
  first_B, end_B = jnp.zeros_like(inputs.lengths_B), inputs.lengths_B
  if mask is not None and inputs.kv_positions_BS is None:
    before, after = reach_of(mask)
    if before is not None:
      first_B = jnp.maximum(jnp.min(inputs.q_positions_BT, axis=1) - before, 0)
    if after is not None:
      end_B = jnp.minimum(end_B, jnp.max(inputs.q_positions_BT, axis=1) + after + 1)
  some_B = first_B < end_B
  return jnp.where(some_B, first_B, 0), jnp.where(some_B, end_B, 0)


def needed_pages(
  page_table_BJ: jax.Array, page: int, first_B: jax.Array, end_B: jax.Array
) -> jax.Array:
  """The table with page 0 in entries whose `page` positions hold none of first_B..end_B - 1."""
  start_1J = (page * jnp.arange(page_table_BJ.shape[1], dtype=jnp.int32))[None]
  needed_BJ = (start_1J < end_B[:, None]) & (start_1J + page > first_B[:, None])
  return jnp.where(needed_BJ, page_table_BJ, 0)
