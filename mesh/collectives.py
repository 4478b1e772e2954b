"""What devices say to each other inside a `shard_map`: weights gathered and their gradients
scattered, token buffers exchanged between experts, keys and values passed round a ring.
"""

import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType

# A TPU compiles one collective over a whole slice into an all-reduce of the full size (seen on v5p
# and v5e with libtpu 0.0.42), two over parts of it into the all-gathers and reduce-scatters asked
# for. So there an axis of at least this size is gathered in two stages.
_TWO_STAGES = {"tpu": 8}

# Dim of a weight -> mesh axes that shard it, most significant first.
Dims = tuple[tuple[int, tuple[str, ...]], ...]

GATHERED = "gathered_weight"  # checkpoint name: never worth keeping


def manual_size(axis: str) -> int:
  """Devices along a mesh axis that the enclosing `shard_map` is manual over; else 1."""
  mesh = jax.sharding.get_abstract_mesh()
  kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
  return mesh.shape[axis] if kinds.get(axis) is AxisType.Manual else 1


def varying(x: jax.Array) -> frozenset[str]:
  """Manual axes along which `x` differs."""
  return jax.typeof(x).manual_axis_type.varying


def vary(tree: Any, axes: Collection[str]) -> Any:
  """`tree` typed as differing along the manual `axes`; its gradient is then summed over them."""

  def one(x: jax.Array) -> jax.Array:
    missing = tuple(a for a in axes if a not in varying(x))
    return lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(one, tree)


def _stages(axes: Sequence[str]) -> list[tuple[str, list[list[int]] | None]]:
  """(axis, groups of its indices) in the order of scattering: the most significant part first."""
  sizes = {axis: manual_size(axis) for axis in axes}
  used = [axis for axis in axes if sizes[axis] > 1]
  device = jax.sharding.get_abstract_mesh().abstract_device
  least = _TWO_STAGES.get(device.platform if device else jax.default_backend(), math.inf)
  if len(used) != 1 or sizes[used[0]] < least:
    return [(axis, None) for axis in used]
  size = sizes[used[0]]
  inner = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
  if inner == 1:
    return [(used[0], None)]
  outer = size // inner
  across = [[o * inner + i for o in range(outer)] for i in range(inner)]
  within = [[o * inner + i for i in range(inner)] for o in range(outer)]
  return [(used[0], across), (used[0], within)]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather_weight(w: jax.Array, dims: Dims, dtype: Any, over: tuple[str, ...]) -> jax.Array:
  """The whole weight from its shards; its gradient is summed in float32 and scattered.

  Shards are rounded to `dtype` before they travel, and the result holds such values in the dtype
  of `w`: a product that rounds its weight anyway then returns its gradient unrounded.

  Args:
    w: this device's shard.
    dims: which dims are sharded over which mesh axes; others are left as they are.
    dtype: what the weight is used in.
    over: all mesh axes along which the rows that meet the weight differ.
  """
  full = checkpoint_name(w.astype(dtype), GATHERED)
  for dim, axes in dims:
    for axis, groups in reversed(_stages(axes)):
      full = lax.all_gather(full, axis, axis=dim, tiled=True, axis_index_groups=groups)
      full = checkpoint_name(full, GATHERED)
  return checkpoint_name(vary(full.astype(w.dtype), over), GATHERED)


def _gather_fwd(w, dims, dtype, over):
  return gather_weight(w, dims, dtype, over), jnp.ravel(w)[:0]  # its type, no bytes


def _gather_bwd(dims, dtype, over, like, g):
  del dtype
  g32 = g.astype(jnp.float32)
  for dim, axes in dims:
    for axis, groups in _stages(axes):
      g32 = lax.psum_scatter(g32, axis, scatter_dimension=dim, tiled=True, axis_index_groups=groups)
  rest = tuple(a for a in over if a not in varying(like) and a in varying(g32))
  return ((lax.psum(g32, rest) if rest else g32).astype(g.dtype),)


gather_weight.defvjp(_gather_fwd, _gather_bwd)


def to_experts(rows_EGX: jax.Array) -> jax.Array:
  """[E, groups here, ...] of every device to [E here, groups of all, ...]: a fixed-size all-to-all.

  Its inverse, and its gradient, is `from_experts`.
  """
  if manual_size("expert") == 1:
    return rows_EGX
  return lax.all_to_all(rows_EGX, "expert", split_axis=0, concat_axis=1, tiled=True)


def from_experts(rows_EGX: jax.Array) -> jax.Array:
  """[E here, groups of all, ...] back to [E, groups here, ...]."""
  if manual_size("expert") == 1:
    return rows_EGX
  return lax.all_to_all(rows_EGX, "expert", split_axis=1, concat_axis=0, tiled=True)


def ring_shift(tree: Any, axis: str) -> Any:
  """What the device before this one along `axis` holds; the first receives from the last."""
  size = manual_size(axis)
  pairs = [(i, (i + 1) % size) for i in range(size)]
  return jax.tree.map(lambda x: lax.ppermute(x, axis, pairs), tree)
