"""The circular pipeline schedule over the mesh axis `stage`, inside a `shard_map`.

Every stage holds `repeats` chunks of layers: chunk r of stage s is the r * S + s-th of the model. A
microbatch passes all stages once for each repeat; with one repeat this is GPipe's schedule, with
more the interleaved one (arXiv 2104.04473, section 2.2), whose bubble is that many times smaller.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .collectives import manual_size, ring_shift, vary, varying

_AXIS = "stage"


def bubble_fraction(stages: int, microbatches: int, repeats: int = 1) -> float:
  """Share of its time that a stage waits: (S - 1) of R * M + S - 1 ticks."""
  return (stages - 1) / (repeats * microbatches + stages - 1)


def stage_order(num_layers: int, stages: int, repeats: int) -> np.ndarray:
  """Layer indices such that stage s finds its chunks, in order, in the s-th part of the array."""
  chunks = np.arange(num_layers).reshape(repeats, stages, num_layers // (repeats * stages))
  return chunks.swapaxes(0, 1).reshape(-1)


def pipeline(
  stage_fn: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]],
  x_MX: jax.Array,
  *,
  repeats: int = 1,
) -> tuple[jax.Array, Any]:
  """Passes microbatches through all stages.

  Args:
    stage_fn: `(chunk, microbatch, x) -> (x, statistics)`: this device's chunk of layers on one
      microbatch; both indices are traced int32.
    x_MX: microbatches [M, ...], the same on all stages.
    repeats: chunks a device holds; more than one needs M >= stages, or a microbatch would return
      before it is due.

  Returns:
    Outputs [M, ...], the same on all stages, and statistics summed over microbatches, [repeats,
    ...], of this stage's chunks. Ticks of the bubble compute on zeros and count for nothing.

  Raises:
    ValueError: too few microbatches for the repeats.
  """
  stages, M = manual_size(_AXIS), x_MX.shape[0]
  if repeats > 1 and stages > M:
    raise ValueError(f"{repeats} repeats need at least {stages} microbatches, got {M}")
  stage = lax.axis_index(_AXIS)
  x_MX = vary(x_MX, (_AXIS,))
  zero = jnp.zeros_like(x_MX[0])
  index = jnp.zeros((), jnp.int32)
  stats = jax.eval_shape(lambda x: stage_fn(index, index, x)[1], zero)
  empty = lambda s: vary(jnp.zeros((repeats, *s.shape), s.dtype), varying(x_MX))

  def tick(carry, t):
    received, waiting_MX, done_MX, sums = carry
    item = t - stage
    valid = (item >= 0) & (item < repeats * M)
    item = jnp.clip(item, 0, repeats * M - 1)
    m, r = item % M, item // M
    at = lambda xs: lax.dynamic_index_in_dim(xs, m, keepdims=False)
    x = at(x_MX)
    if repeats > 1:
      # The first stage puts by what came round the ring until its next turn.
      back = t - stages
      slot = jnp.clip(back, 0) % M
      filed = lax.dynamic_update_index_in_dim(waiting_MX, received, slot, 0)
      waiting_MX = jnp.where((back >= 0) & (back < (repeats - 1) * M), filed, waiting_MX)
      x = jnp.where(r == 0, x, at(waiting_MX))
    x = jnp.where(valid, jnp.where(stage == 0, x, received), 0)
    y, stats = stage_fn(r, m, x)
    sums = jax.tree.map(lambda a, b: a.at[r].add(jnp.where(valid, b, 0)), sums, stats)
    last = valid & (stage == stages - 1) & (r == repeats - 1)
    done_MX = done_MX.at[m].add(jnp.where(last, y, 0))
    return (ring_shift(y, _AXIS), waiting_MX, done_MX, sums), None

  waiting_MX = jnp.zeros_like(x_MX) if repeats > 1 else None
  start = (zero, waiting_MX, jnp.zeros_like(x_MX), jax.tree.map(empty, stats))
  (_, _, done_MX, sums), _ = lax.scan(tick, start, jnp.arange(repeats * M + stages - 1))
  return lax.psum(done_MX, _AXIS), sums
