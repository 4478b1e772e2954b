"""Several processes: start-up, who speaks, waiting for each other, batches across hosts."""

import math
import os
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def initialize() -> bool:
  """Joins the other processes if the environment says there are any; call before using JAX.

  Several processes are announced by JAX_COORDINATOR_ADDRESS (host:port of process 0),
  JAX_NUM_PROCESSES and JAX_PROCESS_ID; by a SLURM step of more than one task; or by a Cloud TPU VM
  or GKE TPU node pool. On a TPU host outside of these set TPU_SKIP_MDS_QUERY=1.

  Returns:
    Whether jax.distributed runs.

  Raises:
    ValueError: part of the three variables is set and nothing supplies the rest.
  """
  if not jax.distributed.is_initialized():
    platforms = jax.config.values["jax_platforms"] or ""
    arguments = launch_arguments(os.environ, on_tpu="tpu" in platforms)
    if arguments is not None:
      jax.distributed.initialize(**arguments)
  return jax.distributed.is_initialized()


def launch_arguments(environ: Mapping[str, str], *, on_tpu: bool) -> dict[str, Any] | None:
  """Arguments for `jax.distributed.initialize` in this environment; None for a single process.

  Args:
    environ: environment variables.
    on_tpu: JAX will use TPUs (importing it on a TPU VM puts "tpu" into `jax_platforms`).
  """
  missing = [name for name in _EXPLICIT if name not in environ]
  if not missing:
    address, count, index = (environ[name] for name in _EXPLICIT)
    if int(count) == 1:
      return None
    return {
      "coordinator_address": address,
      "num_processes": int(count),
      "process_id": int(index),
      "cluster_detection_method": "deactivate",
    }
  if all(name in environ for name in _SLURM) and int(environ["SLURM_NTASKS"]) > 1:
    if environ["SLURM_NTASKS"] == environ.get("SLURM_STEP_NUM_NODES") and (
      gpus := environ.get("SLURM_GPUS_ON_NODE")
    ):
      # JAX gives each task one GPU; the only task of a node is meant to have them all.
      return {"local_device_ids": list(range(int(gpus)))}
    return {}
  workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
  slices = int(environ.get("MEGASCALE_NUM_SLICES", 1))
  if on_tpu and ("," in workers or slices > 1 or "TPU_SKIP_MDS_QUERY" not in environ):
    return {}
  if "JAX_COORDINATOR_ADDRESS" in environ:
    raise ValueError(f"JAX_COORDINATOR_ADDRESS is set, so {' and '.join(missing)} must be too")
  return None


def is_primary() -> bool:
  """Whether this is the process that prints and writes what only one may write."""
  return jax.process_index() == 0


@jax.jit
def _extremes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  return jnp.min(x), jnp.max(x)


def barrier(name: str) -> None:
  """Waits until every process calls this with the same name, and for work of all local devices.

  `multihost_utils.sync_global_devices` looks at its first local device only. A process may then
  exit while another of its devices is still connecting to a peer, which on CPU (gloo) keeps that
  peer alive for some 150 s until the connection times out.

  Raises:
    RuntimeError: another process waits at a barrier of another name.
  """
  if jax.process_count() == 1:
    return
  mesh = Mesh(np.array(jax.devices()), ("all",), axis_types=(AxisType.Auto,))
  tokens = np.full(mesh.size, zlib.crc32(name.encode()), np.uint32)
  sharding = NamedSharding(mesh, PartitionSpec("all"))
  with jax.set_mesh(mesh):
    everywhere = jax.make_array_from_callback(tokens.shape, sharding, lambda index: tokens[index])
    low, high = jax.block_until_ready(_extremes(everywhere))
  if int(low) != int(high):
    raise RuntimeError(f"barrier {name!r}: another process waits at a different one")


def local_rows(mesh: Mesh, spec: PartitionSpec, num_rows: int) -> np.ndarray:
  """Which of `num_rows` global rows this process must load, ascending.

  The order of devices follows the hardware, so the rows of a process need not be neighbours; and
  processes that share rows (over context or tensor) must load the same ones.

  Args:
    spec: of the batch; its first entry shards the rows.

  Raises:
    ValueError: the rows do not divide over the mesh.
  """
  parts = _row_shards(mesh, spec)
  if num_rows % parts:
    raise ValueError(f"a batch of {num_rows} rows does not divide over {parts} groups of devices")
  starts = _local_starts(mesh, spec, num_rows)
  return (starts[:, None] + np.arange(num_rows // parts)).reshape(-1)


def host_batch_to_global(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
  """Global arrays from what each process loaded.

  Args:
    tree: numpy arrays [rows, ...] with this process's `local_rows`, other dims whole.
    mesh: the mesh.
    spec: of the batch, `P(batch axes, sequence axes)`; leaves with fewer dims use its beginning.

  Returns:
    The tree of jax.Arrays, as if every process had placed the whole batch.

  Raises:
    ValueError: the rows of a leaf do not divide over this process's part of the mesh.
  """
  shards = _row_shards(mesh, spec)
  local = len(_local_starts(mesh, spec, shards))

  def place(leaf: np.ndarray) -> jax.Array:
    if len(leaf) % local:
      raise ValueError(f"{len(leaf)} rows do not divide over {local} groups of local devices")
    per_shard = len(leaf) // local
    shape = (per_shard * shards, *leaf.shape[1:])
    rows = local_rows(mesh, spec, shape[0])

    def block(index):
      first = int(np.searchsorted(rows, index[0].start or 0))
      return leaf[(slice(first, first + per_shard), *index[1:])]

    sharding = NamedSharding(mesh, PartitionSpec(*spec[: leaf.ndim]))
    return jax.make_array_from_callback(shape, sharding, block)

  return jax.tree.map(place, tree)


def _row_shards(mesh: Mesh, spec: PartitionSpec) -> int:
  axes = spec[0] if len(spec) else None
  axes = (axes,) if isinstance(axes, str) else axes or ()
  return math.prod(mesh.shape[a] for a in axes)


def _local_starts(mesh: Mesh, spec: PartitionSpec, num_rows: int) -> np.ndarray:
  sharding = NamedSharding(mesh, PartitionSpec(*spec[:1]))
  indices = sharding.addressable_devices_indices_map((num_rows,)).values()
  return np.unique([index[0].start or 0 for index in indices if index is not None])
