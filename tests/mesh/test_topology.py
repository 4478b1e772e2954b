"""Mesh sizes, device order on real tori (described), meshes over virtual devices."""

import importlib.util
import itertools
import math
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from mesh import topology
from mesh.axes import MESH_AXES
from mesh.hardware import find_chip
from mesh.topology import count_slices, describe_devices, make_mesh, resolve_sizes

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="describing a TPU needs the libtpu package, which is not installed (Linux x86-64 only)",
)


def chosen(sizes):
  return {axis: size for axis, size in sizes.items() if size > 1}


@pytest.mark.parametrize(
  ("devices", "experts", "slices", "expected"),
  [
    (8, None, 1, {"fsdp": 8}),
    (8, 4, 1, {"fsdp": 2, "expert": 4}),
    (8, 8, 1, {"expert": 8}),
    (8, 3, 1, {"fsdp": 8}),
    (64, 128, 1, {"fsdp": 4, "expert": 16}),  # at most 16 groups of experts
    (6, 8, 1, {"fsdp": 3, "expert": 2}),
    (16, 8, 2, {"data": 2, "expert": 8}),
    (1, 8, 1, {}),
  ],
)
def test_best_fit_when_nothing_is_asked(devices, experts, slices, expected):
  sizes = resolve_sizes(dict.fromkeys(MESH_AXES), devices, num_experts=experts, num_slices=slices)
  assert tuple(sizes) == MESH_AXES
  assert chosen(sizes) == expected
  assert math.prod(sizes.values()) == devices


@pytest.mark.parametrize(
  ("sizes", "expected"),
  [
    ({"fsdp": 4, "tensor": 2}, {"fsdp": 4, "tensor": 2}),
    ({"fsdp": -1, "tensor": 2}, {"fsdp": 4, "tensor": 2}),
    ({"data": 2}, {"data": 2}),  # the others are 1, though 8 devices are there
    ({"fsdp": -1, "expert": 8}, {"expert": 8}),
    ({"fsdp": 1}, {}),
  ],
)
def test_what_is_asked_is_what_is_given(sizes, expected):
  assert chosen(resolve_sizes(sizes, 8, num_experts=8)) == expected


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"data": 2, "fsdp": 8}, "data=2, fsdp=8 asks for 16 devices, but there are 8"),
    ({"fsdp": -1, "tensor": 3}, "fsdp cannot be whole, 8 devices do not divide by 3"),
    ({"fsdp": -1, "expert": -1}, "fsdp and expert are all -1"),
    ({"tensor": 0}, "tensor=0 must be a positive size"),
    ({"tensor": -2}, "tensor=-2 must be a positive size"),
    ({"model": 2}, "'model' is none of data, stage"),
  ],
)
def test_impossible_sizes_name_axis_and_numbers(sizes, message):
  with pytest.raises(ValueError, match=message):
    resolve_sizes(sizes, 8)


def test_slices_must_share_the_devices_evenly():
  with pytest.raises(ValueError, match="9 devices do not divide over 2 slices"):
    resolve_sizes({}, 9, num_slices=2)


@pytest.mark.xdist_group("devices")
@pytest.mark.parametrize("explicit", [False, True])
def test_a_mesh_has_every_axis_and_its_type(explicit):
  mesh = make_mesh({"fsdp": 2, "tensor": 4}, explicit=explicit)
  assert mesh.axis_names == MESH_AXES
  assert dict(mesh.shape) == dict.fromkeys(MESH_AXES, 1) | {"fsdp": 2, "tensor": 4}
  assert set(mesh.axis_types) == {AxisType.Explicit if explicit else AxisType.Auto}
  assert list(mesh.devices.flat) == jax.devices()


@pytest.mark.xdist_group("devices")
def test_fewer_devices_are_the_first_ones():
  assert list(make_mesh({"fsdp": 3}).devices.flat) == jax.devices()[:3]
  with pytest.raises(ValueError, match="a mesh of 16 devices needs more than the 8 present"):
    make_mesh({"fsdp": 16})


