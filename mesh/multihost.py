"""Several processes: start-up, who speaks, agreements, failures, batches across hosts.

`jax.distributed` watches over the processes that it joined. Measured on CPU, JAX 0.10.2: when the
coordinator (process 0) is killed the others abort after 0.2 s, with exit code 134; when another is
killed they stay in their collective and abort with 134 once its heartbeats were missed for
_HEARTBEAT_SECONDS (JAX's own 100 s: 83 and 99 s after the kill). An abort is a C++ check: no Python
code runs any more. A process that ends by itself says so through `announce_failure`, and the
others, if they `watch_failures`, need not wait; nor if they were started by `experiments.run
--processes`, which ends them at once. One that is alive but stuck sends heartbeats for ever: see
`experiments.training.watchdog`.
"""

import itertools
import math
import os
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Client
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# `jax.distributed` has no public name for its key-value store, nor for a process's number before
# the devices are known.
from jax._src.distributed import global_state
from jax.experimental.multihost_utils import reached_preemption_sync_point
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .launch import FLAGS, launch_arguments

# Process 0 may be alone with its last report for long while the others wait to leave.
_SHUTDOWN_SECONDS = 3600
_HEARTBEAT_SECONDS = 10  # threads in C++ send them, also while Python is busy
_FAILED = "meshyard/failed"
_FOR_EVER = 7 * 24 * 3600 * 1000  # milliseconds

_watchers: list[threading.Thread] = []
_turns = itertools.count()


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  timeout: float = 300,
) -> bool:
  """Joins the other processes if there are any, and says whether; call before using JAX.

  Several processes are announced by the three arguments; by JAX_COORDINATOR_ADDRESS (host:port of
  process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID; by a SLURM step of more than one task; by a
  Cloud TPU VM or GKE TPU node pool; or by a Kubernetes Job or JobSet (`launch.launch_arguments`
  has the details). On a TPU host outside of these set TPU_SKIP_MDS_QUERY=1.

  Args:
    coordinator: HOST:PORT of process 0. All three or none.
    timeout: seconds to wait until all processes are there.

  Raises:
    ValueError: an announcement that is incomplete or contradicts itself.
    TimeoutError: not all processes came; JAX goes on trying, and would abort this process after
      another minute, so end it with `os._exit`.
  """
  if not jax.distributed.is_initialized():
    arguments = announced(coordinator, num_processes, process_id)
    if arguments is not None:
      _join(arguments, timeout)
  return jax.distributed.is_initialized()


