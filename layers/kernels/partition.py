"""Kernels under a mesh with explicit axes: the partitioner places what is inside."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def auto_partitioned(function: Callable, out_shardings: Any, *args: Any) -> Any:
  """`function(*args)`; explicit mesh axes become automatic inside, and results leave as stated.

  A kernel's loops, gathers and contractions have no unambiguous sharding of their own, so in
  explicit mode only its results carry one. `out_shardings` matches the results. Without explicit
  axes in context this is a plain call.
  """
  mesh = jax.sharding.get_abstract_mesh()
  explicit = tuple(
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind == AxisType.Explicit
  )
  if not explicit:
    return function(*args)
  return jax.sharding.auto_axes(function, axes=explicit, out_sharding=out_shardings)(*args)


def sharding_like(x: jax.Array) -> NamedSharding:
  return jax.typeof(x).sharding


def replicated_like(x: jax.Array) -> NamedSharding:
  return NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec())
