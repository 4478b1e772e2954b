"""Several processes on this machine: `experiments.run --processes=4` starts itself four times.

The workers find each other on the loopback interface and share out the GPUs; on CPU each has
devices of its own (XLA_FLAGS=--xla_force_host_platform_device_count=2 makes 8 of 4 workers). Output
of process 0 is passed on, errors of the others with `[process 2]` before them. A signal goes to all
of them; when one fails, the others are ended.
"""

import contextlib
import glob
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from multiprocessing.connection import Listener
from typing import IO

from mesh.launch import launch_arguments
from mesh.multihost import on_tpu

from .config import ConfigError
from .exits import (
  FINISHED,
  INTERRUPTED,
  RESTART,
  USER_MISTAKE,
  WATCHDOG,
  handling,
  tells,
  with_parent,
)
from .joining import ENDED_BY

# After a signal or the first good end workers have this long to save, after a failure to say why.
# A watchdog has told the others before; one that goes on is stuck.
STOP_SECONDS = 600.0
FAILURE_SECONDS = 5.0
_STUCK_SECONDS = 0.5

_POLL_SECONDS = 0.05
_LAST_LINES = 10
_GOOD_ENDS = (FINISHED, RESTART, INTERRUPTED)

# gloo tells on standard output whom it has met, in pieces that several threads mix.
_GLOO = re.compile(
  r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :"
)
# JAX, of every SIGTERM that it passes on.
_CAUGHT = re.compile(r"preemption_notifier\.cc:\d+\] SIGTERM caught")


def check(count: int, environ: Mapping[str, str] = os.environ) -> None:
  """That `--processes=count` makes sense here.

  Raises:
    ConfigError: it does not, with the reason.
  """
  if count < 1:
    raise ConfigError(f"--processes={count}: must be at least 1")
  try:
    announced = launch_arguments(environ, on_tpu=on_tpu())
  except ValueError:
    announced = {}
  if announced is not None and count > 1:
    raise ConfigError(
      f"--processes={count} starts processes here, but the environment (SLURM, Kubernetes, TPU "
      "pod or JAX_COORDINATOR_ADDRESS) already names several: leave it out"
    )
  gpu_shares(count, environ)


def gpu_shares(count: int, environ: Mapping[str, str], present: int | None = None) -> list[str]:
  """For each of `count` processes the GPUs it gets, as JAX_LOCAL_DEVICE_IDS; empty on CPU.

  Args:
    present: NVIDIA GPUs of this machine; None: count them.

  Raises:
    ConfigError: more processes than GPUs, GPUs that do not divide, or another accelerator.
  """
  platform = environ.get("JAX_PLATFORMS", "").split(",")[0]
  if platform == "cpu" or count == 1:
    return [""] * count
  if visible := environ.get("CUDA_VISIBLE_DEVICES"):
    present = len(visible.split(","))
  elif present is None:
    present = len(glob.glob("/dev/nvidia[0-9]*"))
  if platform not in ("", "cuda", "gpu") or not present:
    raise ConfigError(
      f"--processes={count} shares out NVIDIA GPUs or runs on CPU (JAX_PLATFORMS=cpu); one process "
      "drives all other accelerators of a host"
    )
  if count > present or present % count:
    why = "has only" if count > present else "can't share out evenly"
    raise ConfigError(
      f"--processes={count}, but this machine {why} {present} GPU{'s' * (present > 1)}: give a "
      "divisor of that, or JAX_PLATFORMS=cpu"
    )
  each = present // count
  return [",".join(map(str, range(i * each, (i + 1) * each))) for i in range(count)]


def launch(command: list[str], count: int, *, stop_seconds: float = STOP_SECONDS) -> int:
  """Run `command` as `count` processes until all have ended.

  Args:
    command: the program; --coordinator, --num_processes and --process_id are added.
    stop_seconds: time to save after a signal; then workers are killed.

  Returns:
    The exit code of the first worker that failed, 128 + the signal if one killed it; else 0.
  """
  port = _free_port()
  shares = gpu_shares(count, os.environ)
  with contextlib.ExitStack() as stack:
    workers: list[_Worker] = []
    stack.callback(lambda: [worker.kill() for worker in workers])
    group = _Group(workers, stop_seconds)
    stack.enter_context(handling(group.signal))
    for index, share in enumerate(shares):
      place = (f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}")
      more = {"JAX_LOCAL_DEVICE_IDS": share} if share else {}
      workers.append(_Worker(index, [*command, *place, f"--process_id={index}"], more))
      if group.received is not None:
        workers[-1].signal(group.received)
    first = group.wait()
  for worker in workers:
    worker.read_to_the_end()
  if first is None:
    return 0
  _report(workers, group.culprit(first))
  return _exit_code(first)


def _free_port() -> int:
  with Listener(("127.0.0.1", 0)) as listener:
    return listener.address[1]


def _not_killed(worker: "_Worker") -> bool:
  """Whether it ended by itself, or by the abort with which JAX answers the end of a peer."""
  return worker.process.returncode >= 0 or worker.process.returncode == -signal.SIGABRT


def _exit_code(worker: "_Worker") -> int:
  code = worker.process.returncode
  return code if code >= 0 else 128 - code


