"""Build a Mesh over devices that are real, virtual (CPU) or described (a TPU that is not there)."""

import importlib.util
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from .axes import MESH_AXES

# Axes that may also span the slow network between slices: what they exchange is rare or small.
DCN_AXES = ("data", "stage", "fsdp")

# How much it counts how far apart the devices of a row are: data and stage exchange little, the
# others in every layer, the inner ones most urgently.
_WEIGHTS = dict(zip(MESH_AXES, (0.1, 0.1, 1.0, 1.1, 1.2, 1.3), strict=True))

# Experts beyond this many groups exchange tokens in pieces too small to fill the links.
_MAX_AUTO_EXPERT = 16


def resolve_sizes(
  sizes: Mapping[str, int | None],
  num_devices: int,
  *,
  dcn: Mapping[str, int] | None = None,
  num_experts: int | None = None,
  num_slices: int = 1,
) -> dict[str, int]:
  """Turns what the user asked for into one positive size for each of MESH_AXES.

  All None: `data` takes the slices (they meet over the slow network), `expert` the largest divisor
  of the devices in a slice and of `num_experts` up to 16, `fsdp` the rest. If any size is given,
  the others are 1, and one may be -1: the devices that remain. A product below `num_devices` is
  allowed; `make_mesh` then takes the first ones.

  With sizes in `dcn`, all this holds within one of the slices they multiply to, and the result for
  an axis is its size within a slice times its size across slices.

  Args:
    sizes: mesh axis -> size, -1 or None; a missing axis is None.
    num_devices: devices present, over all hosts.
    dcn: axis of DCN_AXES -> slices along it; a missing axis is 1.
    num_experts: experts of the model if an expert axis is wanted and the rules use it, else None.
    num_slices: TPU slices the devices are spread over.

  Raises:
    ValueError: an unknown axis, a size below 1 other than -1, two -1, a -1 that cannot be whole,
      more devices asked for than there are, or `dcn` sizes that do not match the slices.
  """
  across = _across(dcn or {})
  slices = math.prod(across.values())
  unknown = sorted(set(sizes) - set(MESH_AXES))
  if unknown:
    raise ValueError(f"mesh axis {unknown[0]!r} is none of {', '.join(MESH_AXES)}")
  given = {axis: size for axis in MESH_AXES if (size := sizes.get(axis)) is not None}
  if slices > 1:
    if num_slices > 1 and slices != num_slices:
      raise ValueError(f"mesh {_dcn(across)} spans {slices} slices, but there are {num_slices}")
    if num_devices % slices:
      raise ValueError(
        f"mesh {_dcn(across)} spans {slices} slices, but {num_devices} devices do not divide by "
        f"{slices}"
      )
    within = _within(given, num_devices // slices, f" in each of {slices} slices")
    within = within or _best_fit(num_devices // slices, num_experts, 1)
    return {axis: within[axis] * across[axis] for axis in MESH_AXES}
  return _within(given, num_devices, "") or _best_fit(num_devices, num_experts, num_slices)


def _within(given: dict[str, int], num_devices: int, where: str) -> dict[str, int]:
  """Sizes for all axes from those given, -1 resolved; empty if none is given."""
  if not given:
    return {}
  for axis, size in given.items():
    if size < 1 and size != -1:
      raise ValueError(f"mesh axis {axis}={size} must be a positive size, or -1 for the rest")
  rest = [axis for axis, size in given.items() if size == -1]
  if len(rest) > 1:
    raise ValueError(f"mesh axes {' and '.join(rest)} are all -1; only one can take the rest")
  fixed = math.prod(size for size in given.values() if size != -1)
  wanted = ", ".join(f"{axis}={size}" for axis, size in given.items())
  if fixed > num_devices:
    raise ValueError(f"mesh {wanted} asks for {fixed} devices, but there are {num_devices}{where}")
  if rest:
    if num_devices % fixed:
      raise ValueError(
        f"mesh {wanted}: {rest[0]} cannot be whole, {num_devices} devices{where} do not divide by "
        f"{fixed}"
      )
    given = given | {rest[0]: num_devices // fixed}
  return {axis: given.get(axis, 1) for axis in MESH_AXES}


def _best_fit(num_devices: int, num_experts: int | None, num_slices: int) -> dict[str, int]:
  if num_devices % num_slices:
    raise ValueError(f"{num_devices} devices do not divide over {num_slices} slices")
  in_slice = num_devices // num_slices
  common = math.gcd(in_slice, num_experts) if num_experts else 1
  expert = max(n for n in range(1, _MAX_AUTO_EXPERT + 1) if common % n == 0)
  sizes = dict.fromkeys(MESH_AXES, 1)
  return sizes | {"data": num_slices, "fsdp": in_slice // expert, "expert": expert}


def _across(dcn: Mapping[str, int]) -> dict[str, int]:
  """The size of every mesh axis across slices."""
  for axis, size in dcn.items():
    if axis not in DCN_AXES:
      raise ValueError(f"mesh axis {axis!r} cannot span slices; {', '.join(DCN_AXES)} can")
    if size < 1:
      raise ValueError(f"mesh dcn_{axis}={size} must be a positive number of slices")
  return {axis: dcn.get(axis, 1) for axis in MESH_AXES}


def _dcn(across: Mapping[str, int]) -> str:
  return ", ".join(f"dcn_{axis}={size}" for axis, size in across.items() if size > 1)


def count_slices(devices: Sequence[Any]) -> int:
  """TPU slices among `devices`; 1 on other platforms."""
  if devices[0].platform != "tpu":
    return 1  # a GPU's slice_index is its host
  return len({getattr(device, "slice_index", 0) for device in devices})


def make_mesh(
  sizes: Mapping[str, int],
  devices: Sequence[Any] | None = None,
  *,
  dcn: Mapping[str, int] | None = None,
  explicit: bool = False,
) -> Mesh:
  """A mesh with all of MESH_AXES, `tensor` innermost, slices outermost along each axis.

  On TPUs the physical torus decides the order within a slice, so that inner axes run along links.
  Elsewhere devices keep their order. When fewer are asked for than there are, the first ones (of
  each slice) are used.

  A slice is a TPU slice; several of them without `dcn` are split along `data`. On other platforms
  the slices of `dcn` are processes, or equal groups of them in order; in a single process (the
  virtual devices of a CPU) equal groups of devices in order.

  Args:
    sizes: mesh axis -> size over all slices, as `resolve_sizes` returns; a missing axis is 1.
    devices: default `jax.devices()`.
    dcn: axis of DCN_AXES -> slices along it, a divisor of its size; a missing axis is 1.
    explicit: axes of type Explicit (shardings in types) instead of Auto (left to the compiler).

  Raises:
    ValueError: too few devices, an idle host, or slices that the sizes do not match.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
  count = math.prod(shape)
  if count > len(devices):
    raise ValueError(f"a mesh of {count} devices needs more than the {len(devices)} present")
  slices, across = _split(devices, shape, _across(dcn or {}))
  within = tuple(size // n for size, n in zip(shape, across, strict=True))
  used = [part[: math.prod(within)] for part in slices]
  idle = {d.process_index for d in devices} - {d.process_index for part in used for d in part}
  if idle:
    raise ValueError(f"a mesh of {count} of {len(devices)} devices leaves {len(idle)} hosts idle")
  whole = count == len(devices)
  placed = np.stack([arrange(part, within, whole) for part in used]).reshape(across + within)
  outer_inner = [i for pair in enumerate(range(len(shape), 2 * len(shape))) for i in pair]
  axis_types = (AxisType.Explicit if explicit else AxisType.Auto,) * len(shape)
  return Mesh(placed.transpose(outer_inner).reshape(shape), MESH_AXES, axis_types=axis_types)


def _split(
  devices: list[Any], shape: tuple[int, ...], across: dict[str, int]
) -> tuple[list[list[Any]], tuple[int, ...]]:
  """Devices by slice, and the slices along each mesh axis."""
  sizes = dict(zip(MESH_AXES, shape, strict=True))
  asked, present = math.prod(across.values()), count_slices(devices)
  if asked == 1 and present > 1:
    if sizes["data"] % present:
      raise ValueError(
        f"mesh data={sizes['data']} does not divide over {present} TPU slices; say which axis "
        f"spans the {present} slices with dcn_data, dcn_fsdp or dcn_stage"
      )
    asked, across = present, across | {"data": present}
  for axis, n in across.items():
    if sizes[axis] % n:
      raise ValueError(f"mesh {axis}={sizes[axis]} is no multiple of dcn_{axis}={n}")
  on_tpu = devices[0].platform == "tpu"
  slice_of = lambda device: getattr(device, "slice_index", 0) if on_tpu else device.process_index
  groups = len({slice_of(device) for device in devices})
  noun = "TPU slices" if on_tpu else "processes, which stand for slices here"
  if asked != groups and (on_tpu or (groups > 1 and groups % asked)):
    raise ValueError(f"mesh {_dcn(across)} spans {asked} slices, but there are {groups} {noun}")
  if len(devices) % asked:
    raise ValueError(f"{len(devices)} devices do not divide over {asked} slices")
  ordered = sorted(devices, key=slice_of) if asked > 1 else devices
  each = len(devices) // asked
  parts = [ordered[i : i + each] for i in range(0, len(devices), each)]
  return parts, tuple(across.values())


def arrange(devices: list[Any], shape: tuple[int, ...], whole: bool = True) -> np.ndarray:
  """Devices of one slice as an array of this shape, one size for each of MESH_AXES.

  Of TPUs only `device_kind`, `coords` and `core_on_chip` are asked, so they need not be there.

  Args:
    whole: whether these are all devices of the slice.
  """
  if not whole:  # part of a torus has no physical shape to respect
    return np.array(devices).reshape(shape)
  usual = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  if devices[0].platform != "tpu":
    return usual
  # mesh_utils decides axis by axis, and of small slices makes one ring whatever the mesh. Rows then
  # reach across chips of other rows where they need not: on 2x4 chips of v5e for fsdp=2 x tensor=4,
  # on 8x8x8 of v5p for data=4 x fsdp=8 x expert=4 x tensor=4. Where it is no worse, it stays.
  where = {(*d.coords, d.core_on_chip): d for d in devices}
  sides = tuple(len(set(column)) for column in zip(*where, strict=True))
  axes = [(n, _WEIGHTS[axis]) for axis, n in zip(MESH_AXES, shape, strict=True) if n > 1][::-1]
  packed = _pack(axes, sides, (1,) * len(sides), _spread(usual))
  if packed is None:
    return usual
  extents = packed[1][::-1]  # [axis][side], outermost axis first
  box = np.array([where[place] for place in sorted(where)])
  parts = box.reshape([axis[side] for side in range(len(sides)) for axis in extents])
  order = [side * len(extents) + i for i in range(len(extents)) for side in range(len(sides))]
  return parts.transpose(order).reshape(shape)


def _spread(mesh: np.ndarray) -> float:
  """The boxes of the torus around a row along each axis, in sizes of the row, weighted and added.

  A row that fills a box counts 1, one with chips of other rows in between counts more.
  """
  places = np.array([(*d.coords, d.core_on_chip) for d in mesh.flat]).reshape(*mesh.shape, -1)
  total = 0.0
  for i, (axis, n) in enumerate(zip(MESH_AXES, mesh.shape, strict=True)):
    if n > 1:
      boxes = np.prod(np.ptp(places, axis=i) + 1, axis=-1)
      total += _WEIGHTS[axis] * float(np.mean(boxes)) / n
  return total


def _pack(
  axes: list[tuple[int, float]],
  free: tuple[int, ...],
  strides: tuple[int, ...],
  bound: float,
) -> tuple[float, tuple[tuple[int, ...], ...]] | None:
  """The assignment of mesh axes to sides of the torus with the least `_spread` below `bound`.

  Args:
    axes: (size, weight), innermost first.
    free: what is left of each side.
    strides: distance between neighbours along each side, inner axes lying in between.

  Returns:
    The spread, and for each axis its extent along each side; None if nothing is below `bound`.
  """
  if not axes:
    return 0.0, ()
  (size, weight), *others = axes
  least = sum(weight for _, weight in others)
  best = None
  divisors = [[n for n in range(side, 0, -1) if side % n == 0] for side in free]
  for choice in itertools.product(*reversed(divisors)):  # cores of a chip first
    extents = choice[::-1]
    if math.prod(extents) != size:
      continue
    box = math.prod((n - 1) * step + 1 for n, step in zip(extents, strides, strict=True))
    cost = weight * box / size
    if cost + least > bound - 1e-6:
      continue
    rest = _pack(
      others,
      tuple(side // n for side, n in zip(free, extents, strict=True)),
      tuple(step * n for step, n in zip(strides, extents, strict=True)),
      bound - cost,
    )
    if rest is not None:
      bound = cost + rest[0]
      best = bound, (extents, *rest[1])
  return best


def describe_devices(topology: str, *, num_slices: int = 1) -> list[Any]:
  """Devices of a TPU slice that is not there, to compile for ("v5p:4x4x4", "v5p-128").

  Needs the libtpu package and, in the environment before JAX is imported: TPU_SKIP_MDS_QUERY=1 (do
  not ask a cloud which chip this is), ALLOW_MULTIPLE_LIBTPU_LOAD=1 (other processes may do the
  same) and, on a host without TPU, JAX_PLATFORMS=cpu.

  Raises:
    ValueError: a chip other than a TPU, or a shape that libtpu refuses.
    ModuleNotFoundError: libtpu is not installed.
  """
  from .slices import parse_topology  # names of machines: a training run has none to read

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
