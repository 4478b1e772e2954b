"""`--show_mesh`: which device holds what, in text and as a picture."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.config import ConfigError
from experiments.planning.placement import Placed, held_text, numbers, tiles
from experiments.show_mesh import describe, draw, find
from mesh.topology import make_mesh
from tests.experiments.programs import call, spawn
from tests.mesh.test_topology import needs_libtpu

pytestmark = pytest.mark.xdist_group("devices")

PNG = b"\x89PNG\r\n\x1a\n"


EXPERTS = {"expert": 2, "fsdp": 2, "tensor": 2}


def placed(shape, spec, **sizes):
  array = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(make_mesh(sizes), spec))
  return Placed("some/array", tuple("abcd"[: len(shape)]), array)


def held(array, t):
  """Device -> its slice of the array, read back from the tiles' own labels."""
  found = {}
  for label, row in zip(t.rows, t.holders, strict=True):
    for column_label, devices in zip(t.columns, row, strict=True):
      texts = [x for x in [*label.split(", "), column_label] if x != ":"]
      for device in devices:
        assert device not in found
        found[device] = [tuple(map(int, text.split(":"))) for text in texts]
  return found


@pytest.mark.parametrize(
  ("shape", "spec", "sizes", "grid"),
  [
    ((8, 12), P("fsdp", "tensor"), {"fsdp": 4, "tensor": 2}, (4, 2)),
    ((8, 12), P("fsdp", "tensor"), {"data": 2, "fsdp": 2, "tensor": 2}, (2, 2)),
    ((8, 12), P(("fsdp", "tensor"), None), {"fsdp": 4, "tensor": 2}, (8, 1)),
    ((12, 8), P(None, ("fsdp", "tensor")), {"fsdp": 4, "tensor": 2}, (1, 8)),
    ((8,), P("fsdp"), {"fsdp": 8}, (8, 1)),
    ((3, 4, 6, 8), P(None, "expert", "fsdp", "tensor"), EXPERTS, (4, 2)),
    ((5, 8, 3), P(None, "fsdp", None), {"fsdp": 4, "context": 2}, (4, 1)),
  ],
)
def test_tiles_are_where_jax_puts_the_array(shape, spec, sizes, grid):
  """The oracle is an array that really is placed."""
  array = placed(shape, spec, **sizes)
  t = tiles(array)
  assert (len(t.rows), len(t.columns)) == grid
  real = jax.device_put(np.arange(math.prod(shape), dtype=np.float32).reshape(shape),
                        array.array.sharding)  # fmt: skip
  expected = {}
  for shard in real.addressable_shards:
    spans = ((s.start, s.stop) for s in shard.index)
    expected[shard.device.id] = [span for span in spans if span[0] is not None]
  assert held(array, t) == expected
  sizes = {shard.data.nbytes for shard in real.addressable_shards}
  assert sizes == {int(re.search(r"([\d,]+) B", held_text(array))[1].replace(",", ""))}
  copies = 8 // math.prod(grid)
  assert f"one of {math.prod(grid)} slices, {copies} cop" in held_text(array)


def test_an_array_that_is_not_cut_lies_on_all_devices():
  t = tiles(placed((4, 6), P(None, None), fsdp=8))
  assert t.rows == t.columns == [":"] and t.holders == [[list(range(8))]]
  assert "all of it, 8 copies" in held_text(placed((4, 6), P(), fsdp=8))
  assert "| 0-7 |" in draw(t)


def test_the_rule_is_in_the_table():
  lines = describe(placed((8, 12), P(("data", "fsdp"), None), data=2, fsdp=4)).splitlines()
  assert lines[0] == "some/array: float32[8, 12], 384 B"
  assert [line.split() for line in lines[2:4]] == [
    ["0", "a", "data=2", "x", "fsdp=4", "8", "8", "1"],
    ["1", "b", "-", "12", "1", "12"],
  ]


def drawn(t):
  """Row label -> the texts of its cells."""
  rows = {}
  for line in draw(t).splitlines():
    label, *cells = line.rstrip("|").split("|")
    if cells:
      rows[label.strip()] = [cell.strip() for cell in cells]
  return rows


def test_small_drawings_are_whole():
  t = tiles(placed((8, 12), P("fsdp", "tensor"), fsdp=4, tensor=2))
  assert drawn(t) == {"0:2": ["0", "1"], "2:4": ["2", "3"], "4:6": ["4", "5"], "6:8": ["6", "7"]}
  assert "rows: a over fsdp; columns: b over tensor" in draw(t)
  outer = draw(tiles(placed((2, 4, 2), P("expert", "fsdp", "tensor"), expert=2, fsdp=2, tensor=2)))
  assert outer.count("+-----") == 2 * 3  # a line between the parts of the outermost dim


