"""What layers keep of the positions seen so far, pytrees: keys and values, or a state.

B batch, S cached positions, K key/value heads, N heads, H head size, U size of values.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mesh.constrain import constrain


class KVCache(NamedTuple):
  """Keys (already rotated) and values; position s of a row stands at index s.

  The two may differ in heads and size (see `cached` of the attention specs).
  """

  key_BSKH: jax.Array
  value_BSKH: jax.Array


def empty_cache(
  batch: int, length: int, key: tuple[int, int], value: tuple[int, int], dtype
) -> KVCache:
  """A cache of zeros for `length` positions; `key` and `value` are (heads, size)."""
  return KVCache(*(jnp.zeros((batch, length, *shape), dtype) for shape in (key, value)))


def update_cache(
  cache: KVCache, key_BTKH: jax.Array, value_BTKH: jax.Array, start_B: jax.Array
) -> KVCache:
  """Write T new positions of each row from index `start_B`.

  Entries past a row's true length (prompt padding) may be written: causality hides them until the
  next token overwrites them.
  """
  write = jax.vmap(lambda old, new, start: jax.lax.dynamic_update_slice_in_dim(old, new, start, 0))
  place = lambda x, seq: constrain(x, "cache_batch", seq, "cache_heads", None)
  start_B = constrain(start_B, "cache_batch")

  def put(old, new):
    new = place(new.astype(old.dtype), None)
    return place(write(place(old, "cache_seq"), new, start_B), "cache_seq")

  return KVCache(put(cache.key_BSKH, key_BTKH), put(cache.value_BSKH, value_BTKH))


class LinearState(NamedTuple):
  """What a linear attention keeps, of one size for any number of positions."""

  state_BNHU: jax.Array


def empty_state(batch: int, shape: tuple[int, int, int]) -> LinearState:
  """Of a row that starts; float32 whatever the activations are, since it sums over positions."""
  return LinearState(jnp.zeros((batch, *shape), jnp.float32))
