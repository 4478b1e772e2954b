"""Mesh sizes, device order on real tori (described), meshes over virtual devices."""

import importlib.util
import itertools
import math

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

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


@needs_libtpu
def test_slices_meet_along_data_only():
  devices = describe_devices("v5p:2x2x1", num_slices=2)
  assert count_slices(devices) == 2 and count_slices(jax.devices()) == 1
  mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, devices)
  for row, replica in enumerate(mesh.devices):
    assert {d.slice_index for d in replica.flat} == {row}
  with pytest.raises(ValueError, match="data=1 does not divide over 2 TPU slices"):
    make_mesh({"fsdp": 8}, devices)


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


@needs_libtpu
def test_topologies_that_do_not_exist_are_refused():
  with pytest.raises(ValueError, match="libtpu refuses topology v5e:2x3"):
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
