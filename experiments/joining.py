"""One of several processes: meet the others, see that all run the same, and leave together."""

import contextlib
import enum
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib

from mesh import multihost

from . import bucket
from .config import Config, ConfigError
from .exits import RESTART, HaltError, restarted
from .overrides import flatten
from .training.manifest import saved_steps

ENDED_BY = r"ended by process (\d+)"  # begins the last words of a process that did not fail itself
_PACKAGES = ("mesh", "layers", "experiments")
_ABSENT = "nothing"

# JAX aborts the others when the coordinator is gone; first they are to read why.
_FLUSH_SECONDS = 2.0  # of what a bucket lacks
_COORDINATOR_LINGERS = 1.0


class _Stage(enum.Enum):
  FREE = "nobody waits for this process"
  JOINING = "JAX tries to reach the others, and can't be told to give up"
  JOINED = "the others count on this process"


_stage = _Stage.FREE


class Place(NamedTuple):
  """This process among others, as flags give it; nothing set: the environment is asked."""

  coordinator: str = ""
  num_processes: int | None = None
  process_id: int | None = None
  timeout: float = 300.0


def number(place: Place) -> str:
  """Of this process among the others, as announced; "0" alone, empty where only JAX can tell.

  Raises:
    ConfigError: an incomplete announcement.
  """
  try:
    arguments = multihost.announced(*place[:3])
  except ValueError as e:
    raise ConfigError(str(e)) from e
  if arguments is None:
    return "0"
  return str(arguments.get("process_id", os.environ.get("SLURM_PROCID", "")))


def join(place: Place, config: Config, folder: Path) -> None:
  """Wait for the other processes, if there are any, and compare with them.

  From here on `leave` must end the process.

  Raises:
    ConfigError: an incomplete announcement, processes that did not come in time, one that runs
      another config, code, JAX or platform, or has another number of devices. All get the last.
    HaltError: as a supervisor's restart, processes that did not come in time, and may come yet.
  """
  coordinator, count, index, timeout = place
  _enter(_Stage.JOINING)
  try:
    joined = multihost.initialize(coordinator, count, index, timeout=timeout)
  except TimeoutError as e:
    raise (HaltError(str(e), RESTART) if restarted() else ConfigError(str(e))) from e
  except ValueError as e:
    _enter(_Stage.FREE)
    raise ConfigError(str(e)) from e
  if not joined:
    _enter(_Stage.FREE)
    return
  _enter(_Stage.JOINED)
  multihost.watch_failures(_end_with)
  try:
    verdict = multihost.agree("fingerprint", json.dumps(fingerprint(config, folder)), compare)
    if verdict:
      raise ValueError(verdict)
    multihost.check_devices()
  except ValueError as e:
    _enter(_Stage.FREE)  # all processes come here
    raise ConfigError(str(e)) from e
  _start_level()


def _start_level() -> None:
  """On CPU only process 0 would find its programs in the compilation cache (JAX's key names the
  process there). It would then run ahead, and gloo waits 30 s for a peer and no longer."""
  if jax.default_backend() == "cpu":
    jax.config.update("jax_enable_compilation_cache", False)


def done() -> None:
  """The work is finished, or stopped by all together: `leave` may wait for the others."""
  _enter(_Stage.FREE)


def _enter(stage: _Stage) -> None:
  global _stage
  _stage = stage


def leave(code: int) -> None:
  """End this process: together with the others, or if it failed alone, at once.

  A process that failed would wait for the others, which wait for it. So it tells them (they end
  with the same code) and goes without a look back.
  """
  if _stage is _Stage.FREE:
    if not jax.distributed.is_initialized():
      sys.exit(code)
    with contextlib.suppress(KeyboardInterrupt):  # the second: not to wait for the others
      multihost.shut_down()
  elif _stage is _Stage.JOINED:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator is no more
      multihost.announce_failure(code)
    if multihost.process_numbers()[0] == 0:
      time.sleep(_COORDINATOR_LINGERS)
  _exit(code)


def _end_with(process: int, code: int) -> None:
  print(f"ended by process {process}, which failed with exit code {code}", file=sys.stderr)
  _exit(code)


def _exit(code: int) -> None:
  bucket.flush(_FLUSH_SECONDS)
  for stream in (sys.stdout, sys.stderr):
    if stream is not None:
      stream.flush()
  os._exit(code)


def fingerprint(config: Config, folder: Path) -> dict[str, Any]:
  """What must be the same in all processes, by the name a person knows it by."""
  steps = saved_steps(bucket.checkpoints(folder))
  return {
    "number of processes": multihost.process_numbers()[1],
    "code": source_digest(),
    "jax": jax.__version__,
    "jaxlib": jaxlib.__version__,
    "JAX_PLATFORMS": jax.config.jax_platforms,
    "--workdir": str(bucket.home(folder)),
    "newest checkpoint": steps[-1] if steps else _ABSENT,
  } | {path: repr(value) for path, value in flatten(config).items()}


def source_digest() -> str:
  """SHA-256 of all Python files of meshyard, by name and content."""
  root = Path(__file__).parents[1]
  digest = hashlib.sha256()
  for path in sorted(p for name in _PACKAGES for p in (root / name).rglob("*.py")):
    content = path.read_bytes()
    digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
  return digest.hexdigest()[:16]


def compare(texts: list[str]) -> str:
  """The first difference from process 0 among fingerprints, in a sentence; empty without one."""
  first, *others = (json.loads(text) for text in texts)
  for index, other in enumerate(others, start=1):
    for name in first | other:
      here, there = first.get(name, _ABSENT), other.get(name, _ABSENT)
      if here != there:
        return (
          f"process {index} has {name} {there}, process 0 has {here}: start all with the same "
          f"{_REMEDIES.get(name, 'config')}"
        )
  return ""


_REMEDIES = {
  "number of processes": "number",
  "code": "code of meshyard",
  "jax": "version of JAX",
  "jaxlib": "version of JAX",
  "JAX_PLATFORMS": "kind of devices",
  "--workdir": "work directory",
  "newest checkpoint": "work directory, on a disk that all of them see",
}
