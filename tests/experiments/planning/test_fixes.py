"""What to change where a config does not fit: counted by hand, pasted, and ranked."""

from dataclasses import replace

import pytest

from experiments import cli
from experiments.overrides import apply_overrides
from experiments.planning.estimate import memory
from experiments.planning.fixes import fix_lines, fixes
from experiments.planning.search import abstract_mesh, changes, move, search, start
from experiments.planning.speed import step_time
from experiments.training.setup import build_on, mesh_sizes
from layers.count import count_params
from mesh.hardware import CHIPS
from mesh.rules import PRESETS

ROOM = 0.95


def planned(name, devices, **overrides):
  """As `plan` sees a config with the overrides on so many devices."""
  paths = [(path.replace("__", "."), str(value)) for path, value in overrides.items()]
  config = apply_overrides(cli.named_config(name), paths)
  return move(start(config), config, abstract_mesh(mesh_sizes(config, devices)))


def pasted(setup, fix):
  """The setup that a command line with the fix would build."""
  pairs = [text.removeprefix("--config.").split("=", 1) for text in fix.overrides]
  config = apply_overrides(setup.config, [(path, value) for path, value in pairs])
  return build_on(config, abstract_mesh(mesh_sizes(config, setup.mesh.size)), "tpu")


def by_override(found):
  return {" ".join(fix.overrides).removeprefix("--config."): fix for fix in found}


def test_savings_counted_by_hand():
  """dense_1b on 16 devices: 16 rows of 4096 positions each, 16 layers, width 2048."""
  setup = planned("dense_1b", 16)
  full = by_override(fixes(setup, CHIPS["v5e"], 75 * 10**9))["train.remat=full"]
  # `full` leaves a layer's input alone; `minimal` kept these beside it, in bfloat16: 32 queries and
  # 8 keys of 64 in 128 lanes, 8 values, what attention gives as the layer and as the kernel has it,
  # its branch, up and gate; and a float32 a head of the kernel's.
  width = 32 * 128 + 8 * 128 + 8 * 64 + 32 * 64 + 32 * 128 + 2048 + 2 * 8192
  assert full.saves == 16 * (16 * 4096) * (2 * width + 4 * 32)
  assert full.peak == memory(setup).total - full.saves
  # A moment of 2 bytes in place of 4, over 16 devices; ROOM lacks a part of just that.
  parameters = count_params(setup.config.model).total
  lacking = int((memory(setup).total - 1.5 * parameters / 16) / ROOM)
  narrow = by_override(fixes(setup, CHIPS["v5e"], lacking))["optimizer.moment_dtype=bfloat16"]
  assert narrow.saves == pytest.approx(2 * parameters / 16, rel=1e-3)
  assert narrow.fits and narrow.seconds < 0  # fewer bytes to read and write


def test_a_slow_network_changes_the_order_for_that_reason():
  """Microbatches gather all weights again, recomputation sends nothing more."""
  setup, chip = planned("dense_1b", 16), CHIPS["v5p"]
  need = dict.fromkeys(("train.remat=full", "train.microbatches=8"))
  quick, slow = (
    fixes(setup, replace(chip, interconnect=chip.interconnect / factor), 20 * 10**9)
    for factor in (1, 1000)
  )
  places = lambda found: [k for k in by_override(found) if k in need]
  assert all(by_override(found)[key].fits for found in (quick, slow) for key in need)
  assert places(quick) == ["train.microbatches=8", "train.remat=full"]
  assert places(slow) == ["train.remat=full", "train.microbatches=8"]
  cost = lambda found, key: by_override(found)[key].seconds
  # Under more computing, rather more of the traffic hides.
  assert cost(slow, "train.remat=full") < cost(quick, "train.remat=full")
  # Seven gathers and sums more of all weights, 2 + 2 + 4 bytes a parameter, at the slower rate.
  more = 7 * 8 * count_params(setup.config.model).total * 15 / 16
  rate = 0.8 * chip.interconnect / 1000 / 2
  assert cost(slow, "train.microbatches=8") == pytest.approx(more / rate, rel=0.1)


