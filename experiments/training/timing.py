"""Rates of steps, and the profile of some of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from layers.count import train_flops_per_token
from mesh.hardware import find_chip

from ..config import Config
from .goodput import Clock
from .hosts import HostTimes


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


CONVENTION = "PaLM (arXiv 2204.02311, appendix B), a device"  # of `tflops_model`


def describe_perf(detail: dict[str, Any]) -> str:
  """A `perf` event in words."""
  mfu = "" if detail["mfu"] is None else f", MFU {detail['mfu']:.1%}"
  return (
    f"{detail['tok_s']:,.0f} tokens/s, {detail['tflops_model']:.3g} model TFLOP/s a device{mfu}, "
    f"over {detail['steps']:,} steps"
  )


class _Rate(NamedTuple):
  """Of a second."""

  tokens: float
  flops: float  # model FLOPs of a device
  mfu: float | None  # None where the device's peak is unknown


class StepTimer:
  """Rates of steps, by the time that a clock calls productive or lost on waiting for data."""

  def __init__(self, config: Config, mesh: jax.sharding.Mesh, clock: Clock):
    self._clock, self.hosts = clock, HostTimes(clock)
    self._tokens = config.data.batch_size * config.data.row_length
    self._flops = train_flops_per_token(config.model, config.data.row_length)
    chip = find_chip(mesh.devices.flat[0])
    self._peak, self._devices = chip.flops_per_device if chip else None, mesh.devices.size
    self.seconds = 0.0
    self._mark: float | None = None  # None: what runs is compiled first
    self._told, self._steps, self._steps_told = 0.0, 0, 0  # of `perf`

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
    self._steps += steps
    rate = self._rate(steps, seconds)
    return {"tokens_per_second": rate.tokens, "mfu": rate.mfu}

  def _rate(self, steps: int, seconds: float) -> _Rate:
    tokens = steps * self._tokens / seconds
    flops = tokens * self._flops / self._devices
    return _Rate(tokens, flops, flops / self._peak if self._peak else None)

  def perf(self) -> dict[str, Any] | None:
    """For a `perf` event: of the steps that `interval` was told of since the last call; None
    without any."""
    steps, seconds = self._steps - self._steps_told, self.seconds - self._told
    if not steps or seconds <= 0:
      return None
    self._steps_told, self._told = self._steps, self.seconds
    rate = self._rate(steps, seconds)
    return {
      "steps": steps, "tok_s": rate.tokens, "tflops_model": rate.flops / 1e12,
      "convention": CONVENTION, "mfu": rate.mfu, **self.hosts.spread(),
    }  # fmt: skip
