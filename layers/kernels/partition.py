"""Kernels under a mesh with explicit axes and inside `shard_map`."""

from collections.abc import Callable
from functools import partial
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
  if not (explicit := explicit_axes()):
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


def cut_further(
  function: Callable, axes: tuple[str, ...], in_specs: Any, out_spec: PartitionSpec, arrays: tuple,
  ids: Any,
) -> jax.Array:  # fmt: skip
  """`function(*arrays, ids)` in a `shard_map` over `axes`, which may lie inside another one.

  `arrays` are cut as `in_specs` says and have gradients; integers `ids` are whole everywhere.
  Forward and backward are a `shard_map` each: jax (0.10, 0.12) can't differentiate one that lies
  inside another, since what its forward pass keeps would be cut over the outer one's axes again.
  """
  cut = partial(jax.shard_map, axis_names=set(axes), check_vma=False)
  each = PartitionSpec(axes)  # what the forward pass keeps, stacked
  # Inside, what varies over which axes is not tracked: results of any operation have no such type.
  untyped = partial(jax.tree.map, lambda x: x[None][0])
  kept = []

  def forward(arrays, ids):
    def local(arrays, ids):
      out, pull = jax.vjp(lambda *arrays: function(*arrays, ids), *untyped(arrays))
      leaves, tree = jax.tree.flatten(pull)
      kept.append(tree)
      return out, [x[None] for x in leaves]

    specs = (in_specs, PartitionSpec())
    out, leaves = cut(local, in_specs=specs, out_specs=(out_spec, each))(arrays, ids)
    return vary_with(arrays, out), (arrays, leaves)

  def backward(saved, dout):
    arrays, leaves = saved

    def local(leaves, dout):
      return jax.tree.unflatten(kept[-1], [x[0] for x in leaves])(untyped(dout))

    darrays = cut(local, in_specs=(each, out_spec), out_specs=in_specs)(leaves, dout)
    return vary_with(arrays, darrays), None

  @jax.custom_vjp
  def run(arrays, ids):
    local = lambda arrays, ids: function(*arrays, ids)
    specs = (in_specs, PartitionSpec())
    return vary_with(arrays, cut(local, in_specs=specs, out_specs=out_spec)(arrays, ids))

  run.defvjp(forward, backward)
  return run(vary_with(arrays, arrays), vary_with(arrays, ids))


def varying_shape(shape: tuple[int, ...], dtype: Any, operand: jax.Array) -> jax.ShapeDtypeStruct:
  """Of a kernel's result, which varies over the manual mesh axes that its operand does."""
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(operand).manual_axis_type)


def free_axes() -> list[str]:
  """Mesh axes larger than 1 along which no enclosing `shard_map` has cut the arrays."""
  mesh = jax.sharding.get_abstract_mesh()
  return [a for a in _axes(AxisType.Auto, AxisType.Explicit) if mesh.shape[a] > 1]


def explicit_axes() -> tuple[str, ...]:
  """Mesh axes whose shardings are part of types, which are not to be cut by hand."""
  return _axes(AxisType.Explicit)


def _axes(*kinds: AxisType) -> tuple[str, ...]:
  mesh = jax.sharding.get_abstract_mesh()
  each = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return tuple(name for name, kind in each if kind in kinds)


def cut_all(function: Callable, in_specs: Any, out_specs: Any, *args: Any) -> Any:
  """`function(*args)` in a `shard_map` over all mesh axes that are left, if any is larger than 1.

  Those of size 1 too, without which no kernel is free of the compiler.
  """
  if not free_axes():
    return function(*args)
  left = {*_axes(AxisType.Auto, AxisType.Explicit)}
  # What varies over which axes is not tracked: in interpret mode kernels can't be.
  cut = jax.shard_map(
    function, axis_names=left, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )
  return cut(*args)


def sharding_like(x: jax.Array) -> NamedSharding:
  return jax.typeof(x).sharding


def without_last(sharding: NamedSharding) -> NamedSharding:
  """Of an array that lacks the last dim."""
  return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:-1]))


def replicated_like(x: jax.Array) -> NamedSharding:
  return NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec())
