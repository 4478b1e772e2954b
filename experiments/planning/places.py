"""Where the devices of a mesh lie: on the torus of a TPU slice, or in nodes of GPUs."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mesh.axes import MESH_AXES
from mesh.hardware import CHIPS
from mesh.slices import Topology
from mesh.topology import arrange

from .network import NODE

_ROW = 16  # devices in a row of a drawing where their places are not known
_KINDS = {
  "v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x",
}  # fmt: skip


@dataclass(frozen=True)
class _Device:
  """What `arrange` asks of a TPU."""

  coords: tuple[int, ...]
  core_on_chip: int
  device_kind: str
  platform: str = "tpu"


class Places(NamedTuple):
  """Where the devices of a mesh lie."""

  places: np.ndarray  # int [*mesh in the order of MESH_AXES, 4]: x, y, z and what `names` call them
  names: tuple[str, str, str, str]  # of the places' dims
  known: bool  # False: devices one after the other, since their places show only where they run


def places(topology: Topology, sizes: Mapping[str, int]) -> Places:
  """Where `make_mesh` would put each device of a mesh."""
  shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
  chip = CHIPS[topology.chip]
  number = np.arange(math.prod(shape))
  lay = lambda *dims: np.stack(np.broadcast_arrays(*dims), -1).reshape(*shape, 4)
  if not chip.is_tpu:
    return Places(lay(number % NODE, 0, number // NODE, 0), ("GPU", "", "node", ""), True)
  whole = math.prod(shape) == topology.num_chips * chip.devices_per_chip
  if not whole or math.prod(topology.shape) != topology.num_chips:
    return Places(lay(number % _ROW, number // _ROW, 0, 0), ("x", "y", "z", "core"), False)
  x, y, z = (*topology.shape, 1)[:3]
  cores = range(chip.devices_per_chip)
  devices = [
    _Device((i, j, k), core, _KINDS[topology.chip])
    for k, j, i, core in itertools.product(range(z), range(y), range(x), cores)
  ]
  laid = np.array([(*d.coords, d.core_on_chip) for d in arrange(devices, shape).flat])
  return Places(laid.reshape(*shape, 4), ("x", "y", "z", "core"), True)


def run_of(found: Places, axis: int) -> str:
  """Where the devices of a row along a mesh axis lie: "4 along x, 4 along y"."""
  rows = np.moveaxis(found.places, axis, -2).reshape(-1, found.places.shape[axis], 4)
  first = [len(set(column)) for column in rows[0].T.tolist()]
  spread = [(n, name) for n, name in zip(first, found.names, strict=True) if n > 1]
  same = all([len(set(c)) for c in row.T.tolist()] == first for row in rows)
  if not same or math.prod(first) != rows.shape[1]:
    return "on a path through " + ", ".join(name for _, name in spread)
  if found.names[2] == "node":
    words = {"GPU": "{} of a node", "node": "over {} nodes"}
    return ", ".join(words[name].format(n) for n, name in spread)
  return ", ".join(f"{n} cores" if name == "core" else f"{n} along {name}" for n, name in spread)