def announced(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> dict[str, Any] | None:
  """`launch_arguments` of these values, this environment and these devices."""
  given = dict(zip(FLAGS, (coordinator, num_processes, process_id), strict=True))
  return launch_arguments(os.environ, on_tpu=on_tpu(), flags=given)


def on_tpu() -> bool:
  """JAX will use TPUs (importing it on a TPU VM puts "tpu" into `jax_platforms`)."""
  return "tpu" in (jax.config.values["jax_platforms"] or "")


def _join(arguments: dict[str, Any], timeout: float) -> None:
  """`jax.distributed.initialize` in a thread: JAX itself aborts, with a C++ trace, when it has
  waited long enough, and does not hear Ctrl-C until then."""
  failure: list[BaseException] = []
  done = threading.Event()

  def connect():
    try:
      jax.distributed.initialize(
        **arguments,
        initialization_timeout=math.ceil(timeout) + 60,
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
      )
    except BaseException as e:
      failure.append(e)
    done.set()

  threading.Thread(target=connect, daemon=True).start()
  if not done.wait(timeout):
    raise TimeoutError(_why_late(arguments, timeout))
  if failure:
    raise failure[0]


def _why_late(arguments: dict[str, Any], timeout: float) -> str:
  address, count = arguments.get("coordinator_address"), arguments.get("num_processes")
  if address is None:  # found by JAX
    return f"not all processes of this job were there after {timeout:g} s"
  index = arguments["process_id"]
  who = f"process {index} of {count}"
  if index:
    reason = _unreachable(address)
    if reason is not None:
      return (
        f"{who} can't reach the coordinator, process 0 at {address}: {reason} (tried for "
        f"{timeout:g} s)"
      )
  return (
    f"{who} waited {timeout:g} s at {address}, but not all others came; start all {count} with "
    "the same coordinator, each with a number of its own"
  )


def _unreachable(address: str, seconds: float = 5) -> str | None:
  """Why nothing listens at HOST:PORT, or None."""
  host, _, port = address.rpartition(":")
  outcome: list[str | None] = []

  def connect():
    try:
      Client((host.strip("[]"), int(port)), "AF_INET").close()
      outcome.append(None)
    except OSError as e:
      outcome.append(e.strerror or str(e))

  thread = threading.Thread(target=connect, daemon=True)
  thread.start()
  thread.join(seconds)
  return outcome[0] if outcome else "no answer"


def _client() -> Any:
  if global_state.client is None:
    raise RuntimeError("mesh.multihost.initialize has not joined any processes")
  return global_state.client


def joined() -> bool:
  """Whether this is one of several processes, as `initialize` said."""
  return global_state.client is not None


def process_numbers() -> tuple[int, int]:
  """This process's number and how many there are, known before the devices are."""
  return global_state.process_id, global_state.num_processes


def agree(name: str, mine: str, judge: Callable[[list[str]], str], *, timeout: float = 300) -> str:
  """Process 0 judges what each process says, in the order of their numbers; all get its verdict.

  Needs `initialize`, but no devices: what differs may be what keeps the devices from starting.

  Args:
    name: of the question; each can be asked once.
    timeout: seconds to wait for each process.
  """
  client, milliseconds = _client(), math.ceil(timeout * 1000)
  key = lambda what: f"meshyard/{name}/{what}"
  client.key_value_set(key(global_state.process_id), mine)
  if global_state.process_id == 0:
    all_of_them = range(global_state.num_processes)
    said = [client.blocking_key_value_get(key(i), milliseconds) for i in all_of_them]
    client.key_value_set(key("verdict"), judge(said))
  return client.blocking_key_value_get(key("verdict"), milliseconds)


def agree_in_turn(mine: str, judge: Callable[[list[str]], str], *, timeout: float = 7200) -> str:
  """`agree`, for questions that all processes ask in the same order and any number of times."""
  return agree(f"turn/{next(_turns)}", mine, judge, timeout=timeout)


def check_devices() -> None:
  """That every process has as many devices as the others.

  Raises:
    ValueError: the devices of each group of processes.
  """
  counts = Counter(device.process_index for device in jax.devices())
  by_count: dict[int, list[int]] = {}
  for index in range(jax.process_count()):
    by_count.setdefault(counts[index], []).append(index)
  if len(by_count) > 1:
    parts = [f"{_numbers(them)} {count}" for count, them in sorted(by_count.items())]
    raise ValueError(f"every process needs the same number of devices, but {' and '.join(parts)}")


def _numbers(processes: list[int]) -> str:
  shown = ", ".join(map(str, processes[:8])) + (", ..." if len(processes) > 8 else "")
  return f"process {shown} has" if len(processes) == 1 else f"processes {shown} have"


def announce_failure(code: int) -> None:
  """Tells the processes that `watch_failures` that this one ends with exit code `code`."""
  text = f"{global_state.process_id} {code}"
  _client().key_value_set(_FAILED, text, allow_overwrite=True)


def watch_failures(failed: Callable[[int, int], None]) -> None:
  """Calls `failed(process, exit code)` in a thread once another process has announced its failure.

  `shut_down` ends the thread.
  """
  own = global_state.process_id

  def heard(text: str) -> None:
    process, code = map(int, text.split())
    if process != own:
      failed(process, code)

  _watch(_FAILED, heard)


def _watch(key: str, heard: Callable[[str], None]) -> None:
  """Calls `heard` in a thread with what somebody stores under `key`."""
  client = _client()

  def wait() -> None:
    try:
      text = client.blocking_key_value_get(key, _FOR_EVER)
    except jax.errors.JaxRuntimeError:  # `shut_down`, or the coordinator is gone
      return
    heard(text)

  _watchers.append(threading.Thread(target=wait, daemon=True))
  _watchers[-1].start()


def answer(question: str, reply: Callable[[], str]) -> None:
  """Replies, in a thread until `shut_down`, if another process asks this question by `ask`."""
  client, own = _client(), global_state.process_id

  def heard(asker: str) -> None:
    if int(asker) != own:
      client.key_value_set(f"meshyard/{question}/{own}", reply())

  _watch(f"meshyard/{question}", heard)


def ask(question: str, mine: str, *, seconds: float) -> dict[int, str] | None:
  """What the processes say that come to `answer` within `seconds`, by number, and what this one
  does; None if another has asked before. Each question can be asked once.

  Needs the coordinator, and may wait for it for ever: call in a thread.
  """
  client, own = _client(), global_state.process_id
  try:
    client.key_value_set(f"meshyard/{question}", str(own))
  except jax.errors.JaxRuntimeError:  # it is there already
    return None
  said, until = {own: mine}, time.monotonic() + seconds
  while len(said) < global_state.num_processes and time.monotonic() < until:
    time.sleep(0.1)
    said |= told(question)
  return said


def tell(name: str, text: str) -> None:
  """Leaves a text to be `told`, in place of this process's last one; waits for nobody."""
  key = f"meshyard/{name}/{global_state.process_id}"
  _client().key_value_set(key, text, allow_overwrite=True)


def told(name: str) -> dict[int, str]:
  """What processes have left under this name so far, by their numbers."""
  found = _client().key_value_dir_get(f"meshyard/{name}/")
  return {int(key.rpartition("/")[2]): text for key, text in found}


def shut_down() -> None:
  """Waits until all processes call this, and leaves them."""
  jax.distributed.shutdown()
  for watcher in _watchers:  # a thread inside of JAX aborts an interpreter that ends
    watcher.join()
  _watchers.clear()


def stop_point(tick: int) -> bool:
  """Whether all processes stop here, because one of them got SIGTERM (JAX catches it).

  Every process calls this at the same points, with the same growing `tick`; all hear True at the
  same one, about a second after the signal.
  """
  return reached_preemption_sync_point(tick)


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
