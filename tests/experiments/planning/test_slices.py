"""Several TPU slices: what goes over the network between them, how long it takes, what hides it."""

from dataclasses import replace

import pytest

from experiments import cli
from experiments.config import MeshConfig
from experiments.planning import drawing, network, speed
from experiments.planning.fixes import fixes
from experiments.planning.search import abstract_mesh, move, over_slices, search, start
from layers.count import count_params
from mesh.hardware import CHIPS
from tests.experiments.programs import call

V5P = CHIPS["v5p"]
PARAMETERS = count_params(cli.named_config("dense_1b").model).total
# Over fsdp: twice in bfloat16 and gradients in float32; the vocabulary and the last norm once.
FSDP_BYTES = 8 * PARAMETERS - 2 * (128_256 * 2048 + 2048)


def spanning(parts=1, **mesh):
  """dense_1b on the mesh, of which sizes without dcn_ hold within a slice."""
  config = cli.named_config("dense_1b")
  config = replace(config, mesh=MeshConfig(**mesh), train=replace(config.train, microbatches=parts))
  sizes = {axis: n for axis, n in mesh.items() if not axis.startswith("dcn_")}
  axes = {"data": 1, "stage": 1, "fsdp": 1} | sizes
  return move(start(config), config, abstract_mesh(over_slices(config, axes)))


def test_gradients_between_two_slices():
  """All of them in float32, of which each of 64 chips sums its 1/64 with the other slice."""
  setup = spanning(fsdp=64, dcn_data=2)
  inside, between = network.bytes_by_network(setup, V5P)
  assert between == {"data": pytest.approx(2 * 4 * PARAMETERS / 64 / 2)}
  assert inside["data"] == 0
  assert inside["fsdp"] == pytest.approx(FSDP_BYTES * 63 / 64)
  traffic = speed.step_time(setup, V5P).traffic
  assert traffic["dcn_data"] == pytest.approx(4 * PARAMETERS / 64 / (0.8 * 6.25e9))
  assert "data" not in traffic


def test_gradients_meet_inside_of_slices_first():
  """data=4 on each of 2 slices: 3/4 of a shard twice on links, half of a quarter twice between."""
  shard = 4 * PARAMETERS / 16
  inside, between = network.bytes_by_network(spanning(data=4, fsdp=16, dcn_data=2), V5P)
  assert inside["data"] == pytest.approx(2 * shard * 3 / 4)
  assert between["data"] == pytest.approx(2 * shard / 4 / 2)


def test_weights_between_slices():
  """fsdp over 4 slices of 16: a chip's column of the weights comes from three slices, three times
  (in bfloat16 twice, the vocabulary once; as gradients in float32), and is gathered from 15."""
  inside, between = network.bytes_by_network(spanning(fsdp=16, dcn_fsdp=4), V5P)
  assert between["fsdp"] == pytest.approx(FSDP_BYTES / 16 * 3 / 4)
  assert inside["fsdp"] == pytest.approx(FSDP_BYTES * 15 / 16)


def test_stages_on_slices():
  """Two stages, a slice each: nothing of them on links. 16 rows a chip in 4 parts: five ticks hand
  on 4 rows both ways, and all rows of the last stage go to both, 2 (1 - 1/2) times each way."""
  setup = spanning(parts=4, fsdp=16, dcn_stage=2)
  inside, between = network.bytes_by_network(setup, V5P)
  row = 4096 * 2048 * 2
  assert between["stage"] == pytest.approx((2 * 5 * 4 + 2 * 16) * row)
  assert inside["stage"] == 0
  step = speed.step_time(setup, V5P)
  assert step.traffic["dcn_stage"] == pytest.approx(between["stage"] / (0.8 * 6.25e9))
  assert step.exposed >= step.traffic["dcn_stage"]  # a stage waits for what it works on


def test_computing_hides_both_networks_at_once():
  rates = speed.rates_of(V5P)  # under 80 % of the computing
  exposed = lambda **traffic: speed.exposed(traffic, 10.0, rates)
  assert exposed(fsdp=7.0, dcn_data=8.0) == 0
  assert exposed(fsdp=9.0, dcn_data=8.5, dcn_fsdp=1.0) == pytest.approx(1.5)
  assert exposed(dcn_data=1.0, dcn_stage=2.0, tensor=3.0) == 5


def test_on_the_time_line():
  step = speed.Step(
    products=10.0, attention=0.0, repeated=0.0, memory=0.0, optimizer=0.0,
    traffic={"fsdp": 5.0, "tensor": 1.0, "dcn_data": 9.0}, exposed=2.0, bubble=0.0, host=0.0,
  )  # fmt: skip
  found = drawing.tracks(step, {"data": 2, "fsdp": 8, "tensor": 8}, V5P)
  seen = lambda track: [part[:3] for part in found[track] if part[1] < part[2]]
  assert seen("ICI") == [("fsdp", 0.0, 5.0), ("tensor", 11.0, 12.0)]
  assert seen("DCN") == [("dcn_data", 0.0, 8.0), ("dcn_data", 10.0, 11.0)]
  assert step.total == 12


def test_other_meshes_span_the_same_slices():
  setup = spanning(fsdp=64, dcn_data=2)
  options = search(start(setup.config), V5P, 64, quick=True)
  assert {o.setup.mesh.size for o in options} == {128}
  assert all(o.setup.mesh.shape["data"] % 2 == 0 for o in options)
  best = options[0]
  assert not any("dcn_" in change for change in best.overrides(setup.config))
  one = 1.1 * best.memory.total  # of no device: what it would take
  assert all(fix.peak <= one for fix in fixes(setup, V5P, int(one), options) if fix.fits)


def test_what_is_printed(tmp_path):
  """0.8 * 6.25 GB/s a chip: 4 bytes a parameter over 16 chips of each slice."""
  path = tmp_path / "plan.html"
  arguments = ("--config=dense_1b", "--topology=v5p-32", f"--report={path}")
  result = call("plan", *arguments, "--config.mesh.dcn_data=2", "--config.mesh.fsdp=16")
  assert result.code == 0, result.err
  assert result.out.startswith("dense_1b on 2 slices of 16 x v5p, data=2 x fsdp=16, minimal\n")
  size, seconds = 4 * PARAMETERS / 16, 4 * PARAMETERS / 16 / 5e9
  words = f"dcn_data {size / 1e6:.1f} MB, over a network of 6.25 GB/s a chip"
  assert words in result.out and f"dcn_data {seconds:.3f} s" in result.out
  assert "chip-hours" in result.out and "  32 v5p, " in result.out
  page = path.read_text()
  assert words in page and "Each of 2 slices, data over 2 of them: 16 devices on" in page
  assert "Nothing goes over DCN" not in page
  assert f"<title>dcn_data {seconds:.3f} s</title>" in page