@pytest.mark.parametrize(
  ("name", "chip", "devices", "overrides"),
  [
    ("moe_70b", "v5p", 16, {}),
    ("gpt3:175b", "v5p", 64, {}),  # no single change is enough
    ("deepseek:v3", "v5p", 256, {}),  # has a mesh of its own
    ("dense_1b", "v5e", 8, {"mesh__rules": "fsdp", "mesh__context": 2, "mesh__fsdp": -1}),
    ("dense_1b", "v5e", 8, {"mesh__stage": 2, "mesh__circular": 2, "mesh__fsdp": -1,
                            "train__microbatches": 4}),
  ],
)  # fmt: skip
def test_what_is_pasted_gives_what_was_said(name, chip, devices, overrides):
  setup, chip = planned(name, devices, **overrides), CHIPS[chip]
  found = fixes(setup, chip, chip.hbm_bytes)
  assert found
  for fix in found:
    there = pasted(setup, fix)
    assert memory(there).total == fix.peak == memory(setup).total - fix.saves
    cost = step_time(there, chip).total - step_time(setup, chip).total
    assert cost == pytest.approx(fix.seconds, abs=1e-6)
    assert fix.fits == (fix.peak <= ROOM * chip.hbm_bytes)
  options = search(setup, chip, devices)
  for option in options[:5]:
    texts = option.overrides(setup.config)
    there = pasted(setup, found[0]._replace(overrides=tuple(texts)))
    assert there.mesh.shape == option.setup.mesh.shape
    assert memory(there).total == option.memory.total


def test_ranks():
  """Those that fit by time; the rest by bytes; a combination only where no single change fits."""
  chip = CHIPS["v5p"]
  for name, devices, single in (("dense_1b", 8, True), ("gpt3:175b", 64, False)):
    available = 16 * 2**30 if single else chip.hbm_bytes
    found = fixes(planned(name, devices), chip, available)
    fits, rest = [f for f in found if f.fits], [f for f in found if not f.fits]
    assert fits and rest and found == fits + rest
    assert [round(f.seconds, 2) for f in fits] == sorted(round(f.seconds, 2) for f in fits)
    assert [f.saves for f in rest] == sorted((f.saves for f in rest), reverse=True)
    several = [f for f in fits if len(f.overrides) > 1]
    assert bool(several) != single


def test_lines():
  setup = planned("dense_1b", 16)
  lines = fix_lines(setup, CHIPS["v5e"], 16 * 2**30)
  assert lines[0].startswith("--config.train.microbatches=8 saves ")
  assert lines[0].endswith(" of 78.1 GB and adds nothing to a step")
  full = next(line for line in lines if "remat=full" in line)
  assert full.startswith("--config.train.remat=full saves 63.5 GB of 78.1 GB and adds ")
  none = fix_lines(planned("moe_70b", 8), CHIPS["v5e"], 16 * 2**30)
  assert all(line.endswith("which is not enough") for line in none[:-1])
  assert none[-1].startswith("No change makes it fit this machine; python -m experiments.plan")


def test_presets_are_meshes():
  """A preset places everything as `all` does on a mesh without the axes it leaves out."""
  every = start(cli.named_config("moe_8x1b"))
  for name, rules in PRESETS.items():
    sizes = {axis: 2 for axis in ("data", "fsdp", "expert", "tensor") if axis in rules.mesh_axes}
    config = replace(every.config, mesh=replace(every.config.mesh, **sizes, rules=name))
    here = move(every, config, abstract_mesh(sizes))
    assert here.rules is rules
    alike = replace(config, mesh=replace(config.mesh, rules="all"))
    assert move(every, alike, abstract_mesh(sizes)).abstract == here.abstract, name
  assert changes(config, alike) == []


def test_presets_do_not_bind_the_search():
  """A config for one axis finds meshes of the others, with the rules they need."""
  config = apply_overrides(cli.named_config("moe_8x1b"), [("mesh.rules", "fsdp")])
  options = search(start(config), CHIPS["v5p"], 16)
  wide = [o for o in options if o.setup.mesh.shape["expert"] * o.setup.mesh.shape["tensor"] > 1]
  assert wide and all("--config.mesh.rules=all" in " ".join(o.overrides(config)) for o in wide)
  narrow = [o for o in options if o not in wide]
  assert narrow and all("mesh.rules" not in " ".join(o.overrides(config)) for o in narrow)
