"""The head of a GGUF file: metadata, and where its tensors lie. Every length in it is compared with
what is left of the file before anything of that length is made.

The layout is that of ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import ConfigError

_SCALARS = {
  0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8",
  12: "<f8",
}  # fmt: skip
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_MAX_NAME = 1 << 16  # bytes of a name
_MAX_DIMS = 4
_MAX_STRINGS = 1 << 22  # in one list; the largest vocabularies have 2^18 words


class Entry(NamedTuple):
  """Where a tensor lies."""

  name: str
  shape: tuple[int, ...]  # slowest axis first
  kind: int  # number of its type
  offset: int  # in the data


class Header(NamedTuple):
  metadata: dict[str, Any]  # numbers, texts, lists of texts, numpy arrays
  tensors: list[Entry]
  start: int  # of the data in the file
  size: int  # of the data, in bytes


def read_header(path: Path) -> Header:
  """All but the tensors themselves.

  Raises:
    ConfigError: it is no such file, or damaged.
  """
  try:
    whole = np.memmap(path, np.uint8, mode="r")
  except (OSError, ValueError) as e:  # ValueError: it is empty
    raise ConfigError(f"{path} can't be read: {e}") from e
  try:
    return _Reader(whole).header()
  except (_DamagedError, UnicodeDecodeError) as e:
    raise ConfigError(f"{path} is damaged or no GGUF file: {e}") from e


class _DamagedError(Exception):
  pass


class _Reader:
  """Takes values from the front of a file."""

  def __init__(self, whole: np.ndarray):
    self._bytes, self._at = memoryview(whole), 0

  def header(self) -> Header:
    if bytes(self._take(4)) != b"GGUF":
      raise _DamagedError("it does not begin with GGUF")
    version = self._number("<I")
    if version & 0xFFFF == 0:
      raise _DamagedError("its numbers are big-endian, which is not read")
    if version not in (2, 3):
      raise _DamagedError(f"version {version} is not 2 or 3")
    num_tensors = self._count(24, "tensors")
    num_values = self._count(13, "values")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
      name = self._text(_MAX_NAME)
      if name in metadata:
        raise _DamagedError(f"{name!r} is there twice")
      metadata[name] = self._value(self._number("<I"), name)
    tensors = [self._entry() for _ in range(num_tensors)]
    if len({t.name for t in tensors}) != len(tensors):
      raise _DamagedError("two tensors have one name")
    align = metadata.get("general.alignment", 32)
    if not isinstance(align, int) or not 0 < align <= 1 << 20 or align & (align - 1):
      raise _DamagedError(f"general.alignment is {align!r}, no power of two")
    start = -(-self._at // align) * align
    return Header(metadata, tensors, start, len(self._bytes) - start)

  def _take(self, size: int) -> memoryview:
    left = len(self._bytes) - self._at
    if size > left:
      raise _DamagedError(f"{size:,} bytes should follow byte {self._at:,}, but {left:,} do")
    self._at += size
    return self._bytes[self._at - size : self._at]

  def _number(self, form: str) -> int:
    return struct.unpack(form, self._take(struct.calcsize(form)))[0]

  def _count(self, least: int, what: str) -> int:
    """A number of things that take at least so many bytes each."""
    count, left = self._number("<Q"), len(self._bytes) - self._at
    if count * least > left:
      raise _DamagedError(f"{count:,} {what} do not fit into the {left:,} bytes that follow")
    return count

  def _text(self, limit: int) -> str:
    size = self._count(1, "bytes of text")
    if size > limit:
      raise _DamagedError(f"a name of {size:,} bytes")
    return str(self._take(size), "utf-8")

  def _value(self, kind: int, name: str) -> Any:
    if kind in _SCALARS:
      dtype = np.dtype(_SCALARS[kind])
      value = np.frombuffer(self._take(dtype.itemsize), dtype)[0]
      # Of all numbers that round to a float32, the one with the fewest digits: 1e-05.
      return float(str(value)) if kind == _FLOAT32 else value.item()
    if kind == _STRING:
      return self._text(len(self._bytes))
    if kind != _ARRAY:
      raise _DamagedError(f"{name!r} is of unknown type {kind}")
    inner = self._number("<I")
    if inner in _SCALARS:
      dtype = np.dtype(_SCALARS[inner])
      count = self._count(dtype.itemsize, f"numbers of {name!r}")
      return np.frombuffer(self._take(count * dtype.itemsize), dtype)
    if inner != _STRING:
      raise _DamagedError(f"{name!r} is a list of type {inner}, which is not read")
    count = self._count(8, f"texts of {name!r}")
    if count > _MAX_STRINGS:
      raise _DamagedError(f"{name!r} is a list of {count:,} texts, more than {_MAX_STRINGS:,}")
    return [self._text(len(self._bytes)) for _ in range(count)]

  def _entry(self) -> Entry:
    name = self._text(_MAX_NAME)
    dims = self._number("<I")
    if not 0 < dims <= _MAX_DIMS:
      raise _DamagedError(f"{name!r} has {dims:,} dimensions")
    shape = [self._number("<Q") for _ in range(dims)]
    return Entry(name, tuple(reversed(shape)), self._number("<I"), self._number("<Q"))
