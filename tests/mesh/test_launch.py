"""Which environments and flags announce several processes."""

import pytest

from mesh.launch import launch_arguments

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
FLAGS = {"--coordinator": "10.0.0.9:99", "--num_processes": 3, "--process_id": 1}
# As GKE's recipes (xpk) write them for GPU nodes; the Job controller adds JOB_COMPLETION_INDEX.
JOBSET = {
  "JOBSET_NAME": "run",
  "REPLICATED_JOB_NAME": "workers",
  "JOB_COMPLETION_INDEX": "3",
  "NNODES": "8",
}


def arguments(address, count, index, **more):
  return {
    "coordinator_address": address,
    "num_processes": count,
    "process_id": index,
    "cluster_detection_method": "deactivate",
    **more,
  }


@pytest.mark.parametrize(
  ("environ", "on_tpu", "expected"),
  [
    ({}, False, None),
    ({**EXPLICIT, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, False, None),
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
    ({**JOBSET, "TPU_WORKER_HOSTNAMES": "a,b"}, True, {}),  # a GKE TPU slice: JAX knows it
    (JOBSET, False, arguments("run-workers-0-0.run:1234", 8, 3)),
    ({**JOBSET, "JAX_COORDINATOR_PORT": "6002"}, False,
     arguments("run-workers-0-0.run:6002", 8, 3)),
    ({**JOBSET, "JAX_COORDINATOR_ADDRESS": "first"}, False, arguments("first:1234", 8, 3)),
    ({**JOBSET, "JOB_INDEX": "1", "PROCESSES_IN_JOB": "4"}, False,
     arguments("run-workers-0-0.run:1234", 8, 7)),  # replicas: 2 Jobs of 4 pods
    ({**JOBSET, "NNODES": "1", "JOB_COMPLETION_INDEX": "0"}, False, None),
    ({"JOB_COMPLETION_INDEX": "3"}, False, None),  # one of many runs that know nothing of another
  ],
)  # fmt: skip
def test_which_environments_start_jax_distributed(environ, on_tpu, expected):
  assert launch_arguments(environ, on_tpu=on_tpu) == expected


def test_what_is_explicit_goes_first():
  everything = {**SLURM, **JOBSET, **EXPLICIT}
  assert launch_arguments(everything, on_tpu=False) == arguments("10.0.0.1:1234", 4, 2)
  by_flags = launch_arguments(everything, on_tpu=True, flags=FLAGS)
  assert by_flags == arguments("10.0.0.9:99", 3, 1)
  assert launch_arguments({}, on_tpu=False, flags=dict.fromkeys(FLAGS)) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_local_coordinator_listens_on_no_network(host):
  found = launch_arguments({}, on_tpu=False, flags={**FLAGS, "--coordinator": f"{host}:99"})
  assert found["coordinator_bind_address"] == f"{host}:99"


@pytest.mark.parametrize(
  ("environ", "flags", "message"),
  [
    ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}, {},
     "JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID must be too"),
    ({}, {"--num_processes": 2, "--process_id": 0},
     "--num_processes and --process_id are set, so --coordinator must be too"),
    ({}, FLAGS | {"--process_id": 3}, "--process_id=3 is out of range: 3 .* numbered 0 to 2"),
    ({}, FLAGS | {"--process_id": -1}, "--process_id=-1: must be a whole number, at least 0"),
    ({}, FLAGS | {"--num_processes": 0}, "--num_processes=0: .* at least 1"),
    (EXPLICIT | {"JAX_NUM_PROCESSES": "two"}, {}, "JAX_NUM_PROCESSES=two: must be a whole number"),
    ({}, FLAGS | {"--coordinator": "10.0.0.1"}, "--coordinator=10.0.0.1: give HOST:PORT"),
    ({}, FLAGS | {"--coordinator": ":99"}, "--coordinator=:99: give HOST:PORT"),
    ({}, FLAGS | {"--coordinator": "host:99999"}, "--coordinator=host:99999: give HOST:PORT"),
    ({"JOBSET_NAME": "run", "JOB_COMPLETION_INDEX": "0", "NNODES": "2"}, {},
     "JOBSET_NAME is set, so REPLICATED_JOB_NAME must be too"),
    ({k: v for k, v in JOBSET.items() if k != "NNODES"}, {}, "set JAX_NUM_PROCESSES"),
    ({**JOBSET, "JOB_INDEX": "1"}, {}, "JOB_INDEX is set, so PROCESSES_IN_JOB"),
    ({**JOBSET, "NNODES": "3"}, {}, "JAX_PROCESS_ID=3 is out of range"),
  ],
)  # fmt: skip
def test_half_an_announcement_is_refused(environ, flags, message):
  with pytest.raises(ValueError, match=message):
    launch_arguments(environ, on_tpu=False, flags=flags)
