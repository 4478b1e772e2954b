"""Build a Mesh over devices that are real, virtual (CPU) or described (a TPU that is not there)."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from .axes import MESH_AXES
from .hardware import parse_topology

# Experts beyond this many groups exchange tokens in pieces too small to fill the links.
_MAX_AUTO_EXPERT = 16


def resolve_sizes(
  sizes: Mapping[str, int | None],
  num_devices: int,
  *,
  num_experts: int | None = None,
  num_slices: int = 1,
) -> dict[str, int]:
  """Turns what the user asked for into one positive size for each of MESH_AXES.

  All None: `data` takes the slices (they meet over the slow network), `expert` the largest divisor
  of the devices in a slice and of `num_experts` up to 16, `fsdp` the rest. If any size is given,
  the others are 1, and one may be -1: the devices that remain. A product below `num_devices` is
  allowed; `make_mesh` then takes the first ones.

  Args:
    sizes: mesh axis -> size, -1 or None; a missing axis is None.
    num_devices: devices present, over all hosts.
    num_experts: experts of the model if the sharding rules use the expert axis, else None.
    num_slices: TPU slices the devices are spread over.

  Raises:
    ValueError: an unknown axis, a size below 1 other than -1, two -1, a -1 that cannot be whole,
      or more devices asked for than there are.
  """
  unknown = sorted(set(sizes) - set(MESH_AXES))
  if unknown:
    raise ValueError(f"mesh axis {unknown[0]!r} is none of {', '.join(MESH_AXES)}")
  given = {axis: size for axis in MESH_AXES if (size := sizes.get(axis)) is not None}
  if not given:
    return _best_fit(num_devices, num_experts, num_slices)
  for axis, size in given.items():
    if size < 1 and size != -1:
      raise ValueError(f"mesh axis {axis}={size} must be a positive size, or -1 for the rest")
  rest = [axis for axis, size in given.items() if size == -1]
  if len(rest) > 1:
    raise ValueError(f"mesh axes {' and '.join(rest)} are all -1; only one can take the rest")
  fixed = math.prod(size for size in given.values() if size != -1)
  wanted = ", ".join(f"{axis}={size}" for axis, size in given.items())
  if fixed > num_devices:
    raise ValueError(f"mesh {wanted} asks for {fixed} devices, but there are {num_devices}")
  if rest:
    if num_devices % fixed:
      raise ValueError(
        f"mesh {wanted}: {rest[0]} cannot be whole, {num_devices} devices do not divide by {fixed}"
      )
    given[rest[0]] = num_devices // fixed
  return {axis: given.get(axis, 1) for axis in MESH_AXES}


def _best_fit(num_devices: int, num_experts: int | None, num_slices: int) -> dict[str, int]:
  if num_devices % num_slices:
    raise ValueError(f"{num_devices} devices do not divide over {num_slices} slices")
  in_slice = num_devices // num_slices
  common = math.gcd(in_slice, num_experts) if num_experts else 1
  expert = max(n for n in range(1, _MAX_AUTO_EXPERT + 1) if common % n == 0)
  sizes = dict.fromkeys(MESH_AXES, 1)
  return sizes | {"data": num_slices, "fsdp": in_slice // expert, "expert": expert}


def count_slices(devices: Sequence[Any]) -> int:
  """TPU slices among `devices`; 1 where the platform knows none."""
  return len({getattr(device, "slice_index", None) for device in devices})


def make_mesh(
  sizes: Mapping[str, int], devices: Sequence[Any] | None = None, *, explicit: bool = False
) -> Mesh:
  """A mesh with all of MESH_AXES, `tensor` innermost.

  On TPUs the physical torus decides the order, so that inner axes run along links; several slices
  are split along `data`. Elsewhere devices keep their order. When fewer are asked for than there
  are, the first ones are used.

  Args:
    sizes: mesh axis -> size, as `resolve_sizes` returns; a missing axis is 1.
    devices: default `jax.devices()`.
    explicit: axes of type Explicit (shardings in types) instead of Auto (left to the compiler).

  Raises:
    ValueError: too few devices, an idle host, or slices that `data` does not divide over.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
  count = math.prod(shape)
  if count > len(devices):
    raise ValueError(f"a mesh of {count} devices needs more than the {len(devices)} present")
  used = devices[:count]
  idle = {d.process_index for d in devices} - {d.process_index for d in used}
  if idle:
    raise ValueError(f"a mesh of {count} of {len(devices)} devices leaves {len(idle)} hosts idle")
  axis_types = (AxisType.Explicit if explicit else AxisType.Auto,) * len(shape)
  return Mesh(_arrange(used, shape, whole=count == len(devices)), MESH_AXES, axis_types=axis_types)


def _arrange(devices: list[Any], shape: tuple[int, ...], whole: bool) -> np.ndarray:
  num_slices = count_slices(devices)
  if num_slices > 1:
    outer = MESH_AXES.index("data")
    if shape[outer] % num_slices:
      raise ValueError(f"mesh data={shape[outer]} does not divide over {num_slices} TPU slices")
    across = tuple(num_slices if i == outer else 1 for i in range(len(shape)))
    within = tuple(size // n for size, n in zip(shape, across, strict=True))
    return mesh_utils.create_hybrid_device_mesh(
      within, across, devices, allow_split_physical_axes=True
    )
  if not whole:  # part of a torus has no physical shape to respect
    return np.array(devices).reshape(shape)
  return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def describe_devices(topology: str, *, num_slices: int = 1) -> list[Any]:
  """Devices of a TPU slice that is not there, to compile for ("v5p:4x4x4", "v5p-128").

  Needs the libtpu package and, in the environment before JAX is imported: TPU_SKIP_MDS_QUERY=1 (do
  not ask a cloud which chip this is), ALLOW_MULTIPLE_LIBTPU_LOAD=1 (other processes may do the
  same) and, on a host without TPU, JAX_PLATFORMS=cpu.

  Raises:
    ValueError: a chip other than a TPU, or a shape that libtpu refuses.
    ModuleNotFoundError: libtpu is not installed.
  """
  chip, shape, _ = parse_topology(topology)
  if chip not in ("v4", "v5e", "v5p", "v6e", "tpu7x"):
    raise ValueError(f"topology {topology!r}: only TPUs can be described without hardware")
  if importlib.util.find_spec("libtpu") is None:
    raise ModuleNotFoundError(f"describing {topology} needs libtpu: pip install libtpu")
  options: dict[str, Any] = {}
  if chip == "v4":
    options["chip_config_name"] = "megacore"  # one device a chip, as on a real v4
  if chip in ("v5e", "v6e") and shape in ((1, 1), (2, 4)):
    options["chips_per_host_bounds"] = (*shape, 1)  # one host; the default is 2x2 a host
  if num_slices > 1:
    options["num_slices"] = num_slices
  name = f"{chip}:{'x'.join(map(str, shape))}"
  try:
    return list(topologies.get_topology_desc(name, "tpu", **options).devices)
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    raise ValueError(f"libtpu refuses topology {name}: {error}") from error
