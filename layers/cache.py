"""What layers keep of the positions seen so far, pytrees: keys and values, or a state.

A position p of keys and values stands in slot p modulo the number of slots: where a mask sees no
more than W positions back, W slots hold all that it can still see.

B batch, S cached positions, K key/value heads, N heads, H head size, U size of values, V positions
that a convolution sees before its own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mesh.constrain import constrain


class KVCache(NamedTuple):
  """Keys (already rotated) and values.

  The two may differ in heads and size (see `cached` of the attention specs).
  """

  key_BSKH: jax.Array
  value_BSKH: jax.Array


def num_slots(length: int, before: int | None) -> int:
  """Enough for rows of `length` positions under a mask that sees so far back."""
  return length if before is None else min(length, before + 1)


def slot_positions(last_B: jax.Array, slots: int) -> jax.Array:
  """The position that each slot holds when `last_B` is the last one written, [B, S]; -1: none."""
  place_BS = jnp.expand_dims(last_B, 1) - jnp.arange(slots, dtype=jnp.int32)[None]
  return jnp.maximum(jnp.expand_dims(last_B, 1) - place_BS % slots, -1)


def empty_cache(
  batch: int, length: int, key: tuple[int, int], value: tuple[int, int], dtype
) -> KVCache:
  """A cache of zeros for `length` positions; `key` and `value` are (heads, size)."""
  return KVCache(*(jnp.zeros((batch, length, *shape), dtype) for shape in (key, value)))


def update_cache(
  cache: KVCache, key_BTKH: jax.Array, value_BTKH: jax.Array, start_B: jax.Array
) -> KVCache:
  """Write T new positions of each row from `start_B` on; several of them must not go round.

  Entries past a row's true length (prompt padding) may be written: causality hides them until the
  next token overwrites them.

  Raises:
    ValueError: more positions than slots.
  """
  T, S = key_BTKH.shape[1], cache.key_BSKH.shape[1]
  if T > S:
    raise ValueError(f"{T} new positions do not fit a cache of {S}")
  write = jax.vmap(lambda old, new, start: jax.lax.dynamic_update_slice_in_dim(old, new, start, 0))
  place = lambda x, seq: constrain(x, "cache_batch", seq, "cache_heads", None)
  slot_B = constrain(start_B % S, "cache_batch")

  def put(old, new):
    new = place(new.astype(old.dtype), None)
    return place(write(place(old, "cache_seq"), new, slot_B), "cache_seq")

  return KVCache(put(cache.key_BSKH, key_BTKH), put(cache.value_BSKH, value_BTKH))


def roll_cache(
  cache: KVCache, key_BTKH: jax.Array, value_BTKH: jax.Array, start_B: jax.Array, count_B: jax.Array
) -> KVCache:
  """Write the first `count_B` of T new positions from `start_B` on, round and round.

  Of those that share a slot the last one stays. All of the cache is written.
  """
  T, S = key_BTKH.shape[1], cache.key_BSKH.shape[1]
  nth_BS = slot_positions(start_B + count_B - 1, S) - jnp.expand_dims(start_B, 1)
  nth_BS11 = jnp.expand_dims(nth_BS, (2, 3))

  def put(old, new):
    new = jnp.take_along_axis(new.astype(old.dtype), jnp.clip(nth_BS11, 0, T - 1), 1)
    return constrain(
      jnp.where(nth_BS11 >= 0, new, old), "cache_batch", "cache_seq", "cache_heads", None
    )

  return KVCache(put(cache.key_BSKH, key_BTKH), put(cache.value_BSKH, value_BTKH))


class LinearState(NamedTuple):
  """What a linear attention keeps, of one size for any number of positions."""

  state_BNHU: jax.Array
  # The last inputs of the convolutions of queries, keys and values, [B, V, N, .]; without any, ().
  inputs: tuple[jax.Array, ...] = ()


def empty_state(
  batch: int, shape: tuple[int, int, int], inputs: tuple[tuple[int, int, int], ...] = ()
) -> LinearState:
  """Of a row that starts; float32 whatever the activations are, since it sums over positions.

  `shape` and `inputs` are `state` and `conv_inputs` of the spec.
  """
  zeros = lambda shape: jnp.zeros((batch, *shape), jnp.float32)
  return LinearState(zeros(shape), tuple(map(zeros, inputs)))
