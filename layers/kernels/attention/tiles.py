"""What the Pallas kernels for TPUs and for GPUs share: the mathematics of one tile of logits.

Logits are powers of two: `log2(e)` is part of their scale, and of the log-sum-exps inside.

Letters: B batch, T query positions, S key positions, N query heads.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .blocks import Order, by_position, shown

MASKED = -0.7 * float(np.finfo(np.float32).max)  # finite: differences of it are not NaN
LOG2E = math.log2(math.e)

f32 = jnp.float32


class Ids(NamedTuple):
  """int32, a row of the batch each; None where indices say all."""

  position: jax.Array | None
  segment: jax.Array | None


class Heads(NamedTuple):
  """float32, a number for each query head."""

  sink: jax.Array | None
  slope: jax.Array | None


def needs_positions(masks: tuple[Any, ...], order: Order) -> bool:
  """Whether indices do not say what these masks show, or how far keys are."""
  return order == "any" or any(by_position(mask, order) for mask in masks)


def logits(
  product: jax.Array,
  scale: float,
  softcap: float | None,
  slope: Any,
  distance: Callable[[], jax.Array],
) -> tuple[jax.Array, jax.Array | None]:
  """(base-2 logits, their tanh if capped) from products of queries and keys."""
  tanh = None
  if softcap is not None:
    tanh = jnp.tanh(product * (scale / softcap))
    s = tanh * (softcap * LOG2E)
  else:
    s = product * (scale * LOG2E)
  if slope is not None:
    s = s - (slope * LOG2E) * distance().astype(f32)
  return s, tanh


def visible(masks, which, i, j, q_segment, kv_segment, in_row) -> Any:
  """Bools, of ids that broadcast against each other; None: everything.

  Args:
    masks: those of all heads, None shows all; `which` of them is a number.
    in_row: where the keys' places are keys at all, or None.
  """
  parts = [] if masks in ((), (None,)) else [shown(masks, which, i, j)]
  if q_segment is not None:
    parts.append((q_segment == kv_segment) & (q_segment > 0))
  if in_row is not None:
    parts.append(in_row)
  for part in parts[1:]:
    parts[0] = parts[0] & part
  return parts[0] if parts else None


def natural(lse: jax.Array) -> jax.Array:
  """The log-sum-exp of a kernel to base e; -inf, not -MASKED, where nothing is seen."""
  return jnp.where(lse > -MASKED / 2, -jnp.inf, lse / LOG2E)


def sink_gradient(sink_N: jax.Array, lse_BNT: jax.Array, delta_BNT: jax.Array) -> jax.Array:
  weight_BNT = jnp.exp2(LOG2E * sink_N[None, :, None] - lse_BNT)
  return -jnp.sum(weight_BNT * delta_BNT, axis=(0, 2))
