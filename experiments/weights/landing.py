"""A folder that is there whole or not at all."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..config import ConfigError
from ..paths import is_url

# The disk is full (or a quota, or a limit on file sizes), or can't be written.
_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def refuse_filled(output: str) -> Path:
  """The folder to write.

  Raises:
    ConfigError: there is something in it, or it is no folder.
  """
  if is_url(output):
    raise ConfigError(f"--output={output}: give a folder of this machine, and copy it from there")
  path = Path(output).expanduser().absolute()
  try:
    if path.is_dir() and any(path.iterdir()):
      raise ConfigError(f"--output={output}: the folder is not empty; choose another or delete it")
    if path.exists() and not path.is_dir():
      raise ConfigError(f"--output={output} is a file; give a folder")
  except (OSError, ValueError) as e:
    raise ConfigError(f"--output={output} can't be looked at: {e}") from e
  return path


@contextlib.contextmanager
def landing(output: Path) -> Iterator[Path]:
  """A folder beside `output`, which takes its name when the block ends well, and else is removed.

  What a killed process left of one is removed by the next.

  Raises:
    ConfigError: the disk refuses, or another process writes there.
  """
  partial = output.parent / f".{output.name}.partial"
  try:
    partial.mkdir(parents=True, exist_ok=True)
    held = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
  except OSError as e:
    raise ConfigError(f"can't write to {output.parent}: {e.strerror}") from e
  try:
    try:
      fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise ConfigError(f"another process is writing {output}: end that first") from e
    _empty(partial)
    try:
      yield partial
      partial.rename(output)
    except BaseException:
      shutil.rmtree(partial, ignore_errors=True)
      raise
  except OSError as e:
    if e.errno not in _REFUSALS:
      raise
    raise ConfigError(f"can't write {output}: {os.strerror(e.errno)}; nothing is left of it") from e
  finally:
    os.close(held)


def refuse_without_room(folder: Path, size: int) -> None:
  """Raises ConfigError if the disk of `folder` has less than `size` bytes free."""
  free = shutil.disk_usage(folder).free
  if free < size:
    raise ConfigError(
      f"the result has {size / 1e9:,.1f} GB, but the disk of {folder.parent} only "
      f"{free / 1e9:,.1f} GB left"
    )


def _empty(folder: Path) -> None:
  for path in folder.iterdir():
    if path.is_dir() and not path.is_symlink():
      shutil.rmtree(path)
    else:
      path.unlink()
