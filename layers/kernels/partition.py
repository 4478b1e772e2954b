"""Kernels under a mesh with explicit axes and inside `shard_map`."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def auto_partitioned(function: Callable, out_shardings: Any, *args: Any) -> Any:
  """`function(*args)`; explicit mesh axes become automatic inside, and results leave as stated.

  A kernel's loops, gathers and contractions have no unambiguous sharding of their own, so in
  explicit mode only its results carry one. `out_shardings` matches the results. Without explicit
  axes in context this is a plain call. Inside `shard_map` arguments that some devices share with
  others are made to vary with the rest, so that their gradients are summed over devices.
  """
  args = vary_with(args, args)
  mesh = jax.sharding.get_abstract_mesh()
  explicit = tuple(
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind == AxisType.Explicit
  )
  if not explicit:
    return function(*args)
  return jax.sharding.auto_axes(function, axes=explicit, out_sharding=out_shardings)(*args)


def vary_with(arrays: Any, tree: Any) -> Any:
  """`tree` unchanged, but typed as varying over each manual mesh axis that any of `arrays` does.

  Under `shard_map` a loop must start from values of the type that its steps return, and a
  custom_vjp must return gradients of the type of its arguments.
  """
  varying = lambda a: jax.typeof(a).manual_axis_type.varying
  wanted = frozenset().union(*map(varying, jax.tree.leaves(arrays)))

  def one(a: jax.Array) -> jax.Array:
    missing = tuple(sorted(wanted - varying(a)))
    return jax.lax.pcast(a, missing, to="varying") if missing else a

  return jax.tree.map(one, tree)


def varying_shape(shape: tuple[int, ...], dtype: Any, operand: jax.Array) -> jax.ShapeDtypeStruct:
  """Of a kernel's result, which varies over the manual mesh axes that its operand does."""
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(operand).manual_axis_type)


def free_axes() -> list[str]:
  """Mesh axes larger than 1 along which no enclosing `shard_map` has cut the arrays."""
  mesh = jax.sharding.get_abstract_mesh()
  kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return [a for a, kind in kinds if kind is not AxisType.Manual and mesh.shape[a] > 1]


def sharding_like(x: jax.Array) -> NamedSharding:
  return jax.typeof(x).sharding


def replicated_like(x: jax.Array) -> NamedSharding:
  return NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec())
