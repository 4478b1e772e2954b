"""`plan`: machines that hold a config, one in detail, and what the TPU's compiler says of it.

Mistakes are in `test_bad_input`.
"""

import itertools
import re
from types import SimpleNamespace

import pytest
from jax.experimental import topologies

from experiments import plan
from experiments.planning import compiling
from mesh.slices import parse_topology
from tests.experiments.programs import call, spawn


def numbers(line):
  return [float(n) for n in re.findall(r"(?<![\w.-])[\d.]+(?![\w-])", line.replace(",", ""))]


def test_machines_that_hold_a_model(monkeypatch):
  """Nothing is compiled, no accelerator's library loaded."""
  monkeypatch.setattr(topologies, "get_topology_desc", None)
  result = call("plan", "--config=moe_70b")
  assert result.code == 0, result.err
  assert "70,317,772,800 parameters, 3,729,002,496 active, 7.47e+10 tokens" in result.out
  rows = {line.split()[0]: line for line in result.out.splitlines() if " GB of " in line}
  for kind in ("v4-", "v5litepod-", "v5p-", "v6e-", "tpu7x-", "a100:", "h100:", "h200:", "b200:"):
    assert any(name.startswith(kind) for name in rows), kind
  for line in rows.values():
    chips, used, available, rate, share, days, hours = numbers(line)[:7]
    assert used < available and 0 < share < 100
    # Tokens a second, days and chip-hours say the same three times, each rounded.
    assert days == pytest.approx(7.47e10 / rate / 86_400, abs=0.06)
    assert hours == pytest.approx(7.47e10 / rate / 3600 * chips, rel=0.01)


def test_the_bill_of_a_run(tmp_path):
  """With prices of one's own; tokens of one's own scale it."""
  prices = tmp_path / "prices.toml"
  prices.write_text("[price.v5p]\nusd_per_hour = 2.0\n[power.v5p]\nwatts = 500.0\n")
  arguments = ("--config=dense_1b", "--topology=v5p-32", f"--prices={prices}")
  out = call("plan", *arguments, "--tokens=1e9").out
  hours, usd, kwh = (
    float(re.search(rf"^{name} +([\d,]+)", out, re.MULTILINE)[1].replace(",", ""))
    for name in ("chip-hours", "cost", "energy")
  )
  assert usd == pytest.approx(2 * hours, abs=2) and kwh == pytest.approx(0.55 * hours, abs=1)
  more = call("plan", *arguments, "--tokens=1e11").out
  assert float(re.search(r"^chip-hours +([\d,]+)", more, re.MULTILINE)[1].replace(",", "")) == (
    pytest.approx(100 * hours, abs=60)
  )


def test_budgets():
  """The published table of the refit at 1e23 FLOP; a machine's days are its FLOP."""
  out = call("plan", "--budget_flops=1e23").out
  assert re.search(r"^Epoch refit +2.94e\+10 +5.66e\+11 +19.2$", out, re.MULTILINE)
  out = call("plan", "--topology=a100:1000", "--days=90").out
  assert "1,000 a100 for 90 days at an MFU of 45%" in out
  flops = 1000 * 312e12 * 0.45 * 90 * 86_400
  assert out.startswith(f"{flops:.3g} model FLOP")
  out = call("plan", "--topology=h100:8", "--budget_usd=100").out
  assert out.startswith(f"{100 / 3.99 * 3600 * 989e12 * 0.45:.3g} model FLOP (100 USD: 25 hours")


