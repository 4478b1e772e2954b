"""What to change where a config does not fit: the bytes each change saves, the time it costs.

One change at a time, of what leaves the loss as it is or nearly so; where none is enough, the
combination that the search finds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from mesh.hardware import Chip

from ..config import Config, ConfigError
from ..training.setup import Setup
from .estimate import memory
from .memory import gigabytes
from .search import MAX_PARTS, ROOM, Option, abstract_mesh, changes, move, moves, search, slices
from .speed import step_time

_POLICIES = ("none", "minimal", "dots", "full", "offload")
LEAST = 0.05  # of the bytes that are missing: what saves less is not worth a line
_NEAREST = 8  # options that do not fit to which narrow moments are tried


class Fix(NamedTuple):
  """A change to a config on the machine it is planned for."""

  overrides: tuple[str, ...]
  saves: int  # bytes of a device's peak
  peak: int  # that remain
  seconds: float  # added to a step; below 0 it becomes quicker
  fits: bool

  @property
  def line(self) -> str:
    """--config.train.remat=full saves 3.7 GB of 28.7 GB and adds 1.62 s to a step."""
    seconds = f"{abs(self.seconds):.2f} s"
    time = f"adds {seconds} to" if self.seconds > 0 else f"takes {seconds} off"
    if seconds == "0.00 s":
      time = "adds nothing to"
    saved = f"{gigabytes(self.saves)} of {gigabytes(self.saves + self.peak)}"
    enough = "" if self.fits else ", which is not enough"
    return f"{' '.join(self.overrides)} saves {saved} and {time} a step{enough}"


def fixes(
  setup: Setup, chip: Chip, available: int, options: Sequence[Option] | None = None
) -> list[Fix]:
  """Changes that save memory: those that fit by the time they add, then the others by bytes.

  Args:
    setup: the config as it is, on its mesh, which may be numbers only.
    available: bytes of a device.
    options: of `search` on the same machine, if that ran, for where no single change fits.

  Raises:
    ValueError: a chip whose peak rates nobody published.
  """
  peak, seconds = memory(setup).total, step_time(setup, chip).total

  def rate(changed: Setup) -> Fix:
    left = memory(changed).total
    more = step_time(changed, chip).total - seconds
    overrides = changes(setup.config, _as_written(changed, setup))
    return Fix(tuple(overrides), peak - left, left, more, left <= ROOM * available)

  best = lambda several: min(map(rate, several), key=_rank)  # the first of equals
  found = [best(kind) for kind in _single(setup) if kind]
  if not any(fix.fits for fix in found):
    combined = _combined(setup, chip, available, options)
    found += [best(combined)] if combined else []
  least = LEAST * (peak - ROOM * available)
  kept = [fix for fix in found if fix.saves > max(least, 0)]
  return sorted(kept, key=lambda fix: (*_rank(fix), -fix.saves))


def _rank(fix: Fix) -> tuple[bool, float]:
  """What fits by its time, the rest by its bytes."""
  return not fix.fits, round(fix.seconds, 2) if fix.fits else -fix.saves


def _as_written(changed: Setup, setup: Setup) -> Config:
  """The config of `changed`, whose mesh need not be named where it is the one of `setup`."""
  config = changed.config
  if changed.mesh.shape != setup.mesh.shape:
    return config
  return replace(config, mesh=replace(setup.config.mesh, rules=config.mesh.rules))


def _single(setup: Setup) -> Iterator[list[Setup]]:
  """Changes of one kind each, of which the best counts."""
  config, mesh = setup.config, abstract_mesh(dict(setup.mesh.shape))
  train, rows = config.train, config.data.batch_size
  at = lambda **change: _moved(setup, replace(config, **change), mesh)
  for policy in _POLICIES:
    yield at(train=replace(train, remat=policy))
  more = [train.microbatches * 2**n for n in range(1, MAX_PARTS.bit_length())]
  parts = [at(train=replace(train, microbatches=n)) for n in more if rows % n == 0]
  yield [one for found in parts for one in found]
  if config.optimizer.moment_dtype == "float32" and config.optimizer.name != "adafactor":
    yield at(optimizer=replace(config.optimizer, moment_dtype="bfloat16"))
  yield list(moves(setup, config, mesh.size // slices(config), quick=True))


def _moved(setup: Setup, config: Config, mesh) -> list[Setup]:
  """Of one setup, or none where the mesh does not divide it."""
  try:
    return [move(setup, config, mesh)]
  except ConfigError:
    return []


def _combined(
  setup: Setup, chip: Chip, available: int, options: Sequence[Option] | None
) -> list[Setup]:
  """The quickest option that fits; without one, the nearest with narrow moments."""
  if options is None:
    here = replace(chip, hbm_bytes=available * chip.devices_per_chip)
    chips = setup.mesh.size // chip.devices_per_chip // slices(setup.config)
    options = search(setup, here, chips, quick=True)
  if options and options[0].fits:
    return [options[0].setup]
  if setup.config.optimizer.name == "adafactor":
    return []
  narrow = replace(setup.config.optimizer, moment_dtype="bfloat16")
  near = [option.setup for option in options[:_NEAREST]]
  return [one for s in near for one in _moved(s, replace(s.config, optimizer=narrow), s.mesh)]


def fix_rows(found: Sequence[Fix], room: int) -> list[tuple[str, ...]]:
  """(overrides, bytes saved, bytes that remain, time of a step, verdict), as text.

  Args:
    room: bytes of a device that a program can have.
  """
  return [
    (
      " ".join(fix.overrides),
      gigabytes(fix.saves),
      gigabytes(fix.peak),
      f"{fix.seconds:+.2f} s" if round(fix.seconds, 2) else "nothing",
      "fits" if fix.fits else f"{gigabytes(fix.peak - room)} too much",
    )
    for fix in found
  ]


FIX_COLUMNS = ("fix", "saves", "peak", "adds to a step", "")


def fix_lines(setup: Setup, chip: Chip, available: int, count: int = 5) -> list[str]:
  """The first `fixes`, one a line, as plain text; the last line says so where none fits.

  Cheap enough for a message about memory that ran out: a second for hundreds of chips. Arguments
  and errors as in `fixes`.
  """
  found = fixes(setup, chip, available)
  lines = [fix.line for fix in found[:count]]
  return lines if any(fix.fits for fix in found) else [*lines, no_fix(setup.config)]


def no_fix(config: Config) -> str:
  return (
    f"No change makes it fit this machine; python -m experiments.plan --config={config.name} "
    "lists machines that hold it."
  )
