"""Which processes there are: flags, SLURM, Kubernetes, or a TPU pod that JAX asks by itself."""

from collections.abc import Mapping, Sequence
from typing import Any

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
FLAGS = ("--coordinator", "--num_processes", "--process_id")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_PORT = "1234"  # of a coordinator whose address comes without one


def launch_arguments(
  environ: Mapping[str, str], *, on_tpu: bool, flags: Mapping[str, str | int | None] | None = None
) -> dict[str, Any] | None:
  """Arguments for `jax.distributed.initialize` in this environment; None for a single process.

  Kubernetes numbers the pods of an Indexed Job (JOB_COMPLETION_INDEX) but tells them neither how
  many they are nor who is first. The manifest adds the number as JAX_NUM_PROCESSES, or as NNODES or
  JAX_PROCESS_COUNT as xpk does, and the address as JAX_COORDINATOR_ADDRESS, or as JOBSET_NAME and
  REPLICATED_JOB_NAME (fieldRef metadata.annotations['jobset.sigs.k8s.io/jobset-name'] and
  .../replicatedjob-name): JobSet gives the first pod the name <jobset>-<job>-0-0.<jobset>. Where
  a replicated job has several replicas, JOB_INDEX (.../job-index) and PROCESSES_IN_JOB are needed.

  Args:
    environ: environment variables.
    on_tpu: JAX will use TPUs.
    flags: values of --coordinator, --num_processes and --process_id; they go before everything.

  Raises:
    ValueError: an announcement that is incomplete or contradicts itself.
  """
  flags = {name: value for name, value in (flags or {}).items() if value not in (None, "")}
  if flags:
    return _explicit({name: str(value) for name, value in flags.items()}, FLAGS)
  if all(name in environ for name in _EXPLICIT):
    return _explicit(environ, _EXPLICIT)
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
  if "JOB_COMPLETION_INDEX" in environ and (
    "JOBSET_NAME" in environ or "JAX_COORDINATOR_ADDRESS" in environ
  ):
    return _kubernetes(environ)
  if "JAX_COORDINATOR_ADDRESS" in environ:
    return _explicit(environ, _EXPLICIT)  # says what is missing
  return None


def _explicit(values: Mapping[str, str], names: Sequence[str]) -> dict[str, Any] | None:
  missing = [name for name in names if name not in values]
  if missing:
    present = " and ".join(name for name in names if name in values)
    verb = "is" if len(missing) == 2 else "are"
    raise ValueError(f"{present} {verb} set, so {' and '.join(missing)} must be too")
  address, count, index = (values[name] for name in names)
  for name, text, least in zip(names[1:], (count, index), (1, 0), strict=True):
    if not text.isdecimal() or int(text) < least:
      raise ValueError(f"{name}={text}: must be a whole number, at least {least}")
  if int(index) >= int(count):
    raise ValueError(
      f"{names[2]}={index} is out of range: {count} processes are numbered 0 to {int(count) - 1}"
    )
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
    raise ValueError(f"{names[0]}={address}: give HOST:PORT of process 0, such as 10.0.0.1:{_PORT}")
  if int(count) == 1:
    return None
  arguments = {
    "coordinator_address": address,
    "num_processes": int(count),
    "process_id": int(index),
    "cluster_detection_method": "deactivate",
  }
  # By default process 0 listens on all networks, also when all its peers are on this machine.
  local = host in ("127.0.0.1", "localhost")
  return arguments | ({"coordinator_bind_address": address} if local else {})


def _kubernetes(environ: Mapping[str, str]) -> dict[str, Any] | None:
  address = environ.get("JAX_COORDINATOR_ADDRESS")
  if address is None:
    jobset, job = environ["JOBSET_NAME"], environ.get("REPLICATED_JOB_NAME")
    if job is None:
      raise ValueError("JOBSET_NAME is set, so REPLICATED_JOB_NAME must be too")
    address = f"{jobset}-{job}-0-0.{jobset}"
  if ":" not in address:
    address = f"{address}:{environ.get('JAX_COORDINATOR_PORT', _PORT)}"
  counts = (environ.get(n) for n in ("JAX_NUM_PROCESSES", "JAX_PROCESS_COUNT", "NNODES"))
  count = next(filter(None, counts), None)
  if count is None:
    raise ValueError(
      "a Kubernetes pod is not told how many there are: set JAX_NUM_PROCESSES (1 for a pod alone)"
    )
  index = environ.get("JAX_PROCESS_ID") or environ["JOB_COMPLETION_INDEX"]
  if "JAX_PROCESS_ID" not in environ and int(environ.get("JOB_INDEX", 0)):
    if "PROCESSES_IN_JOB" not in environ:
      raise ValueError("JOB_INDEX is set, so PROCESSES_IN_JOB (pods of one Job) must be too")
    index = str(int(environ["JOB_INDEX"]) * int(environ["PROCESSES_IN_JOB"]) + int(index))
  return _explicit(dict(zip(_EXPLICIT, (address, count, index), strict=True)), _EXPLICIT)
