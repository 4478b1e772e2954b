"""Metrics of a run: one JSON line and one set of TensorBoard scalars a logged step."""

import os
import platform
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from .journal import Journal, plain, read
from .step import StepMetrics

_BOARD_SECONDS = 5.0  # between flushes of the events, each of which waits for the disk


def summarise(steps: list[StepMetrics]) -> dict[str, Any]:
  """Means over the logged interval of metrics already on the host.

  `load` is each expert's share of its layer's choices, one list a MoE layer in layer order;
  `load_cv` the standard deviation of these shares over their mean, averaged over layers;
  `dead_experts` how many experts of all layers nobody chose; `nonfinite` how often a router met a
  token whose logits held a NaN or an infinity.
  """
  row = {
    "loss": float(np.mean([m.loss for m in steps])),
    "aux_loss": float(np.mean([m.aux_loss for m in steps])),
    "grad_norm": float(np.mean([m.grad_norm for m in steps])),
    "update_ratio": float(np.mean([m.update_ratio for m in steps])),
    "log_z": float(np.mean([m.log_z for m in steps])),
  }
  if not steps[0].moe:
    return row
  total = [jax.tree.map(lambda *x: np.sum(x, axis=0), *(m.moe[i] for m in steps))
           for i in range(len(steps[0].moe))]  # fmt: skip
  tokens = sum(float(t.tokens.sum()) for t in total)
  choices = sum(float(t.load_E.sum()) for t in total)
  share = [load_E / max(load_E.sum(), 1) for t in total for load_E in t.load_E]
  row |= {
    "drop_rate": sum(float(t.dropped.sum()) for t in total) / max(choices, 1),
    "router_entropy": sum(float(t.entropy.sum()) for t in total) / max(tokens, 1),
    "gate": sum(float(t.gate.sum()) for t in total) / max(tokens, 1),
    "load_max_over_mean": max(float(s.max() * s.size) for s in share),
    "load_cv": float(np.mean([s.std() * s.size for s in share])),
    "dead_experts": sum(int(np.sum(s == 0)) for s in share),
    "nonfinite": sum(float(t.nonfinite.sum()) for t in total),
    "load": [[round(float(v), 5) for v in s] for s in share],
  }
  return row


def bits_of(metrics: StepMetrics) -> str:
  """Loss and gradient norm of one step, on the host: the bits of two float32, to compare runs."""
  return "-".join(np.float32(x).tobytes()[::-1].hex() for x in (metrics.loss, metrics.grad_norm))


class MetricsWriter:
  """Appends to `metrics.jsonl` and to TensorBoard events in `tensorboard/`.

  A run that goes on from an earlier step says so in a row, `{"resumed_after": step}`; the rows
  that it takes back stay in the file (`read_history`). Everything is written in the calling
  thread: a thread of its own loses its queue when the process dies. A full disk stops nothing:
  rows wait for it, TensorBoard goes without.

  Args:
    resume_step: steps that were finished before.
    note: is told, at the end, how many rows TensorBoard lacks.

  Raises:
    OSError: the folder can't be written, for another reason than that the disk is full.
  """

  def __init__(self, folder: Path, *, resume_step: int = 0, note: Callable[[str], None] = print):
    self._journal = Journal(folder / "metrics.jsonl")
    self._board = _Board(folder / "tensorboard", resume_step)
    self._note = note
    # A run that turns out to be finished takes nothing back, so this waits for the first row.
    self._resumed = None if self._journal.last is None else resume_step

  @property
  def pending(self) -> int:
    """Rows that a full disk has refused so far."""
    return self._journal.pending

  def write(self, step: int, row: dict[str, Any]) -> None:
    """One row, in the file at once: a dying process flushes nothing. JSON has no NaN: null."""
    row = plain(row)
    if self._resumed is not None:
      self._journal.append({"resumed_after": self._resumed})
      self._resumed = None
    self._journal.append({"step": step, **row})
    scalars = {k: v for k, v in row.items() if isinstance(v, (int, float))}
    values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
    self._board.add(step, summary=Summary(value=values))

  def rewind(self, step: int) -> None:
    """The run goes back: rows after `step` were for nothing."""
    self._resumed = None
    self._journal.append({"resumed_after": step})
    self._board.restart(step)

  def close(self) -> None:
    """Write what waits.

    Raises:
      OSError: the disk still refuses rows, which are lost.
    """
    try:
      self._journal.close()
    finally:
      self._board.flush()
      if self._board.dropped:
        self._note(f"TensorBoard lacks rows that the disk refused: {self._board.dropped}")


