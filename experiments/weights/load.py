"""Weights from a checkpoint onto the mesh, one tensor at a time.

A parameter is allocated on the devices, and each tensor written into its place: on the host there
is never more than one of them.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from layers.spec import ModelSpec

from ..config import ConfigError
from .source import Source
from .table import Piece, Table, grouped, pieces, their_shape, to_ours

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
    tensor = source.tensors[name].read()
    for piece in own:
      value = to_ours(piece.rule, piece.part, tensor, piece.shapes(leaves))
      _fill(filled, piece, leaves[piece.leaf], value)
  progress(len(by_tensor), len(by_tensor))
  return jax.tree.unflatten(tree, [filled[name] for name in leaves])


def _fill(filled: dict[str, jax.Array], piece: Piece, leaf: Any, value: np.ndarray) -> None:
  """Write a part of a parameter to its place, allocating the parameter for the first one."""
  if not piece.at:
    filled[piece.leaf] = _put(value, leaf.dtype, leaf.sharding)
    return
  if piece.leaf not in filled:
    filled[piece.leaf] = _empty(leaf.shape, leaf.dtype, leaf.sharding)
  part = _without(leaf.sharding, len(piece.at))
  at = np.asarray(piece.at, np.int32)
  filled[piece.leaf] = _write(leaf.sharding)(filled[piece.leaf], _put(value, leaf.dtype, part), at)
  jax.block_until_ready(filled[piece.leaf])  # or tensors pile up on their way


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


def _put(value: np.ndarray, dtype: Any, sharding: Any) -> jax.Array:
  def part(index: tuple[slice, ...]) -> np.ndarray:
    return np.ascontiguousarray(value[index].astype(dtype))

  return jax.make_array_from_callback(value.shape, sharding, part)


def _without(sharding: NamedSharding, count: int) -> NamedSharding:
  """Of one element of the first `count` axes."""
  return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[count:]))


def _empty(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.Array:
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@cache
def _write(sharding: Any) -> Callable[[jax.Array, jax.Array, np.ndarray], jax.Array]:
  return partial(jax.jit, donate_argnums=0, out_shardings=sharding)(_update)


def _update(whole: jax.Array, part: jax.Array, at: jax.Array) -> jax.Array:
  start = [at[i] for i in range(at.shape[0])] + [0] * part.ndim
  grown = part.reshape((1,) * at.shape[0] + part.shape)
  return jax.lax.dynamic_update_slice(whole, grown, start)
