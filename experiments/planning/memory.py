"""Does the training state fit the devices that are here? If not: what would hold it."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax

from layers.lora import split
from mesh.hardware import device_memory_bytes, host_memory_bytes, smallest_slices

from ..config import ConfigError
from ..training.setup import Setup

# Share of a device's memory left for activations, compiler temporaries and the runtime.
_RESERVE = 0.15
# The commands name a slice with room for a real batch: the state leaves it three quarters.
_ROOMY = 0.75


def training_bytes(setup: Setup) -> int:
  """Bytes over all devices of parameters, their gradients and the optimizer state."""
  size = lambda leaf: leaf.size * leaf.dtype.itemsize
  return _state_bytes(setup, size)


def bytes_per_device(setup: Setup) -> int:
  """The same on the fullest device of the mesh, each leaf cut as its sharding says."""
  size = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
  return _state_bytes(setup, size)


def _state_bytes(setup: Setup, size: Callable[[Any], int]) -> int:
  params, gradients = setup.abstract.params, split(setup.abstract.params)[0]
  held = (params, gradients, setup.abstract.opt_state)
  return sum(map(size, jax.tree.leaves(held)))


def refuse_if_too_large(setup: Setup) -> None:
  """Raise before anything is allocated when the state alone can't fit.

  Raises:
    ConfigError: bytes needed against bytes here, the smallest slices that hold the state, and the
      commands to compile for one and to launch on one.
  """
  devices = list(setup.mesh.devices.flat)
  local = [d for d in devices if d.process_index == jax.process_index()]
  if devices[0].platform == "cpu":
    available, needed = host_memory_bytes(), bytes_per_device(setup) * len(local)
    where = f"this host has {gigabytes(available)}"
  else:
    available, needed = device_memory_bytes(devices[0]), bytes_per_device(setup)
    where = f"a {devices[0].device_kind} has {gigabytes(available or 0)}"
  if available is None or needed <= available:
    return
  total = training_bytes(setup)
  slices = smallest_slices(total, reserve=_RESERVE)
  rows = "\n".join(
    f"  {s.name:<14} {s.topology:<14} {s.chips:>4} chips  {gigabytes(s.hbm_bytes):>9}"
    for s in slices
  )
  roomy = [s.name for s in smallest_slices(total, reserve=_ROOMY)] or [slices[-1].name]
  example = next((name for name in roomy if name.startswith("v5p")), roomy[0])
  name = setup.config.name
  plain = re.sub("[^a-z0-9]", "-", name)  # what clouds take
  raise ConfigError(
    f"{name} does not fit here: weights, gradients and optimizer state take {gigabytes(total)}, "
    f"of which {gigabytes(needed)} on {len(local)} {devices[0].platform} device(s) here, "
    f"but {where}.\n"
    f"Smallest slices that hold that with {_RESERVE:.0%} to spare:\n{rows}\n"
    f"See a run on one without renting it (--compile asks the TPU's compiler):\n"
    f"  python -m experiments.plan --config={name} --topology={example}\n"
    f"Launch on one:\n"
    f"  bash tpu_setup/tpu_vm.sh launch --name={plain} --type={example} "
    f"--zone=ZONE -- --config={name} --workdir=/SHARED/{name.replace(':', '-')}"
  )


def gigabytes(n: int) -> str:
  """ "1.1 TB", "24.0 GB", "3.2 MB": decimal units."""
  for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
    if n >= scale:
      return f"{n / scale:,.1f} {unit}"
  return f"{n:,} B"
