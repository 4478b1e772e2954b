"""Machines by name, as `--topology` takes them, and what to write instead of one that is not there.

Apart from the facts in `hardware`, since no training run asks.
"""

import math
import re
from typing import NamedTuple

from .hardware import CHIPS, Slice, cloud_slices

# Most chips of a slice that is made of whole cubes (a v5p pod has more than a slice may).
_MOST = {"v4": 4096, "v5p": 6144, "tpu7x": 9216}


class Topology(NamedTuple):
  """`num_chips` chips of kind `chip`: a torus for TPUs, (nodes, GPUs a node) or (GPUs,)."""

  chip: str
  shape: tuple[int, ...]
  num_chips: int

  @property
  def name(self) -> str:
    """As `--topology` takes it."""
    return f"{self.chip}:{'x'.join(map(str, self.shape))}"


def _shape(text: str) -> tuple[int, ...]:
  return tuple(int(size) for size in text.split("x"))


def parse_topology(text: str) -> Topology:
  """Reads "v5p:4x4x4", the cloud's "v5p-128" (64 chips), "h100:8" or "h100:4x8" (4 nodes of 8).

  Raises:
    ValueError: for an unknown chip, a malformed size, or no slice of that chip; says what there is.
  """
  known = ", ".join(name for name in CHIPS if name != "cpu")
  match = re.fullmatch(r"([a-z0-9-]+?)(?::(\d+(?:x\d+)*)|-(\d+))", text.strip().lower())
  if match is None:
    form = "v5p:4x4x4, v5p-128, h100:8 or h100:4x8 (4 nodes of 8)"
    raise ValueError(f"topology {text!r} is not of the form {form}; chips: {known}")
  chip = "v5e" if match[1] == "v5litepod" else match[1]
  if chip not in known.split(", "):
    raise ValueError(f"topology {text!r}: chip {match[1]!r} is none of {known}")
  if match[3]:
    return _named_slice(text, chip, match[3])
  shape = _shape(match[2])
  count = math.prod(shape)
  if CHIPS[chip].is_tpu:
    if not _is_slice(chip, shape):
      near = " and ".join(f"{chip}:{s.topology}" for s in _nearest(chip, count))
      more = ""
      if chip in _MOST:
        more = f"; larger ones have sides of 4, 8, 12 ... and {_MOST[chip]:,} chips at most"
      raise ValueError(f"topology {text!r}: {chip} has no such slice, the nearest are {near}{more}")
  elif not count:
    raise ValueError(f"topology {text!r} has no chips: write {chip}:8 for 8 of them")
  elif len(shape) > 2 or (len(shape) == 2 and shape[1] != 8):
    near = f"{chip}:{max(1, round(count / 8))}x8, or {chip}:{count} in all"
    raise ValueError(f"topology {text!r}: GPUs come in nodes of 8: {near}")
  return Topology(chip, shape, count)


def _is_slice(chip: str, shape: tuple[int, ...]) -> bool:
  """Whether the cloud has it, sides in any order: a standard one, or one of whole 4x4x4 cubes."""
  if sorted(shape) in [sorted(_shape(s.topology)) for s in cloud_slices(chip)]:
    return True
  whole = len(shape) == 3 and all(n and n % 4 == 0 for n in shape)
  return whole and math.prod(shape) <= _MOST.get(chip, 0)


def _nearest(chip: str, count: int) -> list[Slice]:
  """The two standard slices nearest to so many chips, the smaller first."""
  by_ratio = sorted(cloud_slices(chip), key=lambda s: abs(math.log(s.chips / max(1, count))))
  return sorted(by_ratio[:2], key=lambda s: s.chips)


def _named_slice(text: str, chip: str, count: str) -> Topology:
  if not CHIPS[chip].is_tpu:
    raise ValueError(f"topology {text!r}: write {chip}:{count} for {count} chips of {chip}")
  names = {int(s.name.rsplit("-", 1)[1]): s for s in cloud_slices(chip)}
  if int(count) not in names:
    unit = min(names) // names[min(names)].chips  # the cloud counts chips, or cores
    near = _nearest(chip, int(count) // unit)
    listed = " and ".join(f"{s.name} ({s.topology})" for s in near)
    raise ValueError(f"topology {text!r}: no standard {chip} slice, the nearest are {listed}")
  shape = _shape(names[int(count)].topology)
  return Topology(chip, shape, math.prod(shape))
