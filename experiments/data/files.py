"""Files by path or URL: local, gs:// and whatever else fsspec knows, with errors worth reading.

fsspec comes with orbax. A gs:// URL needs its `gcsfs` backend; without it the user is told so.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import fsspec

from ..config import ConfigError

_BLOCK = 1 << 22  # bytes read at once while hashing


def locate(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
  """The file system of `path` and the path within it. Raises ConfigError if it has no backend."""
  local = "://" not in path
  try:
    return fsspec.core.url_to_fs(str(Path(path).expanduser()) if local else path)
  except (ImportError, ValueError) as error:
    raise ConfigError(f"{path} can't be reached: {error}") from error


def is_local(path: str) -> bool:
  return "://" not in path


def join(folder: str, name: str) -> str:
  return f"{folder.rstrip('/')}/{name}"


def find(pattern: str) -> list[str]:
  """The files that a path or a glob (`**` included) names, sorted. Raises ConfigError if none."""
  found = matches(pattern)
  if not found:
    raise ConfigError(f"no file matches {pattern}")
  return found


def matches(pattern: str) -> list[str]:
  """`find`, but none is no error."""
  fs, where = locate(pattern)
  with _readable(pattern):
    found = [where] if fs.isfile(where) else [p for p in fs.glob(where) if fs.isfile(p)]
  return sorted(found if is_local(pattern) else (fs.unstrip_protocol(p) for p in found))


def exists(path: str) -> bool:
  fs, where = locate(path)
  with _readable(path):
    return fs.exists(where)


def is_folder(path: str) -> bool:
  fs, where = locate(path)
  with _readable(path):
    return fs.isdir(where)


def version(path: str) -> list:
  """Size in bytes and time of change (or entity tag), by which a changed file is noticed."""
  fs, where = locate(path)
  with _readable(path):
    info = fs.info(where)
  return [info["size"], str(info.get("mtime") or info.get("etag") or info.get("created"))]


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
  try:
    yield
  except FileNotFoundError as error:
    raise ConfigError(f"{path} does not exist") from error
  except OSError as error:
    raise ConfigError(f"{path} can't be read: {error.strerror or error}") from error


@contextlib.contextmanager
def open_read(path: str) -> Iterator[IO[bytes]]:
  """Opens for reading bytes. Whatever the file system refuses becomes a ConfigError."""
  fs, where = locate(path)
  with _readable(path), fs.open(where, "rb") as stream:
    yield stream


def read_bytes(path: str) -> bytes:
  with open_read(path) as stream:
    return stream.read()


def read_range(path: str, start: int, stop: int) -> bytes:
  """Bytes `start` to `stop` by one ranged request; safe to call from several threads."""
  fs, where = locate(path)
  with _readable(path):
    return fs.cat_file(where, start=start, end=stop)


def sha256(path: str) -> str:
  digest = hashlib.sha256()
  with open_read(path) as stream:
    while block := stream.read(_BLOCK):
      digest.update(block)
  return digest.hexdigest()


@contextlib.contextmanager
def _writable(path: str) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise ConfigError(f"{path} can't be written: {error.strerror or error}") from error


def make_folder(path: str) -> None:
  fs, where = locate(path)
  with _writable(path):
    fs.makedirs(where, exist_ok=True)


def remove(pattern: str) -> None:
  """Removes the files that a glob names; none is no error."""
  fs, where = locate(pattern)
  with _writable(pattern):
    for path in fs.glob(where):
      fs.rm_file(path)


@contextlib.contextmanager
def open_atomic(path: str) -> Iterator[IO[bytes]]:
  """Opens `path`.tmp for writing and renames it to `path` at a clean end: whole or not there."""
  fs, where = locate(path)
  with _writable(path):
    with fs.open(where + ".tmp", "wb") as stream:
      yield stream
    fs.mv(where + ".tmp", where)


def write_atomic(path: str, data: bytes) -> None:
  with open_atomic(path) as stream:
    stream.write(data)
