"""What a run prints and leaves behind, as a user meets it."""

import gzip
import os
import pty
import re
import select
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments import cli
from experiments.training import compiled_step, loop
from experiments.training.checkpoint import saved_steps
from experiments.training.state import init_state
from tests.experiments.programs import (
  DEBUG,
  ONE,
  QUICK,
  ROOT,
  call,
  environment,
  metrics,
  spawn,
  steps,
)

pytestmark = pytest.mark.xdist_group("run")


def test_what_a_run_prints(finished):
  folder, result = finished
  assert result.err == ""
  pieces = (
    "debug: 188,992 parameters, 115,264 active, 2 layers",
    "1 x cpu",
    "pydoc",
    "20 steps of 8 x 64 tokens (10,240), adamw",
    f"workdir  {folder}",
    "compiling the step",
    "step 1/20   loss 6.1",
    "step 20/20",
    "tok/s",
    "dropped",
    "Held-out text, bits a byte",
    f"{folder / 'report.png'}",
    f"--workdir={folder} --config.train.steps=40",
    "--config.data.path=FILE",
    "--config=moe_small",
    f"experiments.generate --workdir={folder}",
    "Sample (temperature 0.8)",
    "  | The ",
  )
  place = 0
  for piece in pieces:  # in this order
    place = result.out.find(piece, place)
    assert place >= 0, piece
  assert "recompiled" not in result.out
  assert "MFU" not in result.out  # the peak of a CPU is not known
  assert not re.search("[\x00-\x08\x0b-\x1f]", result.out)  # what a sample does to a terminal


def test_what_a_run_leaves(trained):
  assert {p.name for p in trained.iterdir()} == {
    ".lock", "LOGBOOK.md", "checkpoints", "config.json", "latest", "logbook.jsonl", "metrics.jsonl",
    "report.png", "tensorboard",
  }  # fmt: skip
  assert saved_steps(trained / "checkpoints") == [10, 20]
  assert steps(trained) == list(range(1, 21))


def test_the_next_commands_work(finished, tmp_path):
  """Those the closing prints, shortened: own text, and more steps."""
  text = tmp_path / "own.txt.gz"
  text.write_bytes(gzip.compress(b"To be, or not to be, that is the question.\n" * 400))
  folder = tmp_path / "mine"
  arguments = (f"--config.data.path={text}", f"--workdir={folder}", "--config.train.steps=6")
  result = call("run", *QUICK, *arguments)
  assert result.code == 0, result.err
  assert f"{text} (17,201 bytes: " in result.out
  assert steps(folder) == list(range(1, 7))
  # Stored with the run: not to be given again.
  again = call("run", f"--workdir={folder}", "--config.train.steps=7")
  assert again.code == 0 and steps(folder)[-1] == 7, again.err


def test_synthetic_tokens_measure_speed_without_data(tmp_path):
  arguments = ("--config.data.source=synthetic", f"--workdir={tmp_path}/run")
  arguments += ("--config.train.steps=6", "--config.eval.batches=1", "--config.eval.every=4")
  result = call("run", *DEBUG, *arguments)
  assert result.code == 0, result.err
  assert re.search(r"^step 4  held out: \d\.\d{3} nats a token$", result.out, re.MULTILINE)
  assert "nats a token" in result.out and "bits a byte" not in result.out
  assert "Sample" not in result.out


def test_twin_is_trained_beside(tmp_path, monkeypatch):
  """The twin is the same config here, so that no second program is compiled."""
  folder = tmp_path / "run"
  arguments = (*QUICK, "--config.eval.baselines=true", f"--workdir={folder}")
  arguments += ("--config.train.steps=6",)
  result = call("run", *arguments, "--config.eval.twin=debug")
  assert result.code == 0, result.err
  rows = re.findall(r"^  (\S.*?) +(\d\.\d{3})$", result.out, re.MULTILINE)
  values = {name: float(value) for name, value in rows}
  assert values.keys() == {"debug", "debug, equal active FLOPs", "interpolated byte trigrams"}
  assert values["debug"] == values["debug, equal active FLOPs"]
  assert 2.2 < values["interpolated byte trigrams"] < 2.6
  assert steps(folder / "debug") == list(range(1, 7))
  assert saved_steps(folder / "debug" / "checkpoints") == [6]
  # The run goes on with another learning rate; a twin that began with the first one does not.
  monkeypatch.setattr("experiments.start.train", lambda *a, **k: pytest.fail("trains"))
  change = ("--config.optimizer.learning_rate=1e-3", "--reason=test")
  main = loop.Outcome(6, 6, None, loop.HeldOut(1.0, 2.0, 5), None, 0.0, None)
  monkeypatch.setattr("experiments.start.train", lambda *a, **k: main)
  monkeypatch.setattr("experiments.start.print_closing", lambda *a: print("lines", a[2]))
  result = call("run", f"--workdir={folder}", *change)
  assert result.code == 0, result.err
  assert "debug is left out, since it began otherwise" in result.out
  assert "optimizer.learning_rate from 0.003 to 0.001" in result.out
  assert "lines {}" in result.out


