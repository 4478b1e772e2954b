"""An append-only file of JSON lines that outlives a crash and a full disk.

`Journal(path).append(row)` writes one line and hands it to the system at once. A disk that refuses
it stops nobody: the row waits in memory, in order, and goes out with a later `append` or `close`.
A line that came out half is cut off before the next one. `read(path)` gives the rows back.

All access to such files is in this module; a folder without append needs another one of it.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..exits import ConfigError

_BLOCK = 1 << 16  # bytes read at once in search of the last line
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Journal:
  """Appends rows to the file at `path`; what a crash left of a last line is cut off first.

  Threads may share one, signal handlers may not. A file system that hangs makes `append` hang.

  Args:
    sync: wait for the disk after each row, so that it outlives the machine and not only the
      process.
    shared: other processes append to the file too, each for as long as its journal is open: wait
      for them.

  Raises:
    OSError: the file can't be opened; not if the disk is just full.
  """

  def __init__(self, path: Path, *, sync: bool = False, shared: bool = False):
    self.path = path
    self.last: str | None = None  # the last line, whether it is in the file yet or waits
    self.refusal: str | None = None  # why rows wait
    self._sync, self._shared = sync, shared
    self._waiting: deque[str] = deque()
    self._lock = threading.Lock()
    self._file = -1
    self._end: int | None = None  # of the last whole line
    try:
      self._open()
    except OSError as e:
      if e.errno not in _FULL:
        raise

  @property
  def pending(self) -> int:
    """Rows that the disk has refused so far."""
    return len(self._waiting)

  def append(self, row: dict[str, Any]) -> str:
    """Write a row, after those that wait; never raises what the system says. Returns its line."""
    line = json.dumps(plain(row))
    with self._lock:
      self.last = line
      self._waiting.append(line)
      try:
        self._flush()
        self.refusal = None
      except OSError as e:
        self.refusal = e.strerror or str(e)
    return line

  def close(self) -> None:
    """Write what waits, and close the file.

    Raises:
      OSError: rows remain that the disk refused; they are lost.
    """
    with self._lock:
      try:
        self._flush()
      except OSError as e:
        lost = len(self._waiting)
        rows = "1 row is" if lost == 1 else f"{lost} rows are"
        why = e.strerror or str(e)
        raise OSError(e.errno, f"{why}; {rows} lost", str(self.path)) from e
      finally:
        self._close()

  def _flush(self) -> None:
    while self._waiting:
      if self._file < 0:
        self._open()
      try:
        self._write(f"{self._waiting[0]}\n".encode())
      except OSError:
        self._close()  # opened anew next time, which cuts off what of the line is there
        raise
      self._waiting.popleft()

  def _write(self, data: bytes) -> None:
    assert self._end is not None
    left = memoryview(data)
    while left:
      left = left[os.write(self._file, left) :]
    if self._sync:
      os.fsync(self._file)
    self._end += len(data)

  def _open(self) -> None:
    """Open the file, and cut it off after the last whole line (after our last one, if later)."""
    file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
      if self._shared:
        fcntl.flock(file, fcntl.LOCK_EX)
      size = os.fstat(file).st_size
      known = self._end is not None and self._end <= size
      start, end, ended = (0, self._end, True) if known else _last_line(file, size)
      if end < size:
        os.ftruncate(file, end)
      if self.last is None and end:
        self.last = os.pread(file, end - start, start).decode("utf-8", "replace").rstrip("\n")
      if not ended:
        end += os.write(file, b"\n")  # all of the line is there but its end
    except BaseException:
      os.close(file)
      raise
    self._file, self._end = file, end

  def _close(self) -> None:
    if self._file >= 0:
      with contextlib.suppress(OSError):
        os.close(self._file)
      self._file = -1
      if self._shared:
        self._end = None  # others may write


def _last_line(file: int, size: int) -> tuple[int, int, bool]:
  """(start, end, does it end in a newline) of the last line, without what a crash left of one."""
  line = _line_before(file, size)
  if line.endswith(b"\n") or _is_row(line):
    return size - len(line), size, line.endswith(b"\n")
  end = size - len(line)
  return end - len(_line_before(file, end)), end, True


def _line_before(file: int, end: int) -> bytes:
  """The line that ends at byte `end`, with its newline if it has one."""
  start, tail = end, b""
  while start and b"\n" not in tail[:-1]:
    begin = max(0, start - _BLOCK)
    tail = os.pread(file, start - begin, begin) + tail
    start = begin
  return tail[tail[:-1].rfind(b"\n") + 1 :]


def _is_row(line: bytes) -> bool:
  try:
    return isinstance(json.loads(line), dict)
  except ValueError:
    return False


def read_lines(path: Path) -> list[str]:
  """The lines of a journal, without a last one that a crash cut off; none if there is no file.

  Raises:
    OSError: the file can't be read.
  """
  try:
    data = path.read_bytes()
  except FileNotFoundError:
    return []
  whole, _, rest = data.rpartition(b"\n")
  lines = whole.decode("utf-8", "replace").split("\n") if whole else []
  return [*lines, rest.decode()] if _is_row(rest) else lines


def read(
  path: Path, choose: Callable[[list[str]], Iterable[int]] | None = None
) -> list[dict[str, Any]]:
  """Rows of a journal; a last line cut off by a crash is left out.

  Args:
    choose: which lines to read, from 0; the others may be damaged.

  Raises:
    ConfigError: another line is damaged.
  """
  lines, rows = read_lines(path), []
  for i in range(len(lines)) if choose is None else choose(lines):
    row = parse(lines[i])
    if row is None:
      raise ConfigError(f"{path} line {i + 1} is not JSON; repair or remove the file")
    rows.append(row)
  return rows


def parse(line: str) -> dict[str, Any] | None:
  """The row of a line; None if it holds none."""
  try:
    row = json.loads(line)
  except ValueError:
    return None
  return row if isinstance(row, dict) else None


def plain(value: Any) -> Any:
  """`value` as JSON has it: NaN and infinities, which it has not, are null; scalars of numpy and
  jax are numbers; paths and other objects are text."""
  if isinstance(value, dict):
    return {str(k): plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(v) for v in value]
  if value is None or isinstance(value, (bool, int, str)):
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if hasattr(value, "tolist"):
    return plain(value.tolist())
  return str(value)
