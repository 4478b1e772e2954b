"""Rows that can't be read: tried again, then left blank and counted, or the end of the run."""

import threading
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from ..config import ConfigError
from .load import RowSource

RETRY_SECONDS = (0.1, 0.4, 1.6)


class RowFault(NamedTuple):
  """A row that was not read at the first try."""

  row: int
  tries: int
  reason: str
  skipped: bool  # False: a later try succeeded


class CarefulRows:
  """`rows`, reading again after an error; under `skip` a row that stays unreadable is blank.

  A blank row is all padding (segment 0, weight 0): nothing is learnt from it, no other row moves,
  and steps count it (`StepMetrics.blank_rows`).
  """

  def __init__(
    self,
    rows: RowSource,
    row_length: int,
    on_error: Literal["stop", "skip"],
    waits: Sequence[float] | None = None,
  ):
    self._rows, self._row_length = rows, row_length
    self._on_error = on_error
    self._waits = RETRY_SECONDS if waits is None else waits
    self._lock = threading.Lock()  # threads read ahead
    self._faults: list[RowFault] = []

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, row: int) -> dict[str, np.ndarray]:
    reason = ""
    for tries, wait in enumerate((*self._waits, None), start=1):
      try:
        found = self._rows[row]
      except (OSError, ConfigError) as e:
        reason = str(e)
        if wait is not None:
          time.sleep(wait)
        continue
      if tries > 1:
        self._tell(RowFault(row, tries, reason, skipped=False))
      return found
    if self._on_error == "stop":
      raise ConfigError(
        f"row {row} of the data can't be read: {reason} (tried {tries} times; data.on_error=skip "
        "leaves such rows out and counts them)"
      )
    self._tell(RowFault(row, tries, reason, skipped=True))
    return blank_row(self._row_length)

  def _tell(self, fault: RowFault) -> None:
    with self._lock:
      self._faults.append(fault)

  def faults(self) -> list[RowFault]:
    """Those met since the last call, by this process, reading ahead included."""
    with self._lock:
      faults, self._faults = self._faults, []
    return faults


def blank_row(row_length: int) -> dict[str, np.ndarray]:
  """A row of padding."""
  zeros = np.zeros(row_length, np.int32)
  names = ("tokens", "targets", "segments", "positions")
  return {name: zeros.copy() for name in names} | {"weights": np.zeros(row_length, np.float32)}