def test_profile_holds_the_named_scopes(tmp_path):
  folder = tmp_path / "run"
  short = ("--config.train.steps=6", f"--workdir={folder}")
  result = call("run", *QUICK, *short, "--profile=3:5")
  assert result.code == 0, result.err
  assert f"profile of steps 3:5 in {folder / 'profile'}" in result.out
  [trace] = (folder / "profile").rglob("*.xplane.pb")
  data = trace.read_bytes()
  for scope in (b"embedding", b"attention", b"route", b"dispatch", b"head", b"optimizer"):
    assert b"/" + scope + b"/" in data, scope
  assert b"train" in data
  late = call("run", f"--workdir={folder}", "--profile=3:5", "--config.train.steps=7")
  assert late.code == 0 and "no profile: step 3 is not among those left of 7" in late.out


def test_implicit_transfers_in_the_step_are_refused(tmp_path, monkeypatch):
  """An array that never got placed would be copied in every step, unseen."""
  step = lambda state, batch, limit: (state, batch["tokens"].sum())
  monkeypatch.setattr(compiled_step, "make_train_step", lambda *_, **__: step)
  monkeypatch.setattr(loop, "batch_placer", lambda setup: lambda batch: batch)
  result = call("run", *QUICK, f"--workdir={tmp_path}/run")
  assert result.code == 1
  assert "Disallowed host-to-device transfer" in result.err


def test_internal_error_keeps_its_trace(tmp_path, monkeypatch):
  def broken(*_, **__):
    raise AttributeError("a mistake of ours")

  monkeypatch.setattr("experiments.start.train", broken)
  result = call("run", *QUICK, f"--workdir={tmp_path}/run")
  assert result.code == 1
  assert result.err.startswith("Traceback") and "in broken" in result.err
  assert result.err.rstrip().endswith("AttributeError: a mistake of ours")


def test_divergence_is_shown_and_stays_json(tmp_path, monkeypatch):
  """Weights that are NaN: null in JSON, and neither report nor closing nor sample fails."""

  def diverged(*arguments):
    state = init_state(*arguments)
    return state._replace(params=jax.tree.map(lambda x: x * np.nan, state.params))

  monkeypatch.setattr(loop, "init_state", diverged)
  result = call("run", *DEBUG, f"--workdir={tmp_path}/run", "--config.train.steps=6")
  assert result.code == 0, result.err
  assert metrics(tmp_path / "run")[-1]["loss"] is None
  assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
  assert "loss nan" in result.out
  assert (tmp_path / "run" / "report.png").stat().st_size > 10_000


