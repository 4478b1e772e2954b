"""Rates of steps, and the profile of some of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from layers.count import train_flops_per_token
from mesh.hardware import find_chip

from ..config import Config
from .goodput import Clock


class Profile(NamedTuple):
  """An xprof trace of steps start..stop - 1."""

  start: int
  stop: int


class Trace:
  """The profile that was asked for, begun and ended at its steps."""

  def __init__(
    self, wanted: Profile | None, folder: Path, note: Callable[[str], None], start: int, total: int
  ):
    self._wanted, self._folder, self._note, self._on = wanted, folder, note, False
    if wanted is not None and not start < wanted.start <= total:
      note(f"no profile: step {wanted.start} is not among those left of {total}")

  def before(self, step: int) -> None:
    if self._wanted is not None and step == self._wanted.start:
      jax.profiler.start_trace(str(self._folder / "profile"))
      self._on = True

  def after(self, step: int, state: Any, last: bool) -> None:
    if self._on and self._wanted is not None and (step + 1 == self._wanted.stop or last):
      jax.block_until_ready(state)
      jax.profiler.stop_trace()
      self._on = False
      span = f"{self._wanted.start}:{step + 1}"
      self._note(f"profile of steps {span} in {self._folder / 'profile'}")


class StepTimer:
  """Rates of steps, by the time that a clock calls productive or lost on waiting for data."""

  def __init__(self, config: Config, mesh: jax.sharding.Mesh, clock: Clock):
    self._clock = clock
    self._tokens = config.data.batch_size * config.data.row_length
    self._flops = train_flops_per_token(config.model, config.data.row_length)
    chip = find_chip(mesh.devices.flat[0])
    peak = chip.flops_per_device if chip else None
    self._peak = peak * mesh.devices.size if peak else None
    self.seconds = 0.0
    self._mark: float | None = None  # None: what runs is compiled first

  def _now(self) -> float:
    spent = self._clock.seconds
    return spent["productive"] + spent["data"]

  def restart(self) -> None:
    self._mark = self._now()

  def interval(self, steps: int) -> dict[str, Any]:
    """Rates since the last call; of the step that was compiled they mean nothing."""
    now = self._now()
    seconds, began = now - (self._mark or 0.0), self._mark
    self._mark = now
    if began is None or not steps or seconds <= 0:
      return {"tokens_per_second": None, "mfu": None}
    self.seconds += seconds
    rate = steps * self._tokens / seconds
    return {
      "tokens_per_second": rate,
      "mfu": rate * self._flops / self._peak if self._peak else None,
    }
