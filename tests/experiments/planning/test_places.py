"""Where devices of a mesh lie, as the plan's page draws them."""

import importlib.util

import numpy as np
import pytest

from experiments.planning.places import places, run_of
from mesh.axes import MESH_AXES
from mesh.slices import parse_topology
from mesh.topology import describe_devices, make_mesh

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="describing a TPU needs the libtpu package, which is not installed (Linux x86-64 only)",
)


@needs_libtpu
@pytest.mark.parametrize(
  ("name", "sizes"),
  (
    ("v4:4x4x8", {"fsdp": 16, "tensor": 8}),
    ("v5p:4x4x4", {"fsdp": 4, "expert": 16}),
    ("v5p:4x4x4", {"fsdp": 8, "expert": 2, "tensor": 4}),
    ("v5p:8x8x8", {"data": 4, "fsdp": 8, "expert": 4, "tensor": 4}),
    ("v5e:2x4", {"fsdp": 8}),
    ("v5e:16x16", {"fsdp": 32, "tensor": 8}),
    ("v6e:2x4", {"fsdp": 2, "tensor": 4}),
    ("tpu7x:4x4x4", {"fsdp": 32, "tensor": 4}),
  ),
)
def test_a_mesh_lies_where_a_run_lays_it(name, sizes):
  """Without libtpu's devices, as with them."""
  found = places(parse_topology(name), sizes)
  mesh = make_mesh(sizes, describe_devices(name)).devices
  real = [(*d.coords, d.core_on_chip) for d in mesh.flat]
  assert found.known
  np.testing.assert_array_equal(found.places.reshape(-1, 4), real)
  assert found.places.shape[:-1] == mesh.shape


def axis(name):
  return MESH_AXES.index(name)


def test_what_is_said_of_an_axis():
  found = places(parse_topology("v5p:4x4x4"), {"fsdp": 4, "expert": 16})
  assert {run_of(found, axis("fsdp")), run_of(found, axis("expert"))} == {
    "4 along z", "4 along x, 4 along y",
  }  # fmt: skip
  found = places(parse_topology("tpu7x:2x2x1"), {"tensor": 2, "fsdp": 4})
  assert run_of(found, axis("tensor")) == "2 cores"
  assert run_of(found, axis("fsdp")) == "2 along x, 2 along y"


def test_rows_that_fill_no_box_are_said_to_wind():
  """Two devices of each of two sides, on a diagonal: four places in the box, two in the row."""
  found = places(parse_topology("v5e:2x2"), {"fsdp": 2, "tensor": 2})
  diagonal = np.array([[[0, 0, 0, 0], [1, 1, 0, 0]], [[1, 0, 0, 0], [0, 1, 0, 0]]])
  found = found._replace(places=diagonal.reshape(found.places.shape))
  assert run_of(found, axis("tensor")) == "on a path through x, y"


def test_gpus_fill_nodes_in_order():
  found = places(parse_topology("h100:4x8"), {"data": 2, "fsdp": 4, "tensor": 4})
  assert found.known and found.places.shape == (2, 1, 4, 1, 1, 4, 4)
  # Device 1 * 16 + 2 * 4 + 3 = 27 is GPU 3 of node 3.
  assert found.places[1, 0, 2, 0, 0, 3].tolist() == [3, 0, 3, 0]
  assert run_of(found, axis("tensor")) == "4 of a node"
  assert run_of(found, axis("fsdp")) == "2 of a node, over 2 nodes"
  assert run_of(found, axis("data")) == "over 2 nodes"


def test_places_that_show_only_where_it_runs():
  slices = parse_topology("v5p:2x2x1")
  assert not places(slices, {"fsdp": 2}).known  # half the slice stays idle
  assert places(slices, {"data": 2, "fsdp": 2}).known
