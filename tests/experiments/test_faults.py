"""Faults that are really injected into runs of real processes, and how long recovery takes.

Every deadline here is one that the project promises.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import run
from experiments.training import stop
from experiments.training.checkpoint import saved_steps
from experiments.training.goodput import process_age
from experiments.training.logbook import read_logbook
from tests.experiments.programs import QUICK, ROOT, call, environment, steps
from tests.experiments.test_processes import devices, free_port, workers_of
from tests.experiments.test_supervise import children, eventually, gone

pytestmark = pytest.mark.xdist_group("devices")

FOUR = (*QUICK, "--config.mesh.fsdp=2", "--config.mesh.expert=2")
LONG = "--config.train.steps=20000"

# A process that is stopped sends no heartbeats either; here the watchdog is to be the first.
HEARTBEATS = """
import sys
if "--process_id" in " ".join(sys.orig_argv):
  from mesh import multihost
  multihost._HEARTBEAT_SECONDS = 100
"""

# Process 1 is stuck in step 12, alive and sending heartbeats.
STUCK = """
import sys, time
if "--process_id=1" in sys.orig_argv:
  from experiments.data import loader
  following, count = loader.Loader.__next__, [0]
  def stuck(self):
    count[0] += 1
    if count[0] == 12:
      time.sleep(600)
    return following(self)
  loader.Loader.__next__ = stuck
