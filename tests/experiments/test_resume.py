"""A stopped run goes on as if it had not been stopped, and only as the same run."""

import json
import re
import shutil
import signal

import numpy as np
import pytest

from experiments.overrides import to_json
from experiments.training import checkpoint
from experiments.training import evaluate as evaluation
from experiments.training.checkpoint import saved_steps
from experiments.training.folder import read_config
from experiments.training.metrics import MetricsWriter
from tests.experiments.programs import QUICK, call, losses, metrics, spawn, state_hash, steps

pytestmark = pytest.mark.xdist_group("run")

# Stop from inside, at a step: the signal is real, and its moment the same each time.
STOP = """
import os, signal
from experiments.training import metrics
write = metrics.MetricsWriter.write
def stop(self, step, row):
  write(self, step, row)
  if step == {step} and "loss" in row:
    os.kill(os.getpid(), signal.{name})
metrics.MetricsWriter.write = stop
"""
# Die while a checkpoint is being written in the background.
DIE_SAVING = """
import os, signal
from experiments.training import checkpoint
save = checkpoint.Checkpoints.save
def die(self, step, state, data, **more):
  save(self, step, state, data, **more)
  if step == {step}:
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint.Checkpoints.save = die
"""


@pytest.fixture(scope="module")
def stopped(finished, tmp_path_factory):
  """A run like `finished`, stopped in three ways and then finished; always the same command.

  The last two times in this process, which takes a third as long.
  """
  home = tmp_path_factory.mktemp("stopped")
  command = ("run", *QUICK, "--config.checkpoint.every=5")
  # A home that can't be written costs the caches, nothing else.
  killed = spawn(home, *command, "--workdir=run", script=DIE_SAVING.format(step=10), HOME="/proc")
  interrupted = spawn(home, *command, "--workdir=run", script=STOP.format(step=12, name="SIGINT"))
  write = MetricsWriter.write

  def terminate(self, step, row):
    write(self, step, row)
    if step == 14:
      signal.raise_signal(signal.SIGTERM)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(MetricsWriter, "write", terminate)
    terminated = call(*command, f"--workdir={home}/run")
  return home, [killed, interrupted, terminated, call(*command, f"--workdir={home}/run")]


def test_bit_exact_after_every_way_to_stop(stopped, trained):
  home, results = stopped
  assert [r.code for r in results] == [-signal.SIGKILL, 130, 75, 0], results[-1].err
  assert state_hash(home / "run") == state_hash(trained)
  np.testing.assert_array_equal(losses(home / "run"), losses(trained))


def test_each_step_is_logged_once(stopped, trained):
  home, _ = stopped
  assert steps(home / "run") == steps(trained) == list(range(1, 21))
  assert metrics(home / "run")[-1].keys() == metrics(trained)[-1].keys()


def test_what_a_stopped_run_says(stopped):
  home, (_, interrupted, terminated, last) = stopped
  # Killed in the middle of saving step 10, it has that one or the one before.
  assert re.search("resuming after step (5|10)\n", interrupted.out)
  for result, step in ((interrupted, 13), (terminated, 15)):  # the step under way is finished
    assert f"stopping: saving step {step}" in result.out
    assert f"stopped, saved at step {step}; the same command goes on from there" in result.out
  assert "resuming after step 15" in last.out
  assert saved_steps(home / "run" / "checkpoints") == [15, 20]
  assert not list((home / "run" / "checkpoints").glob("*tmp*"))


def test_no_noise_and_nothing_outside(stopped):
  """stderr is empty; only the run directory and the cache folder were written."""
  home, results = stopped
  assert [r.err for r in results] == [""] * 4
  assert sorted(p.name for p in home.iterdir()) == ["home", "run", "tmp"]
  assert not list((home / "tmp").iterdir())
  assert [p.name for p in (home / "home").iterdir()] == [".cache"]
  assert [p.name for p in (home / "home" / ".cache").iterdir()] == ["meshyard"]
  assert sorted(p.name for p in (home / "run").iterdir()) == [
    ".lock", "LOGBOOK.md", "checkpoints", "config.json", "latest", "logbook.jsonl", "metrics.jsonl",
    "report.png", "tensorboard",
  ]  # fmt: skip


@pytest.fixture
def copy(trained, tmp_path):
  """A copy of the finished run, to go on with."""
  folder = tmp_path / "run"
  shutil.copytree(trained, folder)
  return folder


def snapshot(folder):
  return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def go_on(folder, *arguments):
  return call("run", f"--workdir={folder}", "--config.eval.sample_prompt=", *arguments)


def test_finished_run_trains_nothing(copy):
  before = state_hash(copy), (copy / "metrics.jsonl").read_text()
  result = go_on(copy, "--config=debug")
  assert result.code == 0, result.err
  assert "is finished at step 20: nothing left to train" in result.out
  assert (state_hash(copy), (copy / "metrics.jsonl").read_text()) == before
  fewer = go_on(copy, "--config.train.steps=7")
  assert (fewer.code, state_hash(copy)) == (0, before[0])
  assert "is finished at step 20" in fewer.out


def test_more_steps_extend_a_run(copy):
  result = go_on(copy, "--config.train.steps=23")
  assert result.code == 0, result.err
  assert "resuming after step 20" in result.out and "3 steps in" in result.out
  assert "recompiled" not in result.out  # restored arrays are placed as trained ones are
  assert steps(copy) == list(range(1, 24))
  assert state_hash(copy)[0] == 23
  assert read_config(copy).train.steps == 23
  assert not (copy / "interventions.jsonl").exists()  # steps are free


