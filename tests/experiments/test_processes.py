"""Several real processes: one run on them all, stopped, gone on with by another number, refused."""

import collections
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from experiments import cli, processes
from experiments.config import ConfigError
from experiments.data.load import load
from experiments.data.loader import make_loader
from experiments.joining import compare, fingerprint, source_digest
from experiments.training.checkpoint import saved_steps
from tests.experiments.programs import QUICK, ROOT, Result, call, environment, losses, spawn, steps

pytestmark = pytest.mark.xdist_group("devices")

# Batch, weights and experts cut over eight devices. In one process this is the program that
# test_devices has compiled.
MESH = (*QUICK, "--config.mesh.fsdp=4", "--config.mesh.expert=2")
FOUR = (*QUICK, "--config.mesh.fsdp=2", "--config.mesh.expert=2")

# Each process notes the position and the content of all rows that it trains on.
RECORD = """
import hashlib, os
if "--process_id" in " ".join(__import__("sys").orig_argv):
  from experiments.data import loader
  following = loader.Loader.__next__
  def record(self):
    state, batch = self.state(), following(self)
    if state["fingerprint"]["split"] == "train":
      with open(os.environ["ROWS"], "a") as file:
        for row in batch["tokens"]:
          file.write(f"{state['position']} {hashlib.sha256(row.tobytes()).hexdigest()}\\n")
    return batch
  loader.Loader.__next__ = record
"""


def devices(count: int) -> dict[str, str]:
  """XLA's flags for a process with so many devices, which compiles in a hurry."""
  flags = (
    f"--xla_force_host_platform_device_count={count}",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    "--xla_backend_optimization_level=0",
  )
  return {"XLA_FLAGS": " ".join(flags)}


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


