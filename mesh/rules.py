"""The one table that maps logical axes to mesh axes, and the shardings that follow from it."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from .axes import LOGICAL_AXES, MESH_AXES

MeshAxes = str | tuple[str, ...] | None


def _nearest(name: str, known: Iterable[str]) -> str:
  near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
  return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"


@dataclass(frozen=True)
class Rules:
  """Logical axis -> mesh axes. Hashable, so that it can be part of a jit cache key."""

  name: str
  table: tuple[tuple[str, tuple[str, ...]], ...]

  def __getitem__(self, logical: str) -> tuple[str, ...]:
    for name, axes in self.table:
      if name == logical:
        return axes
    raise ValueError(
      f"rules {self.name!r} have no entry for logical axis {logical!r}; "
      f"{_nearest(logical, LOGICAL_AXES)}"
    )

  @property
  def mesh_axes(self) -> frozenset[str]:
    """Every mesh axis that some rule uses."""
    return frozenset(axis for _, axes in self.table for axis in axes)


def make_rules(name: str, table: Mapping[str, MeshAxes]) -> Rules:
  """Rules from a mapping that covers exactly LOGICAL_AXES.

  Raises:
    ValueError: a logical axis is missing or unknown, or a mesh axis does not exist or comes twice.
  """
  missing, extra = set(LOGICAL_AXES) - set(table), set(table) - set(LOGICAL_AXES)
  if missing or extra:
    raise ValueError(
      f"rules {name!r} must cover the logical axes exactly: "
      f"missing {sorted(missing)}, unknown {sorted(extra)}"
    )
  entries = []
  for logical in LOGICAL_AXES:
    value = table[logical]
    axes = (value,) if isinstance(value, str) else tuple(value or ())
    for axis in axes:
      if axis not in MESH_AXES:
        raise ValueError(
          f"rules {name!r}: {logical} maps to {axis!r}, which is no mesh axis; "
          f"{_nearest(axis, MESH_AXES)}"
        )
      if axes.count(axis) > 1:
        raise ValueError(f"rules {name!r}: {logical} maps to mesh axis {axis} twice")
    entries.append((logical, axes))
  return Rules(name, tuple(entries))


_BATCH = ("data", "fsdp", "expert")

_TABLE: dict[str, MeshAxes] = {
  # Weights. Dense ones spread their width over every axis that would otherwise hold a copy;
  # those of experts spread it over fsdp, since the expert axis already holds different experts.
  "embed": ("fsdp", "expert", "context"),
  "mlp": "tensor",
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_dim": None,
  "vocab": "tensor",
  "expert": "expert",
  "expert_embed": "fsdp",
  "expert_mlp": "tensor",
  "norm": None,
  "layers": "stage",  # each pipeline stage holds its share of a segment's repeats
  # Activations.
  "act_batch": _BATCH,
  "act_seq": "context",
  "act_norm_seq": ("context", "tensor"),  # between blocks, where every position stands alone
  "act_embed": None,
  "act_mlp": "tensor",
  "act_heads": "tensor",
  "act_kv_heads": "tensor",
  "act_vocab": "tensor",
  "act_expert": "expert",
  # Decoding cache.
  "cache_batch": _BATCH,
  "cache_seq": None,
  "cache_heads": "tensor",
}


def _without(*unused: str) -> dict[str, MeshAxes]:
  def keep(axes: MeshAxes) -> MeshAxes:
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return tuple(axis for axis in axes if axis not in unused)

  return {logical: keep(axes) for logical, axes in _TABLE.items()}


PRESETS: dict[str, Rules] = {
  name: make_rules(name, table)
  for name, table in {
    "fsdp": _without("tensor", "expert"),
    "fsdp_tensor": _without("expert"),
    "fsdp_expert": _without("tensor"),
    "all": _TABLE,
  }.items()
}


def parse_rules(text: str) -> Rules:
  """Rules from text: the name of a preset, then any number of changed entries.

  "all,embed=fsdp+context,act_norm_seq=context,mlp=" is the preset `all` in which `embed` is cut
  over fsdp and, within it, context; `act_norm_seq` over context; and `mlp` not at all. The rules
  are called what the text says, without spaces.

  Raises:
    ValueError: an unknown preset, logical axis or mesh axis, with the nearest names; a change
      without "="; an axis changed twice.
  """
  name = "".join(text.split())
  preset, *changes = name.split(",")
  if preset not in PRESETS:
    hint = f"begin with a preset: {', '.join(PRESETS)}" if "=" in preset else None
    raise ValueError(f"rules {text!r}: no preset {preset!r}; {hint or _nearest(preset, PRESETS)}")
  if not changes:
    return PRESETS[preset]
  changed: dict[str, tuple[str, ...]] = {}
  for change in changes:
    logical, equals, axes = change.partition("=")
    if not equals:
      raise ValueError(
        f"rules {text!r}: write {change!r} as LOGICAL=AXIS+AXIS, or LOGICAL= for none"
      )
    if logical not in LOGICAL_AXES:
      raise ValueError(
        f"rules {text!r}: no logical axis {logical!r}; {_nearest(logical, LOGICAL_AXES)}"
      )
    if logical in changed:
      raise ValueError(f"rules {text!r}: {logical} is changed twice")
    changed[logical] = tuple(axes.split("+")) if axes else ()
  return make_rules(name, dict(PRESETS[preset].table) | changed)


def validate(rules: Rules, mesh: Any) -> None:
  """Refuses a mesh whose devices the rules would leave with copies of everything.

  Raises:
    ValueError: a mesh axis larger than 1 that no rule uses.
  """
  for axis, size in mesh.shape.items():
    if size > 1 and axis not in rules.mesh_axes:
      users = [name for name, preset in PRESETS.items() if axis in preset.mesh_axes]
      hint = f"; rules {' and '.join(users)} do" if users else ""
      raise ValueError(f"mesh axis {axis}={size} is used by no rule of {rules.name!r}{hint}")


def assign(
  logical: Sequence[str | None],
  rules: Rules,
  sizes: Mapping[str, int],
  name: str = "array",
  shape: Sequence[int] | None = None,
) -> list[tuple[str, ...]]:
  """For each dim, the mesh axes that shard it, leaving out those of size 1 or not in `sizes`.

  Beside `act_expert`, `act_batch` gives up the mesh axes that `act_expert` takes: rows on their
  way to the experts are spread over the other batch axes. `name` and `shape` are for errors.

  Raises:
    ValueError: a logical axis without a rule, or a mesh axis wanted by two dims.
  """
  where = f"{name} with axes {tuple(logical)}"
  if shape is not None:
    where = f"{name} of shape {tuple(shape)} with axes {tuple(logical)}"
  taken = rules["act_expert"] if "act_expert" in logical else ()
  dims: list[tuple[str, ...]] = []
  owner: dict[str, str] = {}
  for axis in logical:
    try:
      wanted = () if axis is None else rules[axis]
    except ValueError as error:
      raise ValueError(f"{where}: {error}") from None
    if axis == "act_batch":
      wanted = tuple(a for a in wanted if a not in taken)
    dims.append(tuple(a for a in wanted if sizes.get(a, 1) > 1))
    for a in dims[-1]:
      if a in owner:
        raise ValueError(f"{where}: both {owner[a]} and {axis} want mesh axis {a}")
      owner[a] = str(axis)
  return dims


def spec_entry(axes: tuple[str, ...]) -> MeshAxes:
  """One dim of a PartitionSpec in JAX's own normal form."""
  return axes if len(axes) > 1 else axes[0] if axes else None