@pytest.mark.parametrize(
  "change",
  (
    "data.seed=1",
    "data.holdout=0.1",
    "train.seed=1",
    "data.row_length=32",
    "model.embed_dim=32",
    "model.segments.0.layers.1.mlp.capacity_factor=2",
    "data.path=/somewhere",
  ),
)
def test_another_identity_is_refused_by_name(trained, change):
  before = snapshot(trained)
  result = go_on(trained, f"--config.{change}")
  assert result.code == 2
  assert change.split("=")[0] in result.err and "--allow_config_change" in result.err
  assert len(result.err.splitlines()) == 1
  assert snapshot(trained) == before


def test_an_intervention_needs_a_reason_and_is_recorded(copy):
  change = "--config.optimizer.learning_rate=1e-4"
  refused = go_on(copy, change, "--config.train.steps=21")
  assert refused.code == 2
  assert "optimizer.learning_rate" in refused.err and "--reason" in refused.err
  result = go_on(copy, change, "--config.train.steps=21", "--reason=it was too high")
  assert result.code == 0, result.err
  rows = (copy / "interventions.jsonl").read_text().splitlines()
  [row] = map(json.loads, rows)
  assert (row["step"], row["reason"]) == (20, "it was too high")
  assert row["changes"] == [{"key": "optimizer.learning_rate", "old": 0.003, "new": 0.0001}]
  assert metrics(copy)[-1]["learning_rate"] < 1.1e-4
  again = go_on(copy, "--config.train.steps=21")  # the change is now the run's config
  assert again.code == 0, again.err


def test_allowed_change_of_data_reads_the_new_data_from_its_start(copy, tmp_path):
  refused = go_on(copy, "--config.data.seed=1", "--config.train.steps=22")
  assert refused.code == 2
  allowed = go_on(copy, "--config.data.seed=1", "--config.train.steps=22", "--allow_config_change")
  assert allowed.code == 0, allowed.err
  assert "reading it from its start" in allowed.out
  step, _, position = state_hash(copy)
  assert (step, position["position"]) == (22, 2 * 8)
  assert position["fingerprint"]["seed"] == 1
  assert json.loads((copy / "interventions.jsonl").read_text())["changes"][0]["key"] == "data.seed"


@pytest.mark.parametrize(
  ("changes", "leaf"),
  (
    (["--config.model.embed_dim=32", "--allow_config_change"], "params/embedding/table"),
    (["--config.optimizer.name=lion", "--reason=try"], "optimizer/opt_state"),
    (["--config.optimizer.moment_dtype=bfloat16", "--reason=try"], "the config needs bfloat16"),
  ),
)
def test_a_change_that_does_not_fit_the_checkpoint_loses_nothing(copy, changes, leaf):
  stored = (copy / "config.json").read_text()
  result = go_on(copy, "--config.train.steps=22", *changes)
  assert result.code == 2 and leaf in result.err
  assert len(result.err.splitlines()) == 1
  assert (copy / "config.json").read_text() == stored
  assert go_on(copy, "--config.train.steps=21").code == 0


def test_a_run_without_a_checkpoint_starts_afresh(copy):
  """Nothing was trained yet, so nothing binds."""
  shutil.rmtree(copy / "checkpoints")
  result = go_on(copy, *QUICK, "--config.train.steps=6", "--config.data.seed=3")
  assert result.code == 0, result.err
  assert steps(copy) == list(range(1, 7))
  assert read_config(copy).data.seed == 3


def test_a_folder_of_another_config_is_refused(trained):
  result = call("run", "--config=moe_tiny", f"--workdir={trained}")
  assert result.code == 2
  assert "holds a run of 'debug', not of 'moe_tiny'" in result.err


def test_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
  """The first is noted and saves; the second, while saving, ends the program all the same."""
  write, save = MetricsWriter.write, checkpoint.Checkpoints.save

  def first(self, step, row):
    write(self, step, row)
    signal.raise_signal(signal.SIGINT)

  def second(self, *arguments, **more):
    signal.raise_signal(signal.SIGINT)
    save(self, *arguments, **more)

  monkeypatch.setattr(MetricsWriter, "write", first)
  monkeypatch.setattr(checkpoint.Checkpoints, "save", second)
  handler = signal.getsignal(signal.SIGINT)
  result = call("run", *QUICK, f"--workdir={tmp_path / 'run'}")
  assert result.code == 130
  assert result.err.strip() == "interrupted"
  assert signal.getsignal(signal.SIGINT) is handler
  assert not saved_steps(tmp_path / "run" / "checkpoints")


def test_ctrl_c_in_the_last_evaluation_stops(copy, monkeypatch):
  evaluate = evaluation.evaluate

  def interrupted(*arguments):
    signal.raise_signal(signal.SIGINT)
    return evaluate(*arguments)

  monkeypatch.setattr(evaluation, "evaluate", interrupted)
  result = go_on(copy, "--config.train.steps=21")
  assert result.code == 130, result.err
  assert "stopped, saved at step 21" in result.out
  assert "Held-out" not in result.out
  assert saved_steps(copy / "checkpoints")[-1] == 21


def test_stored_config_is_what_was_resolved(trained):
  config = json.loads((trained / "config.json").read_text())
  assert config == json.loads(json.dumps(to_json(read_config(trained))))
  assert config["mesh"]["data"] == 1 and config["train"]["steps"] == 20
