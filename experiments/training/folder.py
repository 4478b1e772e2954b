"""The run directory: its config, what a resume changed, and a disk's refusals in words."""

import contextlib
import dataclasses
import datetime
import errno
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from .. import bucket, paths
from ..config import Config, ConfigError
from ..exits import RESTART, USER_MISTAKE, HaltError, restarted
from ..overrides import Change, from_json, to_json
from . import lease, lock
from .manifest import saved_steps

# The disk is full (or a quota, or a limit on file sizes), or has become unwritable.
_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def read_config(folder: Path) -> Config | None:
  """The config stored in a run directory; None if there is none.

  Raises:
    ConfigError: it can't be read or is not a config.
  """
  path = folder / "config.json"
  try:
    text = path.read_text()
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (OSError, ValueError) as e:
    raise ConfigError(f"can't read {path}: {e}") from e
  try:
    return from_json(json.loads(text))
  except ValueError as e:  # not JSON, or not a config
    raise ConfigError(
      f"{path} is damaged ({e}); put back a good copy, or choose another --workdir"
    ) from e


def own_tokenizer(config: Config, folder: Path) -> Config:
  """`config`, its tokenizer being that of the run directory where it names none."""
  kept = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
  if config.data.tokenizer or not kept:
    return config
  return dataclasses.replace(
    config, data=dataclasses.replace(config.data, tokenizer=str(folder.absolute()))
  )


@contextlib.contextmanager
def claim(folder: Path, *, patience: float = 0.0) -> Iterator[None]:
  """Create the run directory, see that it can be written, and keep others from writing there.

  Args:
    patience: seconds to wait for another process that is about to end.

  Raises:
    ConfigError: it can't be written, or another process does that.
    HaltError: it can't be written now, though an earlier attempt could.
  """
  probe = folder / ".writable"
  with contextlib.ExitStack() as stack:
    try:
      folder.mkdir(parents=True, exist_ok=True)
      what = f"the work directory {folder}"
      stack.enter_context(lock.hold(folder / ".lock", what, patience=patience))
      if isinstance(home := bucket.home(folder), paths.Url):
        what = f"the work directory {home}"
        held = lease.hold(home / "lock", what, lost=_lost, patience=patience)
        stack.enter_context(held)
      probe.write_text("yes")
      probe.unlink()
    except ConfigError:
      raise
    except (OSError, ValueError) as e:  # ValueError: a NUL in the path
      why = f"can't write to the work directory {folder}: {getattr(e, 'strerror', None) or e}"
      if restarted():
        raise HaltError(why, RESTART) from e
      raise ConfigError(why) from e
    yield


def _lost(why: str) -> None:
  """Another process has taken the folder, so nothing more may be written there."""
  os.write(2, f"error: the work directory was {why}; this run ends\n".encode())
  os._exit(USER_MISTAKE)


def write_config(folder: Path, config: Config) -> None:
  """Store the resolved config, atomically."""
  temporary = folder / "config.json.tmp"
  temporary.write_text(json.dumps(to_json(config), indent=1) + "\n")
  temporary.replace(folder / "config.json")


def record_changes(folder: Path, step: int, reason: str, changes: Sequence[Change]) -> None:
  """Append to `interventions.jsonl` what a resume changed, after which step, and why."""
  time = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
  entries = [{"key": c.path, "old": c.stored, "new": c.requested} for c in changes]
  row = {"time": time, "step": step, "reason": reason, "changes": entries}
  with (folder / "interventions.jsonl").open("a") as file:
    file.write(json.dumps(row, default=str) + "\n")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
  """Turn the refusal of a disk that was writable at first into one sentence.

  Raises:
    ConfigError: the disk is full or has become read-only; says what is saved.
  """
  try:
    yield
  except OSError as e:
    if e.errno not in _REFUSALS:
      raise
    steps = saved_steps(bucket.checkpoints(folder))
    saved = f"step {steps[-1]} is saved" if steps else "nothing is saved yet"
    raise ConfigError(
      f"can't write to the work directory {folder}: {os.strerror(e.errno)}; {saved}, and with the "
      "disk put right the same command goes on from there"
    ) from e
