"""dense(x, w): every product of activations with a weight matrix goes through here.

Dims: K contracted (one or more dims of x and w), F results (one or more dims of w).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from mesh.collectives import vary, varying


class LowRank(NamedTuple):
  """A weight with an adapter, w + a b: see `layers.lora`."""

  w: jax.Array  # [K..., F...]
  a: jax.Array  # [K..., r]
  b: jax.Array  # [r, F...]


def dense(x: jax.Array, w: jax.Array | LowRank, *, num_in: int = 1) -> jax.Array:
  """Contract the last `num_in` dims of x with the first `num_in` of w.

  Products are of values in x.dtype, sums in float32, so are those of the gradients; the gradient
  of a float32 `w` is never rounded to x.dtype.

  Args:
    x: [..., K...].
    w: [K..., F...], cast to x.dtype; with an adapter the product with it is added.
    num_in: how many dims are K; the rest of w are F.

  Returns:
    [..., F...] in x.dtype.

  Raises:
    ValueError: when the contracted dims of x and w differ.
  """
  if isinstance(w, LowRank):
    return dense(x, w.w, num_in=num_in) + dense(dense(x, w.a, num_in=num_in), w.b)
  lead, k_dims, f_dims = x.shape[:-num_in], w.shape[:num_in], w.shape[num_in:]
  if x.shape[-num_in:] != k_dims:
    raise ValueError(
      f"dense: the last {num_in} dims of x {x.shape} are not the first {num_in} of w {w.shape}"
    )
  product = _product
  if x.dtype != w.dtype:
    # Inside a shard_map each must differ along the axes the other does, so that gradients are
    # summed there. JAX does this to operands by itself, but not for a custom_vjp.
    product, x, w = _product_mixed, vary(x, varying(w)), vary(w, varying(x))
  if _keep_dims():
    return product(x, w, num_in)
  # One contracted dim in the weight gradient: XLA's CPU matmul is half as fast with two (B and T).
  size = math.prod(k_dims)
  y_MF = product(x.reshape(math.prod(lead), size), w.reshape(size, math.prod(f_dims)), 1)
  return y_MF.reshape(lead + f_dims)


def _keep_dims() -> bool:
  """Merging dims would undo a sharding the compiler sees: of T over `context` or, between blocks,
  `tensor` (a reduce-scatter would become an all-reduce and a slice), or any in Explicit mode."""
  mesh = jax.sharding.get_abstract_mesh()
  kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
  if AxisType.Explicit in kinds.values():
    return True
  return any(kinds.get(a) == AxisType.Auto and mesh.shape[a] > 1 for a in ("context", "tensor"))


def _product(x: jax.Array, w: jax.Array, num_in: int) -> jax.Array:
  lead = x.ndim - num_in
  dims = (tuple(range(lead, x.ndim)), tuple(range(num_in)))
  return _dot(x, w, dims, product_sharding(x, w, num_in, w.ndim - num_in)).astype(x.dtype)


def product_sharding(x: jax.Array, w: jax.Array, num_in: int, num_out: int) -> PartitionSpec | None:
  """How [rows..., K...] times [..., K..., F...] lies in Explicit mode; None elsewhere.

  Rows stay where they are, columns follow w; an axis can hold only one of them (FSDP: rows).
  """
  x_spec, w_spec = explicit_spec(x), explicit_spec(w)
  if x_spec is None or w_spec is None:
    return None
  rows, columns = x_spec[: x.ndim - num_in], w_spec[w.ndim - num_out :]
  taken = {axis for entry in rows for axis in _axes(entry)}
  return PartitionSpec(*rows, *(None if taken & set(_axes(e)) else e for e in columns))


# Autodiff of a bf16 product with float32 sums multiplies a float32 cotangent by bf16 values (no
# bf16 matrix unit runs that at speed) and rounds dw to bf16 before it is summed over devices.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product_mixed(x: jax.Array, w: jax.Array, num_in: int) -> jax.Array:
  return _product(x, w.astype(x.dtype), num_in)


def _product_mixed_fwd(x, w, num_in):
  return _product_mixed(x, w, num_in), (x, w)


def _product_mixed_bwd(num_in, saved, dy):
  x, w = saved
  lead, num_out = x.ndim - num_in, w.ndim - num_in
  columns = (tuple(range(lead, dy.ndim)), tuple(range(num_in, num_in + num_out)))
  rows = (tuple(range(lead)), tuple(range(lead)))
  dx = _dot(dy, w.astype(dy.dtype), columns, explicit_spec(x)).astype(x.dtype)
  return dx, _dot(x, dy, rows, explicit_spec(w)).astype(w.dtype)


_product_mixed.defvjp(_product_mixed_fwd, _product_mixed_bwd)


def _dot(a, b, contracting, out_spec) -> jax.Array:
  return lax.dot_general(
    a,
    b,
    (contracting, ((), ())),
    preferred_element_type=jnp.float32,
    out_sharding=None if out_spec is None else PartitionSpec(*out_spec),
  )


def explicit_spec(x: jax.Array) -> tuple | None:
  """One entry a dim of an array in Explicit mode; None elsewhere, where XLA decides."""
  sharding = jax.typeof(x).sharding
  if AxisType.Explicit not in sharding.mesh.axis_types:
    return None
  return tuple(sharding.spec) + (None,) * (x.ndim - len(sharding.spec))


def take(x: jax.Array, indices: jax.Array | np.ndarray, dim: int) -> jax.Array:
  """`x` at `indices` of `dim`, placed as x is."""
  spec = explicit_spec(x)
  index = (slice(None),) * dim + (indices,)
  if spec is None:
    return x[index]
  return x.at[index].get(out_sharding=PartitionSpec(*spec))


def regroup(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """`x` with its first two dims cut or joined otherwise; the first stays sharded as it was."""
  spec = explicit_spec(x)
  if spec is None:
    return x.reshape(shape)
  rest = (None,) * (len(shape) - 1)
  return jnp.reshape(x, shape, out_sharding=PartitionSpec(spec[0], *rest))


def _axes(entry) -> tuple[str, ...]:
  return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