def test_the_overrides_that_are_printed_give_what_was_shown():
  shown = call("plan", "--config=dense_1b", "--topology=v5p-32")
  assert shown.code == 0, shown.err
  given = call("plan", "--config=dense_1b", "--topology=v5p-32", "--print_overrides").out.split()
  assert f"the first: {' '.join(given)}" in shown.out
  (best,) = (
    line
    for line, before in zip(lines(shown), ["", *lines(shown)], strict=False)
    if before.startswith("mesh, recomputation")
  )
  again = call("plan", "--config=dense_1b", "--topology=v5p-32", *given)
  name = re.split(r"  +", best)[0]
  assert lines(again)[0] == f"dense_1b on 16 x v5p, {name}"
  memory, seconds = re.search(r"([\d.]+ .B) +([\d.]+) ", best).groups()
  assert re.search(rf"^peak +{memory} ", again.out, re.MULTILINE)
  (step,) = re.findall(r"^step +([\d.]+) ", again.out, re.MULTILINE)
  assert float(step) == pytest.approx(float(seconds), abs=0.006)


def tpus(kind, *sides, cores=1):
  """What JAX would list on such a slice."""
  return [
    SimpleNamespace(platform="tpu", device_kind=kind, coords=place, slice_index=0)
    for place in itertools.product(*map(range, sides))
    for _ in range(cores)
  ]


