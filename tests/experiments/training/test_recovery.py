"""What a run does about gradients that are not finite, and about spikes: whole runs of `debug`."""

import json

import numpy as np
import pytest

from experiments.cli import named_config
from experiments.training import loop
from experiments.training.checkpoint import saved_steps
from experiments.training.metrics import read_history, read_metrics
from experiments.training.recovery import Recovery
from tests.experiments.programs import QUICK, call, state_hash

pytestmark = pytest.mark.xdist_group("run")

RUN = (
  *QUICK, "--config.train.steps=120",
  "--config.checkpoint.every=10", "--config.checkpoint.keep=20", "--config.guard.window=32",
  "--config.guard.rewind_steps=10", "--config.guard.skip_batches=5,9", "--config.train.log_every=5",
)  # fmt: skip
ROWS = 8  # a batch of `debug`


def short(steps):
  return [a for a in RUN if "train.steps" not in a] + [f"--config.train.steps={steps}"]


def poisoned(monkeypatch, poison):
  """Batches pass through `poison(number, batch)`; numbers count in the order of the data."""
  make, read = loop.make_loader, []

  def make_poisoned(dataset, config, split, **more):
    loader = make(dataset, config, split, **more)
    if split == "train":
      take = loader.__class__.__next__

      class Poisoned(loader.__class__):
        def __next__(self):
          batch = take(self)
          number = self.state()["position"] // ROWS - 1
          read.append(number)
          return poison(number, batch)

      loader.__class__ = Poisoned
    return loader

  monkeypatch.setattr(loop, "make_loader", make_poisoned)
  return read


def nan(batch):
  return batch | {"weights": batch["weights"] * np.float32(np.nan)}


def steep(batch):
  """Weights that all but cancel: a finite gradient, thousands of times the usual."""
  sign_T = np.where(np.arange(batch["weights"].shape[1]) % 2, -1000, 1000).astype(np.float32)
  return batch | {"weights": batch["weights"] * sign_T}


def events(folder, kind):
  lines = (folder / "logbook.jsonl").read_text().splitlines()
  return [row for row in map(json.loads, lines) if row["kind"] == kind]


def test_a_batch_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch):
  folder = tmp_path / "run"
  poisoned(monkeypatch, lambda n, batch: nan(batch) if n in (7, 8, 12) else batch)
  result = call("run", *short(20), f"--workdir={folder}")
  assert result.code == 0, result.err
  rows = [row for row in read_metrics(folder) if "loss" in row]
  assert [(r["step"], r["skipped_updates"]) for r in rows] == [
    (1, 0), (5, 0), (10, 2), (15, 3), (20, 3),
  ]  # fmt: skip
  skips = [e for e in events(folder, "action") if e["detail"]["policy"] == "skip_update"]
  assert [e["step"] for e in skips] == [8, 13]  # one entry an episode
  step, _, _ = state_hash(folder)
  assert step == 20


def test_many_in_a_row_stop_the_run(tmp_path, monkeypatch):
  folder = tmp_path / "run"
  poisoned(monkeypatch, lambda n, batch: nan(batch) if n >= 14 else batch)
  result = call("run", *RUN, f"--workdir={folder}", "--config.guard.nonfinite_steps=4")
  assert result.code == 77
  assert "stopped: step" in result.err and "4 steps in a row" in result.err
  assert result.err.count("\n") == 1
  assert saved_steps(folder / "checkpoints") == [10]  # nothing is saved of what came after
  assert events(folder, "stop")[-1]["detail"] == {"reason": "policy", "exit_code": 77}


@pytest.fixture(scope="module")
def rewound(tmp_path_factory):
  """Forty steep batches from the 60th on, among them too many to skip one by one."""
  folder = tmp_path_factory.mktemp("rewound") / "run"
  with pytest.MonkeyPatch.context() as patch:
    read = poisoned(patch, lambda n, batch: steep(batch) if 60 <= n < 100 else batch)
    result = call("run", *RUN, f"--workdir={folder}")
    again = call("run", *short(125), f"--workdir={folder}")
  return folder, result, again, read


