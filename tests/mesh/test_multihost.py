"""Batches over hosts, missing peers, and two real processes."""

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
  _numbers,
  barrier,
  check_devices,
  host_batch_to_global,
  initialize,
  is_primary,
  local_rows,
)
from mesh.topology import make_mesh

pytestmark = pytest.mark.xdist_group("devices")


def test_one_process_is_primary_and_waits_for_nobody():
  assert initialize() is False
  assert is_primary()
  barrier("alone")
  check_devices()


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


def test_processes_are_named_but_not_all_of_many():
  assert _numbers([2]) == "process 2 has"
  assert _numbers([0, 3]) == "processes 0, 3 have"
  assert _numbers(list(range(100))) == "processes 0, 1, 2, 3, 4, 5, 6, 7, ... have"


WORKER = """
import signal, sys, time, threading
from pathlib import Path
import jax, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from mesh.axes import MESH_AXES
from mesh.constrain import constrain, use_mesh
from mesh.multihost import (
  agree, announce_failure, barrier, check_devices, host_batch_to_global, initialize, is_primary,
  local_rows, process_numbers, shut_down, stop_point, watch_failures)
from mesh.topology import make_mesh

assert initialize() and initialize()
rank, count = process_numbers()
assert agree("who", f"rank {rank}", " and ".join) == "rank 0 and rank 1"
assert agree("nothing", "", "".join) == ""
failed, told = [], threading.Event()
watch_failures(lambda *failure: (failed.append(failure), told.set()))
assert (rank, count) == (jax.process_index(), 2)
check_devices()
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

# A signal to one stops both, at the same point.
for tick in range(1, 10_000):
  if tick == 5 and rank == 1:
    signal.raise_signal(signal.SIGTERM)
  if stop_point(tick):
    break
  time.sleep(0.01)
assert agree("where", str(tick), lambda said: str(len(set(said)))) == "1" and 5 < tick < 9_999

if rank == 1:
  announce_failure(3)
else:
  assert told.wait(60) and failed == [(1, 3)]
barrier("end")
print("finished", rank)
shut_down()
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