class Terminal:
  """A program on a pseudo-terminal, and what it writes there."""

  def __init__(self, folder, *arguments):
    self._leader, follower = pty.openpty()
    # A session leader takes the terminal for its own, so that a typed Ctrl-C becomes SIGINT.
    start = "import fcntl, termios, runpy; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    start += "runpy.run_module('experiments.run', run_name='__main__', alter_sys=True)"
    self.process = subprocess.Popen(
      [sys.executable, "-c", start, *arguments],
      stdin=follower, stdout=follower, stderr=follower, cwd=folder, start_new_session=True,
      env=environment(folder, TERM="xterm", COLUMNS="80", LINES="24"),
    )  # fmt: skip
    os.close(follower)
    self.text = ""

  def read_until(self, pattern: str, seconds: float = 240) -> None:
    """Until `pattern` was written, or the end if it is empty."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
      if pattern and re.search(pattern, self.text):
        return
      if not select.select([self._leader], [], [], 0.2)[0]:
        continue
      try:
        self.text += os.read(self._leader, 1 << 16).decode(errors="replace")
      except OSError:  # the other side is closed
        return
    raise AssertionError(f"no {pattern!r} within {seconds} s in: {self.text[-2000:]}")

  def type(self, text: str) -> None:
    os.write(self._leader, text.encode())

  def close(self) -> int:
    code = self.process.wait(60)
    os.close(self._leader)
    return code


def test_progress_in_a_terminal_and_ctrl_c(tmp_path):
  """Step, loss, speed, expert load and time left are on the screen; Ctrl-C saves and leaves."""
  steps_arg = "--config.train.steps=100000"
  terminal = Terminal(tmp_path, *QUICK, "--workdir=run", steps_arg, "--config.train.log_every=5")
  terminal.read_until(r"step \d{2,}/100000.*left(.|\n)*loss(.|\n)*dropped")
  terminal.type("\x03")
  terminal.read_until("")
  assert terminal.close() == 130
  plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.text)
  assert re.search(r"debug ━+.* step \d+/100000 \d+:\d\d(:\d\d)? left", plain)
  assert re.search(r"loss \d\.\d{3}   [\d,]+ tok/s", plain)
  assert re.search(r"experts │[ ▁▂▃▄▅▆▇█]{4}│   fullest \d\.\dx   dropped \d+\.\d%", plain)
  assert "compiling the step" in plain
  assert re.search(r"stopping: saving step \d+ \(Ctrl-C again stops at once\)", plain)
  assert re.search(r"stopped, saved at step \d+; the same command goes on from there", plain)
  assert "Traceback" not in plain
  assert max(map(len, plain.replace("\r", "\n").splitlines())) <= 80
  assert steps(tmp_path / "run")[-1] == saved_steps(tmp_path / "run" / "checkpoints")[-1]


def test_a_reader_that_leaves_early_stops_nothing(trained, tmp_path):
  """`| head -1`, or a `tee` that Ctrl-C ended first."""
  command = f"{sys.executable} -m experiments.evaluate --workdir={trained} {ONE} | true"
  process = subprocess.run(
    ["bash", "-o", "pipefail", "-c", command],
    cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert process.returncode == 0 and process.stderr == ""


def test_output_that_nobody_reads_is_dropped(tmp_path):
  """Also more of it than a pipe or a buffer holds, and in the middle of a run."""
  reader, writer = os.pipe()
  with os.fdopen(writer, "w") as pipe:
    out = cli._lasting(pipe)
    os.close(reader)
    for _ in range(200):
      print("x" * 1000, file=out, flush=True)
    out.flush()
  with open(tmp_path / "log", "w", encoding="ascii") as file:
    out = cli._lasting(file)
    print("bars █▅", file=out, flush=True)  # of a terminal that has no such letters
  assert (tmp_path / "log").read_text() == "bars ??\n"


def test_other_errors_of_output_are_raised():
  with open("/dev/full", "w") as full, pytest.raises(OSError, match="No space left"):
    print("x", file=cli._lasting(full), flush=True)


def test_moe_70b_is_refused_before_anything_is_compiled(tmp_path):
  """As on a machine of one's own: no XLA flags, no variable that names a platform."""
  watch = """
import jax
jax.monitoring.register_event_duration_secs_listener(
  lambda name, seconds, **_: "backend_compile" in name and print("COMPILED", name))
"""
  began = time.monotonic()
  result = spawn(tmp_path, "run", "--config=moe_70b", "--workdir=run", script=watch, XLA_FLAGS="")
  print(f"moe_70b answered within {time.monotonic() - began:.1f} s")  # 5 s on a quiet machine
  assert result.code == 2, result.err
  assert result.out == ""  # nothing compiled, nothing begun
  assert not (tmp_path / "run").exists()
  assert "weights, gradients and optimizer state take 1.1 TB" in result.err
  assert re.search(r"but this host has [\d.]+ GB", result.err)
  for name in ("v5p-32", "v6e-64", "h100:2x8"):
    assert re.search(rf"^  {name} .* chips +[\d.]+ TB$", result.err, re.MULTILINE), name
  plan = re.search(r"python -m experiments.plan (.*)", result.err)[1].split()
  assert plan == ["--config=moe_70b", "--topology=v5p-128"]
  launch = re.search(r"bash (tpu_setup/\S+) launch", result.err)[1]
  assert (ROOT / launch).is_file()


def test_the_slice_to_launch_has_a_name_that_clouds_take(tmp_path, monkeypatch):
  monkeypatch.setattr("experiments.planning.memory.host_memory_bytes", lambda: 10**9)
  result = call("run", "--config=gpt3:2.7b", f"--workdir={tmp_path}/run", "--config.mesh.data=1")
  assert result.code == 2
  name = re.search(r"tpu_vm.sh launch --name=(\S+)", result.err)[1]
  assert re.fullmatch("[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name)  # as tpu_setup/common.sh wants it


def test_moe_70b_with_enough_memory_wants_data(tmp_path, monkeypatch):
  monkeypatch.setattr("experiments.planning.memory.host_memory_bytes", lambda: 10**13)
  result = call("run", "--config=moe_70b", f"--workdir={tmp_path}/run", "--config.mesh.data=1")
  assert result.code == 2
  assert "data.path" in result.err
  assert "python -m experiments.data.train_tokenizer --input=" in result.err
  assert "python -m experiments.data.prepare --input=" in result.err
  assert "--tokenizer=" in result.err
  assert not (tmp_path / "run").exists()
