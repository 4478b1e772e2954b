"""Weights from a checkpoint onto the mesh, one tensor at a time.

A parameter is allocated on the devices, and each tensor goes there as it is in the file, to be
cast, laid out and written into its place: on the host there is never more than one of them.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layers.spec import ModelSpec

from ..config import ConfigError
from .source import Source
from .table import Piece, Rule, Table, grouped, pieces, their_shape, to_ours

_SHOWN = 6  # names in a message


def load(
  source: Source,
  table: Table,
  spec: ModelSpec,
  abstract: Any,
  *,
  progress: Callable[[int, int], None] = lambda done, count: None,
) -> Any:
  """Parameters like `abstract`, filled from `source`.

  Raises:
    ConfigError: tensors that are missing, of another shape, or left over; by name.
  """
  paths, tree = jax.tree.flatten_with_path(abstract)
  leaves = {_name(path): leaf for path, leaf in paths}
  plan = list(pieces(table, spec, {k: leaf.shape for k, leaf in leaves.items()}, source.tensors))
  check(source, table, leaves, plan)
  filled: dict[str, jax.Array] = {}
  by_tensor = grouped(plan)
  for done, (name, own) in enumerate(by_tensor.items()):
    progress(done, len(by_tensor))
    # Once it is there, the host's copy goes when the next program is sent.
    tensor = jax.block_until_ready(
      _put(source.tensors[name].read(), leaves[own[0].leaf].sharding.mesh)
    )
    for piece in own:
      _fill(filled, piece, leaves, tensor)
    jax.block_until_ready([filled[piece.leaf] for piece in own])  # or tensors pile up on their way
  progress(len(by_tensor), len(by_tensor))
  return jax.tree.unflatten(tree, [filled[name] for name in leaves])


def _fill(
  filled: dict[str, jax.Array], piece: Piece, leaves: dict[str, Any], tensor: jax.Array
) -> None:
  """Write a part of a parameter to its place, allocating the parameter for the first one."""
  leaf = leaves[piece.leaf]
  if piece.at and piece.leaf not in filled:
    filled[piece.leaf] = _empty(leaf.shape, leaf.dtype, leaf.sharding)
  write = _write(
    piece.rule.unnamed, piece.part, tuple(piece.shapes(leaves)), leaf.dtype, leaf.sharding
  )
  filled[piece.leaf] = write(filled.get(piece.leaf), tensor, np.asarray(piece.at, np.int32))


def check(source: Source, table: Table, leaves: dict[str, Any], plan: list[Piece]) -> None:
  """That every parameter has its tensor, of the right shape, and every tensor its parameter."""
  there = source.tensors
  missing = list(dict.fromkeys(p.name for p in plan if p.name not in there))
  used = {p.name for p in plan}
  left = [n for n in there if n not in used and not n.endswith(table.ignored or ("\0",))]
  if missing:
    raise ConfigError(f"{source.path} lacks {_list(missing)}" + (
      f"; it has {_list(left)}, which the model does not know" if left else ""
    ))  # fmt: skip
  for piece in plan:
    have, want = there[piece.name].shape, their_shape(piece.rule, piece.shapes(leaves))
    if have != want:
      raise ConfigError(
        f"{source.path}: {piece.name} is {list(have)}, the model needs {list(want)}"
      )
  if left:
    raise ConfigError(f"{source.path} has {_list(left)}, which the model does not know")


def _list(names: list[str]) -> str:
  shown = ", ".join(names[:_SHOWN])
  return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def by_path(params: Any) -> dict[str, Any]:
  """Leaves of a tree of parameters, by /-separated path."""
  return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _put(tensor: np.ndarray, mesh: Mesh) -> jax.Array:
  """As it lies, cut on its first axis if that divides over the devices."""
  if tensor.dtype == np.float64:  # which JAX has none of
    tensor = tensor.astype(np.float32)
  divides = tensor.ndim > 0 and len(tensor) % mesh.size == 0
  sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names if divides else None))
  return jax.device_put(tensor, sharding)


def _empty(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.Array:
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@cache
def _write(
  rule: Rule, part: int, shapes: tuple[tuple[int, ...], ...], dtype: Any, sharding: Any
) -> Callable[[jax.Array | None, jax.Array, np.ndarray], jax.Array]:
  """Writes a tensor, its axes laid as ours, at a place on the parameter's first axes; where these
  are none it is the whole parameter."""

  @partial(jax.jit, donate_argnums=0, out_shardings=sharding)
  def write(whole: jax.Array | None, tensor: jax.Array, at: jax.Array) -> jax.Array:
    value = to_ours(rule, part, tensor, shapes).astype(dtype)
    if whole is None:
      return value
    start = [at[i] for i in range(at.shape[0])] + [0] * value.ndim
    grown = value.reshape((1,) * at.shape[0] + value.shape)
    return jax.lax.dynamic_update_slice(whole, grown, start)

  return write
