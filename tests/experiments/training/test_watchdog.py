"""The watchdog in a process of its own: when it fires, when not, and what it leaves."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from experiments.training import watchdog
from experiments.training.watchdog import Watchdog, brief, group, summary
from tests.experiments.programs import ROOT

START = """
import pathlib, sys, time
from experiments.training.watchdog import Watchdog
def say(text):
  print(text, flush=True)
with Watchdog(1.0, pathlib.Path(sys.argv[1])) as dog:
  say("ready")
"""


@pytest.fixture
def dog(tmp_path):
  """Runs lines under a watchdog of one second; gives the process."""
  begun = []

  def start(*lines: str) -> subprocess.Popen:
    script = START + "".join(f"  {line}\n" for line in lines)
    begun.append(
      subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
    assert begun[-1].stdout.readline() == "ready\n"
    return begun[-1]

  yield start
  for process in begun:
    process.kill()
    process.communicate()


def test_a_step_that_does_not_end(dog, tmp_path):
  process = dog("for step in range(1, 4):", "  dog.beat(step)", "def stuck():", "  time.sleep(60)",
                "stuck()")  # fmt: skip
  began = time.monotonic()
  _, err = process.communicate(timeout=30)
  assert process.returncode == 76
  assert 1 <= time.monotonic() - began < 1 + 5
  first, second, third = err.splitlines()
  assert first == "watchdog: nothing finished for 1 s after step 3 (limit 1 s)"
  assert second.startswith("  at ") and " stuck" in second
  assert third == f"  all stacks: {tmp_path / 'stacks'}"
  [dump] = (tmp_path / "stacks").glob("*-process0.txt")
  assert " in stuck\n" in dump.read_text()
  [note] = (tmp_path / "stacks").glob("*.json")
  found = json.loads(note.read_text())
  assert (found["step"], found["limit"], found["silent"]) == (3, 1.0, [])
  assert found["stack_groups"][0]["ranks"] == [0]


def test_what_takes_longer_with_reason(dog):
  """The first step, a save; and beats in between that are just in time."""
  process = dog("time.sleep(1.6)", "dog.beat(1)", "with dog.patience():", "  time.sleep(1.6)",
                "for step in range(2, 8):", "  time.sleep(0.3)", "  dog.beat(step)",
                "dog.__exit__()", "time.sleep(1.6)", "say('end')")  # fmt: skip
  out, err = process.communicate(timeout=60)
  assert (process.returncode, out, err) == (0, "end\n", "")


def test_stopped_as_a_whole_it_has_not_been_stuck(dog):
  process = dog("dog.beat(1)", "say('stop me')", "time.sleep(0.3)", "dog.beat(2)", "say('end')")
  assert process.stdout.readline() == "stop me\n"
  process.send_signal(signal.SIGSTOP)
  time.sleep(2.5)
  process.send_signal(signal.SIGCONT)
  out, err = process.communicate(timeout=30)
  assert (process.returncode, out, err) == (0, "end\n", "")


def test_a_disk_that_can_not_be_written_is_no_hindrance(dog, tmp_path):
  (tmp_path / "stacks").write_text("a file")
  process = dog("dog.beat(1)", "time.sleep(60)")
  _, err = process.communicate(timeout=30)
  assert process.returncode == 76
  assert "watchdog: nothing finished" in err


def test_the_automatic_limit_follows_the_longest_recent_step(tmp_path, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
  dog = Watchdog(None, tmp_path)  # not started
  assert dog.limit == 3600  # compiling

  def beat(step, seconds):
    now[0] += seconds
    dog.beat(step)

  beat(1, 1000.0)
  assert dog.limit == 300  # the first step is no measure
  beat(2, 1.0)
  assert dog.limit == 300
  beat(3, 40.0)
  assert dog.limit == 20 * 40
  with dog.patience():
    assert dog.limit == 3600
    beat(3, 500.0)  # a batch of an evaluation
    beat(3, 500.0)
  beat(4, 1.0)  # what patience took was no step
  assert dog.limit == 20 * 40
  for step in range(5, 60):
    beat(step, 1.0)
  assert dog.limit == 300  # the slow one is forgotten
  assert Watchdog(20.0, tmp_path).limit == 3600
  assert Watchdog(7200.0, tmp_path).limit == 7200


def test_equal_stacks_are_one_line():
  at_barrier = [
    "jax/api.py:9 wait", "jax/x.py:1 f", "mesh/multihost.py:5 stop_point",
    "experiments/training/loop.py:7 advance", "experiments/cli.py:2 execute",
  ]  # fmt: skip
  reading = ["grain/load.py:3 read", "experiments/training/loop.py:8 advance"]
  said = {rank: json.dumps(at_barrier) for rank in (0, 1, 2, 5, 7, 8)} | {3: json.dumps(reading)}
  groups = group(said)
  assert sorted(groups.values()) == [[0, 1, 2, 5, 7, 8], [3]]
  assert brief(reading) == "grain/load.py:3 read < experiments/training/loop.py:8 advance"
  lines = summary(groups, [4, 6], 9)
  assert lines == [
    "  process 0-2, 5, 7-8 at jax/api.py:9 wait < mesh/multihost.py:5 stop_point < "
    "experiments/training/loop.py:7 advance < experiments/cli.py:2 execute",
    "  process 3 at grain/load.py:3 read < experiments/training/loop.py:8 advance",
    "  process 4, 6 gave no answer: stopped, dead, or stuck outside of Python",
  ]
