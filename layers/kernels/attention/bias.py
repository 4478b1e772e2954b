"""Terms added to attention logits: ALiBi, T5's distance buckets, Transformer-XL's relative keys.

Each is a pytree of arrays that attention differentiates. Distance is query minus key position.

Letters: B batch, T query positions, S key positions, N query heads, H head size, U buckets,
P distances, W distances that occur between a run of queries and a run of keys.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

f32 = jnp.float32


@partial(jax.tree_util.register_dataclass, data_fields=["slopes_N"], meta_fields=[])
@dataclass(frozen=True)
class Alibi:
  """`-slope * distance` (arXiv 2108.12409)."""

  slopes_N: jax.Array


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["table_UN"],
  meta_fields=["max_distance", "bidirectional"],
)
@dataclass(frozen=True)
class Bucketed:
  """A learned value for each head and `bucket` of the distance (T5, arXiv 1910.10683)."""

  table_UN: jax.Array
  max_distance: int = 128
  bidirectional: bool = False


@partial(jax.tree_util.register_dataclass, data_fields=["q_BTNH", "r_PNH"], meta_fields=[])
@dataclass(frozen=True)
class RelativeKeys:
  """`scale * q_i . r_(i - j)`, Transformer-XL's terms (b) and (d) (arXiv 1901.02860, section 3.3).

  `q_BTNH` is the query with the bias v already added; row d of `r_PNH` is the projected sinusoid
  of distance d. Distances outside 0..P-1 read the nearest row: a causal mask hides the negative
  ones, and P must exceed every distance that it leaves.
  """

  q_BTNH: jax.Array
  r_PNH: jax.Array


Bias = Alibi | Bucketed | RelativeKeys


def num_heads(bias: Bias) -> int:
  match bias:
    case Alibi():
      return bias.slopes_N.shape[-1]
    case Bucketed():
      return bias.table_UN.shape[-1]
    case RelativeKeys():
      return bias.r_PNH.shape[-2]


def bucket(
  distance: jax.Array | np.ndarray,
  num_buckets: int = 32,
  max_distance: int = 128,
  bidirectional: bool = False,
) -> jax.Array:
  """T5's bucket of each distance (query minus key position), int32.

  Half of the buckets hold one distance each; the other half grow logarithmically up to
  `max_distance` and the last takes all beyond. With `bidirectional` half of all buckets are for
  keys ahead of the query; otherwise those share bucket 0 (arXiv 1910.10683, section 2.1). The
  limits are exact integers, so no rounding of a logarithm moves one.
  """
  table = jnp.asarray(_bucket_table(num_buckets, max_distance, bidirectional))
  return table[jnp.clip(distance, -max_distance, max_distance) + max_distance]


@lru_cache
def _bucket_table(num_buckets: int, max_distance: int, bidirectional: bool) -> np.ndarray:
  """Buckets of the distances -max_distance..max_distance."""
  side = num_buckets // 2 if bidirectional else num_buckets
  exact = side // 2
  if exact < 1 or max_distance <= exact:
    raise ValueError(
      f"num_buckets={num_buckets} and max_distance={max_distance} leave no logarithmic buckets: "
      f"needs num_buckets >= {4 if bidirectional else 2} and max_distance > {exact}"
    )
  logarithmic = side - exact

  def one(distance: int) -> int:
    if distance < exact:
      return distance
    # exact * (max_distance / exact) ** (k / logarithmic) <= distance, in integers.
    steps = sum(
      distance**logarithmic * exact**k >= max_distance**k * exact**logarithmic
      for k in range(1, logarithmic)
    )
    return exact + steps

  behind = [one(d) for d in range(max_distance + 1)]
  ahead = [side + b for b in behind[:0:-1]] if bidirectional else [0] * max_distance
  return np.array(ahead + behind, np.int32)


def split_rows(bias: Bias | None) -> tuple[jax.Array | None, Any]:
  """(the array that has a row for each query, or None; what all queries share)."""
  if isinstance(bias, RelativeKeys):
    return bias.q_BTNH, bias.r_PNH
  return None, bias


def join_rows(rows_BTNH: jax.Array | None, shared: Any) -> Bias | None:
  """Inverse of `split_rows`; the rows may be some of the queries only."""
  return shared if rows_BTNH is None else RelativeKeys(rows_BTNH, shared)


def term(
  bias: Bias,
  q_positions_BT: jax.Array,
  kv_positions_BS: jax.Array,
  *,
  scale: float,
  offset: int | jax.Array | None = None,
) -> jax.Array:
  """The float32 term [B or 1, N, T, S] for these queries and keys.

  With `offset` both are runs of one row, query t standing `offset + t - s` places after key s:
  distances follow from indices, and gathers shrink from T * S to T + S. Entries where that differs
  from the positions (another segment) are then arbitrary. `scale` is that of the logits.
  """
  distance_BTS = q_positions_BT[:, :, None] - kv_positions_BS[:, None, :]
  if isinstance(bias, Alibi):
    return -bias.slopes_N.astype(f32)[None, :, None, None] * distance_BTS.astype(f32)[:, None]
  T, S = distance_BTS.shape[1:]
  if isinstance(bias, Bucketed):
    value = lambda distance: bias.table_UN.astype(f32)[
      bucket(distance, bias.table_UN.shape[0], bias.max_distance, bias.bidirectional)
    ]
    if offset is None:
      return jnp.moveaxis(value(distance_BTS), -1, 1)
    x_NW = value(_distances(offset, T, S)).T
    return _shift(jnp.broadcast_to(x_NW[None, :, None], (1, x_NW.shape[0], T, T + S)), S)
  rows = lambda distance: bias.r_PNH[jnp.clip(distance, 0, bias.r_PNH.shape[0] - 1)]
  if offset is None:
    x_BNTP = _relative(bias.q_BTNH, bias.r_PNH, scale)
    index_BTS = jnp.clip(distance_BTS, 0, bias.r_PNH.shape[0] - 1)
    return jnp.take_along_axis(x_BNTP, index_BTS[:, None], axis=-1)
  return _shift(_relative(bias.q_BTNH, rows(_distances(offset, T, S)), scale), S)


def _relative(q_BTNH: jax.Array, r_WNH: jax.Array, scale: float) -> jax.Array:
  return scale * jnp.einsum("btnh,wnh->bntw", q_BTNH, r_WNH, preferred_element_type=f32)


def _distances(offset: int | jax.Array, T: int, S: int) -> jax.Array:
  """The T + S - 1 distances between T queries and S keys, falling, and one more."""
  return offset + (T - 1) - jnp.arange(T + S)


def _shift(x_BNTW: jax.Array, S: int) -> jax.Array:
  """out[t, s] = x[t, s + T - 1 - t] by a reshape (arXiv 1901.02860, appendix B)."""
  B, N, T, W = x_BNTW.shape
  flat = x_BNTW.reshape(B, N, T * W)[:, :, T - 1 : T - 1 + T * (W - 1)]
  return flat.reshape(B, N, T, W - 1)[..., :S]