@contextmanager
def started(folder: Path, *arguments: str, **more: str):
  """`experiments.run` in a process that can be listened to and signalled."""
  process = subprocess.Popen(
    [sys.executable, "-m", "experiments.run", *arguments],
    cwd=folder,
    env=environment(folder, **more),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  late = threading.Timer(240, process.kill)
  late.start()
  try:
    yield process
  finally:
    late.cancel()
    process.kill()
    process.communicate()


def by_hand(folder: Path, count: int, *arguments: str, own=lambda rank: ((), devices(2))):
  """`count` processes of one run, started with flags; their results."""
  place = (f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}")
  results: dict[int, Result] = {}

  def start(rank):
    extra, environ = own(rank)
    flags = (*FOUR, *place, f"--process_id={rank}", *arguments, *extra)
    results[rank] = spawn(folder, "run", *flags, **environ)

  threads = [threading.Thread(target=start, args=(rank,)) for rank in range(count)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return [results[rank] for rank in range(count)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """One process with eight devices, never interrupted; with checkpoints of steps 4, 8 and 10."""
  folder = tmp_path_factory.mktemp("alone") / "run"
  flags = ("--config.train.steps=10", "--config.checkpoint.every=4", "--config.checkpoint.keep=3")
  result = call("run", *MESH, *flags, f"--workdir={folder}")
  assert result.code == 0, result.err
  return folder


def rows_of(config, first: int, last: int) -> collections.Counter:
  """(position, content) of the rows that steps `first` to `last` train on, read by one loader."""
  loader = make_loader(load(config.data, config.model.vocab_size), config.data, "train")
  found = collections.Counter()
  for step in range(1, last + 1):
    position, batch = loader.state()["position"], next(loader)
    if step >= first:
      found.update((position, hashlib.sha256(row.tobytes()).hexdigest()) for row in batch["tokens"])
  loader.close()
  return found


def check_moves(home: Path, alone: Path, count: int) -> None:
  """A run of one process goes on in `count`, and then in one again, as if nothing had happened."""
  run = ("run", *MESH, f"--workdir={home}/run")
  shutil.copytree(alone, home / "run")
  for step in (8, 10):
    shutil.rmtree(home / "run" / "checkpoints" / str(step))
  (home / "patch").mkdir()
  (home / "patch" / "sitecustomize.py").write_text(RECORD)
  several = spawn(
    home, "run", *run[1:], "--config.train.steps=7", f"--processes={count}",
    PYTHONPATH=f"{home}/patch:{ROOT}", ROWS=str(home / "rows"), **devices(8 // count),
  )  # fmt: skip
  assert several.code == 0, several.err
  assert "8 x cpu, mesh fsdp=4 x expert=2" in several.out
  assert several.out.count("resuming after step 4") == 1 and several.out.count("Next\n") == 1
  assert "Gloo" not in several.out
  last = call(*run, "--config.train.steps=10")
  assert last.code == 0, last.err
  assert "resuming after step 7" in last.out

  assert steps(home / "run") == list(range(1, 11))
  np.testing.assert_allclose(losses(home / "run"), losses(alone), rtol=1e-5)
  read = collections.Counter(
    tuple(line.split()) for line in (home / "rows").read_text().split("\n")
  )
  del read[()]
  expected = rows_of(cli.named_config("debug"), 5, 7)
  assert len(expected) == 3 * 8
  # Processes that share rows (here none do) would read them once each.
  assert read == collections.Counter({(str(p), row): 1 for p, row in expected})


def test_one_process_then_two_then_one(tmp_path, alone):
  check_moves(tmp_path, alone, 2)


@pytest.mark.full
def test_one_process_then_four_then_one(tmp_path, alone):
  check_moves(tmp_path, alone, 4)


@pytest.mark.full
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_from_the_first_step(tmp_path, alone, count):
  flags = (*MESH, "--config.train.steps=10", f"--processes={count}", "--workdir=run")
  result = spawn(tmp_path, "run", *flags, **devices(8 // count))
  assert result.code == 0, result.err
  np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone), rtol=1e-5)


def test_sigterm_to_one_of_two_stops_and_saves_both(tmp_path, alone):
  """Started with flags, as on two hosts; only one is told to stop."""
  place = (f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2")
  flags = (*FOUR, "--workdir=run", "--config.train.steps=4000", *place)
  with (
    started(tmp_path, *flags, "--process_id=0", **devices(2)) as first,
    started(tmp_path, *flags, "--process_id=1", **devices(2)) as second,
  ):
    said = []
    for line in first.stdout:
      said.append(line)
      if "step 1/4000" in line:
        break
    second.send_signal(signal.SIGTERM)
    out, err = first.communicate()
    second_out, second_err = second.communicate()
  assert (first.returncode, second.returncode) == (75, 75), err + second_err
  [saved] = saved_steps(tmp_path / "run" / "checkpoints")
  assert f"stopped, saved at step {saved}; the same command goes on from there" in out
  assert "stopped" not in second_out  # one speaks
  assert steps(tmp_path / "run") == list(range(1, saved + 1))
  same = min(saved, 5)
  np.testing.assert_allclose(losses(tmp_path / "run")[:same], losses(alone)[:same], rtol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize(
  ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGKILL, 137)]
)
def test_signals_with_four_workers(tmp_path, number, code):
  """The first two go to the launcher; the third kills a worker."""
  flags = (*MESH, "--workdir=run", "--config.train.steps=4000", "--processes=4")
  with started(tmp_path, *flags, **devices(2)) as launcher:
    for line in launcher.stdout:
      if "step 1/4000" in line:
        break
    began = time.monotonic()
    if number == signal.SIGKILL:
      [worker] = workers_of(launcher.pid, "--process_id=2")
      os.kill(worker, number)
    else:
      launcher.send_signal(number)
    out, err = launcher.communicate()
  assert launcher.returncode == code, err
  assert workers_of(launcher.pid, "--process_id") == []
  if number == signal.SIGKILL:
    assert time.monotonic() - began < 10  # JAX itself takes 100 s
    assert "process 2 was ended by SIGKILL, and the others with it" in err
  else:
    [saved] = saved_steps(tmp_path / "run" / "checkpoints")
    assert f"saved at step {saved}" in out and err == ""


def workers_of(parent: int, flag: str) -> list[int]:
  """Children of a process that have this flag."""
  found = []
  for stat in Path("/proc").glob("[0-9]*/stat"):
    try:
      ours = int(stat.read_text().rpartition(")")[2].split()[1]) == parent
      command = (stat.parent / "cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
      continue
    if ours and flag in command:
      found.append(int(stat.parent.name))
  return found


# What is refused once the processes have met


def refused(results: list[Result], message: str) -> None:
  for result in results:
    assert result.code == 2, result.err
    assert result.err == f"error: {message}\n"


def test_another_config_is_refused_by_process_and_field(tmp_path):
  other = lambda rank: (("--config.data.batch_size=4",) if rank else (), devices(2))
  results = by_hand(tmp_path, 2, "--workdir=run", own=other)
  refused(
    results,
    "process 1 has data.batch_size 4, process 0 has 8: start all with the same config",
  )
  assert not (tmp_path / "run").exists()


def test_uneven_devices_are_refused_by_process(tmp_path):
  results = by_hand(tmp_path, 2, "--workdir=run", own=lambda rank: ((), devices(1 + rank)))
  refused(
    results,
    "every process needs the same number of devices, but process 0 has 1 and process 1 has 2",
  )


def test_a_process_that_fails_alone_ends_the_others(tmp_path):
  """Only process 0 writes: the other hears of it, ends with the same code, and does not speak."""
  nowhere = "/proc/nowhere/run"
  flags = (*FOUR, f"--workdir={nowhere}", "--processes=2")
  result = spawn(tmp_path, "run", *flags, **devices(2))
  assert result.code == 2
  assert result.err.startswith(f"error: can't write to the work directory {nowhere}: ")
  assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize(
  ("rank", "attempt", "code"),
  [(0, "", 2), (1, "", 2), (1, "2", 75)],  # they may come yet when a supervisor starts all again
)
def test_missing_peers_are_waited_for_and_named(tmp_path, rank, attempt, code):
  port = free_port()
  place = (f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={rank}")
  result = spawn(tmp_path, "run", *QUICK, *place, "--join_seconds=1.5",
                 MESHYARD_ATTEMPT=attempt, **devices(2))  # fmt: skip
  assert result.code == code
  assert len(result.err.splitlines()) == 1
  assert f": process {rank} of 2 " in result.err and "1.5 s" in result.err
  assert f"127.0.0.1:{port}" in result.err
  assert ("Connection refused" in result.err) == (rank == 1)
  assert ("not all others came" in result.err) == (rank == 0)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--coordinator=127.0.0.1:1"], "--coordinator is set, so --num_processes and --process_id"),
    (["--num_processes=2"], "--num_processes is set, so --coordinator and --process_id"),
    (["--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=2"],
     "--process_id=2 is out of range: 2 processes are numbered 0 to 1"),
    (["--processes=2", "--coordinator=127.0.0.1:1"], "--processes=2 starts its own coordinator"),
    (["--processes=2", "--process_id=0"], "--processes=2 starts its own coordinator"),
    (["--processes=0"], "--processes=0: must be at least 1"),
    (["--max_hours=0"], "--max_hours=0: must be above 0"),
    (["--supervise", "--num_processes=2"], "--num_processes is set, so"),
    (["--supervise", "--config.train.stepz=1"], "stepz"),
    (["--processes=two"], "--processes"),
    (["--join_seconds=0"], "--join_seconds=0: must be above 0"),
    (["--processes=2", "--config.train.stepz=1"], "stepz"),  # said once, before anything starts
  ],
)  # fmt: skip
def test_flags_that_make_no_sense(tmp_path, flags, message):
  result = call("run", *QUICK, f"--workdir={tmp_path / 'run'}", *flags)
  assert result.code == 2
  assert message in result.err and len(result.err.splitlines()) == 1
  assert not (tmp_path / "run").exists()


# What must be the same


def test_fingerprints_differ_by_name(tmp_path):
  config = cli.named_config("debug")
  own = fingerprint(config, tmp_path)
  assert own["code"] == source_digest() and own["train.steps"] == "20"

  def verdict(**changed):
    return compare([json.dumps(own), json.dumps(own), json.dumps(own | changed)])

  assert verdict() == ""
  assert verdict(code="f00") == (
    f"process 2 has code f00, process 0 has {own['code']}: start all with the same code of meshyard"
  )
  assert verdict(**{"newest checkpoint": 20}).endswith(
    "process 0 has nothing: start all with the same work directory, on a disk that all of them see"
  )
  assert "process 2 has model.embed_dim 8, process 0 has 64" in verdict(**{"model.embed_dim": "8"})
  # A field that only one of them has, as when their models are of different kinds.
  assert "process 2 has model.extra 1, process 0 has nothing" in verdict(**{"model.extra": "1"})


def test_the_digest_of_the_source_sees_every_byte(tmp_path, monkeypatch):
  for name in ("mesh", "layers", "experiments"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.py").write_text("x = 1\n")
  monkeypatch.setattr("experiments.joining.__file__", str(tmp_path / "experiments" / "joining.py"))
  digests = [source_digest()]
  (tmp_path / "layers" / "a.py").write_text("x = 2\n")
  digests.append(source_digest())
  (tmp_path / "layers" / "a.py").rename(tmp_path / "layers" / "b.py")
  digests.append(source_digest())
  (tmp_path / "mesh" / "notes.txt").write_text("no code")
  assert source_digest() == digests[-1]
  assert len(set(digests)) == 3


# GPUs


@pytest.mark.parametrize(
  ("count", "present", "environ", "shares"),
  [
    (4, 8, {}, ["0,1", "2,3", "4,5", "6,7"]),
    (2, 2, {"JAX_PLATFORMS": "cuda,cpu"}, ["0", "1"]),
    (2, 8, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, ["0,1", "2,3"]),  # numbers among the visible
    (3, 0, {"JAX_PLATFORMS": "cpu"}, ["", "", ""]),
    (3, 2, {"JAX_PLATFORMS": "cpu"}, ["", "", ""]),
    (1, 8, {}, [""]),  # all of them
  ],
)
def test_gpus_are_shared_out(count, present, environ, shares):
  assert processes.gpu_shares(count, environ, present) == shares


@pytest.mark.parametrize(
  ("count", "present", "environ", "message"),
  [
    (4, 2, {}, "--processes=4, but this machine has only 2 GPUs"),
    (2, 1, {}, "has only 1 GPU:"),
    (3, 8, {}, "can't share out evenly 8 GPUs"),
    (2, 0, {}, "drives all other accelerators"),
    (2, 0, {"JAX_PLATFORMS": "tpu"}, "drives all other accelerators"),
  ],
)
def test_gpus_that_can_not_be_shared_out(count, present, environ, message):
  with pytest.raises(ConfigError, match=message):
    processes.gpu_shares(count, environ, present)


def test_processes_that_a_scheduler_started_start_no_more():
  announced = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_PLATFORMS": "cpu"}
  with pytest.raises(ConfigError, match="already names several"):
    processes.check(2, announced)
  processes.check(1, announced)


# The launcher, with workers that need no JAX

WORKER = """
import os, signal, sys, time
flags = dict(a.lstrip("-").split("=", 1) for a in sys.argv[1:] if "=" in a)
rank, count = int(flags["process_id"]), int(flags["num_processes"])
say = lambda text: print(text, file=sys.stderr, flush=True)
"""


@pytest.fixture
def launch(capfd, monkeypatch):
  """Runs a script as workers; exit code, output and errors."""

  def launch(script: str, count: int = 3, **options):
    command = [sys.executable, "-S", "-c", WORKER + script]
    code = processes.launch(command, count, **options)
    return Result(code, *capfd.readouterr())

  monkeypatch.setattr(processes, "FAILURE_SECONDS", 1.0)
  return launch


def test_output_is_that_of_process_0_and_errors_tell_whose_they_are(launch):
  result = launch('print("out", rank); say(f"warning {rank}"); assert "coordinator" in flags')
  assert (result.code, result.out) == (0, "out 0\n")
  assert sorted(result.err.splitlines()) == ["[process 1] warning 1", "[process 2] warning 2",
                                             "warning 0"]  # fmt: skip


def test_workers_meet_at_one_free_loopback_port(launch):
  result = launch('say(flags["coordinator"] + " of " + str(count))')
  lines = {line.removeprefix("[process 1] ").removeprefix("[process 2] ")
           for line in result.err.splitlines()}  # fmt: skip
  [line] = lines
  assert line.startswith("127.0.0.1:") and line.endswith(" of 3")


def test_what_gloo_says_is_left_out(launch):
  met = "[Gloo] Rank 3 is connected to 3 peer ranks. "
  both = "Expected number of connected peer ranks is : 3"
  lines = [met + both, met + "[Gloo] Rank 2 is connected to 3 peer ranks. " + both + both, "step 1",
           "[Gloo] Rank step 2", "", "12 connected hosts"]  # fmt: skip
  result = launch(f"print({chr(10).join(lines)!r})", count=1)
  assert result.out.splitlines() == ["step 1", " step 2", "", "12 connected hosts"]


def test_a_mistake_is_said_once(launch):
  result = launch('say("error: no such file"); sys.exit(2)')
  assert result == (2, "", "error: no such file\n")
  alone = launch('\nif rank == 2: say("error: no such file"); sys.exit(2)\ntime.sleep(60)')
  assert alone == (2, "", "[process 2] error: no such file\n")


@pytest.mark.parametrize(
  ("death", "code", "how"),
  [
    ("sys.exit(3)", 3, "ended with exit code 3"),
    ("os.kill(os.getpid(), signal.SIGKILL)", 137, "was ended by SIGKILL"),
  ],
)
def test_one_that_dies_ends_all(launch, death, code, how):
  began = time.monotonic()
  result = launch(f'\nif rank == 1: print("last"); say("words"); sys.stdout.flush(); {death}\n'
                  'time.sleep(60); say("never")')  # fmt: skip
  assert result.code == code
  assert time.monotonic() - began < 30
  assert "[process 1] words" in result.err.splitlines()
  assert f"process 1 {how}, and the others with it" in result.err
  assert {"  last", "  words"} <= set(result.err.splitlines())
  assert "never" not in result.err


def test_the_cause_is_named_and_not_who_died_of_it(launch):
  """Process 1 fails and lingers; process 0 hears of it and is gone before."""
  result = launch(
    '\nif rank == 1: say("ValueError: here"); time.sleep(0.5); sys.exit(1)\n'
    'if rank == 0: time.sleep(0.2); say("ended by process 1, which failed"); sys.exit(1)\n'
    "time.sleep(60)"
  )
  assert result.code == 1
  assert "process 1 ended with exit code 1, and the others with it" in result.err
  assert "  ValueError: here" in result.err
  assert "ended by process" not in result.err


def signalled(launch, number: int, script: str, **options):
  """`launch`, and a signal to it once all workers have said that they are ready."""
  ready = []
  write = sys.stderr.write

  def send():
    while len(ready) < 3:
      time.sleep(0.02)
    os.kill(os.getpid(), number)

  def listen(text):
    ready.extend("ready" for _ in range(text.count("ready")))
    return write(text)

  thread = threading.Thread(target=send)
  thread.start()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys.stderr, "write", listen)
    result = launch(script, **options)
  thread.join()
  return result


STOPPING = """
def stop(number, frame): say(f"got {signal.Signals(number).name}"); sys.exit(CODE)
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, stop)
say("ready")
while True: time.sleep(0.05)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_goes_to_all_once(launch, number, code):
  before = signal.getsignal(number)
  result = signalled(launch, number, STOPPING.replace("CODE", str(code)))
  assert result.code == code
  assert result.err.count(f"got {signal.Signals(number).name}") == 3
  assert "ended" not in result.err
  assert signal.getsignal(number) is before


def test_a_worker_that_does_not_stop_is_killed(launch):
  script = "\nif rank == 1: signal.signal(signal.SIGTERM, signal.SIG_IGN); say('ready'); "
  script += "time.sleep(600)\n" + STOPPING.replace("CODE", "75")
  result = signalled(launch, signal.SIGTERM, script, stop_seconds=1)
  assert result.code == 75
  assert "[process 1] did not end within 1 s of SIGTERM: killed" in result.err


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux only")
def test_workers_do_not_outlive_the_launcher(tmp_path):
  note = f"open({str(tmp_path)!r} + f'/{{rank}}', 'w'); say"
  worker = WORKER + STOPPING.replace('say(f"got', note + '(f"got').replace("CODE", "75")
  script = (
    "import sys; from experiments.processes import launch; "
    f"launch([sys.executable, '-S', '-c', {worker!r}], 2)"
  )
  with subprocess.Popen(
    [sys.executable, "-c", script],
    env=environment(tmp_path, JAX_PLATFORMS="cpu"),
    stderr=subprocess.PIPE,
    text=True,
  ) as launcher:
    assert launcher.stderr is not None
    try:
      assert ["ready" in launcher.stderr.readline() for _ in range(2)] == [True, True]
    finally:
      launcher.kill()
  deadline = time.monotonic() + 20
  while not all((tmp_path / str(rank)).exists() for rank in range(2)):
    assert time.monotonic() < deadline, "a worker was left behind"
    time.sleep(0.05)
