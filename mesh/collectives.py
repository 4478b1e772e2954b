"""What devices say to each other inside a `shard_map`: weights gathered and their gradients
scattered, token buffers exchanged between experts, keys and values passed round a ring.
"""

import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

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


# Rows to the devices that want them, and back: any number from each to each. P devices along the
# axis, L destinations on each (experts), R rows here, W rows that may arrive, D width.


class Exchange(NamedTuple):
  """Who sends how many rows to whom; rows lie sorted by destination here and there.

  Index arrays point past the end where there is no row.
  """

  size_L: jax.Array  # rows that arrive for each destination here
  block_W: jax.Array | None  # row behind each place of the blocks sent; None where rows go alone
  place_R: jax.Array | None  # the inverse
  arrived_W: jax.Array  # arrived row at each place in order of destination
  sorted_W: jax.Array  # the inverse
  start_P: jax.Array  # first row here for each device
  sent_P: jax.Array
  there_P: jax.Array  # where on each device these rows go
  first_P: jax.Array  # where rows from each device arrive
  received_P: jax.Array
  back_P: jax.Array  # where on each device they came from


def _before(size: jax.Array, axis: int = 0) -> jax.Array:
  """Sums of what comes before."""
  return jnp.cumsum(size, axis=axis) - size


def _runs(start_B, size_B, target_B, length: int, empty: int) -> jax.Array:
  """Index i of run b (from start_B[b], size_B[b] long) to target_B[b] + i - start_B[b]."""
  i = jnp.arange(length, dtype=jnp.int32)
  b = jnp.searchsorted(start_B, i, side="right", method="compare_all") - 1
  step = i - start_B[b]
  return jnp.where(step < size_B[b], target_B[b] + step, empty)


def plan_exchange(
  size_PL: jax.Array, kept_PL: jax.Array, *, num_rows: int, block: int, ragged: bool, axis: str
) -> Exchange:
  """The exchange of rows sorted by destination.

  Args:
    size_PL: rows here for each destination.
    kept_PL: how many of them travel; per device the first of its rows, at most `block`.
    num_rows: R.
    block: most rows from one device to one other; W is P times that.
    ragged: rows go alone (needs kept_PL = size_PL), otherwise blocks of `block` rows.
    axis: the manual mesh axis.
  """
  P, L = size_PL.shape
  R, W = num_rows, P * block
  me = lax.axis_index(axis)
  all_PPL = lax.all_gather(kept_PL, axis)
  all_PP = all_PPL.sum(2)
  received_PL = all_PPL[:, me]
  received_P, sent_P = received_PL.sum(1), kept_PL.sum(1)
  start_P = _before(size_PL.sum(1))
  blocks_P = jnp.arange(P, dtype=jnp.int32) * block
  first_P = _before(received_P) if ragged else blocks_P
  arrived_PL = first_P[:, None] + _before(received_PL, axis=1)
  sorted_LP = _before(received_PL.T.reshape(-1)).reshape(L, P)
  by_destination = (sorted_LP.reshape(-1), received_PL.T.reshape(-1), arrived_PL.T.reshape(-1))
  by_arrival = (arrived_PL.reshape(-1), received_PL.reshape(-1), sorted_LP.T.reshape(-1))
  return Exchange(
    size_L=received_PL.sum(0),
    block_W=None if ragged else _runs(blocks_P, sent_P, start_P, W, R),
    place_R=None if ragged else _runs(start_P, sent_P, blocks_P, R, W),
    arrived_W=_runs(*by_destination, W, W),
    sorted_W=_runs(*by_arrival, W, W),
    start_P=start_P,
    sent_P=sent_P,
    there_P=_before(all_PP)[me],
    first_P=first_P,
    received_P=received_P,
    back_P=_before(all_PP, axis=1)[:, me],
  )


def send(rows_RD: jax.Array, plan: Exchange, axis: str) -> jax.Array:
  """Rows to their destinations: [W, D], sorted by destination, zeros at the end."""
  if plan.block_W is None:
    arrived_WD = _ragged(rows_RD, plan, plan.arrived_W.shape[0], axis, True)
  else:
    arrived_WD = _swap(_move(rows_RD, plan.block_W, plan.place_R), plan, axis)
  return _move(arrived_WD, plan.arrived_W, plan.sorted_W)


def send_back(rows_WD: jax.Array, plan: Exchange, num_rows: int, axis: str) -> jax.Array:
  """The way back of `send`: [R, D], zeros for rows that did not travel."""
  arrived_WD = _move(rows_WD, plan.sorted_W, plan.arrived_W)
  if plan.block_W is None:
    return _ragged(arrived_WD, plan, num_rows, axis, False)
  return _move(_swap(arrived_WD, plan, axis), plan.place_R, plan.block_W)


def _swap(blocks_WD, plan, axis):
  shape = (plan.sent_P.shape[0], -1, *blocks_WD.shape[1:])
  swapped = lax.all_to_all(blocks_WD.reshape(shape), axis, split_axis=0, concat_axis=0)
  return swapped.reshape(blocks_WD.shape)


@jax.custom_vjp
def _move(x_ND: jax.Array, index_R: jax.Array, inverse_N: jax.Array) -> jax.Array:
  """x[index], zeros where there is none; backward is a gather too."""
  del inverse_N
  return x_ND.at[index_R].get(mode="fill", fill_value=0)


def _move_fwd(x_ND, index_R, inverse_N):
  return _move(x_ND, index_R, inverse_N), (index_R, inverse_N)


def _move_bwd(saved, dy_RD):
  index_R, inverse_N = saved
  return _move(dy_RD, inverse_N, index_R), None, None


_move.defvjp(_move_fwd, _move_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _ragged(x_ND: jax.Array, plan: Exchange, length: int, axis: str, there: bool) -> jax.Array:
  out_LD = jnp.zeros_like(x_ND, shape=(length, *x_ND.shape[1:]))
  if there:
    sizes = (plan.start_P, plan.sent_P, plan.there_P, plan.received_P)
  else:
    sizes = (plan.first_P, plan.received_P, plan.back_P, plan.sent_P)
  return lax.ragged_all_to_all(x_ND, out_LD, *sizes, axis_name=axis)


def _ragged_fwd(x_ND, plan, length, axis, there):
  return _ragged(x_ND, plan, length, axis, there), (plan, jnp.zeros((x_ND.shape[0], 0)))


def _ragged_bwd(length, axis, there, saved, dy_LD):
  plan, like = saved
  return _ragged(dy_LD, plan, like.shape[0], axis, not there), None


_ragged.defvjp(_ragged_fwd, _ragged_bwd)
