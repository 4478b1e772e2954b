"""Where the seconds of a process go: `Clock` shares them out among buckets, none left over.

    clock = Clock()
    ...                                # counts as `start`, from the process's birth on
    with clock.phase("restore"): ...
    clock.switch("productive")         # what no phase claims, from here on
    with clock.phase("checkpoint"): ...
    row |= clock.row()                 # {"time": ..., "clock": {bucket: seconds, ...}}

`experiments.book.ledger` adds up the clocks of all attempts of a run.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# start: until training begins; productive: steps; data: waiting for batches; checkpoint: what of
# saving blocks; other: the rest, such as the report at the end.
BUCKETS = (
  "start", "restore", "compile", "productive", "data", "checkpoint", "evaluation", "other",
)  # fmt: skip

_LOADED = time.monotonic()


def process_age() -> float:
  """Seconds since this process was born; where the system does not tell, since this import.

  A program that replaces itself (exec) stays the same process.
  """
  with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    born = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # the 22nd field, after the name's two
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - born
    if age >= time.monotonic() - _LOADED - 0.02:  # the kernel counts in hundredths
      return age
  return time.monotonic() - _LOADED


class Clock:
  """Seconds of this process by bucket; for one thread to move, and any to read."""

  def __init__(self):
    self._spent = dict.fromkeys(BUCKETS, 0.0)
    self._bucket = "start"
    self._mark = time.monotonic() - process_age()

  def switch(self, bucket: str) -> str:
    """Count from now on as `bucket`; returns what it was."""
    assert bucket in self._spent, bucket
    now = time.monotonic()
    self._spent[self._bucket] += now - self._mark
    before, self._bucket, self._mark = self._bucket, bucket, now
    return before

  def move(self, seconds: float, bucket: str) -> None:
    """The last so many seconds were not what they are counted as."""
    self._spent[self._bucket] -= seconds
    self._spent[bucket] += seconds

  @contextlib.contextmanager
  def phase(self, bucket: str) -> Iterator[None]:
    """Count as `bucket` meanwhile; a phase inside takes its time for itself."""
    before = self.switch(bucket)
    try:
      yield
    finally:
      self.switch(before)

  def spent(self, bucket: str) -> float:
    """Seconds of one bucket so far, to the last digit."""
    running = time.monotonic() - self._mark if bucket == self._bucket else 0.0
    return self._spent[bucket] + running

  @property
  def seconds(self) -> dict[str, float]:
    """By bucket so far; the sum is the age of the process."""
    now = dict(self._spent)
    now[self._bucket] += time.monotonic() - self._mark
    return {bucket: round(seconds, 3) for bucket, seconds in now.items()}

  def row(self) -> dict[str, Any]:
    """For a row of metrics: the time, in seconds since 1970, and `seconds`."""
    return {"time": round(time.time(), 3), "clock": self.seconds}
