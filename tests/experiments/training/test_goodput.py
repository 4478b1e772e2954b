"""The clock of a process: every second in one bucket."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.book.ledger import ledger
from experiments.training import goodput
from experiments.training.goodput import BUCKETS, Clock
from experiments.training.logbook import read_logbook
from experiments.training.metrics import read_history

ROOT = Path(__file__).parents[3]


@pytest.fixture
def ticks(monkeypatch):
  """Seconds that pass as the test says; the process is 5 s old."""
  now = [1000.0]
  monkeypatch.setattr(goodput.time, "monotonic", lambda: now[0])
  monkeypatch.setattr(goodput, "process_age", lambda: 5.0)
  return now


def spent(clock):
  return {bucket: seconds for bucket, seconds in clock.seconds.items() if seconds}


def test_phases_take_their_time_from_what_is_around_them(ticks):
  """By hand: 5 s before the clock, 1 s until the restore, ..."""
  clock = Clock()
  ticks[0] += 1
  with clock.phase("restore"):
    ticks[0] += 2
  assert clock.switch("productive") == "start"
  ticks[0] += 10
  with clock.phase("checkpoint"):
    ticks[0] += 3
    with clock.phase("data"):
      ticks[0] += 0.5
    ticks[0] += 1
  ticks[0] += 4
  assert spent(clock) == {
    "start": 6.0, "restore": 2.0, "productive": 14.0, "checkpoint": 4.0, "data": 0.5,
  }  # fmt: skip
  assert list(clock.seconds) == list(BUCKETS) and sum(clock.seconds.values()) == 5 + 21.5


def test_a_phase_that_fails_ends(ticks):
  clock = Clock()
  with pytest.raises(KeyError), clock.phase("evaluation"):
    ticks[0] += 2
    raise KeyError
  ticks[0] += 3
  assert spent(clock) == {"start": 8.0, "evaluation": 2.0}


def test_reading_changes_nothing(ticks):
  clock = Clock()
  ticks[0] += 1
  first = clock.row()
  ticks[0] += 1
  assert first["clock"]["start"] == 6.0 and clock.seconds["start"] == 7.0
  assert abs(first["time"] - time.time()) < 60


def test_the_sum_is_the_age_of_the_process(tmp_path):
  """Against the parent's watch, in a process that replaces itself once."""
  script = """
import os, sys, time
if len(sys.argv) == 2:
  time.sleep(0.5)
  os.execv(sys.executable, [sys.executable, *sys.argv, "again"])
sys.path.insert(0, sys.argv[1])
from experiments.training.goodput import Clock
clock = Clock()
with clock.phase("compile"):
  time.sleep(0.3)
print(sum(clock.seconds.values()), clock.seconds["compile"])
"""
  program = tmp_path / "program.py"
  program.write_text(script)
  began = time.monotonic()
  command = [sys.executable, str(program), str(ROOT)]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  line = process.stdout.readline()
  took = time.monotonic() - began
  assert process.wait(60) == 0
  process.stdout.close()
  total, compiling = map(float, line.split())
  assert took - 0.3 < total < took + 0.05
  assert 0.3 <= compiling < 0.3 + took - 0.8


def test_a_run_that_is_killed_again_and_again(tmp_path):
  """Against the watch of who starts and kills it: buckets sum to the wall clock's time, and hold
  the time that nothing ran."""
  script = """
import sys, time
from pathlib import Path
from experiments.training.goodput import Clock
from experiments.training.logbook import Logbook
from experiments.training.metrics import MetricsWriter
folder, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
clock = Clock()
book, metrics = Logbook(folder, clock=clock), MetricsWriter(folder, resume_step=first)
software = {"versions": {}, "env_lock_sha256": "", "git_commit": None, "git_dirty": None}
book.launch(
  software, step=first, config="x", config_sha256="", config_diff=[], mesh={}, hosts=[], seed=0,
  device_kind="cpu", devices=1, steps=100, tokens_per_step=1, flops_per_token=1.0,
  restore={"step": first} if first else None,
)
clock.switch("productive")
for step in range(first + 1, last + 1):
  time.sleep(0.05)
  metrics.write(step, {"loss": 1.0} | clock.row())
  if step % 10 == 0:
    with clock.phase("checkpoint"):
      time.sleep(0.1)
if last == 40:
  book.event("stop", "finished", step=last, reason="finished", exit_code=0)
print("there", flush=True)
time.sleep(100)
"""
  began = time.time()
  down = 0.0
  for first, last in ((0, 18), (10, 25), (20, 40)):
    command = [sys.executable, "-c", script, str(tmp_path), str(first), str(last)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "there\n"
    process.kill()
    process.communicate()
    ended = time.time()
    if last < 40:
      time.sleep(0.5)
      down += 0.5
  found = ledger(*_book(tmp_path))
  assert found.wall == pytest.approx(ended - began, abs=0.25)
  assert sum(found.seconds.values()) == pytest.approx(found.wall, rel=0.01)
  assert found.seconds["down"] == pytest.approx(down, abs=0.2)
  assert found.lost_steps == 8 + 5
  assert found.seconds["lost"] == pytest.approx(13 * 0.05, rel=0.2)
  assert found.seconds["productive"] == pytest.approx(40 * 0.05, rel=0.2)
  assert found.seconds["checkpoint"] == pytest.approx(4 * 0.1, rel=0.3)


def _book(folder):
  rows, abandoned = read_history(folder)
  return read_logbook(folder).events, [row for branch in (*abandoned, rows) for row in branch]
