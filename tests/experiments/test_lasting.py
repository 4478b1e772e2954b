"""Faults of disks, settings and processes, in whole runs: what must not be lost is not."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments.cli import named_config
from experiments.data.load import load
from experiments.overrides import apply_overrides
from experiments.training import checkpoint
from experiments.training.checkpoint import saved_steps
from experiments.training.loop import Resume, train
from experiments.training.metrics import MetricsWriter, read_metrics
from experiments.training.setup import build
from tests.experiments.programs import (
  QUICK,
  call,
  environment,
  losses,
  metrics,
  state_hash,
  steps,
)
from tests.experiments.test_bad_input import crowded

pytestmark = pytest.mark.xdist_group("run")


def events(folder, kind):
  lines = (folder / "logbook.jsonl").read_text().splitlines()
  return [row for row in map(json.loads, lines) if row["kind"] == kind]


def reached(folder):
  """The last step that is logged."""
  rows = metrics(folder)
  return rows[-1]["step"] if rows else 0


@pytest.mark.parametrize("kills", (2, pytest.param(20, marks=pytest.mark.full)))
def test_kill_at_random_moments(kills, tmp_path):
  """Each time the last finished checkpoint is taken; at most a save interval is lost, or two if a
  save was under way."""
  every, rng = 100, random.Random(kills)
  folder = tmp_path / "run"
  command = [
    sys.executable, "-m", "experiments.run", *QUICK, "--workdir=run", "--config.train.steps=100000",
    f"--config.checkpoint.every={every}", "--config.train.log_every=5", "--config.guard.mode=off",
  ]  # fmt: skip
  lost, saving, newest = [], 0, 0
  for _ in range(kills):
    before = reached(folder)
    with subprocess.Popen(
      command, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, text=True
    ) as process:
      try:
        # Once it has passed where it was before, at any moment.
        until = time.monotonic() + 240
        while reached(folder) <= before:
          assert process.poll() is None and time.monotonic() < until
          time.sleep(0.1)
        time.sleep(rng.uniform(0, 3))
      finally:
        process.send_signal(signal.SIGKILL)
      out, _ = process.communicate()
    if newest:
      assert f"resuming after step {newest}\n" in out
    newest = max(saved_steps(folder / "checkpoints"), default=0)
    names = {p.name for p in (folder / "checkpoints").iterdir()}
    under_way = bool(names - set(map(str, saved_steps(folder / "checkpoints"))))
    saving += under_way
    lost.append(reached(folder) - newest)
    assert lost[-1] <= every * (1 + under_way), (newest, names)
  print(f"steps lost at {kills} kills: {lost}; {saving} of them while saving")


def test_a_full_disk_in_the_middle_of_a_run(tmp_path, monkeypatch):
  """Step 10 finds no room, training goes on, step 20 is saved; no row and no event is missing."""
  folder = tmp_path / "disk" / "run"
  folder.parent.mkdir()
  with crowded(folder.parent, 4) as make_room:
    assert call("run", *QUICK, f"--workdir={folder}", "--config.train.steps=5").code == 0
    if not os.path.ismount(folder.parent):
      resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    kept = state_hash(folder)
    write = MetricsWriter.write

    def write_and_repair(self, step, row):
      write(self, step, row)
      if step == 15 and "loss" in row:
        assert saved_steps(folder / "checkpoints") == [5]
        assert state_hash(folder) == kept
        make_room()

    monkeypatch.setattr(MetricsWriter, "write", write_and_repair)
    result = call("run", *QUICK, f"--workdir={folder}", "--config.train.steps=20",
                  "--config.checkpoint.every=10")  # fmt: skip
    assert result.code == 0, result.err
    assert "step 10 could not be saved" in result.out and "training goes on" in result.out
    assert saved_steps(folder / "checkpoints") == [5, 20]
    assert steps(folder) == list(range(1, 21))
    statuses = [(e["step"], e["detail"]["status"]) for e in events(folder, "checkpoint")]
    assert statuses == [(5, "finished"), (10, "failed"), (20, "finished")]
    assert not [p for p in (folder / "checkpoints").iterdir() if not p.name.isdecimal()]


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
  folder = tmp_path_factory.mktemp("ten") / "run"
  result = call("run", *QUICK, f"--workdir={folder}", "--config.train.steps=10")
  assert result.code == 0, result.err
  return folder


def test_other_hyperparameters_than_the_checkpoint_had(ten, tmp_path):
  """config.json was edited: optax would take the new values without a word."""
  folder = tmp_path / "run"
  subprocess.run(["cp", "-r", ten, folder], check=True)
  stored = json.loads((folder / "config.json").read_text())
  stored["optimizer"] |= {"beta1": 0.0, "eps": 1.0}
  (folder / "config.json").write_text(json.dumps(stored))
  more = ("run", f"--workdir={folder}", "--config.train.steps=12")
  refused = call(*more)
  assert refused.code == 2 and refused.err.count("\n") == 1
  assert "optimizer.beta1=0.9 and 1 more, the config says 0.0" in refused.err
  assert "--reason" in refused.err and saved_steps(folder / "checkpoints")[-1] == 10
  applied = call(*more, "--reason=as plain as SGD")
  assert applied.code == 0, applied.err
  [event] = events(folder, "effective_config")
  assert event["detail"]["match"] is False
  assert (event["detail"]["optimizer"]["beta1"], event["detail"]["requested"]["beta1"]) == (0.9, 0)
  again = call("run", f"--workdir={folder}", "--config.train.steps=13")
  assert again.code == 0, again.err
  assert events(folder, "effective_config")[-1]["detail"]["match"] is True


def test_replay_computes_the_same_bits(ten, tmp_path):
  folder = tmp_path / "run"
  subprocess.run(["cp", "-r", ten, folder], check=True)
  assert call("run", f"--workdir={folder}", "--config.train.steps=15").code == 0
  result = call("replay", f"--workdir={folder}", "--step=15")
  assert result.code == 0, result.out + result.err
  assert result.out.count(" equal\n") == 5 + 1 and "arrays equal" in result.out
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  changed = [json.loads(line) for line in lines]
  for row in changed:
    if row.get("step") == 13 and "bits" in row:
      row["bits"] = "0" + row["bits"][1:]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
  result = call("replay", f"--workdir={folder}", "--step=15")
  assert result.code == 1 and "different: step 13" in result.out
  early = call("replay", f"--workdir={folder}", "--step=3")
  assert early.code == 2 and "from before step 3" in early.err


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
  """Steps 1-4 of moe without jitter on fsdp 2 x expert 4, in float32, and a checkpoint of step 4;
  steps 5-8 as they would go on there."""
  folder = tmp_path_factory.mktemp("meshes")
  rows = spread(folder / "saved", 4, 8, fsdp=2, expert=4)
  subprocess.run(["cp", "-r", folder / "saved", folder / "whole"], check=True)
  return folder, rows + spread(folder / "whole", 8, 8, fsdp=2, expert=4)


def spread(folder, last, devices, **axes):
  """Losses of the steps up to `last` on so many devices."""
  overrides = [
    ("train.steps", str(last)), ("train.compute_dtype", "float32"), ("checkpoint.every", "4"),
    ("optimizer.decay_steps", "40"), ("train.log_every", "1"), ("eval.batches", "1"),
    ("model.segments.*.layers.1.mlp.jitter", "0"),
    *((f"mesh.{k}", str(v)) for k, v in axes.items()),
  ]  # fmt: skip
  config = apply_overrides(named_config("debug"), overrides)
  setup = build(config, jax.devices()[:devices])
  before = len(metrics(folder)) if folder.exists() else 0
  folder.mkdir(exist_ok=True)
  outcome = train(setup, load(config.data, config.model.vocab_size), folder, resume=Resume())
  assert outcome.step == last
  return [row["loss"] for row in metrics(folder)][before:]


@pytest.mark.parametrize(
  ("devices", "axes"),
  (
    pytest.param(8, {"fsdp": 8}, marks=pytest.mark.full),
    (4, {"fsdp": 2, "expert": 2}),
    (1, {"data": 1}),
  ),
)
def test_another_mesh_goes_on_with_the_same_losses(meshes, tmp_path, devices, axes):
  saved, expected = meshes
  folder = tmp_path / "run"
  subprocess.run(["cp", "-r", saved / "saved", folder], check=True)
  found = spread(folder, 8, devices, **axes)
  np.testing.assert_allclose(found, expected[4:], rtol=1e-5)
  with checkpoint.Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
    assert checkpoints.newest() == 8
  assert len(losses(folder)) == 8 and read_metrics(folder)[-1]["step"] == 8
