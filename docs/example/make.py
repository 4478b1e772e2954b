"""Makes this folder: a `moe_tiny` that meets faults, run by the programs that a user runs.

    python docs/example/make.py

On Linux, from the repository's root; five minutes on two cores. The run is supervised. Data that is
not finite, data that is too steep and a row that can't be read are put in its way by FAULTS, which
each of its processes loads first; the rest is done from outside, at the steps below: kill -9,
SIGTERM as before a preemption, a flipped bit, a person's change of the learning rate, notes. Names
of machine and user are made up.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
KEPT = ("config.json", "metrics.jsonl", "logbook.jsonl", "logbook.supervisor.jsonl",
        "logbook.notes.jsonl", "LOGBOOK.md", "logbook.html")  # fmt: skip

RUN = (
  "run", "--config=moe_tiny", "--supervise", "--config.train.steps=320",
  "--config.train.log_every=2", "--config.checkpoint.every=20", "--config.checkpoint.keep=4",
  "--config.eval.every=40", "--config.eval.twin=", "--config.eval.sample_prompt=",
  "--config.eval.baselines=false", "--config.guard.window=32", "--config.guard.rewind_steps=10",
  "--config.guard.skip_batches=5,10", "--config.data.on_error=skip",
)  # fmt: skip
SLOWER = (
  "--config.optimizer.learning_rate=0.005",
  "--reason=the gradient norm has been restless since the rewind",
)

FAULTS = """
import platform, sys
platform.node = lambda: "host-1"
if sys.orig_argv[1:3] == ["-m", "experiments.run"]:
  import numpy as np
  from experiments.data import faults, loader

  take, init = loader.Loader.__next__, faults.CarefulRows.__init__

  def poisoned(self):
    batch, state = take(self), self.state()
    if state["fingerprint"]["split"] == "train":
      weights_BT = batch["weights"]
      number = state["position"] // len(weights_BT)
      if number == 61:
        batch = batch | {"weights": weights_BT * np.float32(np.nan)}
      if 141 <= number <= 163:  # all but cancel: a finite gradient, thousands of times the usual
        sign_T = np.where(np.arange(weights_BT.shape[1]) % 2, -1000, 1000).astype(np.float32)
        batch = batch | {"weights": weights_BT * sign_T}
    return batch

  class Damaged:
    def __init__(self, rows):
      self.rows = rows

    def __len__(self):
      return len(self.rows)

    def __getitem__(self, row):
      if row == 1000:
        raise OSError(5, "Input/output error")
      return self.rows[row]

  loader.Loader.__next__ = poisoned
  faults.CarefulRows.__init__ = lambda self, rows, *rest: init(self, Damaged(rows), *rest)
"""


class Story:
  """A run in folder `home`, and what is done to it."""

  def __init__(self, home: Path):
    self.home, self.folder = home, home / "moe_tiny"
    (home / "faults").mkdir()
    (home / "faults" / "sitecustomize.py").write_text(FAULTS)
    self._environment = os.environ | {
      "PYTHONPATH": f"{home}/faults:{ROOT}", "HOME": str(home), "LOGNAME": "ada", "TZ": "UTC",
      "JAX_PLATFORMS": "cpu", "GIT_DIR": os.devnull,
    }  # fmt: skip
    self._process: subprocess.Popen | None = None

  def start(self, *flags: str) -> None:
    self._process = subprocess.Popen(
      [*self._command(*RUN), *flags], cwd=self.home, env=self._environment
    )

  def call(self, *words: str) -> None:
    subprocess.run(self._command(*words), cwd=self.home, env=self._environment, check=True)

  def _command(self, program: str, *words: str) -> list[str]:
    return [sys.executable, "-m", f"experiments.{program}", "--workdir=moe_tiny", *words]

  def wait(self, reached: Callable[[], bool], minutes: float = 20) -> None:
    until = time.monotonic() + 60 * minutes
    while not reached():
      assert self._process is not None and self._process.poll() is None, "the run has ended"
      assert time.monotonic() < until, "the run does not come further"
      time.sleep(0.02)

  def beyond(self, step: int, attempt: int) -> None:
    """Wait until an attempt has logged a later step."""
    self.wait(lambda: self._launches() == attempt and self._step() > step)

  def _lines(self, name: str) -> list[str]:
    path = self.folder / name
    return path.read_text().splitlines() if path.exists() else []

  def _launches(self) -> int:
    return sum('"kind": "launch"' in line for line in self._lines("logbook.jsonl"))

  def _step(self) -> int:
    rows = [json.loads(line) for line in self._lines("metrics.jsonl")[-3:]]
    return rows[-1].get("step", 0) if rows else 0

  def id_of(self, word: str) -> str:
    """Of the first event that holds a word; empty without one."""
    found = (json.loads(line) for line in self._lines("logbook.jsonl") if word in line)
    return next((event["id"] for event in found), "")

  def signal_trainer(self, number: int) -> None:
    assert self._process is not None
    pid = self._process.pid
    child = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
    os.kill(int(child), number)

  def flip_a_bit(self) -> None:
    """In the largest file of the newest checkpoint."""
    newest = re.search(r"in (checkpoints/\d+)", (self.folder / "latest").read_text())
    assert newest is not None
    files = [path for path in (self.folder / newest[1]).rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)

  def end(self, number: int | None, code: int) -> None:
    """Until the supervisor has ended, of itself or by a signal."""
    assert self._process is not None
    if number is not None:
      self._process.send_signal(number)
    found = self._process.wait(1200)
    assert found == code, f"the run ended with {found}, not {code}"

  def close(self) -> None:
    if self._process is not None and self._process.poll() is None:
      self._process.terminate()
      self._process.wait()


def tell(story: Story) -> None:
  story.start()
  story.beyond(46, attempt=1)
  story.signal_trainer(signal.SIGKILL)
  story.beyond(86, attempt=2)  # on the way a batch that is not finite, and the damaged row
  story.signal_trainer(signal.SIGTERM)
  story.beyond(106, attempt=3)
  story.signal_trainer(signal.SIGSTOP)
  story.flip_a_bit()
  story.signal_trainer(signal.SIGKILL)
  story.wait(lambda: bool(story.id_of("rewind_skip")))
  about = f"--about={story.id_of('rewind_skip')[-4:]}"
  story.call("logbook", "note", "looked at those rows: a page of digits, rightly left out", about)
  story.beyond(206, attempt=4)
  story.end(signal.SIGTERM, 75)
  story.start(*SLOWER)
  story.end(None, 0)
  story.call("logbook", "note", "row 1000 lies on a bad block; the disk is replaced tomorrow")
  story.call("logbook", "report")


def main() -> None:
  with tempfile.TemporaryDirectory() as home:
    story = Story(Path(home))
    try:
      tell(story)
    finally:
      story.close()
    for name in KEPT:
      shutil.copy(story.folder / name, HERE / name)


if __name__ == "__main__":
  main()