@pytest.mark.parametrize(
  ("devices", "same"),
  (
    (tpus("TPU v5", 2, 2, 4), "v5p-32"),
    (tpus("TPU v6 lite", 2, 4, 1), "v6e:2x4"),
    (tpus("TPU7x", 2, 2, 1, cores=2), "tpu7x:2x2x1"),
    ([SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")] * 8, "h200:8"),
  ),
)
def test_the_devices_that_are_here(devices, same, monkeypatch):
  monkeypatch.setattr(plan, "devices_here", lambda: devices)
  assert plan.machines.topology_of(devices) == parse_topology(same)
  here = call("plan", "--config=debug", "--topology=here", "--config.data.batch_size=16")
  named = call("plan", "--config=debug", f"--topology={same}", "--config.data.batch_size=16")
  assert here.code == 0 and here == named


def test_devices_that_plan_does_not_know(monkeypatch):
  """CPUs for real; the others are made up."""
  result = call("plan", "--config=debug", "--topology=here")
  assert result.code == 2 and result.err.count("\n") == 1
  assert "there is no accelerator here, only CPUs; name a machine instead" in result.err
  for devices, piece in (
    ([SimpleNamespace(platform="gpu", device_kind="NVIDIA L40S")], "'NVIDIA L40S' are not in"),
    ([*tpus("TPU v4", 2, 2, 1), *(SimpleNamespace(**vars(d) | {"slice_index": 1})
      for d in tpus("TPU v4", 2, 2, 1))], "2 TPU slices, of which plan knows one"),
  ):  # fmt: skip
    monkeypatch.setattr(plan, "devices_here", lambda devices=devices: devices)
    result = call("plan", "--config=debug", "--topology=here")
    assert result.code == 2 and piece in result.err
  gpus = [SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")]
  monkeypatch.setattr(plan, "devices_here", lambda: gpus)
  result = call("plan", "--config=debug", "--topology=here", "--compile")
  assert result.code == 2 and "only TPUs" in result.err


def test_parts_add_up():
  """Memory, time and work of a device, as printed."""
  out = lines(call("plan", "--config=moe_8x1b", "--topology=h100:2x8"))

  def rows(title, last):
    begin = next(i for i, line in enumerate(out) if line.startswith(title))
    end = next(i for i, line in enumerate(out) if i > begin and line.startswith(last))
    return [re.split(r"  +", line)[1].split() for line in out[begin + 1 : end + 1]]

  unit = {"GB": 1e9, "MB": 1e6}
  *parts, peak = (float(n) * unit[u] for n, u in rows("memory of a device", "peak"))
  assert sum(parts) == pytest.approx(peak, rel=0.01)
  *parts, step = (float(n) for (n,) in rows("time of a step", "step"))
  assert sum(parts) == pytest.approx(step, rel=0.01)
  *parts, done = (float(n) for (n,) in rows("work of a device", "all done"))
  assert len(parts) > 2 and sum(parts) == pytest.approx(done, rel=0.01)


def lines(result):
  assert result.code == 0, result.err
  return result.out.splitlines()


def test_pipeline_stages_wait():
  """Two stages and four microbatches: one in four times, they have nothing to do."""
  stages = ("--config.mesh.stage=2", "--config.mesh.fsdp=-1", "--config.train.microbatches=4")
  out = call("plan", "--config=dense_1b", "--topology=v5p-32", *stages).out
  assert out.startswith("dense_1b on 16 x v5p, stage=2 x fsdp=8, minimal, 4 microbatches")
  out = out[out.index("time of a step") :]
  seconds = {name: float(re.search(rf"^{name} +([\d.]+) ", out, re.MULTILINE)[1]) for name in (
    "products with weights", "attention", "element-wise, in memory", "optimizer",
    "waiting for other stages",
  )}  # fmt: skip
  waiting = seconds.pop("waiting for other stages")
  assert waiting == pytest.approx(sum(seconds.values()) / 4, rel=0.01)
  assert "stage=" not in out[out.index("mesh, recomputation") : out.index("the first: ")]
  assert "--config.mesh.stage=1 " in out[out.index("the first: ") :]  # in place of the 2 above


def test_fixes_of_what_does_not_fit():
  """After the largest arrays: what to paste, and nothing of it where the config fits."""
  arguments = ("plan", "--config=dense_1b", "--topology=v5e-16")
  out = call(*arguments).out
  fix, saves, peak, cost, verdict = re.search(
    r"^fix +saves +peak +adds to a step +\n(\S+) +([\d.]+) GB +([\d.]+) GB +(\S+) +(\S+)$",
    out[out.index("largest arrays") : out.index("time of a step")],
    re.MULTILINE,
  ).groups()
  assert (fix, cost, verdict) == ("--config.train.microbatches=8", "nothing", "fits")
  (before,) = re.findall(r"^peak +([\d.]+) GB", out, re.MULTILINE)
  assert float(before) == pytest.approx(float(saves) + float(peak), abs=0.11)
  again = call(*arguments, fix).out
  assert re.search(rf"^peak +{peak} GB", again, re.MULTILINE) and ": fits\n" in again
  assert "\nfix " not in again


def test_nothing_fits():
  out = call("plan", "--config=moe_70b", "--topology=v5e:2x2").out
  assert "No change makes it fit this machine" in out
  assert "does NOT fit" in out and "Nothing fits; nearest first" in out and "too much" in out
  result = call("plan", "--config=moe_70b", "--topology=v5e:2x2", "--print_overrides")
  assert result.code == 2 and "moe_70b fits no mesh of 4 x v5e" in result.err


def test_a_mesh_that_is_none_of_the_machine():
  """Said in one sentence, with what to add to the command line; that gives what is shown."""
  arguments = ("plan", "--config=dense_1b", "--topology=v5p-32")
  result = call(*arguments, "--config.mesh.fsdp=3", "--config.mesh.tensor=-1")
  first, second, empty, title = lines(result)[:4]
  assert first == (
    "dense_1b as it is does not divide over this machine: mesh fsdp=3, tensor=-1: tensor cannot "
    "be whole, 16 devices do not divide by 3. Shown is the quickest that does, with these in place "
    "of its mesh:"
  )
  given = second.split()
  assert all(change.startswith("--config.") for change in given) and empty == ""
  assert f"the first: {' '.join(given)}" in result.out
  assert lines(call(*arguments, *given))[0] == title


def test_devices_that_a_mesh_leaves_idle():
  """Eight of sixteen chips; with -1 all of them."""
  arguments = ("plan", "--config=dense_1b", "--topology=v5p-32")
  out = call(*arguments, "--config.mesh.fsdp=8").out
  assert out.startswith("dense_1b's mesh takes 8 of 16 devices, and the others are idle: ")
  assert "idle" not in call(*arguments, "--config.mesh.fsdp=-1").out


def test_no_mesh_at_all():
  """One row of 4096 tokens over 512 chips of 16 GB, and nothing else to cut."""
  changed = ("--config.data.batch_size=1", "--config.mesh.fsdp=256", "--config.data.row_length=31")
  result = call("plan", "--config=dense_1b", "--topology=v5e-256", *changed)
  assert result.code == 2 and result.err.count("\n") == 1
  assert "a (micro)batch of 1 rows does not divide over mesh fsdp=256" in result.err


def test_debug_fits_four_v5e(tmp_path):
  """In a process of its own: libtpu speaks to stderr, and is asked not to."""
  result = spawn(tmp_path, "plan", "--config=debug", "--topology=v5litepod-4", "--compile")
  assert result.code == 0, result.err
  assert result.err == ""
  assert "debug on 4 x v5e, mesh expert=4" in result.out
  assert "of 17.2 GB: fits" in result.out and "does NOT fit" not in result.out
  for name in ("parameters", "batch"):  # padded to tiles alike
    assert re.search(rf"^{name} +(\d[\d.,]* M?B) +\1$", result.out, re.MULTILINE)
  (flop,) = re.findall(r"^FLOP +([\d.e+]+) +([\d.e+]+)$", result.out, re.MULTILINE)
  assert float(flop[0]) == pytest.approx(float(flop[1]), rel=0.15)
  assert re.search(r"compiled in \d+ s \(\d+ CPU seconds, [\d.]+ [MG]B here\)", result.out)
  assert re.search(r"^HFU, all FLOP done +[\d.]+%", result.out, re.MULTILINE)


def test_a_model_that_does_not_fit_is_said_in_one_line():
  """After the tables that say what does not."""
  pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu, Linux x86-64 only")
  changed = ("--config.train.remat=minimal", "--config.train.microbatches=2")
  result = call("plan", "--config=dense_1b", "--topology=v5e:4x4", "--compile", *changed)
  assert result.code == 2
  assert result.err.startswith("error: dense_1b does not fit") and result.err.count("\n") == 1
  assert "Ran out of memory" in result.err
  assert re.search(r"does NOT fit, 2\d\.\d GB too much", result.out)
  assert re.search(r"^kept: mlp +bf16\[16,8,4096,8192\] +8\.6 GB", result.out, re.MULTILINE)


def test_the_step_that_draws_a_token(tmp_path):
  """Llama 3.2 1B in bfloat16 on four v5e, 32 rows: weights and caches in four parts, in place."""
  pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu, Linux x86-64 only")
  changed = ("--config.data.batch_size=32", "--config.mesh.fsdp=1", "--config.mesh.tensor=4")
  result = call(
    "plan", "--config=dense_1b", "--topology=v5e:2x2", "--compile", "--inference", *changed
  )
  assert result.code == 0, result.err
  cells = dict(
    re.findall(r"^(parameters|caches) +[\d.]+ [GM]B +([\d.]+) [GM]B$", result.out, re.MULTILINE)
  )
  assert float(cells["parameters"]) == pytest.approx(1235.8 * 2 / 4, rel=0.01)
  assert float(cells["caches"]) == pytest.approx(
    16 * 32 * 4096 * 8 * 64 * 2 * 2 / 4 / 1e9, abs=0.05
  )
  seconds = re.search(r"computing, reading memory +([\d.]+) ms +([\d.]+) ms", result.out)
  # The estimate is the least that memory allows; a cache that is copied takes forty times as long.
  assert float(seconds[1]) < float(seconds[2]) < 3 * float(seconds[1])


def test_a_compiler_that_dies_takes_nobody_with_it(monkeypatch):
  pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu, Linux x86-64 only")
  monkeypatch.setattr(compiling.sys, "executable", "/bin/false")
  result = call("plan", "--config=debug", "--topology=v5e:2x2", "--compile")
  assert result.code == 1 and "Traceback" not in result.err
  assert result.err.startswith("error: the compiler's process ended with exit code 1")
