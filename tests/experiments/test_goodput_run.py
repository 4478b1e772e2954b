"""Kills at random moments for ten minutes: what the ledger says of them, and what is left."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from experiments.book.ledger import ledger
from experiments.training.logbook import read_logbook
from tests.experiments.programs import environment

pytestmark = pytest.mark.xdist_group("run")


def children(parent):
  found = []
  for stat in Path("/proc").glob("[0-9]*/stat"):
    try:
      fields = stat.read_text().rpartition(")")[2].split()
    except OSError:
      continue
    if int(fields[1]) == parent:
      found.append(int(stat.parent.name))
  return found


@pytest.mark.full
def test_ten_minutes_of_kills(tmp_path):
  """`kill -9` every 60 s on average: the ledger's times add up to the time outside within 1 %, and
  at least 80 % of it went into steps that count. The compiled programs are cached before."""
  minutes, mean, rng = 10.0, 60.0, random.Random(20261123)
  folder = tmp_path / "run"
  program = [sys.executable, "-m", "experiments.run", "--config=moe_tiny"]
  program += ["--config.optimizer.decay_steps=1000000"]  # so that both are one program
  near = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path)
  more = (
    "--config.train.steps=1000000", "--config.checkpoint.every=20", "--config.eval.twin=",
    "--config.train.log_every=5", "--config.eval.sample_prompt=",
    f"--config.checkpoint.near={near}", "--config.checkpoint.near_every=4",
  )  # fmt: skip
  command = [*program, "--workdir=run", *more]
  warm = subprocess.run(
    [*program, "--workdir=warm", "--config.train.steps=25", "--config.eval.twin="],
    cwd=tmp_path, env=environment(tmp_path), capture_output=True, check=False, timeout=300,
  )  # fmt: skip
  assert warm.returncode == 0, warm.stderr
  began, kills = time.time(), 0
  with (tmp_path / "out").open("w") as out:
    supervisor = subprocess.Popen(
      [*command, "--supervise"], cwd=tmp_path, env=environment(tmp_path), stdout=out,
      stderr=subprocess.STDOUT,
    )  # fmt: skip
  try:
    while (left := began + 60 * minutes - time.time()) > 0:
      time.sleep(min(left, rng.expovariate(1 / mean)))
      if time.time() < began + 60 * minutes - 5:
        for pid in children(supervisor.pid):
          os.kill(pid, signal.SIGKILL)
        kills += 1
    supervisor.terminate()
    code = supervisor.wait(120)
  finally:
    supervisor.kill()
    shutil.rmtree(near)
  wall = time.time() - began
  assert code == 75, (tmp_path / "out").read_text()[-3000:]
  book = read_logbook(folder)
  assert book.problems == []
  rows = read_rows(folder)
  found = ledger(book.events, rows)
  total = sum(found.seconds.values())
  share = found.seconds["productive"] / total
  print(f"{kills} kills in {wall:.0f} s: {found.seconds}, sum {total:.1f}, productive {share:.1%}")
  assert total == pytest.approx(wall, rel=0.01)
  assert kills >= 5 and share >= 0.8


def read_rows(folder):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  rows = []
  for line in lines:
    try:
      rows.append(json.loads(line))
    except ValueError:
      continue  # cut off by a kill
  return [row for row in rows if "step" in row]
