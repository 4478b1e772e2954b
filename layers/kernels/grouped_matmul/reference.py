"""The specification: a loop over experts, in float32.

R rows sorted by expert, E experts, D contracted width, F width of the result.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def _owned_RE(group_sizes_E: jax.Array, num_rows: int) -> jax.Array:  # noqa: N802
  """Whether row r belongs to expert e."""
  end_E = jnp.cumsum(group_sizes_E)
  row_R1 = jnp.arange(num_rows)[:, None]
  return (row_R1 >= (end_E - group_sizes_E)[None]) & (row_R1 < end_E[None])


def row_products(
  x_RD: jax.Array,
  ws: tuple[jax.Array, ...],
  group_sizes_E: jax.Array,
  finish: Callable[..., tuple[jax.Array, ...]],
  *,
  transposed: bool = False,
) -> tuple[jax.Array, ...]:
  """[R, F] each, rounded: `finish` of the products of x with each of `ws`; zeros past the last."""
  owned_RE = _owned_RE(group_sizes_E, x_RD.shape[0])

  def product(w_EDF):
    y_RF = jnp.zeros((x_RD.shape[0], w_EDF.shape[1 if transposed else 2]), jnp.float32)
    for e in range(w_EDF.shape[0]):
      w_DF = w_EDF[e].T if transposed else w_EDF[e]
      rows_RD = jnp.where(owned_RE[:, e, None], x_RD, 0)
      y_RF += jnp.dot(rows_RD, w_DF, preferred_element_type=jnp.float32)
    return y_RF

  inside_R1 = owned_RE.any(axis=1, keepdims=True)
  return tuple(jnp.where(inside_R1, y, 0).astype(x_RD.dtype) for y in finish(*map(product, ws)))


def outer(x_RD: jax.Array, dy_RF: jax.Array, group_sizes_E: jax.Array, *, dtype) -> jax.Array:
  """Sum over the rows of each group of x^T dy."""
  owned_RE = _owned_RE(group_sizes_E, x_RD.shape[0])
  parts = []
  for e in range(group_sizes_E.shape[0]):
    keep = owned_RE[:, e, None]
    x_DR = jnp.where(keep, x_RD, 0).T
    parts.append(jnp.dot(x_DR, jnp.where(keep, dy_RF, 0), preferred_element_type=jnp.float32))
  return jnp.stack(parts).astype(dtype)
