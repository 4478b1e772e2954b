"""Whole runs that die between two checkpoints, and go on from near copies as if they had not."""

import json
import os
import re
import shutil
import signal

import pytest

from experiments.training import loop
from experiments.training.checkpoint import saved_steps
from experiments.training.metrics import read_history
from experiments.training.record import Record
from tests.experiments.programs import QUICK, call, spawn, state_hash
from tests.experiments.test_faults import patched
from tests.experiments.test_processes import FOUR, devices
from tests.experiments.training.test_recovery import poisoned, short, steep

pytestmark = pytest.mark.xdist_group("devices")

# Die in a step: at any moment of the copy under way, or once it is finished.
DIE = """
import os, signal
from experiments.training import loop, near
advance = loop._Run.advance
def die(self):
  advance(self)
  if self.step == {step}:
    {wait} and self.near._thread.join()
    os.kill(os.getpid(), signal.SIGKILL)
loop._Run.advance = die
"""
# The same in each of several processes, once the copy is finished.
DIE_TOGETHER = """
import os, sys
if "--process_id" in " ".join(sys.orig_argv) and "DIE" in os.environ:
  from experiments.training import loop
  advance = loop._Run.advance
  def die(self):
    advance(self)
    if self.step == int(os.environ["DIE"]):
      self.near.wait()
      self._checkpoints.wait()
      loop.jax.block_until_ready(self.state)
      self._record.close()
      os._exit(1)
  loop._Run.advance = die
"""


def near_flags(folder, every, checkpoint=1000):
  return (
    f"--config.checkpoint.near={folder}", f"--config.checkpoint.near_every={every}",
    f"--config.checkpoint.every={checkpoint}",
  )  # fmt: skip


def test_a_killed_run_loses_less_than_between_two_copies(trained, tmp_path):
  """No checkpoint was ever finished. In the end parameters, optimizer state, data position and the
  guard are those of a run that was never interrupted."""
  flags = (*QUICK, *near_flags(tmp_path / "near", 3))
  die = DIE.format(step=8, wait=False)
  result = spawn(tmp_path, "run", *flags, "--workdir=run", script=die)
  assert result.code == -signal.SIGKILL, result.err
  die = DIE.format(step=14, wait=True)
  result = spawn(tmp_path, "run", *flags, "--workdir=run", script=die)
  assert result.code == -signal.SIGKILL, result.err
  [first] = re.findall("resuming after step (3|6), from near copies\n", result.out)
  result = call("run", *flags, f"--workdir={tmp_path}/run")
  assert result.code == 0, result.err
  assert "resuming after step 12, from near copies\n" in result.out
  assert state_hash(tmp_path / "run") == state_hash(trained)
  assert saved_steps(tmp_path / "run" / "checkpoints") == [12, 20]  # 12: when it went on
  assert not list((tmp_path / "near").iterdir()) and not (tmp_path / "run" / "near.json").exists()
  launches = [
    row["detail"]["restore"]
    for row in map(json.loads, (tmp_path / "run" / "logbook.jsonl").read_text().splitlines())
    if row["kind"] == "launch"
  ]
  assert launches[0] is None and [r["step"] for r in launches[1:]] == [int(first), 12]
  assert all(r["near"] for r in launches[1:])


def test_killed_right_after_going_back(tmp_path, monkeypatch):
  """The copies of the steps that were taken back are nobody's any more."""
  folder, near = tmp_path / "run", tmp_path / "near"
  flags = (*near_flags(near, 5, checkpoint=10), f"--workdir={folder}")
  poisoned(monkeypatch, lambda n, batch: steep(batch) if 60 <= n < 100 else batch)
  before = []
  forget = loop.NearCopies.forget

  def copied(self):
    self.wait()
    before.extend(int(path.name) for path in near.glob("*/*/0-of-1/*"))
    shutil.copytree(near, tmp_path / "away")
    forget(self)

  def die(*_):
    raise KeyError("killed")

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop.NearCopies, "forget", copied)
    patch.setattr(Record, "rewound", die)
    died = call("run", *short(120), *flags)
  assert died.code == 1 and "KeyError: 'killed'" in died.err
  assert max(before) > 60 and saved_steps(folder / "checkpoints")[-1] == 50
  assert not list(near.glob("*/*/*/*"))
  shutil.copytree(tmp_path / "away", near, dirs_exist_ok=True)  # a host that was away
  result = call("run", *short(52), *flags)
  assert result.code == 0, result.err
  assert "resuming after step 50\n" in result.out and not list(near.glob("*/*/*/*"))


def test_a_folder_that_can_not_be_written_stops_nobody(tmp_path):
  (tmp_path / "near").write_text("a file")
  result = call("run", *QUICK, *near_flags(tmp_path / "near", 2), f"--workdir={tmp_path}/run")
  assert result.code == 0, result.err
  assert result.out.count("training goes on without them") == 1 and not result.err


def test_ctrl_c_leaves_a_checkpoint_and_no_copies(tmp_path, monkeypatch):
  advance = loop._Run.advance

  def interrupted(self):
    if self.step == 6:
      signal.raise_signal(signal.SIGINT)
    advance(self)

  monkeypatch.setattr(loop._Run, "advance", interrupted)
  result = call("run", *QUICK, *near_flags(tmp_path / "near", 2), f"--workdir={tmp_path}/run")
  assert result.code == 130 and "stopped, saved at step 7" in result.out
  assert saved_steps(tmp_path / "run" / "checkpoints") == [7]
  assert not list((tmp_path / "near").iterdir())


def test_settings_are_refused_in_a_sentence(tmp_path):
  result = call("run", *QUICK, f"--workdir={tmp_path}/run", "--config.checkpoint.near_every=5")
  assert result.code == 2 and result.err.count("\n") == 1
  assert "checkpoint.near_every=5 needs a folder on each host" in result.err


@pytest.mark.full  # small: training/test_near.py
def test_two_processes_go_back_together(tmp_path):
  """One host is lost: both fall back to the same step. The next time both have theirs."""
  path = patched(tmp_path, DIE_TOGETHER)
  flags = (*FOUR, *near_flags(tmp_path / "near", 2, checkpoint=4), "--config.train.log_every=1")
  folder = tmp_path / "run"

  def start(**more):
    place = ("--workdir=run", "--processes=2", "--config.train.steps=9")
    return spawn(tmp_path, "run", *flags, *place, PYTHONPATH=path, **more, **devices(2))

  result = start(DIE="8")
  assert result.code != 0 and saved_steps(folder / "checkpoints") == [4], result.err
  [lost] = (tmp_path / "near").glob("*/*/1-of-2")
  assert {path.name for path in lost.iterdir()} == {"4", "6"}
  shutil.rmtree(lost)
  result = start(DIE="8")
  assert "near copy of step 6 not used: process 1 has none" in result.out, result.err
  assert "resuming after step 4\n" in result.out
  result = start()
  assert result.code == 0, result.err
  assert "resuming after step 6, from near copies\n" in result.out
  assert saved_steps(folder / "checkpoints")[-1] == 9
  assert not os.listdir(tmp_path / "near")
  seen = [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
          if row.get("step") == 7 and "bits" in row]  # fmt: skip
  assert len(seen) >= 2 and len({row["bits"] for row in seen}) == 1  # step 7, each time
  assert read_history(folder)