class _Worker:
  """One process, and threads that read what it says."""

  def __init__(self, index: int, command: list[str], environ: Mapping[str, str]):
    self.index = index
    self.ended_by: int | None = None  # the process whose failure ended this one
    self.mistake: str | None = None  # its `error: ...`
    self.muted = False
    self.last: deque[str] = deque(maxlen=_LAST_LINES)
    self.process = subprocess.Popen(
      with_parent(command, os.getpid()),
      env=os.environ | environ,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      # Ctrl-C in the terminal is to reach it once, through us.
      start_new_session=True,
    )
    streams = ((self.process.stdout, self._out), (self.process.stderr, self._err))
    self._readers = [threading.Thread(target=self._read, args=s, daemon=True) for s in streams]
    for reader in self._readers:
      reader.start()

  def _read(self, stream: IO[bytes], take) -> None:
    with stream:
      for line in stream:
        take(line.decode(errors="replace").rstrip("\n"))

  def _out(self, line: str) -> None:
    if _GLOO.search(line):
      line = _GLOO.sub("", line)
      if not re.search(r"[^\d\s]", line):
        return
    if self.index == 0:
      print(line, flush=True)
    elif line:
      self.last.append(line)

  def _err(self, line: str) -> None:
    if _CAUGHT.search(line):
      return
    if found := re.match(ENDED_BY, line):
      self.ended_by = int(found[1])
    elif line.startswith("error: "):
      self.mistake = line
    elif line and not self.muted:
      if tells(line):
        self.last.append(line)
      who = f"[process {self.index}] " if self.index else ""
      # One call: print writes the end of the line in a second one, and other workers' come between.
      with contextlib.suppress(OSError):  # nobody reads it any more
        sys.stderr.write(f"{who}{line}\n")
        sys.stderr.flush()

  def signal(self, number: int) -> None:
    if self.process.poll() is None:
      self.process.send_signal(number)

  def kill(self) -> None:
    self.signal(signal.SIGKILL)
    self.process.wait()

  def read_to_the_end(self) -> None:
    for reader in self._readers:
      reader.join(timeout=5)


class _Group:
  """Waits for workers, and sees to it that none outlives the others."""

  def __init__(self, workers: list[_Worker], stop_seconds: float):
    self._workers, self._stop_seconds = workers, stop_seconds
    self._deadline: float | None = None
    self._reason = ""
    self.received: int | None = None

  def signal(self, number: int, _frame=None) -> None:
    self.received = number
    self._hurry(self._stop_seconds, signal.Signals(number).name)
    for worker in self._workers:
      worker.signal(number)

  def _hurry(self, seconds: float, reason: str) -> None:
    deadline = time.monotonic() + seconds
    if self._deadline is None or deadline < self._deadline:
      self._deadline, self._seconds, self._reason = deadline, seconds, reason

  def wait(self) -> _Worker | None:
    """The first worker that did not finish with 0, once all have ended."""
    first, running = None, list(self._workers)
    while running:
      ended = [worker for worker in running if worker.process.poll() is not None]
      running = [worker for worker in running if worker not in ended]
      for worker in sorted(ended, key=_not_killed):
        worker.read_to_the_end()
        first = first or (worker if worker.process.returncode else None)
        failed = worker.process.returncode not in _GOOD_ENDS
        patience = FAILURE_SECONDS if _not_killed(worker) else 0  # nobody told the others
        if worker.process.returncode == WATCHDOG:
          patience = _STUCK_SECONDS
        self._hurry(
          patience if failed else self._stop_seconds, f"the end of process {worker.index}"
        )
        if failed:  # the others will only say that a peer is gone
          for other in running:
            other.muted = other.index != worker.ended_by
      if self._deadline is not None and time.monotonic() > self._deadline:
        self._kill(running, told=first is None or first.process.returncode in _GOOD_ENDS)
      time.sleep(_POLL_SECONDS)
    return first

  def _kill(self, late: list[_Worker], *, told: bool) -> None:
    for worker in late:
      if told:
        why = f"did not end within {self._seconds:g} s of {self._reason}: killed"
        print(f"[process {worker.index}] {why}", file=sys.stderr)
      worker.kill()

  def culprit(self, first: _Worker) -> _Worker:
    """The worker whose failure ended `first`, or `first`."""
    return first if first.ended_by is None else self._workers[first.ended_by]


def _report(workers: list[_Worker], culprit: _Worker) -> None:
  """A mistake of the user's, once; or how the worker failed, and its last lines."""
  code = culprit.process.returncode
  if code in _GOOD_ENDS:
    return
  mistakes = {worker.mistake: worker.index for worker in reversed(workers) if worker.mistake}
  for text, index in sorted(mistakes.items(), key=lambda item: item[1]):
    print(f"[process {index}] {text}" if index else text, file=sys.stderr)
  if code == USER_MISTAKE and mistakes:
    return
  how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
  print(f"process {culprit.index} {how}, and the others with it", file=sys.stderr)
  if culprit.last and code != WATCHDOG:  # which has said all
    print("its last lines:", *(f"  {line}" for line in culprit.last), sep="\n", file=sys.stderr)
