"""Start-up decisions, batches over hosts, and two real processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mesh.multihost import (
  barrier,
  host_batch_to_global,
  initialize,
  is_primary,
  launch_arguments,
  local_rows,
)
from mesh.topology import make_mesh

pytestmark = pytest.mark.xdist_group("devices")

SLURM = {
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "node[1-2]",
  "SLURM_NTASKS": "16",
  "SLURM_PROCID": "3",
  "SLURM_LOCALID": "3",
  "SLURM_STEP_NUM_NODES": "2",
  "SLURM_GPUS_ON_NODE": "8",
}
EXPLICIT = {
  "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
  "JAX_NUM_PROCESSES": "4",
  "JAX_PROCESS_ID": "2",
}


@pytest.mark.parametrize(
  ("environ", "on_tpu", "expected"),
  [
    ({}, False, None),
    ({**EXPLICIT, "JAX_NUM_PROCESSES": "1"}, False, None),
    (SLURM, False, {}),  # one task a GPU: JAX finds everything
    ({**SLURM, "SLURM_NTASKS": "2"}, False, {"local_device_ids": list(range(8))}),
    ({**SLURM, "SLURM_NTASKS": "1"}, False, None),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}, False, None),  # in a batch script, outside srun
    ({}, True, {}),  # a Cloud TPU VM: JAX asks the metadata server
    ({"TPU_SKIP_MDS_QUERY": "1"}, True, None),
    ({"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "a,b"}, True, {}),
    ({"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}, True, None),
    ({"TPU_SKIP_MDS_QUERY": "1", "MEGASCALE_NUM_SLICES": "2"}, True, {}),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, False, None),  # a TPU host told to use its CPUs
  ],
)
def test_which_environments_start_jax_distributed(environ, on_tpu, expected):
  assert launch_arguments(environ, on_tpu=on_tpu) == expected


def test_an_explicit_coordinator_wins_over_the_scheduler():
  assert launch_arguments({**SLURM, **EXPLICIT}, on_tpu=False) == {
    "coordinator_address": "10.0.0.1:1234",
    "num_processes": 4,
    "process_id": 2,
    "cluster_detection_method": "deactivate",
  }


def test_half_a_coordinator_is_refused():
  with pytest.raises(ValueError, match="so JAX_NUM_PROCESSES and JAX_PROCESS_ID must be too"):
    launch_arguments({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}, on_tpu=False)


def test_one_process_is_primary_and_waits_for_nobody():
  assert initialize() is False
  assert is_primary()
  barrier("alone")


def test_a_batch_of_one_process_becomes_the_global_batch():
  mesh = make_mesh({"data": 2, "fsdp": 2, "context": 2})
  spec = P(("data", "fsdp"), "context")
  tokens_BT = np.arange(8 * 6).reshape(8, 6)
  batch = {"tokens": tokens_BT, "lengths": np.arange(8)}
  np.testing.assert_array_equal(local_rows(mesh, spec, 8), np.arange(8))
  placed = host_batch_to_global(batch, mesh, spec)
  assert placed["tokens"].sharding == NamedSharding(mesh, spec)
  assert placed["lengths"].sharding == NamedSharding(mesh, P(("data", "fsdp")))
  jax.tree.map(np.testing.assert_array_equal, placed, batch)
  assert placed["tokens"].addressable_shards[0].data.shape == (2, 3)
  whole = host_batch_to_global(batch, mesh, P())
  jax.tree.map(np.testing.assert_array_equal, whole, batch)


def test_rows_that_do_not_divide_are_refused():
  mesh = make_mesh({"fsdp": 4})
  with pytest.raises(ValueError, match="batch of 6 rows does not divide over 4 groups"):
    local_rows(mesh, P("fsdp"), 6)
  with pytest.raises(ValueError, match="6 rows do not divide over 4 groups of local devices"):
    host_batch_to_global(np.zeros((6, 2)), mesh, P("fsdp"))


WORKER = """
import sys, time
from pathlib import Path
import jax, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from mesh.axes import MESH_AXES
from mesh.constrain import constrain, use_mesh
from mesh.multihost import barrier, host_batch_to_global, initialize, is_primary, local_rows
from mesh.topology import make_mesh

assert initialize() and initialize()
rank = jax.process_index()
assert is_primary() == (rank == 0)
assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 4, 2)
tokens_BT = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)
spec = P(("data", "fsdp", "expert"), "context")

try:
  make_mesh({"fsdp": 2})
except ValueError as error:
  assert "leaves 1 hosts idle" in str(error)
else:
  raise AssertionError("a mesh without the devices of one process was accepted")

def check(mesh, rows):
  assert local_rows(mesh, spec, 8).tolist() == rows, local_rows(mesh, spec, 8)
  global_BT = host_batch_to_global(tokens_BT[rows], mesh, spec)
  assert global_BT.shape == (8, 6)
  for shard in global_BT.addressable_shards:
    np.testing.assert_array_equal(shard.data, tokens_BT[shard.index])
  return global_BT

check(make_mesh({"data": 2, "fsdp": 2}), [0, 1, 2, 3] if rank == 0 else [4, 5, 6, 7])
# Sequence over both processes: each must load every row, and keeps half of the positions.
mixed = [jax.devices()[i] for i in (0, 2, 1, 3)]
check(make_mesh({"fsdp": 2, "context": 2}, mixed), list(range(8)))
# Devices in an order in which a process's rows are no neighbours.
mesh = make_mesh({"fsdp": 4}, mixed)
x_BT = check(mesh, [0, 1, 4, 5] if rank == 0 else [2, 3, 6, 7])

@jax.jit
def total(x_BT):
  return constrain(x_BT * 2, "act_batch", "act_seq").sum()

with use_mesh(mesh, "all"):
  assert float(total(x_BT)) == 2 * tokens_BT.sum()
  if rank == 0:
    time.sleep(0.5)
    Path(sys.argv[1]).touch()
  barrier("the file is there")
  assert Path(sys.argv[1]).exists()

try:
  barrier(f"rank {rank}")
except RuntimeError as error:
  assert "waits at a different one" in str(error)
else:
  raise AssertionError("two barriers of different names met")
barrier("end")
print("finished", rank)
jax.distributed.shutdown()
"""


def test_two_processes_share_a_batch_and_wait_for_each_other(tmp_path):
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  environ = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600",
    "PYTHONPATH": str(Path(__file__).parents[2]),
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    "JAX_NUM_PROCESSES": "2",
  }
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", WORKER, str(tmp_path / "flag")],
      env={**environ, "JAX_PROCESS_ID": str(rank)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for rank in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=240) for process in processes]
  finally:
    for process in processes:
      process.kill()
  for rank, (process, (out, err)) in enumerate(zip(processes, outputs, strict=True)):
    assert process.returncode == 0, err[-3000:]
    assert f"finished {rank}" in out