def test_large_drawings_leave_out_what_goes_on_alike():
  t = tiles(placed((8, 2), P("fsdp", None), fsdp=8))
  holders = [[[i]] for i in range(512)]
  t = t._replace(rows=[f"{i}:{i + 1}" for i in range(512)], holders=holders, outer=512)
  assert len(draw(t).splitlines()) < 24
  assert "497 more rows, each 1 devices further" in draw(t)
  assert drawn(t)["0:1"] == ["0"] and drawn(t)["511:512"] == ["511"]
  holders[7] = [[300]]
  assert draw(t).rstrip().count("497 more rows\n") == 1
  wide = t._replace(rows=[":"], columns=t.rows, holders=[[[i] for i in range(512)]], outer=1)
  assert max(map(len, draw(wide).splitlines())) <= 100
  assert "..." in draw(wide)


@pytest.mark.parametrize(
  ("devices", "text"),
  [
    ([5], "5"),
    ([0, 1], "0,1"),
    ([0, 4], "0,4"),
    ([0, 1, 2, 3], "0-3"),
    ([0, 8, 16, 24], "0,8..24"),
    ([0, 1, 2, 3, 8, 9, 10, 11], "0-3,8-11"),
    ([0, 1, 4, 5, 8, 9, 12, 13], "0,1,4,5.. (8)"),
  ],
)
def test_device_numbers_are_short(devices, text):
  assert numbers(devices) == text


NAMES = ("embedding/table", "head", "a/layer_0/attention/query", "a/layer_1/attention/query",
         "a/layer_1/attention/query_norm")  # fmt: skip


def test_a_parameter_is_found_by_part_of_its_path():
  assert find("head", NAMES) == "head"
  assert find("table", NAMES) == "embedding/table"
  assert find("layer_0/att", NAMES) == "a/layer_0/attention/query"
  # The whole path wins over paths that continue it.
  assert find("a/layer_1/attention/query", NAMES) == "a/layer_1/attention/query"
  with pytest.raises(ConfigError, match="is part of 3 parameters; give more of the path:\n  a/lay"):
    find("query", NAMES)
  with pytest.raises(ConfigError, match=r"=tabel: .* nearest: embedding/table, "):
    find("tabel", NAMES)


def test_debug_on_eight_devices(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(jax, "device_put", None)  # nothing is placed
  before = len(jax.live_arrays())
  result = call("run", "--config=debug", "--show_mesh=moe/up")
  assert (result.code, result.err) == (0, "")
  assert len(jax.live_arrays()) == before
  assert "debug on 8 x cpu, mesh fsdp=2 x expert=4, rules all" in result.out
  assert "segment_0/layer_1/moe/up: float32[1, 4, 64, 128], 131,072 B" in result.out
  assert re.search(r"^ +1 +expert +expert=4 +4 +4 +1$", result.out, re.MULTILINE)
  assert re.search(r"^ +3:4 \| +3 +\| +7 +\|$", result.out, re.MULTILINE)
  assert "a device holds int32[1, 64], 256 B: one of 8 slices, 1 copy of each" in result.out
  assert result.out.splitlines()[-1] == "picture mesh_segment_0_layer_1_moe_up.png"
  assert [p.name for p in tmp_path.iterdir()] == ["mesh_segment_0_layer_1_moe_up.png"]
  content = (tmp_path / "mesh_segment_0_layer_1_moe_up.png").read_bytes()
  assert content.startswith(PNG) and len(content) > 20_000


def test_changed_rules_and_slices_are_drawn_into_an_existing_work_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "run").mkdir()
  mesh = ("--config.mesh.rules=all,embed=,vocab=fsdp", "--config.mesh.fsdp=-1")
  result = call("run", "--config=debug", "--workdir=run", "--show_mesh=head", *mesh,
                "--config.mesh.dcn_data=2", "--config.mesh.axis_types=explicit")  # fmt: skip
  assert (result.code, result.err) == (0, "")
  assert "mesh data=2 x fsdp=4, rules all,embed=,vocab=fsdp" in result.out
  assert re.search(r"^ +0 +embed +- ", result.out, re.MULTILINE)
  assert re.search(r"^ +: \| +0,4 +\| +1,5 +\| +2,6 +\| +3,7 +\|$", result.out, re.MULTILINE)
  assert [p.name for p in (tmp_path / "run").iterdir()] == ["mesh_head.png"]


