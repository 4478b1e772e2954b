"""Run directories in a bucket: a store on this machine, whole programs, kills and damage."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import paths
from experiments.config import ConfigError
from experiments.training.metrics import read_metrics
from tests.experiments.programs import QUICK, call, environment, losses, spawn, state_hash
from tests.object_store import Store

pytestmark = pytest.mark.xdist_group("run")

# Leases that are renewed, and run out, within a test's time.
HASTY = """
from experiments.training import lease
lease.RENEW_SECONDS, lease.DEAD_SECONDS = 0.5, 3.0
"""
OFTEN = ("--config.checkpoint.every=10", "--config.train.log_every=1")


@pytest.fixture(scope="module")
def store():
  with Store() as store:
    yield store


@pytest.fixture(scope="module")
def local(tmp_path_factory):
  """What a run on a disk comes to in 40 steps."""
  folder = tmp_path_factory.mktemp("local") / "run"
  assert call("run", *QUICK, *OFTEN, f"--workdir={folder}", "--config.train.steps=40").code == 0
  return folder


@contextlib.contextmanager
def begun(home, store, *arguments, script=HASTY):
  """A run that is under way."""
  start = f"{script}\nfrom experiments import cli, run\ncli.run(run.main, leave=run.joining.leave)"
  with (home / "said").open("wb") as said, subprocess.Popen(
    [sys.executable, "-c", start, *map(str, arguments)],
    cwd=home, env=environment(home, **store.env), stdout=said, stderr=subprocess.STDOUT,
  ) as process:  # fmt: skip
    try:
      yield process
    finally:
      process.kill()


def until(true, seconds=120):
  end = time.monotonic() + seconds
  while not true():
    assert time.monotonic() < end
    time.sleep(0.05)


def sealed(store, run, step):
  return any("digests." in name for name in store.names(prefix=f"{run}/checkpoints/{step}/"))


def brought(store, run, folder):
  """The run directory, on a disk."""
  for name in store.names(prefix=f"{run}/"):
    path = folder / name.removeprefix(f"{run}/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(store.read(name))
  return folder


def staged(home):
  """Stages left in the temporary folder."""
  return [path.name for path in (home / "tmp").glob("meshyard-*")]


@pytest.fixture(scope="module")
def killed(store, tmp_path_factory):
  """A run that was killed once, then finished: its home, and what the second part said."""
  home = tmp_path_factory.mktemp("killed")
  run = (*QUICK, *OFTEN, "--workdir=gs://yard/killed")
  with begun(home, store, *run, "--config.train.steps=100000") as process:
    until(lambda: sealed(store, "killed", 10) or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
  shutil.rmtree(home / "tmp")  # the machine is gone, and with it the stage
  # What it saved after step 10 is taken away, so that it goes on from there.
  for name in store.names(prefix="killed/checkpoints/"):
    if not name.startswith("killed/checkpoints/10/"):
      del store.objects["yard", name]
  return home, spawn(home, "run", *run, "--config.train.steps=40", **store.env)


def test_what_was_killed_ends_as_if_it_had_not_been(store, killed, local, tmp_path):
  home, ended = killed
  assert ended.code == 0, ended.err
  assert "resuming after step 10\n" in ended.out and "workdir  gs://yard/killed\n" in ended.out
  here = brought(store, "killed", tmp_path / "run")
  assert state_hash(here) == state_hash(local)
  assert [row["bits"] for row in read_metrics(here) if "bits" in row][10:] == [
    row["bits"] for row in read_metrics(local) if "bits" in row
  ][10:]
  assert len(losses(here)) == 40
  assert staged(home) == []
  assert {"config.json", "LOGBOOK.md", "logbook.jsonl", "report.png", "latest"} <= {
    path.name for path in here.iterdir()
  }
  assert json.loads((here / "lock" / "000002.json").read_text())["released"]


def test_programs_that_read_a_run(store, killed, tmp_path):
  at = "--workdir=gs://yard/killed"
  found = spawn(tmp_path, "evaluate", at, "--config.eval.batches=2", **store.env)
  assert found.code == 0, found.err
  rows = [json.loads(line) for line in store.read("killed/metrics.jsonl").splitlines()]
  expected = [row["heldout_loss"] for row in rows if "heldout_loss" in row][-1]
  assert f"{expected:.6f}" in found.out
  noted = spawn(tmp_path, "logbook", "note", "a word", at, **store.env)
  assert noted.code == 0, noted.err
  assert "a word" in store.read("killed/logbook.notes.jsonl").decode()
  assert "a word" in store.read("killed/LOGBOOK.md").decode()
  assert "gs://yard/killed" in noted.out and str(tmp_path) not in noted.out
  assert staged(tmp_path) == []


@pytest.mark.full
def test_damage_in_the_bucket_is_refused(store, killed, tmp_path):
  """A flipped bit in the newest step: the one before is used, and its number can be saved again."""
  for name in store.names(prefix="killed/"):
    store.put(name.replace("killed/", "damaged/", 1), store.read(name))
  name = max(store.names(prefix="damaged/checkpoints/40/params/ocdbt.process_0/d/"),
             key=lambda name: len(store.read(name)))  # fmt: skip
  data = bytearray(store.read(name))
  data[len(data) // 2] ^= 1
  store.put(name, bytes(data))
  run = (*QUICK, *OFTEN, "--workdir=gs://yard/damaged")
  ended = spawn(tmp_path, "run", *run, "--config.train.steps=40", **store.env)
  assert ended.code == 0, ended.err
  short = name.removeprefix("damaged/checkpoints/40/")
  assert f"checkpoint of step 40 refused: {short} is damaged" in ended.out
  assert "resuming after step 30\n" in ended.out
  assert "damaged/checkpoints/40.refused" not in store.names()
  here = brought(store, "damaged", tmp_path / "again")
  whole = brought(store, "killed", tmp_path / "run")
  assert state_hash(here) == state_hash(whole)


def test_one_writer(store, tmp_path):
  run = (*QUICK, *OFTEN, "--workdir=gs://yard/one", "--config.train.steps=100000")
  with begun(tmp_path, store, *run) as process:
    until(lambda: sealed(store, "one", 10))
    second = spawn(tmp_path, "run", *run, script=HASTY, **store.env)
    assert second.code == 2
    assert f"gs://yard/one is in use by process {process.pid} on " in second.err
    # Somebody who had not heard from it took its place: it ends, without another word.
    who = json.dumps({"host": "elsewhere", "pid": 7, "start": "now", "boot": "x", "begun": "y"})
    store.put("one/lock/000002.json", who.encode())
    assert process.wait(60) == 2
  said = (tmp_path / "said").read_text()
  assert "the work directory was taken over by process 7 on elsewhere, since now" in said
  # That one is not heard of again, and its host can't be asked.
  third = spawn(tmp_path, "run", *QUICK, "--workdir=gs://yard/one", "--config.train.steps=20",
                script=HASTY, **store.env)  # fmt: skip
  assert third.code == 2 or "taking over" in third.out, third.err
  assert "process 7 on elsewhere" in third.out


@pytest.mark.full
def test_a_bucket_that_is_out_of_reach_for_a_while(store, tmp_path):
  """Training goes on; what was written meanwhile arrives later."""
  run = (*QUICK, "--config.train.log_every=1", "--workdir=gs://yard/away")
  with begun(tmp_path, store, *run, "--config.train.steps=100000",
             "--config.checkpoint.every=100000") as process:  # fmt: skip
    until(lambda: "away/metrics.jsonl" in store.names())
    [stage] = (tmp_path / "tmp").glob("meshyard-*")
    store.refusal = 503
    try:
      before = len(read_metrics(stage))
      until(lambda: len(read_metrics(stage)) > before + 20)
    finally:
      store.refusal = 0
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75
  here = brought(store, "away", tmp_path / "run")
  rows = [row["step"] for row in read_metrics(here) if "loss" in row]
  assert rows == list(range(1, len(rows) + 1)) and len(rows) > before + 20
  assert sealed(store, "away", rows[-1])


@pytest.mark.full
def test_supervised(store, tmp_path):
  """A supervisor mirrors for the run it starts again, its own files too."""
  arguments = (
    *QUICK, *OFTEN, "--workdir=gs://yard/kept", "--config.train.steps=3000", "--supervise",
  )  # fmt: skip
  with begun(tmp_path, store, *arguments) as process:
    until(lambda: sealed(store, "kept", 10))
    tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    os.kill(int(tasks), signal.SIGKILL)
    until(lambda: "kept/attempts/002.log" in store.names())
    until(lambda: b"resuming after step" in store.read("kept/attempts/002.log"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75
  assert b"was killed by SIGKILL" in store.read("kept/attempts/001.log")
  assert '"policy": "restart"' in store.read("kept/logbook.supervisor.jsonl").decode()
  assert staged(tmp_path) == []


@pytest.mark.full
def test_two_processes(store, tmp_path, local):
  arguments = (*QUICK[:1], *QUICK[2:], *OFTEN, "--workdir=gs://yard/two", "--config.train.steps=20",
               "--config.mesh.data=2", "--processes=2")  # fmt: skip
  env = store.env | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
  ended = spawn(tmp_path, "run", *arguments, **env)
  assert ended.code == 0, ended.err
  assert {"digests.0-of-2.json", "digests.1-of-2.json"} <= {
    Path(name).name for name in store.names(prefix="two/checkpoints/20/")
  }
  assert staged(tmp_path) == []
  found = losses(brought(store, "two", tmp_path / "run"))
  assert found == pytest.approx(losses(local)[:20], rel=1e-5)


def test_urls_that_are_none(monkeypatch):
  with pytest.raises(ConfigError, match=re.escape("gs://BUCKET/FOLDER")):
    paths.place("http://somewhere/run")
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "gs", raising=False)
  with pytest.raises(ConfigError, match=re.escape("pip install 'meshyard[gcs]'")):
    paths.place("gs://yard/run")


def test_no_such_bucket(store, tmp_path):
  ended = spawn(tmp_path, "run", *QUICK, "--workdir=gs://missing/run", **store.env)
  assert ended.code == 2 and "Traceback" not in ended.err
  assert ended.err.splitlines()[-1].startswith("error: can't ")
  assert "gs://missing/run" in ended.err
