"""Place activations: constrain(x, *logical) inside `with use_mesh(mesh, rules)`.

Constraints on activations are hints: a dim that its mesh axes do not divide (one row while
decoding, one position) is left to the compiler. Parameters are strict, see `rules.shardings`.
"""

import contextlib
import math
from collections.abc import Iterator

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from .axes import LOGICAL_AXES
from .rules import PRESETS, Rules, assign, spec_entry, validate

# Part of every jit cache key. A global or a contextvar would leave stale traces behind.
_active_rules = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules | str) -> Iterator[Mesh]:
  """Makes `mesh` and `rules` (or the preset of that name) the context of the block.

  Raises:
    ValueError: an unknown preset, or rules that leave an axis of the mesh unused.
  """
  if isinstance(rules, str):
    if rules not in PRESETS:
      raise ValueError(f"rules {rules!r} is none of the presets {', '.join(PRESETS)}")
    rules = PRESETS[rules]
  validate(rules, mesh)
  with jax.set_mesh(mesh), _active_rules(rules):
    yield mesh


def active() -> tuple[Rules | None, jax.sharding.AbstractMesh]:
  """The rules and the mesh of the context; None and an empty mesh outside of any."""
  return _active_rules.value, jax.sharding.get_abstract_mesh()


def _uncut(mesh: jax.sharding.AbstractMesh) -> tuple[dict[str, int], bool]:
  """Axes larger than 1 that no enclosing `shard_map` has cut, and whether one is Explicit."""
  kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
  sizes = {a: n for a, n in mesh.shape.items() if n > 1 and kinds[a] is not AxisType.Manual}
  return sizes, any(kinds[a] is AxisType.Explicit for a in sizes)


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
  """Shards `x` as the active rules say; returns `x` itself where there is nothing to say.

  That is: no mesh or rules, one device, or inside a `shard_map` that is manual over the whole
  mesh. Under a partly manual `shard_map` only the other axes count. In a mesh of Auto axes this is
  a sharding constraint, in one of Explicit axes a reshard.

  Args:
    x: an array.
    *logical: for each dim a logical axis, or None: the same on all devices.

  Raises:
    ValueError: an unknown logical axis, the wrong number of them, or two that want one mesh axis.
  """
  for axis in logical:
    if axis is not None and axis not in LOGICAL_AXES:
      raise ValueError(f"constrain: {axis!r} is no logical axis, see mesh.axes.LOGICAL_AXES")
  if len(logical) != x.ndim:
    raise ValueError(f"constrain: axes {logical} for an array of shape {x.shape}")
  rules, mesh = active()
  if rules is None or mesh.empty:
    return x
  sizes, explicit = _uncut(mesh)
  if not sizes:
    return x
  loose = None if explicit else PartitionSpec.UNCONSTRAINED
  entries = [
    loose if size % math.prod(sizes[a] for a in axes) else spec_entry(axes)
    for size, axes in zip(x.shape, assign(logical, rules, sizes), strict=True)
  ]
  spec = PartitionSpec(*entries)
  if explicit:
    return jax.sharding.reshard(x, spec)
  return jax.lax.with_sharding_constraint(x, spec)


def uncut_axes(*logical: str | None) -> list[tuple[str, ...]] | None:
  """The mesh axes that shard each dim, of those that no enclosing `shard_map` has cut.

  None if there are other such axes, or Explicit ones, which are not to be cut by hand.
  """
  rules, mesh = active()
  if rules is None or mesh.empty:
    return None
  sizes, explicit = _uncut(mesh)
  found = assign(logical, rules, sizes)
  if explicit or not sizes or set(sizes) - {a for axes in found for a in axes}:
    return None
  return found


def dim_axes(*logical: str, shape: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
  """Along which mesh axes `constrain` splits each dim of an array of this shape."""
  rules, mesh = active()
  if rules is None or mesh.empty:
    return ((),) * len(logical)
  sizes, _ = _uncut(mesh)
  found = zip(shape, assign(logical, rules, sizes), strict=True)
  return tuple(() if size % math.prod(sizes[a] for a in axes) else axes for size, axes in found)


def shard_counts(*logical: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """How many ways `constrain` splits each dim of an array of this shape; 1 where it does not."""
  sizes = jax.sharding.get_abstract_mesh().shape
  return tuple(math.prod(sizes[a] for a in axes) for axes in dim_axes(*logical, shape=shape))