@pytest.mark.parametrize(
  ("sizes", "dcn", "slices", "expected"),
  [
    ({"data": 1}, {"data": 2}, 1, {"data": 2}),
    ({"data": 2, "fsdp": 2}, {"data": 2}, 1, {"data": 4, "fsdp": 2}),
    ({"fsdp": -1}, {"data": 2}, 2, {"data": 2, "fsdp": 8}),
    ({"fsdp": -1, "tensor": 2}, {"fsdp": 2}, 2, {"fsdp": 8, "tensor": 2}),
    ({"fsdp": 8}, {"data": 1, "stage": 2, "fsdp": 1}, 2, {"stage": 2, "fsdp": 8}),
    ({"fsdp": 2}, {"data": 2, "fsdp": 2, "stage": 2}, 8, {"data": 2, "stage": 2, "fsdp": 4}),
    ({}, {"data": 2}, 2, {"data": 2, "fsdp": 2, "expert": 4}),
    ({}, {"fsdp": 2}, 2, {"fsdp": 4, "expert": 4}),
    ({}, {"data": 2, "stage": 2}, 4, {"data": 2, "stage": 2, "expert": 4}),
    ({}, {"data": 1}, 2, {"data": 2, "fsdp": 2, "expert": 4}),
  ],
)
def test_sizes_within_and_across_slices_multiply(sizes, dcn, slices, expected):
  """Of 16 devices and a model of 4 experts."""
  found = resolve_sizes(sizes, 16, dcn=dcn, num_experts=4, num_slices=slices)
  assert chosen(found) == expected


@pytest.mark.parametrize(
  ("sizes", "dcn", "slices", "message"),
  [
    ({"fsdp": 8}, {"data": 2}, 1, "fsdp=8 asks for 8 devices, but there are 4 in each of 2 slices"),
    ({"tensor": 3, "fsdp": -1}, {"data": 2}, 1, "4 devices in each of 2 slices do not divide by 3"),
    ({}, {"data": 3}, 1, "dcn_data=3 spans 3 slices, but 8 devices do not divide by 3"),
    ({}, {"data": 2, "fsdp": 2}, 2, "dcn_data=2, dcn_fsdp=2 spans 4 slices, but there are 2"),
    ({}, {"data": 0}, 1, "dcn_data=0 must be a positive number of slices"),
    ({}, {"tensor": 2}, 1, "'tensor' cannot span slices; data, stage, fsdp can"),
  ],
)
def test_slices_that_do_not_match_are_refused(sizes, dcn, slices, message):
  with pytest.raises(ValueError, match=message):
    resolve_sizes(sizes, 8, dcn=dcn, num_slices=slices)


