"""Where an array would lie on a mesh: its tiles, and the devices that hold each."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from .memory import gigabytes


class Placed(NamedTuple):
  """An array that is not there, and where it would lie."""

  name: str
  logical: tuple[str | None, ...]
  array: jax.ShapeDtypeStruct  # with its sharding


class Tiles(NamedTuple):
  """A placed array as a rectangle of equal tiles, one a slice.

  Rows follow the first dims that are cut, the outermost slowest, columns the last one. Devices go
  by `device_numbers`.
  """

  rows: list[str]  # slice of the cut dims, as "0:32, 4:8"
  columns: list[str]
  row_title: str
  column_title: str
  outer: int  # rows of one part of the outermost dim, where several dims are cut over rows
  holders: list[list[list[int]]]  # [row][column] -> devices


def size_text(shape: tuple[int, ...], dtype: Any) -> str:
  """Type, shape and bytes."""
  return f"{dtype}{list(shape)}, {gigabytes(math.prod(shape) * dtype.itemsize)}"


def held_text(placed: Placed) -> str:
  """What each device holds, and how many hold the same."""
  array = placed.array
  held = array.sharding.shard_shape(array.shape)
  slices = math.prod(array.shape) // math.prod(held)
  copies = array.sharding.mesh.size // slices
  if slices == 1:
    whose = f"all of it, {copies} copies" if copies > 1 else "all of it"
  else:
    whose = f"one of {slices} slices, {'1 copy' if copies == 1 else f'{copies} copies'} of each"
  return f"a device holds {size_text(held, array.dtype)}: {whose}"


def mesh_axes(sharding: NamedSharding, dim: int) -> tuple[str, ...]:
  """The mesh axes that cut this dim."""
  entry = sharding.spec[dim] if dim < len(sharding.spec) else None
  return (entry,) if isinstance(entry, str) else tuple(entry or ())


def device_numbers(mesh: Mesh) -> dict[Any, int]:
  """Device -> its id; of several CPU processes, whose ids are far apart, its place in order."""
  devices = sorted(mesh.devices.flat, key=lambda d: d.id)
  in_order = devices[0].platform == "cpu" and len({d.process_index for d in devices}) > 1
  return {d: i if in_order else d.id for i, d in enumerate(devices)}


def tiles(placed: Placed) -> Tiles:
  """Cut the array as its sharding does."""
  _, logical, array = placed
  shape, sharding = array.shape, array.sharding
  held = sharding.shard_shape(shape)
  parts = [size // part for size, part in zip(shape, held, strict=True)]
  cut = [i for i, n in enumerate(parts) if n > 1]
  across = cut.pop() if len(cut) > 1 or (cut and cut[0] == len(shape) - 1 > 0) else None
  count = math.prod(parts[i] for i in cut)
  width = 1 if across is None else parts[across]
  number = device_numbers(sharding.mesh)
  holders: list[list[list[int]]] = [[[] for _ in range(width)] for _ in range(count)]
  for device, index in sharding.devices_indices_map(shape).items():
    place = [(s.start or 0) // part for s, part in zip(index, held, strict=True)]
    row = int(np.ravel_multi_index([place[i] for i in cut], [parts[i] for i in cut])) if cut else 0
    holders[row][0 if across is None else place[across]].append(number[device])

  def span(dim: int, part: int) -> str:
    return f"{part * held[dim]}:{(part + 1) * held[dim]}"

  def title(dims: Sequence[int]) -> str:
    over = lambda i: "+".join(mesh_axes(sharding, i))
    return ", ".join(f"{logical[i]} over {over(i)}" for i in dims)

  places = [np.unravel_index(row, [parts[i] for i in cut]) for row in range(count)] if cut else [()]
  return Tiles(
    [
      ", ".join(span(i, int(p)) for i, p in zip(cut, place, strict=True)) or ":" for place in places
    ],
    [":"] if across is None else [span(across, i) for i in range(width)],
    title(cut),
    "" if across is None else title([across]),
    count // parts[cut[0]] if len(cut) > 1 else count,
    [[sorted(cell) for cell in row] for row in holders],
  )


def numbers(devices: Sequence[int]) -> str:
  """Sorted numbers in few characters: "5", "0-3", "0,8..56", "0-3,8-11", "0-3,8-11.. (32)"."""
  steps = {b - a for a, b in pairwise(devices)}
  if len(devices) > 3 and len(steps) == 1 and steps != {1}:
    return f"{devices[0]},{devices[1]}..{devices[-1]}"
  breaks = [i for i, (a, b) in enumerate(pairwise(devices), 1) if b - a > 1]
  bounds = pairwise([0, *breaks, len(devices)])
  ends = [(devices[i], devices[j - 1]) for i, j in bounds]
  runs = [f"{a}-{b}" if b - a > 1 else f"{a},{b}" if b > a else str(a) for a, b in ends]
  return ",".join(runs) if len(runs) <= 3 else f"{runs[0]},{runs[1]}.. ({len(devices)})"
