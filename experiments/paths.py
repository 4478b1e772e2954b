"""Folders on a disk and in a bucket (gs://, s3://), by the same few functions. Without JAX.

A path is a `pathlib.Path`, or a `Url` in a bucket, whose files are whole objects: written
at once, never appended to nor renamed. fsspec reads and writes them.
"""

import contextlib
import dataclasses
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import fsspec

from .exits import ConfigError


@dataclasses.dataclass(frozen=True)
class Url:
  """A file or folder in a bucket."""

  text: str

  def __truediv__(self, name: str | Path) -> "Url":
    return Url(f"{self.text}/{name}")

  def __str__(self) -> str:
    return self.text


Place = Path | Url

LINK = -1  # the size of a symbolic link

# Other processes write there too, so what was listed a while ago says nothing. Orbax's own file
# systems heed it as well.
for _scheme in ("gcs", "gs", "s3"):
  fsspec.config.conf.setdefault(_scheme, {})["use_listings_cache"] = False


def is_url(text: str) -> bool:
  return "://" in text


def place(text: str) -> Place:
  """A path or URL.

  Raises:
    ConfigError: a URL of another kind, or the package that knows buckets is not there.
  """
  if not is_url(text):
    return Path(text).expanduser()
  scheme = text.partition("://")[0]
  packages = {"gs": "gcsfs", "s3": "s3fs"}
  if scheme not in packages:
    raise ConfigError(f"{text}: give a folder, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER")
  try:
    fsspec.get_filesystem_class(scheme)
  except ImportError as e:
    extra = "gcs" if scheme == "gs" else "s3"
    raise ConfigError(f"{text} needs {packages[scheme]}: pip install 'meshyard[{extra}]'") from e
  return Url(text.rstrip("/"))


@contextlib.contextmanager
def reaching(path: Place) -> Iterator[None]:
  """Whatever the libraries of a bucket raise is an OSError."""
  try:
    yield
  except OSError:
    raise
  except Exception as e:
    raise OSError(errno.EIO, reason(e), str(path)) from e


def reason(error: Exception) -> str:
  """What an error says, in a line."""
  text = str(error).strip() or type(error).__name__
  return text.splitlines()[0][:200]


def system(path: Place) -> tuple[Any, str]:
  """The file system of a path in a bucket, and its name there."""
  return fsspec.core.url_to_fs(str(path))


def names(folder: Place) -> list[str]:
  """What a folder holds, sorted; nothing if it is not there."""
  try:
    if isinstance(folder, Path):
      return sorted(os.listdir(folder))
    with reaching(folder):
      fs, where = system(folder)
      return sorted(Path(name).name for name in fs.ls(where, detail=False) if name != where)
  except (FileNotFoundError, NotADirectoryError):
    return []


def files(folder: Place) -> dict[str, int]:
  """Bytes of all files below a folder, by name; a symbolic link has LINK and is not followed."""
  if not isinstance(folder, Path):
    with reaching(folder):
      fs, where = system(folder)
      found = fs.find(where, detail=True)
    return {name.removeprefix(f"{where}/"): int(info["size"]) for name, info in found.items()}
  sizes, waiting = {}, [""]
  while waiting:
    prefix = waiting.pop()
    try:
      with os.scandir(folder / prefix) as entries:
        for entry in entries:
          name = f"{prefix}{entry.name}"
          if entry.is_symlink():
            sizes[name] = LINK
          elif entry.is_dir():
            waiting.append(f"{name}/")
          else:
            sizes[name] = entry.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
      continue
  return sizes


def size(path: Place) -> int:
  """Bytes of a file; LINK of a symbolic link.

  Raises:
    OSError: it is not there.
  """
  if isinstance(path, Path):
    return LINK if path.is_symlink() else path.stat().st_size
  with reaching(path):
    fs, where = system(path)
    return int(fs.size(where))


def modified(path: Place) -> float:
  """When a file was last written, in seconds since 1970.

  Raises:
    OSError: it is not there.
  """
  if isinstance(path, Path):
    return path.stat().st_mtime
  with reaching(path):
    fs, where = system(path)
    return fs.modified(where).timestamp()


def open_read(path: Place) -> IO[bytes]:
  if isinstance(path, Path):
    return path.open("rb")
  with reaching(path):
    fs, where = system(path)
    return fs.open(where, "rb")


def write_whole(path: Place, data: bytes) -> None:
  """Write a file that is there as a whole or not at all, also after a crash."""
  if not isinstance(path, Path):
    with _putting(path):
      fs, where = system(path)
      fs.pipe_file(where, data)
    return
  temporary = path.with_name(f"{path.name}.tmp")
  with temporary.open("wb") as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)


def create(path: Place, data: bytes) -> bool:
  """Write a file that is not there yet; False if it is. Of several who try, one succeeds."""
  try:
    if isinstance(path, Path):
      with path.open("xb") as file:
        file.write(data)
    else:
      with _putting(path):
        fs, where = system(path)
        fs.pipe_file(where, data, mode="create")
  except FileExistsError:
    return False
  return True


@contextlib.contextmanager
def _putting(path: Url) -> Iterator[None]:
  try:
    with reaching(path):
      yield
  except FileNotFoundError as e:
    raise OSError(errno.ENOENT, "there is no such bucket", str(path)) from e


def set_aside(path: Place, ending: str) -> None:
  """Rename a folder, or in a bucket, where that would be to copy it, leave a mark of that name."""
  if isinstance(path, Path):
    path.rename(path.with_name(f"{path.name}{ending}"))
  else:
    write_whole(Url(f"{path}{ending}"), b"set aside\n")


def remove(path: Place) -> None:
  """A file, or a folder and all in it; nothing if it is not there or can't be removed."""
  if isinstance(path, Path):
    if path.is_dir() and not path.is_symlink():
      shutil.rmtree(path, ignore_errors=True)
    else:
      path.unlink(missing_ok=True)
    return
  with contextlib.suppress(FileNotFoundError), reaching(path):
    fs, where = system(path)
    fs.rm(where, recursive=True)
