"""What layers keep of the positions seen so far, pytrees: keys and values, or a state.

A position p of keys and values stands in slot p modulo the number of slots: where a mask sees no
more than W positions back, W slots hold all that it can still see.

B batch, S cached positions, K key/value heads, N heads, H head size, U size of values, V positions
that a convolution sees before its own.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mesh.constrain import constrain, dim_axes

from .kernels.partition import auto_partitioned, cut_all, explicit_axes, sharding_like
from .kernels.select import LANES, TPU, current_platform


class KVCache(NamedTuple):
  """Keys (already rotated) and values.

  The two may differ in heads and size (see `cached` of the attention specs). With `layer` both are
  stacks [L, B, S, K, H] of the caches of several layers, of which this is one: it is written in
  place.
  """

  key_BSKH: jax.Array
  value_BSKH: jax.Array
  layer: jax.Array | None = None

  @property
  def slots(self) -> int:
    return self.key_BSKH.shape[-3]


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


FEW_POSITIONS = 16  # written one by one into a stack


def update_cache(
  cache: KVCache, key_BTKH: jax.Array, value_BTKH: jax.Array, start_B: jax.Array
) -> KVCache:
  """Write T new positions of each row from `start_B` on; several of them must not go round.

  Entries past a row's true length (prompt padding) may be written: causality hides them until the
  next token overwrites them.

  Raises:
    ValueError: more positions than slots.
  """
  T, S = key_BTKH.shape[1], cache.slots
  if T > S:
    raise ValueError(f"{T} new positions do not fit a cache of {S}")
  slot_B = constrain(start_B % S, "cache_batch")
  if cache.layer is not None and T <= FEW_POSITIONS:
    at = partial(_put_each, layer=cache.layer, slot_B=slot_B)
    return KVCache(at(cache.key_BSKH, key_BTKH), at(cache.value_BSKH, value_BTKH), cache.layer)
  write = jax.vmap(lambda old, new, start: jax.lax.dynamic_update_slice_in_dim(old, new, start, 0))
  place = lambda x, seq: constrain(x, "cache_batch", seq, "cache_heads", None)

  def put(old, new):
    new = place(new.astype(old.dtype), None)
    return place(write(place(old, "cache_seq"), new, slot_B), "cache_seq")

  old = take_layer(cache)
  return _put_layer(cache, put(old.key_BSKH, key_BTKH), put(old.value_BSKH, value_BTKH))


def _put_each(stack_LBSKH, new_BTKH, *, layer, slot_B):
  """In place. On TPUs the memory of a stack has positions last where heads fill no registers, and
  only slices of a row each leave it so; all others take a scatter."""
  axes = (None, "cache_batch", "cache_seq", "cache_heads", None)
  stack_LBSKH = constrain(stack_LBSKH, *axes)
  new_BTKH = constrain(new_BTKH.astype(stack_LBSKH.dtype), "cache_batch", None, *axes[3:])

  def put(stack_LBSKH, new_BTKH, layer, slot_B):
    B, T = new_BTKH.shape[:2]
    row_B1, slot_BT = jnp.arange(B)[:, None], slot_B[:, None] + jnp.arange(T)[None]
    at = stack_LBSKH.at[layer, row_B1, slot_BT]
    return at.set(new_BTKH, mode="drop", unique_indices=True)

  def put_rows(stack_LBSKH, new_BTKH, layer, slot_B):
    for b in range(new_BTKH.shape[0]):  # as a loop it would have the stack turned
      at = (layer, b, slot_B[b], 0, 0)
      stack_LBSKH = jax.lax.dynamic_update_slice(stack_LBSKH, new_BTKH[None, b : b + 1], at)
    return stack_LBSKH

  arrays = (stack_LBSKH, new_BTKH, layer, slot_B)
  rows, positions, heads = dim_axes(*axes[1:4], shape=stack_LBSKH.shape[1:4])
  by_rows = current_platform() in TPU and stack_LBSKH.shape[-1] % LANES
  if by_rows and not positions and not explicit_axes():
    of_stack, of_new = P(None, rows, None, heads), P(rows, None, heads)
    return constrain(cut_all(put_rows, (of_stack, of_new, P(), P(rows)), of_stack, *arrays), *axes)
  return constrain(auto_partitioned(put, sharding_like(stack_LBSKH), *arrays), *axes)


def roll_cache(
  cache: KVCache, key_BTKH: jax.Array, value_BTKH: jax.Array, start_B: jax.Array, count_B: jax.Array
) -> KVCache:
  """Write the first `count_B` of T new positions from `start_B` on, round and round.

  Of those that share a slot the last one stays. All of the cache is written.
  """
  T, S = key_BTKH.shape[1], cache.slots
  nth_BS = slot_positions(start_B + count_B - 1, S) - jnp.expand_dims(start_B, 1)
  nth_BS11 = jnp.expand_dims(nth_BS, (2, 3))

  def put(old, new):
    new = jnp.take_along_axis(new.astype(old.dtype), jnp.clip(nth_BS11, 0, T - 1), 1)
    return constrain(
      jnp.where(nth_BS11 >= 0, new, old), "cache_batch", "cache_seq", "cache_heads", None
    )

  old = take_layer(cache)
  return _put_layer(cache, put(old.key_BSKH, key_BTKH), put(old.value_BSKH, value_BTKH))


def take_layer(cache: KVCache) -> KVCache:
  """A copy of the layer's own keys and values, [B, S, K, H]."""
  if cache.layer is None:
    return cache
  at = lambda x: jax.lax.dynamic_index_in_dim(x, cache.layer, keepdims=False)
  return KVCache(at(cache.key_BSKH), at(cache.value_BSKH))


def _put_layer(cache: KVCache, key_BSKH: jax.Array, value_BSKH: jax.Array) -> KVCache:
  """The cache with all of a layer's keys and values."""
  if cache.layer is None:
    return KVCache(key_BSKH, value_BSKH)
  new = KVCache(key_BSKH, value_BSKH)
  return _put(cache._replace(layer=None), new, cache.layer)._replace(layer=cache.layer)


def _put(stacks: Any, arrays: Any, layer: jax.Array) -> Any:
  put = lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, layer, 0)
  return jax.tree.map(put, stacks, arrays)


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


def of_layer(stack: KVCache | LinearState, layer: jax.Array) -> KVCache | LinearState:
  """One of stacked caches, as its layer takes it."""
  if isinstance(stack, KVCache):
    return stack._replace(layer=layer)
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), stack)


def stack_axes(stack: KVCache | LinearState) -> Any:
  """Logical axes of each array of stacked caches, in their place."""
  kept: Any = (None, "cache_batch", "cache_seq", "cache_heads", None)
  if isinstance(stack, KVCache):
    return KVCache(kept, kept)
  state: Any = (None, "cache_batch", "cache_heads", None, None)
  seen: Any = (None, "cache_batch", None, "cache_heads", None)
  return LinearState(state, (seen,) * len(stack.inputs))


def place_stack(stack: KVCache | LinearState) -> KVCache | LinearState:
  """Stacked caches, laid out over devices as layers give them back."""
  return jax.tree.map(lambda x, names: constrain(x, *names), stack, stack_axes(stack))


def into_stack(stack: Any, cache: KVCache | LinearState, layer: jax.Array) -> Any:
  """The stack with what the layer gave back."""
  if isinstance(cache, KVCache):
    return cache._replace(layer=None)
  return _put(stack, cache, layer)
