"""What a run does about a spike: which checkpoint it goes back to, and which data it leaves out."""

import json
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mesh.multihost import agree_in_turn

from ..config import Config, ConfigError
from .checkpoint import Checkpoints
from .guard import Anomaly, Decision, Guard, Observation
from .step import StepMetrics

WINDOWS = "skipped.json"
_POSITIONS = 10_000  # of the data, remembered; an anomaly that began earlier is left out from there


class Rewind(NamedTuple):
  """Where to go on."""

  step: int  # the checkpoint
  skipped: tuple[int, int] | None  # rows of the data, in the order of reading: [first, end)


class Recovery:
  """The guard of a run, fed by its steps, and the windows of data that rewinds leave out.

  All processes see the same numbers and decide alike; the primary writes the windows down, so that
  neither a restart nor another rewind reads them.
  """

  def __init__(self, config: Config, folder: Path, *, primary: bool):
    self.guard = Guard(config.guard)
    self._batch_size = config.data.batch_size
    self._path, self._primary = folder / WINDOWS, primary
    self._kept = _read_windows(self._path)
    if jax.process_count() > 1:  # the primary wrote them: others may read of late
      self._kept = json.loads(agree_in_turn(json.dumps(self._kept), lambda said: said[0]))
    self._waiting: deque[tuple[int, StepMetrics]] = deque()
    self._positions: deque[tuple[int, int]] = deque(maxlen=_POSITIONS)

  @property
  def windows(self) -> list[tuple[int, int]]:
    return [(w["first"], w["end"]) for w in self._kept]

  def state(self) -> dict[str, Any]:
    """For the checkpoint, as JSON: the guard's, and how many windows there were."""
    return self.guard.state() | {"windows": len(self._kept)}

  def restore(self, state: dict[str, Any]) -> None:
    """As the checkpoint has it, but for rewinds since: a crash may follow one before the next save,
    and the window that it left out is all that is known of it then."""
    since = self._kept[state.get("windows", len(self._kept)) :]
    self.guard.restore(state | {"rewinds": state["rewinds"] + [w["step"] for w in since]})

  def ran(self, step: int, metrics: StepMetrics, position: int) -> None:
    """A step was started; `position` is where its batch begins in the data."""
    self._waiting.append((step, metrics))
    self._positions.append((step, position))

  def judge(self, in_flight: int) -> list[tuple[Decision, int]]:
    """The guard's decisions, with their steps, about all but the last `in_flight`; up to the first
    that asks for more than going on."""
    found = []
    while len(self._waiting) > in_flight:
      step, m = self._waiting.popleft()
      loss, norm, ratio, log_z, cv, skipped = jax.device_get(
        (m.loss, m.grad_norm, m.update_ratio, m.log_z, m.load_cv, m.skipped)
      )
      spread = float(cv) if m.moe else None
      seen = Observation(
        step, float(loss), float(norm), float(ratio), float(log_z), spread, bool(skipped)
      )
      found.append((self.guard.observe(seen), step))
      if found[-1][0].action in ("rewind", "stop"):
        break
    return found

  def rewind(self, decision: Decision, checkpoints: Checkpoints, position: int) -> Rewind | None:
    """Find a checkpoint from before the anomaly, and leave out its data; None if there is none.

    Args:
      position: of the data, where the next step would begin.
    """
    anomaly = decision.anomaly
    assert anomaly is not None
    checkpoints.wait()
    target = checkpoints.before(anomaly.first - 1 - decision.back)
    if target is None:  # nearer to the anomaly is better than nothing
      target = checkpoints.before(anomaly.first - 1)
    if target is None:
      return None
    skipped = None
    if decision.skip_batches:
      end = position + decision.skip_batches * self._batch_size
      skipped = self._position_of(decision.left_out[0]), end
      self._leave_out(skipped, anomaly, decision.reason)
    checkpoints.forget_after(target)
    while self._positions and self._positions[-1][0] > target:
      self._positions.pop()  # those steps will come again, with other data
    self._waiting.clear()
    return Rewind(target, skipped)

  def _position_of(self, first: int) -> int:
    """Where the batch of a step began; of the earliest that is remembered, if it is older."""
    return next(position for step, position in self._positions if step >= first)

  def _leave_out(self, window: tuple[int, int], anomaly: Anomaly, reason: str) -> None:
    first, end = window
    self._kept.append({"first": first, "end": end, "step": anomaly.first, "reason": reason})
    if self._primary:
      temporary = self._path.with_suffix(".tmp")
      temporary.write_text(json.dumps(self._kept, indent=1) + "\n")
      temporary.replace(self._path)


def _read_windows(path: Path) -> list[dict[str, Any]]:
  try:
    found = json.loads(path.read_text())
    assert all(w["first"] < w["end"] for w in found)
  except FileNotFoundError:
    return []
  except (ValueError, KeyError, TypeError, AssertionError) as e:
    raise ConfigError(
      f"{path} is damaged: it lists the data that this run leaves out; put back a good copy"
    ) from e
  return found
