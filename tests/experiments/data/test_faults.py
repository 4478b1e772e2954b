"""Records that can't be read: retried, then skipped and counted exactly, or the end of the run."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from experiments.cli import named_config
from experiments.config import ConfigError
from experiments.data import faults
from experiments.data.faults import CarefulRows
from experiments.data.load import load
from experiments.data.loader import make_loader
from experiments.data.rows import SyntheticRows
from tests.experiments.programs import QUICK, ROOT, call

T = 16
CONFIG = named_config("debug").data


UNREADABLE = OSError(5, "Input/output error")


class Failing:
  """Rows of which some fail some times before they can be read."""

  def __init__(self, failures, error=UNREADABLE):
    self.rows, self.left, self.error = SyntheticRows(64, T, 100, (0,)), dict(failures), error

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, row):
    if self.left.get(row, 0) > 0:
      self.left[row] -= 1
      raise self.error
    return self.rows[row]


NO_WAIT = (0.0, 0.0, 0.0)


@pytest.mark.parametrize("error", (OSError(5, "Input/output error"), ConfigError("is damaged")))
def test_a_row_that_comes_at_a_later_try_is_the_row(error):
  careful = CarefulRows(Failing({3: 3}, error), T, "stop", NO_WAIT)
  np.testing.assert_array_equal(careful[3]["tokens"], SyntheticRows(64, T, 100, (0,))[3]["tokens"])
  [fault] = careful.faults()
  assert (fault.row, fault.tries, fault.skipped) == (3, 4, False) and str(error) in fault.reason
  assert careful.faults() == []
  careful[5]
  assert careful.faults() == []


def test_one_that_never_comes_ends_the_run_or_is_left_blank():
  with pytest.raises(
    ConfigError, match=r"row 3 .* Input/output error \(tried 4 times; data.on_err"
  ):
    CarefulRows(Failing({3: 99}), T, "stop", NO_WAIT)[3]
  careful = CarefulRows(Failing({3: 99}), T, "skip", NO_WAIT)
  blank, good = careful[3], careful[4]
  assert {k: x.dtype for k, x in blank.items()} == {k: x.dtype for k, x in good.items()}
  assert all(x.shape == (T,) and not x.any() for x in blank.values())
  [fault] = careful.faults()
  assert (fault.row, fault.skipped) == (3, True)


def test_a_mistake_of_ours_is_not_retried():
  rows = Failing({3: 1}, KeyError("ours"))
  with pytest.raises(KeyError):
    CarefulRows(rows, T, "skip", NO_WAIT)[3]


def test_waits_grow():
  assert list(faults.RETRY_SECONDS) == sorted(faults.RETRY_SECONDS) and faults.RETRY_SECONDS[0] > 0


def test_a_loader_jumps_over_windows_and_nothing_else():
  config = dataclasses.replace(CONFIG, source="synthetic", row_length=T, batch_size=4)
  dataset = load(config, 100)

  def take(windows, batches):
    loader = make_loader(dataset, config, "train")
    loader.avoid(windows)
    found = [(next(loader)["tokens"], loader.state()["position"]) for _ in range(batches)]
    loader.close()
    return found

  whole = take([], 12)
  some = take([(8, 16), (24, 28), (28, 36)], 6)
  kept = [0, 1, 4, 5, 9, 10]  # batches of 4 rows: 2, 3 and 6, 7, 8 are left out
  for (tokens, position), index in zip(some, kept, strict=True):
    np.testing.assert_array_equal(tokens, whole[index][0])
    assert position == whole[index][1]


@pytest.fixture
def shards(tmp_path):
  """Six shards of text."""
  text = tmp_path / "text.jsonl"
  rng = np.random.default_rng(0)
  letters = np.array(list("abcdefgh "))
  lines = (json.dumps({"text": "".join(rng.choice(letters, 600))}) for _ in range(60))
  text.write_text("\n".join(lines) + "\n")
  folder = tmp_path / "shards"
  arguments = (f"--input={text}", f"--output={folder}", "--workers=1", "--shard_tokens=6000")
  command = [sys.executable, "-m", "experiments.data.prepare", *arguments, "--tokenizer=byte"]
  made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
  assert made.returncode == 0, made.stderr
  return folder


def blank_rows(folder):
  rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return [row["skipped_rows"] for row in rows if "loss" in row][-1]


@pytest.mark.parametrize("harm", ("empty", "corrupt"))
def test_a_damaged_shard(shards, tmp_path, monkeypatch, harm):
  """An empty file, or token ids that no tokenizer has: refused, or its rows are counted out."""
  monkeypatch.setattr(faults, "RETRY_SECONDS", (0.0,))
  [victim] = sorted(shards.glob("*00002.tokens"))
  size = victim.stat().st_size
  victim.write_bytes(b"" if harm == "empty" else b"\xff" * size)
  folder = tmp_path / "run"
  run = ("run", *QUICK, f"--config.data.path={shards}", f"--workdir={folder}",
         "--config.train.steps=10", "--config.train.log_every=1")  # fmt: skip
  refused = call(*run)
  assert refused.code == 2 and victim.name in refused.err and refused.err.count("\n") == 1
  skipping = call(*run, "--config.data.on_error=skip")
  assert skipping.code == 0, skipping.err
  # The oracle: which rows of the shuffle's first ten batches touch the tokens of that shard.
  manifest = json.loads((shards / "manifest.json").read_text())
  ends = np.cumsum([shard["tokens"] for shard in manifest["shards"]])
  low, high = ends[1], ends[2]
  config = dataclasses.replace(
    CONFIG, path=str(shards), source="shards", on_error="skip", batch_size=8, row_length=64
  )
  dataset = load(config, 512)
  numbered = dataset._replace(train=Numbers(len(dataset.train), 64))
  loader = make_loader(numbered, config, "train")
  seen = np.concatenate([next(loader)["tokens"][:, 0] for _ in range(10)])
  loader.close()
  expected = sum(1 for row in seen if row * 64 < high and row * 64 + 64 >= low)
  assert expected > 0 and blank_rows(folder) == expected
  logbook = [json.loads(line) for line in (folder / "logbook.jsonl").read_text().splitlines()]
  assert any(e["kind"] == "fault" and e["class"] == "I" for e in logbook)


class Numbers:
  """Rows that say which row they are."""

  def __init__(self, count, length):
    self.count, self.length = count, length

  def __len__(self):
    return self.count

  def __getitem__(self, row):
    return faults.blank_row(self.length) | {"tokens": np.full(self.length, row, np.int32)}


def test_damaged_lines_of_text_are_left_out_and_named(tmp_path):
  path = tmp_path / "text.jsonl"
  good = json.dumps({"text": "a good line of text, " * 30})
  path.write_text("\n".join([good] * 20 + ["{oh no", '{"other": 1}'] + [good] * 20) + "\n")
  (tmp_path / "empty.jsonl").write_text("")
  config = dataclasses.replace(CONFIG, path=f"{tmp_path}/*.jsonl", source="text")
  with pytest.raises(ConfigError):
    load(config, 512)
  dataset = load(dataclasses.replace(config, on_error="skip"), 512)
  assert len(dataset.skipped) == 3
  assert any("text.jsonl line 21 is not JSON" in text for text in dataset.skipped)
  assert any("text.jsonl line 22 has no text" in text for text in dataset.skipped)
  assert any("empty.jsonl is empty" in text for text in dataset.skipped)
  clean = tmp_path / "clean"
  clean.mkdir()
  (clean / "text.jsonl").write_text("\n".join([good] * 40) + "\n")
  same = load(dataclasses.replace(config, path=f"{clean}/*.jsonl"), 512)
  assert dataset.fingerprint == same.fingerprint
