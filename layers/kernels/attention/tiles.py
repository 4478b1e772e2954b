"""What the Pallas kernels for TPUs and for GPUs share: the mathematics of one tile of logits.

Logits are powers of two: `log2(e)` is part of their scale, and of the log-sum-exps inside.

Letters: B batch, T query positions, S key positions, N query heads.
"""

import math
import operator
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


class Line:
  """A number for each row or for each column of a tile, spread over it where the two meet.

  Stands for ids in masks, of which much is said of queries alone or of keys alone: Mosaic has no
  arrays of one column, and would compute all of it for each place of the tile.
  """

  __array_ufunc__ = None  # numpy's numbers leave arithmetic to this class

  def __init__(self, values: jax.Array, dim: int, shape: tuple[int, int]):
    self.values, self.dim, self.shape = values, dim, shape

  def spread(self) -> jax.Array:
    return jax.lax.broadcast_in_dim(self.values, self.shape, (self.dim,))

  def astype(self, dtype) -> "Line":
    return Line(self.values.astype(dtype), self.dim, self.shape)


def _of_lines(function: Callable) -> Callable:
  """The method of `Line` that does so; other operands are lines, tiles or single numbers."""

  def method(self, *others):
    tile = lambda x: getattr(x, "ndim", 0) == 2
    meets = lambda x: x.dim != self.dim if isinstance(x, Line) else tile(x)
    if any(map(meets, others)):
      return function(*(x.spread() if isinstance(x, Line) else x for x in (self, *others)))
    values = (x.values if isinstance(x, Line) else x for x in (self, *others))
    return Line(function(*values), self.dim, self.shape)

  return method


for _name in (
  "add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift",
):  # fmt: skip
  _operator = getattr(operator, f"__{_name}__")
  setattr(Line, f"__{_name}__", _of_lines(_operator))
  setattr(Line, f"__r{_name}__", _of_lines(lambda x, y, of=_operator: of(y, x)))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "invert"):
  setattr(Line, f"__{_name}__", _of_lines(getattr(operator, f"__{_name}__")))


def spread(x: Any) -> Any:
  return x.spread() if isinstance(x, Line) else x


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
