"""One writer a run directory: a lock that the system frees when its holder is dead."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..exits import ConfigError

_POLL_SECONDS = 0.1


@contextlib.contextmanager
def hold(path: Path, what: str, *, patience: float = 0.0) -> Iterator[None]:
  """Hold the lock file `path`, which tells who does; the file stays.

  Processes on other hosts see the lock where the file system has locks for all of them (NFS and
  Lustre have, a bucket that is mounted has not); where it has none at all, a line says so.

  Args:
    what: is written there, for the message.
    patience: seconds to wait for a holder that is about to end.

  Raises:
    ConfigError: another process holds it, by host, process and start.
    OSError: the file can't be opened.
  """
  file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
  try:
    until = time.monotonic() + patience
    while not (free := _take(file, path)) and time.monotonic() < until:
      time.sleep(_POLL_SECONDS)
    if not free:
      raise ConfigError(f"{what} is in use by {words(holder(path))}: end that first")
    _sign(file)
    yield
  finally:
    os.close(file)  # frees it


def holder(path: Path) -> dict[str, Any]:
  """What the last that took the lock wrote: `host`, `pid`, `start`; empty if nobody did."""
  try:
    found = json.loads(path.read_text())
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}


def _take(file: int, path: Path) -> bool:
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError as e:
    if e.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL):
      raise
    print(f"{path}: this disk has no locks, so nothing keeps a second run from writing there too")
  return True


def _sign(file: int) -> None:
  text = json.dumps(signature())
  with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
    os.ftruncate(file, 0)
    os.pwrite(file, f"{text}\n".encode(), 0)


def signature() -> dict[str, Any]:
  """Who this process is, for the others."""
  start = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
  return {"host": platform.node(), "pid": os.getpid(), "start": start}


def words(who: dict[str, Any]) -> str:
  """A `signature`, for a person."""
  if not {"host", "pid", "start"} <= who.keys():
    return "another process"
  return f"process {who['pid']} on {who['host']}, since {who['start']}"