"""


class Run:
  """`experiments.run` in a process of its own, what it says in files."""

  def __init__(self, home: Path, name: str, *flags: str, **environ: str):
    self.folder, self._out, self._err = home / "run", home / f"{name}.out", home / f"{name}.err"
    with self._out.open("wb") as out, self._err.open("wb") as err:
      self.process = subprocess.Popen(
        [sys.executable, "-m", "experiments.run", "--workdir=run", *flags],
        cwd=home,
        env=environment(home, **environ),
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
      )

  @property
  def out(self) -> str:
    return self._out.read_text()

  @property
  def err(self) -> str:
    return self._err.read_text()

  def says(self, text: str, seconds: float = 200) -> None:
    """Wait for a text on standard output."""
    until = time.monotonic() + seconds
    while text not in self.out:
      assert self.process.poll() is None and time.monotonic() < until, self.err[-3000:]
      time.sleep(0.02)

  def steps_beyond(self, step: int) -> None:
    """Wait for a row of metrics after `step`."""
    eventually(lambda: self.last_step > step, 200)

  @property
  def last_step(self) -> int:
    path = self.folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0

  @property
  def child(self) -> int:
    return children(self.process.pid)[0]

  def worker(self, rank: int) -> int:
    """Of --supervise --processes."""
    [pid] = workers_of(self.child, f"--process_id={rank}")
    return pid

  def end(self, number: int, *, within: float = 60) -> int:
    self.process.send_signal(number)
    return self.process.wait(within)


@contextmanager
def running(home: Path, *flags: str, name: str = "run", **environ: str):
  run = Run(home, name, *flags, **environ)
  try:
    yield run
  finally:
    if run.process.poll() is None:
      run.process.terminate()
      try:
        run.process.wait(20)
      except subprocess.TimeoutExpired:
        run.process.kill()
        run.process.wait()


def patched(home: Path, script: str) -> str:
  """A PYTHONPATH by which every Python runs `script` first."""
  (home / "patch").mkdir()
  (home / "patch" / "sitecustomize.py").write_text(script)
  return f"{home}/patch:{ROOT}"


def detail(folder: Path, kind: str, source: str = "supervisor") -> list[dict]:
  book = read_logbook(folder)
  assert book.problems == []
  return [e["detail"] for e in book.events if (e["kind"], e["source"]) == (kind, source)]


def took(name: str, began: float, limit: float) -> None:
  """Assert a deadline, and note the figure for benchmarks/results/reliability.md."""
  seconds = time.monotonic() - began
  if path := os.environ.get("MESHYARD_FIGURES"):
    with open(path, "a") as file:
      file.write(f"{name}: {seconds:.1f} s of {limit:g}\n")
  assert seconds < limit, name


def test_one_stops_all_stop_and_one_stuck_is_found(tmp_path):
  """SIGTERM to one of two processes, then SIGSTOP to one; the supervisor starts both again."""
  flags = (*FOUR, LONG, "--config.train.hang_seconds=8", "--processes=2", "--supervise")
  with running(tmp_path, *flags, PYTHONPATH=patched(tmp_path, HEARTBEATS), **devices(2)) as run:
    run.says("step 1/20000")
    began = time.monotonic()
    os.kill(run.worker(1), signal.SIGTERM)
    eventually(lambda: "supervisor: attempt 1 ended with exit code 75" in run.err)
    took("SIGTERM to one of two processes, saved", began, 5 + 5)
    *_, saved = saved_steps(run.folder / "checkpoints")
    assert f"stopped, saved at step {saved};" in run.out
    assert f"going on from step {saved}\n" in run.err  # at once
    run.says(f"resuming after step {saved}")
    run.steps_beyond(saved)
    eight = (*QUICK, "--config.mesh.fsdp=4", "--config.mesh.expert=2")
    second = call("run", *eight, f"--workdir={run.folder}")
    assert second.code == 2 and "is in use by process" in second.err

    began = time.monotonic()
    os.kill(run.worker(1), signal.SIGSTOP)
    eventually(lambda: "supervisor: attempt 2 ended with exit code 76" in run.err, 30)
    took("SIGSTOP to one of two processes, watchdog of 8 s", began, 8 + 5)
    assert re.search(r"process 0 at .* < experiments/training/loop.py:\d+ ", run.err)
    assert "process 1 gave no answer: stopped, dead, or stuck" in run.err
    [dump] = (run.folder / "stacks").glob("*-process0.txt")
    assert "experiments/training/loop.py" in dump.read_text()
    assert run.end(signal.SIGTERM) == 75
  [fault] = detail(run.folder, "fault")
  assert fault["stack_groups"][0]["ranks"] == [0]
  assert len(list((run.folder / "attempts").iterdir())) == 2


def test_the_hours_are_over(tmp_path, monkeypatch):
  """In the middle of training, when a clock jumps; the same command goes on."""
  looks = itertools.count()
  clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 2000 * (next(looks) > 12))
  monkeypatch.setattr(run, "time", clock)
  monkeypatch.setattr(stop, "time", clock)
  hours = (process_age() + 1000) / 3600  # since this process, the test's, began
  flags = (*QUICK, f"--workdir={tmp_path / 'run'}")
  result = call("run", *flags, LONG, f"--max_hours={hours}")
  assert result.code == 75, result.err
  *_, saved = saved_steps(tmp_path / "run" / "checkpoints")
  assert f"stopped, saved at step {saved};" in result.out
  assert result.out.endswith(f"--max_hours={hours:g} are over\n")
  assert steps(tmp_path / "run")[-1] == saved and 8 < saved < 13
  more = call("run", *flags, f"--config.train.steps={saved + 1}")
  assert more.code == 0 and f"resuming after step {saved}" in more.out


@pytest.mark.full
def test_the_hours_are_over_for_two_processes(tmp_path):
  """At the same step, by the clock of process 0."""
  flags = (*FOUR, LONG, "--processes=2", f"--max_hours={60 / 3600}")
  with running(tmp_path, *flags, **devices(2)) as run:
    assert run.process.wait(200) == 75, run.err
  *_, saved = saved_steps(tmp_path / "run" / "checkpoints")
  assert f"stopped, saved at step {saved};" in run.out
  assert steps(tmp_path / "run")[-1] == saved


@pytest.mark.full
def test_a_worker_is_killed(tmp_path):
  """Started by hand, as on two hosts, each with its supervisor; then the coordinator."""
  place = (f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", "--supervise")
  flags = (*FOUR, LONG, "--config.checkpoint.every=20", *place)
  with (
    running(tmp_path, *flags, "--process_id=0", name="zero", **devices(2)) as zero,
    running(tmp_path, *flags, "--process_id=1", name="one", **devices(2)) as one,
  ):
    zero.steps_beyond(30)
    began = time.monotonic()
    os.kill(one.child, signal.SIGKILL)
    eventually(lambda: "supervisor: attempt 1" in zero.err, 30)
    took("kill -9 a worker, heartbeats of 10 s", began, 15)
    assert "attempt 1 was killed by SIGKILL" in one.err
    zero.says("resuming after step")
    first = zero.last_step
    zero.steps_beyond(first + 20)

    began = time.monotonic()
    before = one.err.count("supervisor: attempt")
    os.kill(zero.child, signal.SIGKILL)
    eventually(lambda: one.err.count("supervisor: attempt") > before, 30)
    took("kill -9 the coordinator", began, 2)
    eventually(lambda: zero.out.count("resuming after step") == 2, 200)
    last = zero.last_step
    zero.steps_beyond(last + 10)
    one.process.send_signal(signal.SIGTERM)  # else it would wait for the other to come again
    assert (zero.end(signal.SIGTERM), one.process.wait(60)) == (75, 75)
  numbers = steps(tmp_path / "run")
  assert len(set(numbers)) == len(numbers)


@pytest.mark.full
def test_the_supervisor_is_killed(tmp_path):
  """Launcher and workers hear of it from the kernel, save, and end; another goes on."""
  flags = (*FOUR, LONG, "--processes=2", "--supervise")
  with running(tmp_path, *flags, **devices(2)) as first:
    first.says("step 1/20000")
    pids = [first.child, first.worker(0), first.worker(1)]
    first.process.kill()
    with running(tmp_path, *flags, name="second", **devices(2)) as second:
      eventually(lambda: all(map(gone, pids)), 60)
      *_, saved = saved_steps(first.folder / "checkpoints")
      second.says(f"resuming after step {saved}")
      assert "attempt" not in second.err  # it waited for those that were ending
      assert second.end(signal.SIGINT) == 130
    assert (first.folder / "attempts" / "002.log").exists()


@pytest.mark.full
def test_a_process_that_is_stuck_is_found_and_named(tmp_path):
  """It answers, unlike one that is stopped; both of two supervisors start again."""
  path = patched(tmp_path, STUCK)
  place = (f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2")
  flags = (*FOUR, LONG, "--config.train.hang_seconds=6", *place)
  with (
    running(tmp_path, *flags, "--process_id=0", name="zero", PYTHONPATH=path, **devices(2)) as zero,
    running(tmp_path, *flags, "--process_id=1", name="one", PYTHONPATH=path, **devices(2)) as one,
  ):
    zero.steps_beyond(1)
    codes = zero.process.wait(100), one.process.wait(10)
  assert codes == (76, 76)
  told = zero.err + one.err
  assert re.search(
    r"process 1 at patch/sitecustomize.py:\d+ stuck < experiments/training/loop", told
  )
  assert re.search(r"process 0 at .* < experiments/training/loop", told)
  assert "gave no answer" not in told
  dumps = sorted(p.name[-5:-4] for p in (tmp_path / "run" / "stacks").glob("*-process?.txt"))
  assert dumps == ["0", "1"]
