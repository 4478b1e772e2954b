"""The feed-forward layer: down(act(up x)), plain or gated.

Dims: D model width, F hidden width; leading dims are free, [B, T, D] or tokens [M, D].
"""

import math
from typing import get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from mesh.constrain import constrain

from .linear import LowRank, dense
from .params import declare, declare_projection, kernel_init
from .spec import Activation, InitSpec, MlpSpec

_QUICK_GELU = 1.702  # sigmoid(1.702 x) approximates the normal distribution function


@jax.custom_jvp
def _gelu(x: jax.Array) -> jax.Array:
  """x Phi(x). JAX 0.12's own derivative of erfc can't be traced inside of `shard_map`."""
  return jax.nn.gelu(x, approximate=False)


@_gelu.defjvp
def _gelu_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  below = 0.5 * jax.lax.erfc(-x * 0.5**0.5)
  density = jnp.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5
  return x * below, (below + x * density) * dx


def activate(name: Activation, x: jax.Array) -> jax.Array:
  """Apply a named activation, in x.dtype.

  relu; relu2 = relu^2 (arXiv 2109.08668); gelu = x Phi(x) with the exact error function and
  gelu_tanh its tanh approximation (arXiv 1606.08415); quick_gelu = x sigmoid(1.702 x);
  silu = x sigmoid(x). Those with an exponential are computed in float32.

  Raises:
    ValueError: for any other name.
  """
  if name in ("relu", "relu2"):
    y = jnp.maximum(x, 0)
    return y * y if name == "relu2" else y
  x32 = x.astype(jnp.float32)
  if name == "silu":
    y = jax.nn.silu(x32)
  elif name == "gelu":
    y = _gelu(x32)
  elif name == "gelu_tanh":
    y = jax.nn.gelu(x32, approximate=True)
  elif name == "quick_gelu":
    y = x32 * jax.nn.sigmoid(_QUICK_GELU * x32)
  else:
    raise ValueError(f"unknown activation {name!r}; use one of {', '.join(get_args(Activation))}")
  return y.astype(x.dtype)


def gated_activation(
  up: jax.Array,
  gate: jax.Array | None = None,
  *,
  activation: Activation,
  clamp: float | None = None,
  up_offset: float = 0.0,
) -> jax.Array:
  """What `down` multiplies: act(up), or act(gate) * (up + up_offset) when gated.

  Args:
    up: pre-activation [..., F].
    gate: pre-activation of the same shape, or None (arXiv 2002.05202).
    clamp: limits before the activation: gate <= clamp and |up| <= clamp (gpt-oss).
    up_offset: added to `up` after the clamp.
  """
  if clamp is not None:
    up = jnp.clip(up, -clamp, clamp)
  if gate is None:
    return activate(activation, up)
  if clamp is not None:
    gate = jnp.minimum(gate, clamp)
  if up_offset:
    up = up + up_offset
  return activate(activation, gate) * up


def mlp(
  x: jax.Array,
  w_up_DF: jax.Array | LowRank,
  w_down_FD: jax.Array | LowRank,
  *,
  w_gate_DF: jax.Array | LowRank | None = None,
  b_up_F: jax.Array | None = None,
  b_gate_F: jax.Array | None = None,
  b_down_D: jax.Array | None = None,
  activation: Activation,
  clamp: float | None = None,
  up_offset: float = 0.0,
) -> jax.Array:
  """down(act(up x)), or down(act(gate x) * (up x + up_offset)) with `w_gate_DF`.

  Args:
    x: [..., D]; weights and biases are cast to its dtype.
    clamp, up_offset: see `gated_activation`.

  Returns:
    [..., D] in x.dtype. The pre-activations carry the checkpoint names `mlp_up`, `mlp_gate`.
  """
  up = checkpoint_name(affine(x, w_up_DF, b_up_F), "mlp_up")
  gate = None
  if w_gate_DF is not None:
    gate = checkpoint_name(affine(x, w_gate_DF, b_gate_F), "mlp_gate")
  hidden = gated_activation(up, gate, activation=activation, clamp=clamp, up_offset=up_offset)
  if hidden.ndim == 3:
    hidden = constrain(hidden, "act_batch", "act_seq", "act_mlp")
  return affine(hidden, w_down_FD, b_down_D)


def affine(x: jax.Array, w: jax.Array | LowRank, b: jax.Array | None) -> jax.Array:
  """x w + b, in x.dtype."""
  y = dense(x, w)
  return y if b is None else y + b.astype(y.dtype).reshape((1,) * (y.ndim - 1) + b.shape)


class Mlp(nn.Module):
  """Weights of `mlp` as `spec` describes it; `gain` scales the initial `down` (residual depth)."""

  spec: MlpSpec
  embed_dim: int
  init_spec: InitSpec  # not `init`: that is a method of every Linen module
  gain: float = 1.0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    spec, d, f = self.spec, self.embed_dim, self.spec.hidden
    into = kernel_init(self.init_spec, d)
    back = kernel_init(self.init_spec, f, self.gain)
    zeros = nn.initializers.zeros
    gated, bias = spec.gated, spec.bias
    inward = lambda name: declare_projection(self, name, (d, f), ("embed", "mlp"), into)
    return mlp(
      x,
      inward("up"),
      declare_projection(self, "down", (f, d), ("mlp", "embed"), back),
      w_gate_DF=inward("gate") if gated else None,
      b_up_F=declare(self, "up_bias", (f,), ("mlp",), zeros) if bias else None,
      b_gate_F=declare(self, "gate_bias", (f,), ("mlp",), zeros) if bias and gated else None,
      b_down_D=declare(self, "down_bias", (d,), ("norm",), zeros) if bias else None,
      activation=spec.activation,
      clamp=spec.clamp,
      up_offset=spec.up_offset,
    )
