"""Run a function on each device's own rows, in a `shard_map` that is manual over every mesh axis
but `tensor`.

Inside, collectives are the ones that are written down: weights gathered layer by layer, their
gradients scattered, tokens sent to experts, keys round a ring, activations from stage to stage.
Tensor parallelism stays with the compiler, through `constrain`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, PartitionSpec

from .collectives import Dims, gather_weight
from .constrain import active
from .rules import Rules, assign, spec_entry


class Region(NamedTuple):
  """The mesh as a region sees it."""

  rules: Rules
  sizes: dict[str, int]  # of the manual axes larger than 1
  rows: tuple[str, ...]  # axes that shard rows
  positions: tuple[str, ...]  # axes that shard positions of a row

  @property
  def tokens(self) -> tuple[str, ...]:
    """Axes along which tokens differ."""
    return self.rows + self.positions

  def axes(self, logical: tuple[str | None, ...]) -> list[tuple[str, ...]]:
    """The manual axes that shard each dim of an array."""
    return assign(logical, self.rules, self.sizes)

  def spec(self, logical: tuple[str | None, ...]) -> PartitionSpec:
    """The same as a PartitionSpec."""
    return PartitionSpec(*map(spec_entry, self.axes(logical)))

  def gathered(self, logical: tuple[str | None, ...]) -> Dims:
    """Dims of a weight that must be whole before use: all but `expert` and `layers`."""
    kept = ("expert", "layers")
    named = enumerate(zip(logical, self.axes(logical), strict=True))
    return tuple((i, axes) for i, (name, axes) in named if axes and name not in kept)

  def run(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`function` under the shard_map; specs are trees of PartitionSpecs."""
    mesh = jax.sharding.get_abstract_mesh()
    left = {"tensor"} if mesh.shape.get("tensor", 1) > 1 else set()
    names = set(mesh.axis_names) - left
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=names)


def region_for(num_rows: int, length: int) -> Region | None:
  """The region for rows [num_rows, length, ...], or None: no mesh, nothing but `tensor` larger than
  1, rows that do not divide over it, already inside a shard_map, or Explicit axes with `tensor`
  (which jax 0.12 cannot differentiate inside a shard_map over the other axes).
  """
  rules, mesh = active()
  if rules is None or mesh.empty or AxisType.Manual in mesh.axis_types:
    return None
  sizes = {a: n for a, n in mesh.shape.items() if n > 1 and a != "tensor"}
  if not sizes or (AxisType.Explicit in mesh.axis_types and mesh.shape.get("tensor", 1) > 1):
    return None
  rows, positions = assign(("act_batch", "act_seq"), rules, sizes)
  if num_rows % math.prod(sizes[a] for a in rows):
    return None
  if length % math.prod(sizes[a] for a in positions):
    return None
  return Region(rules, sizes, rows, positions)


def make_whole(region: Region, w: jax.Array, logical: tuple[str | None, ...], dtype: Any) -> Any:
  """The whole weight from this device's shard, see `gather_weight`; cut over `tensor` as it was.

  Left to the compiler, `tensor` is no axis of a gather: each device would first get what the others
  along `tensor` have, and then gather as many times as much.
  """
  dims = region.gathered(logical)
  if not dims:
    return w
  mesh = jax.sharding.get_abstract_mesh()
  n = mesh.shape.get("tensor", 1)
  cut = assign(logical, region.rules, {"tensor": n}) if n > 1 else []
  gather = lambda w: gather_weight(w, dims, dtype, region.tokens)
  if not any(cut) or any(cut[dim] for dim, _ in dims):
    return gather(w)
  spec = PartitionSpec(*map(spec_entry, cut))
  return jax.shard_map(gather, in_specs=spec, out_specs=spec, axis_names={"tensor"})(w)


def gather(region: Region, weights: Any, axes: Any, exact: Any, dtype: Any) -> Any:
  """A tree of whole weights from this device's shards, see `gather_weight`.

  Args:
    weights: this device's shards of one layer.
    axes: a tuple of logical axes at each leaf, without `layers`.
    exact: at each leaf, whether it must not be rounded to `dtype`.
  """

  whole = lambda w, names, exact: make_whole(region, w, names, w.dtype if exact else dtype)
  return jax.tree.map(whole, weights, axes, exact)
