"""One writer a run directory."""

import os
import subprocess
import sys
import time

import pytest

from experiments.config import ConfigError
from experiments.training.folder import claim
from experiments.training.lock import holder
from tests.experiments.programs import QUICK, ROOT, call

HOLD = """
import pathlib, sys, time
from experiments.training.lock import hold
with hold(pathlib.Path(sys.argv[1]) / ".lock", "it"):
  print("held", flush=True)
  time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def held(tmp_path):
  """Another process that holds the lock of `tmp_path` for so many seconds."""
  begun = []

  def start(seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLD, str(tmp_path), str(seconds)]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    begun.append(subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True))
    assert begun[-1].stdout.readline() == "held\n"
    return begun[-1]

  yield start
  for process in begun:
    process.kill()
    process.communicate()


def test_a_second_writer_is_refused_and_told_by_whom(tmp_path, held):
  other = held(600)
  result = call("run", *QUICK, f"--workdir={tmp_path}")
  assert result.code == 2
  [line] = result.err.splitlines()
  who = holder(tmp_path / ".lock")
  assert who["pid"] == other.pid and who["host"] == os.uname().nodename
  told = f"process {other.pid} on {who['host']}, since {who['start']}"
  assert line == f"error: the work directory {tmp_path} is in use by {told}: end that first"
  assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]


def test_a_dead_holder_holds_nothing(tmp_path, held):
  other = held(600)
  with pytest.raises(ConfigError, match="is in use"), claim(tmp_path):
    pass
  other.kill()
  other.wait()
  with claim(tmp_path):
    assert holder(tmp_path / ".lock")["pid"] == os.getpid()
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on"), claim(tmp_path):
      pass
    with claim(tmp_path / "twin"):  # a folder below has a lock of its own
      pass
  with claim(tmp_path):
    pass


def test_a_restart_waits_for_what_is_about_to_end(tmp_path, held):
  held(1.0)
  began = time.monotonic()
  with claim(tmp_path, patience=60):
    assert 0.2 < time.monotonic() - began < 30


def test_programs_that_children_start_do_not_keep_it(tmp_path):
  with claim(tmp_path):
    child = subprocess.Popen(["sleep", "60"])
  try:
    with claim(tmp_path):
      pass
  finally:
    child.kill()
    child.wait()


def test_a_damaged_note_of_the_holder(tmp_path, held):
  held(600)
  (tmp_path / ".lock").write_text("{")
  with (
    pytest.raises(ConfigError, match="in use by another process: end that first"),
    claim(tmp_path),
  ):
    pass
