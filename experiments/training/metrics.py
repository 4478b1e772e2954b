"""Metrics of a run: one JSON line and one set of TensorBoard scalars a logged step."""

import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from ..config import ConfigError
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


class MetricsWriter:
  """Appends to `metrics.jsonl` and to TensorBoard events in `tensorboard/`.

  Rows of steps after `resume_step` (written by a run that died before saving them) are dropped,
  so that the file holds each step once. Everything is written in the calling thread: a thread of
  its own loses its queue when the process dies, and hangs when the disk is full.
  """

  def __init__(self, folder: Path, *, resume_step: int = 0):
    self.path = folder / "metrics.jsonl"
    kept = [row for row in read_metrics(folder) if row["step"] <= resume_step]
    temporary = self.path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
    temporary.replace(self.path)
    self._file = self.path.open("a")
    board = folder / "tensorboard"
    board.mkdir(exist_ok=True)
    name = [str(x) for x in (int(time.time()), platform.node(), resume_step, os.getpid())]
    # Not `EventsWriter`, which leaves its file open when the disk is full.
    self._board = RecordWriter(str(board / ".".join(["events.out.tfevents", *name])))
    self._flushed = time.monotonic()
    self._event(0, file_version="brain.Event:2")
    if resume_step:  # TensorBoard then hides what an earlier process wrote from this step on
      start = SessionLog(status=SessionLog.START)
      self._event(resume_step + 1, session_log=start)

  def write(self, step: int, row: dict[str, Any]) -> None:
    """One row; flushed at once, since a dying process flushes nothing. JSON has no NaN: null."""
    row = {name: _finite(value) for name, value in row.items()}
    self._file.write(json.dumps({"step": step, **row}) + "\n")
    self._file.flush()
    scalars = {k: v for k, v in row.items() if isinstance(v, (int, float))}
    values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
    self._event(step, summary=Summary(value=values))
    if time.monotonic() - self._flushed > _BOARD_SECONDS:
      self._board.flush()
      self._flushed = time.monotonic()

  def _event(self, step: int, **what: Any) -> None:
    event = Event(wall_time=time.time(), step=step, **what)
    self._board.write(event.SerializeToString())

  def close(self) -> None:
    try:
      self._file.close()
    finally:
      self._board.close()


def _finite(value: Any) -> Any:
  return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(folder: Path) -> list[dict[str, Any]]:
  """Rows of a run; a last line cut off by a crash is left out.

  Raises:
    ConfigError: another line is damaged.
  """
  path = folder / "metrics.jsonl"
  if not path.exists():
    return []
  rows = []
  lines = path.read_text(errors="replace").splitlines()
  for number, line in enumerate(lines, start=1):
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError as e:
      if number != len(lines):
        raise ConfigError(f"{path} line {number} is not JSON; repair or remove the file") from e
  return rows
