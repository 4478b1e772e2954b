"""The supervisor over children without JAX: what it starts again, how often, and what it keeps."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.attempt import progress
from experiments.training.logbook import read_logbook
from tests.experiments.programs import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc and the death signal")

# Children know their attempt, and can leave what a run leaves.
CHILD = """
import json, os, pathlib, signal, sys, time
attempt = int(os.environ["MESHYARD_ATTEMPT"])
folder = pathlib.Path(sys.argv[1])
def say(text):
  sys.stdout.write(f"{text}\\n")
  sys.stdout.flush()
def step(number):
  with (folder / "metrics.jsonl").open("a") as file:
    file.write(json.dumps({"step": number, "loss": 1.0}) + "\\n")
def save(number):
  path = folder / "checkpoints" / str(number)
  path.mkdir(parents=True)
  (path / "digests.0-of-1.json").write_text("")
def die(number):
  os.kill(os.getpid(), number)
"""
LISTENING = """
def stop(number, frame):
  say(f"got {signal.Signals(number).name}")
  sys.exit({2: 130}.get(number, 75))
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(number, stop)
say("ready")
while True: time.sleep(0.05)
"""


# The supervisor in a hurry, in a terminal or (`hangup=SIG_IGN`) under nohup.
HURRIED = """
import signal, sys
from experiments import supervise
signal.signal(signal.SIGHUP, signal.Handlers(int(sys.argv.pop(1))))
supervise.FIRST_PAUSE, supervise.STOPPED_SECONDS = 0.25, 1.0
sys.exit(supervise.main(sys.argv[1:]))
"""


class Supervised:
  """A supervisor with its output in files."""

  def __init__(
    self, home: Path, script: str, *, hours: str = "", number: str = "0", hangup=signal.SIG_DFL
  ):
    self.folder = home / "run"
    child = [sys.executable, "-S", "-c", CHILD + script, str(self.folder)]
    self._out, self._err = home / "out", home / "err"
    with self._out.open("ab") as out, self._err.open("ab") as err:
      self.process = subprocess.Popen(
        [sys.executable, "-c", HURRIED, f"{hangup:d}", str(self.folder), hours, number, *child],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=out,
        stderr=err,
      )

  @property
  def out(self) -> str:
    return self._out.read_text()

  @property
  def err(self) -> str:
    return self._err.read_text()

  @property
  def pid(self) -> int:
    """Of the child."""
    return children(self.process.pid)[0]

  def logs(self) -> list[str]:
    return [path.read_text() for path in sorted((self.folder / "attempts").iterdir())]

  def events(self, kind: str) -> list[dict]:
    book = read_logbook(self.folder)
    assert book.problems == []
    return [event["detail"] for event in book.events if event["kind"] == kind]

  def end(self, number: int | None = None, *, within: float = 30) -> int:
    if number is not None:
      self.process.send_signal(number)
    return self.process.wait(within)


def children(pid: int) -> list[int]:
  path = Path(f"/proc/{pid}/task/{pid}/children")
  return [int(word) for word in path.read_text().split()]


def eventually(true, seconds: float = 20) -> None:
  until = time.monotonic() + seconds
  while not true():
    assert time.monotonic() < until
    time.sleep(0.02)


def gone(pid: int) -> bool:
  with contextlib.suppress(FileNotFoundError, ProcessLookupError):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
  return True


@pytest.fixture
def supervise(tmp_path):
  begun = []

  def start(script: str, **options):
    begun.append(Supervised(tmp_path, script, **options))
    return begun[-1]

  yield start
  for one in begun:
    one.process.kill()
    one.process.wait()


@pytest.mark.parametrize("code", [0, 2, 77, 130])
def test_not_started_again(supervise, code):
  run = supervise(f"say('once'); sys.exit({code})")
  assert run.end() == code
  assert run.out == "once\n" and run.err == ""
  [log] = run.logs()
  assert "once\n" in log and f"# ended with exit code {code} after" in log
  [stop] = run.events("stop")
  assert stop["exit_code"] == code
  assert stop["reason"] == {0: "finished", 2: "human", 77: "policy", 130: "human"}[code]
  assert run.events("action") == [] and run.events("fault") == []


@pytest.mark.parametrize(
  ("death", "how"),
  [
    ("sys.exit(75)", "ended with exit code 75 (wants a restart)"),
    ("sys.exit(76)", "ended with exit code 76 (watchdog: no step finished)"),
    ("raise ValueError('broken')", "ended with exit code 1 (a crash)"),
    ("die(signal.SIGKILL)", "was killed by SIGKILL"),
    ("die(signal.SIGABRT)", "was killed by SIGABRT"),
  ],
)
def test_started_again_at_once_after_progress(supervise, death, how):
  run = supervise(f"\nif attempt == 2: sys.exit(0)\nstep(12); save(10); say('out'); {death}")
  began = time.monotonic()
  assert run.end() == 0
  assert time.monotonic() - began < 10
  assert f"supervisor: attempt 1 {how} after" in run.err
  assert "at step 12; going on from step 10\n" in run.err
  first, second = run.logs()
  assert f"# {how} after" in first and "out\n" in first and "# attempt 2 on" in second
  # What the goodput ledger needs to know.
  one, two = run.events("stop")
  assert (one["exit_code"], two["exit_code"]) == (one["exit_code"], 0)
  assert one["checkpoint"] == 10 and 0 < one["seconds"] < 10
  assert one["began"] < one["ended"] <= two["began"] < two["ended"]
  [restart] = run.events("action")
  assert (restart["policy"], restart["from_step"], restart["to_step"]) == ("restart", 12, 10)
  faults = run.events("fault")
  if "75" in death:
    assert faults == [] and one["reason"] == "preempted"
  else:
    [fault] = faults
    assert (fault["first_seen_step"], fault["lost_steps"]) == (12, 2)
    assert "broken" not in death or "ValueError: broken" in fault["error"]


def test_gives_up_at_the_same_step_and_says_why(supervise):
  run = supervise("step(7); print('the cause is here', file=sys.stderr); sys.exit(1)")
  began = time.monotonic()
  assert run.end() == 1
  assert time.monotonic() - began > 0.25 + 0.5
  assert "going on from the beginning in 0.25 s" in run.err
  assert "going on from the beginning in 0.5 s" in run.err  # pauses double
  last = run.err[run.err.index("supervisor: attempt 3") :].splitlines()
  assert "3 attempts in a row that ended at step 7 without a new checkpoint: giving up" in last[0]
  assert last[1] == "  the cause is here"
  assert last[2].endswith("run/attempts/003.log")
  assert len(run.logs()) == 3


def test_progress_starts_the_count_anew(supervise):
  """Attempts 1, 2, 4, 5 and 6 fail at the same step; the third saved one between."""
  run = supervise("step(7)\nif attempt == 3: save(7)\nsys.exit(3)")
  assert run.end(within=60) == 3
  assert len(run.logs()) == 6


def test_another_step_is_another_failure(supervise):
  run = supervise("step(attempt)\nsys.exit(0 if attempt == 4 else 1)")
  assert run.end() == 0
  assert len(run.logs()) == 4


def test_steps_are_read_as_metrics_have_them(tmp_path):
  """Of a run and its twin: the last row of the file that was written last."""
  assert progress(tmp_path)[1:] == (0, 0.0, 0)
  main, twin = tmp_path / "metrics.jsonl", tmp_path / "twin" / "metrics.jsonl"
  main.write_text('{"step": 40, "loss": 1}\n{"step": 50, "lo')  # a crash cut it off
  assert progress(tmp_path).step == 40
  main.write_text('{"step": 40, "loss": 1}\n{"resumed_after": 30}\n')
  assert progress(tmp_path).step == 30
  twin.parent.mkdir()
  twin.write_text('{"step": 7, "loss": 1}\n')
  os.utime(twin, (main.stat().st_mtime + 1,) * 2)
  assert progress(tmp_path).step == 7
  for step, digests in ((20, 1), (30, 2)):  # the second lacks one of two processes' digests
    (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    (tmp_path / "checkpoints" / str(step) / f"digests.0-of-{digests}.json").write_text("")
  assert progress(tmp_path).checkpoint == 20


def test_a_later_supervisor_counts_on(supervise):
  assert supervise("sys.exit(2)").end() == 2
  run = supervise("say(attempt); sys.exit(0)")
  assert run.end() == 0
  assert run.out == "2\n"
  assert len(run.logs()) == 2


@pytest.mark.parametrize(
  ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)]
)
def test_signals_are_passed_on_and_end_it(supervise, number, code):
  run = supervise(LISTENING)
  eventually(lambda: "ready" in run.out)
  assert run.end(number) == code
  assert run.out == f"ready\ngot {signal.Signals(number).name}\n"
  assert len(run.logs()) == 1 and run.events("fault") == []


def test_a_lost_terminal_is_no_signal_under_nohup(supervise):
  run = supervise(LISTENING, hangup=signal.SIG_IGN)
  eventually(lambda: "ready" in run.out)
  run.process.send_signal(signal.SIGHUP)
  assert run.end(signal.SIGTERM) == 75
  assert run.out == "ready\ngot SIGTERM\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_while_nothing_runs_or_listens(supervise, number, code):
  """In the pause before a restart, and in a child that dies of it."""
  run = supervise("step(attempt); sys.exit(1)")
  eventually(lambda: "in 2 s" in run.err)
  assert run.end(number, within=2) == code
  run = supervise("signal.signal(signal.SIGINT, signal.SIG_DFL); say('deaf'); time.sleep(60)")
  eventually(lambda: "deaf" in run.out)
  assert run.end(number) == code
  assert run.events("stop")[-1]["exit_code"] in (code, 128 + number)


def test_the_child_does_not_outlive_it(supervise):
  run = supervise(LISTENING.replace("say(f", "open(folder / 'note', 'w').write(f"))
  eventually(lambda: "ready" in run.out)
  child = run.pid
  run.process.kill()
  eventually(lambda: gone(child))
  assert (run.folder / "note").read_text() == "got SIGTERM"


def test_a_child_that_is_stopped_is_killed(supervise):
  """Its peers on other hosts have given up long ago."""
  run = supervise("save(attempt)\nif attempt == 2: sys.exit(0)\nsay('ready'); time.sleep(600)")
  eventually(lambda: "ready" in run.out)
  child = run.pid
  os.kill(child, signal.SIGSTOP)
  time.sleep(0.4)
  os.kill(child, signal.SIGCONT)
  time.sleep(0.4)
  os.kill(child, signal.SIGSTOP)
  time.sleep(0.5)
  assert run.process.poll() is None and len(run.logs()) == 1  # not a second at once
  assert run.end() == 0
  assert f"supervisor: process {child} has been stopped for 1 s: killing it" in run.err
  assert "attempt 1 was killed by SIGKILL" in run.err


def test_stopped_with_all_it_is_left_alone(supervise):
  run = supervise(LISTENING)
  eventually(lambda: "ready" in run.out)
  pids = (run.process.pid, run.pid)
  for number in (signal.SIGSTOP, signal.SIGCONT):
    for pid in pids:
      os.kill(pid, number)
    time.sleep(1.5)
  assert run.end(signal.SIGTERM) == 75
  assert "stopped" not in run.err


def test_the_hours_are_of_all_attempts(supervise):
  """Three seconds: an attempt that crashes after two, and one that is told to stop."""
  run = supervise(
    f"save(attempt)\nif attempt == 1: time.sleep(1.5); sys.exit(1)\n{LISTENING}",
    hours=str(3 / 3600),
  )
  began = time.monotonic()
  assert run.end() == 75
  assert time.monotonic() - began < 10
  assert "got SIGTERM" in run.out
  assert "supervisor: the hours of --max_hours are over: stopping" in run.err
  assert len(run.logs()) == 2
  assert run.events("stop")[-1]["reason"] == "policy"


def test_two_supervisors(supervise):
  first = supervise(LISTENING)
  eventually(lambda: "ready" in first.out)
  second = supervise("say('never')")
  assert second.end() == 2
  assert f"is in use by process {first.process.pid} on " in second.err
  assert "never" not in first.out and len(first.logs()) == 1
  first.process.kill()  # a dead holder's lock is free
  first.process.wait()
  assert supervise("sys.exit(0)").end() == 0


def test_others_keep_logs_of_their_own(supervise):
  """Supervisors on other hosts write next to that of process 0, and not into its logbook."""
  assert supervise("sys.exit(0)").end() == 0
  run = supervise("say(attempt); sys.exit(0)", number="3")
  assert run.end() == 0
  names = sorted(path.name for path in (run.folder / "attempts").iterdir())
  assert names == ["001-process3.log", "001.log"]
  assert run.out == "1\n" and len(run.events("stop")) == 1


def test_a_full_disk_or_a_closed_terminal_stop_nothing(supervise, tmp_path):
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "logbook.supervisor.jsonl").mkdir()  # can't be opened
  run = supervise("say('x' * 100_000)\nif attempt == 1: save(1); sys.exit(1)\nsys.exit(0)")
  assert run.end() == 0
  assert run.out.count("x") == 200_000
  assert "supervisor: no entry in the logbook: Is a directory" in run.err
  child = f"{CHILD}\nfor i in range(5000): say('y' * 100)\nsay('end')"
  command = [sys.executable, "-m", "experiments.supervise", "run2", "", "0",
             sys.executable, "-S", "-c", child, "run2"]  # fmt: skip
  piped = subprocess.Popen(
    command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
  )
  assert piped.stdout is not None
  piped.stdout.read(10)
  piped.stdout.close()
  assert piped.wait(30) == 0
  assert "end\n" in (tmp_path / "run2" / "attempts" / "001.log").read_text()


def test_a_work_directory_that_can_not_be_written(supervise, tmp_path):
  (tmp_path / "run").write_text("a file")
  run = supervise("say('never')")
  assert run.end() == 2
  assert run.err.startswith("error: can't write to the work directory ") and run.out == ""


def test_it_is_small(supervise):
  run = supervise(LISTENING)
  eventually(lambda: "ready" in run.out)
  status = Path(f"/proc/{run.process.pid}/status").read_text()
  kilobytes = int(status.partition("VmRSS:")[2].split()[0])
  assert kilobytes < 60_000  # JAX alone needs 150 MB
  assert "jaxlib" not in Path(f"/proc/{run.process.pid}/maps").read_text()
  assert run.end(signal.SIGTERM) == 75


def test_stacks_of_a_watchdog_go_into_the_logbook(supervise):
  groups = [{"frame": "experiments/training/loop.py:1 advance", "ranks": [0, 2]}]
  note = json.dumps({"step": 3, "limit": 1.0, "stack_groups": groups, "silent": [1]})
  run = supervise(
    "\nif attempt == 2: sys.exit(0)\n"
    f"(folder / 'stacks').mkdir(); (folder / 'stacks' / 'x.json').write_text({note!r})\n"
    "sys.exit(76)"
  )
  assert run.end() == 0
  [fault] = run.events("fault")
  assert fault["stack_groups"] == groups
