"""RMSNorm and LayerNorm over the last dim, statistics in float32.

Dims: D the normalised dim (model width, or head size for query and key norms).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from .params import declare
from .spec import NormSpec


def rms_norm(
  x: jax.Array, w_D: jax.Array | None = None, *, eps: float, unit_offset: bool = False
) -> jax.Array:
  """x / sqrt(mean(x^2) + eps) * w (arXiv 1910.07467, equation 4).

  Args:
    x: [..., D].
    w_D: gain, or None for none.
    eps: added to the mean square.
    unit_offset: the gain is 1 + w (Gemma stores w - 1).

  Returns:
    [..., D] in x.dtype; float32 inside, the gain included.
  """
  x32 = x.astype(jnp.float32)
  y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  if w_D is not None:
    w_D = w_D.astype(jnp.float32)
    y = y * _along_last(1.0 + w_D if unit_offset else w_D, y.ndim)
  return y.astype(x.dtype)


def layer_norm(
  x: jax.Array, w_D: jax.Array, b_D: jax.Array | None = None, *, eps: float
) -> jax.Array:
  """(x - mean) / sqrt(variance + eps) * w + b (arXiv 1607.06450, equation 4).

  Args:
    x: [..., D].
    w_D: gain.
    b_D: bias, or None for none.
    eps: added to the (biased) variance.

  Returns:
    [..., D] in x.dtype; float32 inside, gain and bias included.
  """
  x32 = x.astype(jnp.float32)
  # The variance of the centred values: E[x^2] - E[x]^2 cancels when the mean is large.
  centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
  y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
  y = y * _along_last(w_D.astype(jnp.float32), y.ndim)
  if b_D is not None:
    y = y + _along_last(b_D.astype(jnp.float32), y.ndim)
  return y.astype(x.dtype)


def _along_last(w_D: jax.Array, ndim: int) -> jax.Array:
  return w_D.reshape((1,) * (ndim - 1) + w_D.shape)


class Norm(nn.Module):
  """The norm that `spec` names, over a last dim of size `dim`; `axis` is its logical axis."""

  spec: NormSpec
  dim: int
  axis: str | None = "norm"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    spec = self.spec
    start = nn.initializers.zeros if spec.unit_offset else nn.initializers.ones
    w_D = declare(self, "scale", (self.dim,), (self.axis,), start)
    if spec.kind == "rms":
      return rms_norm(x, w_D, eps=spec.eps, unit_offset=spec.unit_offset)
    b_D = None
    if spec.bias:
      b_D = declare(self, "bias", (self.dim,), (self.axis,), nn.initializers.zeros)
    return layer_norm(x, 1.0 + w_D if spec.unit_offset else w_D, b_D, eps=spec.eps)