def test_devices_go_by_their_numbers_also_where_some_are_left_out(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  result = call("run", "--config=debug", "--show_mesh=head", "--config.mesh.fsdp=2",
                "--config.mesh.dcn_data=2")  # fmt: skip
  assert result.code == 0, result.err
  assert re.search(r"^ +0:32 \| +0,4 +\|$", result.out, re.MULTILINE)
  assert re.search(r"^ +32:64 \| +1,5 +\|$", result.out, re.MULTILINE)


def test_two_processes_are_two_slices_and_draw_once(tmp_path):
  """Each has eight devices, of which the mesh takes four."""
  result = spawn(tmp_path, "run", "--config=debug", "--show_mesh=head", "--processes=2",
                 "--config.mesh.fsdp=4", "--config.mesh.dcn_data=2")  # fmt: skip
  assert result.code == 0, result.err
  assert result.out.count("debug on 8 x cpu on 2 hosts, mesh data=2 x fsdp=4, rules all") == 1
  assert re.search(r"^ +16:32 \| +1,5 +\|$", result.out, re.MULTILINE)
  assert [p.name for p in tmp_path.glob("*.png")] == ["mesh_head.png"]


@needs_libtpu
def test_a_described_pod_in_a_process_of_its_own(tmp_path):
  result = spawn(tmp_path, "run", "--config=moe_70b", "--topology=v5p-1024",
                 "--show_mesh=layer_1/moe/up", "--config.train.microbatches=1")  # fmt: skip
  assert (result.code, result.err) == (0, "")
  assert "moe_70b on 512 x TPU v5 on 128 hosts, mesh fsdp=32 x expert=16" in result.out
  assert re.search(r"^ +1 +expert +expert=16 +64 +16 +4$", result.out, re.MULTILINE)
  assert "one of 512 slices, 1 copy of each" in result.out
  assert len(result.out.splitlines()) < 70 and max(map(len, result.out.splitlines())) <= 100
  assert len(list(tmp_path.glob("mesh_*.png"))) == 1


@pytest.mark.parametrize(
  ("arguments", "pieces"),
  [
    (["--show_mesh=mooe/up"], ["nearest: segment_0/layer_1/moe/up"]),
    (["--show_mesh=query"], ["2 parameters", "layer_0/attention/query", "layer_1/attention/query"]),
    (["--show_mesh="], ["22 parameters", "segment_0/layer_1/moe/router"]),
    (["--show_mesh=head", "--topology=h100:8"], ["only TPUs"]),
    (["--show_mesh=head", "--config.mesh.fsdp=3"], ["over mesh fsdp=3"]),
    (["--show_mesh=head", "--config.mesh.dcn_data=3"], ["dcn_data=3", "8 devices"]),
    (["--show_mesh=head", "--config.mesh.dcn_data=0"], ["mesh.dcn_data=0", "at least 1"]),
    (["--show_mesh=head", "--config.mesh.rules=all,embedd=fsdp"], ["mesh.rules", "embed"]),
    (["--show_mesh=head", "--config.mesh.rules=all,mlp=fdsp"], ["mesh.rules", "mean fsdp"]),
    (["--show_mesh=query", "--config.mesh.rules=all,heads=fsdp"],
     ["layer_0/attention/out of shape (1, 4, 16, 64)", "both heads and embed want mesh axis fsdp"]),
    (["--show_mesh=head", "--config.mesh.circular=0"], ["mesh.circular=0"]),
    (["--topology=v5e:2x2"], ["only described", "--show_mesh"]),
  ],
)  # fmt: skip
def test_mistakes(arguments, pieces, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  result = call("run", "--config=debug", "--workdir=run", *arguments)
  assert (result.code, result.out) == (2, ""), result.err
  assert result.err.startswith("error: ") and "Traceback" not in result.err
  for piece in pieces:
    assert piece in result.err, result.err
  assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_written_is_said(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "mesh_head.png").mkdir()
  result = call("run", "--config=debug", "--show_mesh=head")
  assert result.code == 2 and "can't write the picture mesh_head.png: Is a directory" in result.err
  assert "Traceback" not in result.err


@pytest.mark.parametrize("program", ("generate", "evaluate"))
def test_programs_that_compute_refuse_described_devices(program, tmp_path):
  result = call(program, f"--workdir={tmp_path}", "--topology=v5e:2x2")
  assert result.code == 2 and "--topology=v5e:2x2" in result.err


def test_only_one_process_speaks(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr("experiments.show_mesh.is_primary", lambda: False)
  result = call("run", "--config=debug", "--show_mesh=head")
  assert (result.code, result.out) == (0, "") and list(tmp_path.iterdir()) == []