def spec_for(
  logical: Sequence[str | None],
  rules: Rules,
  mesh: Any,
  shape: Sequence[int] | None = None,
  *,
  name: str = "array",
) -> PartitionSpec:
  """The PartitionSpec of an array with these logical axes, one entry a dim.

  Args:
    logical: a logical axis, or None (never sharded), for each dim.
    rules: the table.
    mesh: a Mesh or AbstractMesh; axes it lacks count as size 1.
    shape: the array's shape, to check that every sharded dim divides.
    name: what to call the array in errors.

  Raises:
    ValueError: as `assign`; `shape` of another length; a dim that its mesh axes do not divide
      (also kv_heads below `tensor`: multi-query heads are not copied silently).
  """
  dims = assign(logical, rules, mesh.shape, name, shape)
  if shape is not None:
    if len(shape) != len(dims):
      raise ValueError(f"{name}: shape {tuple(shape)} does not fit the axes {tuple(logical)}")
    for i, (size, axes) in enumerate(zip(shape, dims, strict=True)):
      parts = math.prod(mesh.shape[a] for a in axes)
      if size % parts:
        over = " x ".join(f"{a}={mesh.shape[a]}" for a in axes)
        raise ValueError(
          f"{name} of shape {tuple(shape)}: dim {i} ({logical[i]}, size {size}) does not divide "
          f"over mesh {over}; choose mesh sizes that divide it"
        )
  return PartitionSpec(*map(spec_entry, dims))


def shardings(axes_tree: Any, shapes_tree: Any, rules: Rules, mesh: jax.sharding.Mesh) -> Any:
  """NamedSharding for every array of a tree.

  Args:
    axes_tree: the tree of `shapes_tree` with a tuple of logical axes at each leaf.
    shapes_tree: arrays or ShapeDtypeStructs.

  Raises:
    ValueError: as `spec_for`, naming the leaf by its path.
  """

  def place(path, leaf, logical):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return NamedSharding(mesh, spec_for(logical, rules, mesh, leaf.shape, name=name))

  return jax.tree_util.tree_map_with_path(place, shapes_tree, axes_tree)