@pytest.mark.xdist_group("devices")
@pytest.mark.parametrize(
  ("sizes", "dcn", "expected"),
  [
    ({"data": 2, "tensor": 4}, {"data": 2}, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ({"stage": 4, "tensor": 2}, {"stage": 2}, [[0, 1], [2, 3], [4, 5], [6, 7]]),
    # fsdp: two slices, in each of them the outer of two axes
    ({"fsdp": 4, "tensor": 2}, {"fsdp": 2}, [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ({"data": 2, "fsdp": 4}, {"fsdp": 2}, [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ({"data": 4, "fsdp": 2}, {"data": 2, "fsdp": 2}, [[0, 2], [1, 3], [4, 6], [5, 7]]),
    # two devices of each slice of four
    ({"data": 2, "fsdp": 2}, {"data": 2}, [[0, 1], [4, 5]]),
  ],
)
def test_virtual_devices_make_slices_of_neighbours(sizes, dcn, expected):
  mesh = make_mesh(sizes, dcn=dcn)
  ids = np.array([d.id for d in mesh.devices.flat]).reshape(np.shape(expected))
  assert ids.tolist() == expected
  with pytest.raises(ValueError, match="data=4 is no multiple of dcn_data=8"):
    make_mesh({"data": 4}, dcn={"data": 8})


class Fake(NamedTuple):
  """What `make_mesh` asks of a device."""

  id: int
  process_index: int
  platform: str = "cpu"
  slice_index: int | None = None
  device_kind: str = "fake"


def test_processes_stand_for_slices():
  """Four processes of two devices, listed in another order."""
  devices = [Fake(id=i, process_index=i // 2) for i in (6, 0, 1, 4, 2, 3, 5, 7)]
  parts, across = topology._split(devices, (4, 1, 2, 1, 1, 1), topology._across({"data": 4}))
  assert [sorted(d.id for d in part) for part in parts] == [[0, 1], [2, 3], [4, 5], [6, 7]]
  assert across == (4, 1, 1, 1, 1, 1)
  parts, _ = topology._split(devices, (2, 1, 4, 1, 1, 1), topology._across({"data": 2}))
  assert [sorted(d.id for d in part) for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7]]
  with pytest.raises(ValueError, match="spans 8 slices, but there are 4 processes, which stand"):
    make_mesh({"data": 8}, devices, dcn={"data": 8})


def test_hosts_of_gpus_are_slices_only_on_request():
  devices = [Fake(i, i // 4, platform="gpu", slice_index=i // 4) for i in range(8)]
  assert count_slices(devices) == 1
  parts, across = topology._split(devices, (1, 1, 8, 1, 1, 1), topology._across({}))
  assert parts == [devices] and across == (1,) * 6


def hops(a, b, sides):
  """Links between two chips of a torus."""
  distances = (abs(x - y) for x, y in zip(a.coords, b.coords, strict=True))
  return sum(min(d, n - d) for d, n in zip(distances, sides, strict=True))


def ring_hops(devices, axis, sides):
  """Set of link counts from each device to the next along a mesh axis, round the ring."""
  following = np.roll(devices, -1, axis)
  return {hops(a, b, sides) for a, b in zip(devices.flat, following.flat, strict=True)}


@needs_libtpu
@pytest.mark.parametrize("fsdp,expert", [(16, 1), (4, 4), (8, 2)])
def test_tensor_neighbours_on_a_described_v5p_cube_are_one_link_apart(fsdp, expert):
  devices = describe_devices("v5p-128")
  assert len(devices) == 64 and find_chip(devices[0]).name == "v5p"
  mesh = make_mesh({"fsdp": fsdp, "expert": expert, "tensor": 4}, devices)
  tensor = MESH_AXES.index("tensor")
  assert ring_hops(mesh.devices, tensor, (4, 4, 4)) == {1}
  # The order in which devices are listed would not do: hosts are 2x2x1 blocks.
  assert 2 in ring_hops(np.array(devices).reshape(mesh.devices.shape), tensor, (4, 4, 4))


def wrapped(chip, sides):
  """Which sides of a slice close to rings: of v4 and v5p those of slices of whole 4x4x4 cubes, of
  v5e and v6e those of a pod's full 16 (Google Cloud TPU documentation)."""
  if chip in ("v5e", "v6e"):
    return tuple(n == 16 for n in sides)
  return (all(n % 4 == 0 for n in sides),) * len(sides)


def links(a, b, chip, sides):
  """Links from one chip to another."""
  total = 0
  for x, y, n, ring in zip(a.coords, b.coords, sides, wrapped(chip, sides), strict=True):
    total += min(abs(x - y), n - abs(x - y)) if ring else abs(x - y)
  return total


def rows(mesh, axis):
  """The rows of devices along a mesh axis."""
  i = MESH_AXES.index(axis)
  return np.moveaxis(mesh.devices, i, -1).reshape(-1, mesh.devices.shape[i])


def fills_a_box(devices):
  coords = [tuple(d.coords) for d in devices]
  box = itertools.product(*(range(min(c), max(c) + 1) for c in zip(*coords, strict=True)))
  return set(coords) == set(box)


# Topology, mesh, and the axes whose rows cannot all fill boxes, since inner axes lie in between.
PLACED = [
  ("v4:4x4x4", {"fsdp": 16, "tensor": 4}, ()),
  ("v4:4x4x8", {"fsdp": 16, "tensor": 8}, ()),
  ("v4:2x2x1", {"fsdp": 2, "tensor": 2}, ()),
  ("v5p:4x4x4", {"fsdp": 16, "expert": 4}, ()),
  ("v5p:4x4x4", {"fsdp": 4, "expert": 16}, ()),
  ("v5p:4x4x4", {"fsdp": 4, "expert": 4, "tensor": 4}, ()),
  ("v5p:4x4x4", {"fsdp": 8, "expert": 2, "tensor": 4}, ("fsdp",)),
  ("v5p:2x2x2", {"fsdp": 2, "expert": 2, "tensor": 2}, ()),
  ("v5p:8x8x8", {"fsdp": 64, "expert": 8}, ()),
  ("v5p:8x8x8", {"fsdp": 8, "expert": 8, "tensor": 8}, ()),
  ("v5p:8x8x8", {"data": 4, "fsdp": 8, "expert": 4, "tensor": 4}, ("data",)),
  ("v5p:8x8x8", {"stage": 4, "fsdp": 16, "expert": 8}, ("stage",)),
  ("v5p:16x16x24", {"fsdp": 384, "tensor": 16}, ()),
  ("v5e:2x2", {"fsdp": 2, "tensor": 2}, ()),
  ("v5e:2x4", {"fsdp": 2, "tensor": 4}, ()),
  ("v5e:16x16", {"fsdp": 16, "tensor": 16}, ()),
  ("v5e:16x16", {"fsdp": 32, "tensor": 8}, ("fsdp",)),
  ("v6e:2x4", {"fsdp": 4, "tensor": 2}, ()),
  ("v6e:8x8", {"fsdp": 8, "expert": 8}, ()),
  ("v6e:16x16", {"fsdp": 16, "expert": 4, "tensor": 4}, ("expert",)),
]


@needs_libtpu
@pytest.mark.parametrize(("name", "sizes", "torn"), PLACED)
def test_axes_follow_the_torus(name, sizes, torn):
  chip, _, shape = name.partition(":")
  devices = describe_devices(name)
  mesh = make_mesh(sizes, devices)
  assert set(mesh.devices.flat) == set(devices)
  sides = [*map(int, shape.split("x")), 1][:3]
  for row in rows(mesh, "tensor"):
    assert {links(a, b, chip, sides) for a, b in itertools.pairwise(row)} <= {1}
  for axis in sizes:
    assert all(map(fills_a_box, rows(mesh, axis))) == (axis not in torn), axis


@needs_libtpu
def test_cores_of_a_tpu7x_chip_are_the_nearest_neighbours():
  mesh = make_mesh({"fsdp": 4, "tensor": 4}, describe_devices("tpu7x:2x2x2"))
  for row in rows(mesh, "tensor"):
    assert [len({tuple(d.coords) for d in pair}) for pair in (row[:2], row[2:], row)] == [1, 1, 2]
  assert all(map(fills_a_box, rows(mesh, "fsdp")))


@needs_libtpu
@pytest.mark.parametrize(
  ("sizes", "dcn", "axis"),
  [
    ({"data": 2, "fsdp": 2, "tensor": 2}, None, "data"),
    ({"data": 4, "tensor": 2}, {"data": 2}, "data"),
    ({"stage": 2, "fsdp": 4}, {"stage": 2}, "stage"),
    ({"data": 2, "fsdp": 4}, {"fsdp": 2}, "fsdp"),
  ],
)
def test_slices_are_outermost_along_their_axis(sizes, dcn, axis):
  devices = describe_devices("v5p:2x2x1", num_slices=2)
  assert count_slices(devices) == 2 and count_slices(jax.devices()) == 1
  mesh = make_mesh(sizes, devices, dcn=dcn)
  first, second = np.split(mesh.devices, 2, axis=MESH_AXES.index(axis))
  assert {d.slice_index for d in first.flat} == {0}
  assert {d.slice_index for d in second.flat} == {1}


@needs_libtpu
def test_slices_that_the_mesh_does_not_name_are_refused():
  devices = describe_devices("v5p:2x2x1", num_slices=2)
  with pytest.raises(ValueError, match="data=1 does not divide over 2 TPU slices; say which axis"):
    make_mesh({"fsdp": 8}, devices)
  with pytest.raises(ValueError, match="dcn_data=4 spans 4 slices, but there are 2 TPU slices"):
    make_mesh({"data": 8}, devices, dcn={"data": 4})
  with pytest.raises(ValueError, match="dcn_data=2 spans 2 slices, but there are 1 TPU slices"):
    make_mesh({"data": 2, "fsdp": 2}, describe_devices("v5p:2x2x1"), dcn={"data": 2})


@needs_libtpu
def test_described_devices_are_one_a_chip_but_two_on_tpu7x():
  counts = {t: len(describe_devices(t)) for t in ("v4-8", "v5litepod-1", "v6e-8", "tpu7x-8")}
  assert counts == {"v4-8": 4, "v5litepod-1": 1, "v6e-8": 8, "tpu7x-8": 8}
  assert {d.process_index for d in describe_devices("v6e-8")} == {0}  # a single host


@needs_libtpu
def test_a_mesh_that_leaves_a_host_idle_is_refused():
  with pytest.raises(ValueError, match="8 of 64 devices leaves 14 hosts idle"):
    make_mesh({"fsdp": 8}, describe_devices("v5p-128"))
  few = make_mesh({"fsdp": 3}, describe_devices("v5p-8"))
  assert len(set(few.devices.flat)) == 3


def test_topologies_that_do_not_exist_are_refused():
  with pytest.raises(ValueError, match="v5e has no such slice"):
    describe_devices("v5e:2x3")
  with pytest.raises(ValueError, match="only TPUs can be described"):
    describe_devices("h100:8")


def test_describing_without_libtpu_says_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ModuleNotFoundError, match="pip install libtpu"):
    describe_devices("v5p-8")


def test_hops_of_the_oracle_wrap_around():
  corners = itertools.product((0, 3), repeat=3)
  origin = type("Device", (), {"coords": (0, 0, 0)})
  assert {hops(origin, type("D", (), {"coords": c}), (4, 4, 4)) for c in corners} == {0, 1, 2, 3}
