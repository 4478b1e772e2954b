"""Metrics of a run: one JSON line and one set of TensorBoard scalars a logged step."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from .step import StepMetrics


def summarise(steps: list[StepMetrics]) -> dict[str, Any]:
  """Means over the logged interval of metrics already on the host.

  `load` is each expert's share of its layer's choices, one list a MoE layer in layer order.
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
    "load": [[round(float(v), 5) for v in s] for s in share],
  }
  return row


class MetricsWriter:
  """Appends to `metrics.jsonl` and to TensorBoard events in `tensorboard/`.

  Rows of steps after `resume_step` (written by a run that died before saving them) are dropped,
  so that the file holds each step once.
  """

  def __init__(self, folder: Path, *, resume_step: int = 0):
    self.path = folder / "metrics.jsonl"
    kept = [row for row in read_metrics(folder) if row["step"] <= resume_step]
    temporary = self.path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
    temporary.replace(self.path)
    self._file = self.path.open("a")
    self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

  def write(self, step: int, row: dict[str, Any]) -> None:
    """One row; flushed at once, since a dying process flushes nothing."""
    self._file.write(json.dumps({"step": step, **row}) + "\n")
    self._file.flush()
    for name, value in row.items():
      if isinstance(value, (int, float)) and math.isfinite(value):
        self._board.add_scalar(name, value, step)
    self._board.flush()

  def close(self) -> None:
    self._file.close()
    self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
  """Rows of a run; a last line cut off by a crash is left out."""
  path = folder / "metrics.jsonl"
  if not path.exists():
    return []
  rows = []
  lines = path.read_text().splitlines()
  for number, line in enumerate(lines):
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      if number != len(lines) - 1:
        raise
  return rows