def test_a_run_goes_back_and_leaves_the_data_out(rewound):
  folder, result, _, read = rewound
  assert result.code == 0, result.err
  [back, *more] = [e for e in events(folder, "action") if e["detail"]["policy"] == "rewind_skip"]
  assert "back from step" in result.out and back["summary"] in result.out
  first, end = back["detail"]["skipped"]
  assert back["detail"]["to_step"] == 50  # the 61st step is the first bad one, 10 more back
  assert first == 50 * ROWS and end > first  # ten batches before may have caused it
  windows = json.loads((folder / "skipped.json").read_text())
  assert [(w["first"], w["end"]) for w in windows] == [
    tuple(e["detail"]["skipped"]) for e in (back, *more)
  ]
  for low, high in ((w["first"], w["end"]) for w in windows):
    after = read[read.index(high // ROWS) :]
    assert not [n for n in after if low <= n * ROWS < high]  # never again


def test_what_was_taken_back_stays_in_the_record(rewound):
  folder, _, _, _ = rewound
  rows = [row for row in read_metrics(folder) if "loss" in row]
  steps = [row["step"] for row in rows]
  assert steps == sorted(set(steps)) and steps[-1] == 125
  assert len(read_history(folder)) > 1


def test_another_start_does_not_read_it_either(rewound):
  folder, _, again, read = rewound
  assert again.code == 0, again.err
  windows = json.loads((folder / "skipped.json").read_text())
  assert not [n for n in read[-5:] if any(w["first"] <= n * ROWS < w["end"] for w in windows)]


def test_a_resumed_guard_is_the_same_guard(tmp_path):
  """State, guard and data position are those of the uninterrupted run, to the bit."""
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  assert call("run", *short(40), f"--workdir={whole}").code == 0
  assert call("run", *short(20), f"--workdir={parts}").code == 0
  assert call("run", *short(40), f"--workdir={parts}").code == 0
  assert state_hash(parts) == state_hash(whole)


def test_damaged_windows_are_refused(rewound, tmp_path):
  folder = tmp_path / "run"
  assert call("run", *QUICK, f"--workdir={folder}", "--config.train.steps=2").code == 0
  (folder / "skipped.json").write_text('[{"first": 3')
  result = call("run", *QUICK, f"--workdir={folder}", "--config.train.steps=3")
  assert result.code == 2 and "skipped.json is damaged" in result.err


def test_a_crash_after_a_rewind_does_not_forget_it(tmp_path, monkeypatch):
  """One rewind is allowed; data that stays bad is to stop the run the second time, though the
  process died right after the first, before another checkpoint."""
  folder = tmp_path / "run"
  flags = (*(a.replace("=5,9", "=5") for a in RUN), f"--workdir={folder}")
  poisoned(monkeypatch, lambda n, batch: steep(batch) if n >= 60 else batch)
  with monkeypatch.context() as patch:
    go_back = loop._Run._go_back

    def crash(self, decision):
      go_back(self, decision)
      raise RuntimeError("killed")

    patch.setattr(loop._Run, "_go_back", crash)
    assert call("run", *flags).code == 1
  windows = (folder / "skipped.json").read_text()
  assert len(json.loads(windows)) == 1 and saved_steps(folder / "checkpoints")[-1] == 50
  again = call("run", *flags)
  assert again.code == 77 and "after 1 rewinds near this step" in again.err
  assert (folder / "skipped.json").read_text() == windows
  assert "resuming after step 50" in again.out


def test_rewinds_before_the_checkpoint_count_once(tmp_path):
  """Those of the file that the checkpoint knew are in its state, or were forgotten on purpose."""
  window = lambda step: {"first": 8 * step, "end": 8 * step + 8, "step": step, "reason": "steep"}
  path = tmp_path / "skipped.json"
  path.write_text(json.dumps([window(60), window(90)]))
  config = named_config("debug")
  known = Recovery(config, tmp_path, primary=True)
  before = known.guard.state() | {"rewinds": [60]}
  for state, expected in (
    (before | {"windows": 1}, [60, 90]),
    (before | {"windows": 2}, [60]),  # a person's change made it forget the second
    (before | {"windows": 0, "rewinds": []}, [60, 90]),
    (before, [60]),
  ):
    recovery = Recovery(config, tmp_path, primary=True)
    recovery.restore(state)
    assert recovery.state()["rewinds"] == expected and recovery.state()["windows"] == 2
