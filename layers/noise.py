"""Random noise whose value for a row depends on that row's key and on positions, nothing else.

One typed key a row (`jax.random.key`, threefry) makes a result independent of how the batch is
split over devices, microbatches or pipeline stages. Threefry draws by counter, so a longer row
starts with the same noise as a shorter one.

Dims: B batch, T positions, D features of any kind.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mesh.collectives import manual_size


def fold(key_B: jax.Array, *data: jax.Array | int) -> jax.Array:
  """Derive new keys from old ones and integers.

  Args:
    key_B: typed keys [B].
    data: integers, each a scalar or [B] (layer index, step, row number), folded in order.

  Returns:
    Typed keys [B].
  """
  for value in data:
    each = 0 if jnp.ndim(value) else None
    key_B = jax.vmap(jax.random.fold_in, in_axes=(0, each))(key_B, value)
  return key_B


def jitter_BTD(  # noqa: N802 (named for what it returns)
  x_BTD: jax.Array, eps: float, key_B: jax.Array | None, place_T: jax.Array | None = None
) -> jax.Array:
  """Multiply by noise from U[1 - eps, 1 + eps] (Switch Transformer, arXiv 2101.03961, section 2.4).

  Args:
    x_BTD: any float dtype.
    eps: half width of the noise; 0 is none.
    key_B: one typed key a row, or None for no noise.
    place_T: where in its row each position lies; None: in order.

  Returns:
    float32 [B, T, D]: rounded to bfloat16, noise of 1e-2 would have five values.
  """
  x_BTD = x_BTD.astype(jnp.float32)
  if key_B is None or eps == 0.0:
    return x_BTD
  draw = lambda key, shape: jax.random.uniform(key, shape, minval=1.0 - eps, maxval=1.0 + eps)
  return x_BTD * draw_rows(draw, x_BTD.shape[1:], key_B, place_T)


def draw_rows(
  draw: Callable[[jax.Array, tuple[int, ...]], jax.Array],
  shape: tuple[int, ...],
  key_B: jax.Array,
  place_T: jax.Array | None = None,
) -> jax.Array:
  """`draw(key, [T, ...])` a row, at the places this device holds.

  Args:
    shape: [T, ...].
    place_T: where in its row each position lies; None: in order.
  """
  if place_T is None:
    return jax.vmap(lambda key: draw(key, shape))(key_B)
  length = shape[0] * manual_size("context")
  return jax.vmap(lambda key: draw(key, (length, *shape[1:]))[place_T])(key_B)


def dropout_BTD(  # noqa: N802
  x_BTD: jax.Array, rate: float, key_B: jax.Array | None, place_T: jax.Array | None = None
) -> jax.Array:
  """Zero each element with probability `rate` and divide the others by 1 - rate.

  Args:
    x_BTD: any float dtype, kept.
    rate: in [0, 1).
    key_B: one typed key a row, or None for no dropout.
    place_T: where in its row each position lies; None: in order.

  Raises:
    ValueError: when the rate is outside [0, 1).
  """
  if not 0.0 <= rate < 1.0:
    raise ValueError(f"dropout rate must lie in [0, 1), got {rate}")
  if key_B is None or rate == 0.0:
    return x_BTD
  draw = lambda key, shape: jax.random.bernoulli(key, 1.0 - rate, shape)
  keep_BTD = draw_rows(draw, x_BTD.shape[1:], key_B, place_T)
  return jnp.where(keep_BTD, x_BTD / (1.0 - rate), 0)