class _Board:
  """A file of TensorBoard events; those that the disk refuses are dropped."""

  def __init__(self, folder: Path, resume_step: int):
    self.dropped = 0
    name = [str(x) for x in (int(time.time()), platform.node(), resume_step, os.getpid())]
    self._path = folder / ".".join(["events.out.tfevents", *name])
    self._held: list[tuple[bytes, bool]] = []  # since the last flush; is it needed by what follows?
    self._end = 0  # of the last event that is whole
    self._flushed = time.monotonic()
    self.add(0, needed=True, file_version="brain.Event:2")
    if resume_step:
      self.restart(resume_step)

  def restart(self, step: int) -> None:
    """TensorBoard then hides what was written before from the next step on."""
    self.add(step + 1, needed=True, session_log=SessionLog(status=SessionLog.START))

  def add(self, step: int, *, needed: bool = False, **what: Any) -> None:
    event = Event(wall_time=time.time(), step=step, **what)
    self._held.append((_record(event.SerializeToString()), needed))
    if time.monotonic() - self._flushed > _BOARD_SECONDS:
      self.flush()

  def flush(self) -> None:
    held, self._held, self._flushed = self._held, [], time.monotonic()
    try:
      self._path.parent.mkdir(exist_ok=True)
      with self._path.open("ab", buffering=0) as file:
        file.truncate(self._end)  # nobody reads on behind half an event
        left = memoryview(b"".join(event for event, _ in held))
        size = len(left)
        while left:
          left = left[file.write(left) :]
        os.fsync(file.fileno())
      self._end += size
    except OSError:
      self._held = [(event, needed) for event, needed in held if needed]
      self.dropped += len(held) - len(self._held)


def _record(data: bytes) -> bytes:
  """TFRecord: length and data, each with its checksum."""
  length = struct.pack("<Q", len(data))
  check = lambda part: struct.pack("<I", masked_crc32c(part))
  return length + check(length) + data + check(data)


class History(NamedTuple):
  """Rows of a run: those that count, and each branch that a resume or a rewind took back."""

  rows: list[dict[str, Any]]
  abandoned: list[list[dict[str, Any]]]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
  """Rows of a run, each step once; a last line cut off by a crash is left out.

  Raises:
    ConfigError: another line is damaged.
  """
  return read_history(folder).rows


def read_history(folder: Path, *, most: int | None = None) -> History:
  """Rows of a run, and those that were taken back: after the step that a later part began with.

  Args:
    most: of a longer file, about so many lines, which takes as much less time: evenly chosen, and
      all beside a resume, or with a held-out loss.

  Raises:
    ConfigError: a line is damaged.
  """
  choose = None if most is None else lambda lines: _thinned(lines, most)
  history = History([], [])
  for row in read(folder / "metrics.jsonl", choose):
    step = row.get("resumed_after")
    if step is None:
      history.rows.append(row)
      continue
    back = [kept for kept in history.rows if kept["step"] > step]
    if back:
      history.abandoned.append(back)
      history.rows[:] = [kept for kept in history.rows if kept["step"] <= step]
  return history


def _thinned(lines: list[str], most: int) -> list[int]:
  resumes = [i for i, line in enumerate(lines) if line.startswith('{"resumed_after"')]
  held = [i for i, line in enumerate(lines) if '"heldout_loss"' in line]
  beside = [j for i in (*resumes, len(lines)) for j in (i - 1, i, i + 1) if 0 <= j < len(lines)]
  return sorted({*range(0, len(lines), -(-len(lines) // most) or 1), *beside, *held})
