"""What a run logs: means over an interval, JSON lines, TensorBoard events."""

import contextlib
import functools
import gc
import json
import math
import os
import resource
import struct
import warnings

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from experiments.config import ConfigError
from experiments.training.metrics import MetricsWriter, read_history, read_metrics, summarise
from experiments.training.step import StepMetrics
from layers.moe import MoeStats


def events(folder):
  """TensorBoard events of a run, in order of writing."""
  found = []
  for path in sorted((folder / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
    data, at = path.read_bytes(), 0
    while at < len(data):
      (length,) = struct.unpack("<Q", data[at : at + 8])
      found.append(Event.FromString(data[at + 12 : at + 12 + length]))
      at += 12 + length + 4
  return found


def scalars(folder, tag):
  return [(e.step, v.simple_value) for e in events(folder) for v in e.summary.value if v.tag == tag]


def moe(load_LE, dropped, tokens=8, nonfinite=0):
  """Statistics of a layer that stands L times in the model."""
  load_LE = np.array(load_LE, np.float32)
  each = np.ones(len(load_LE), np.float32)
  return MoeStats(
    aux_loss=each, balance=each, z=each, load_E=load_LE, dropped=dropped * each,
    entropy=0.5 * tokens * each, gate=0.25 * tokens * each, tokens=tokens * each,
    nonfinite=nonfinite * each,
  )  # fmt: skip


stats = functools.partial(
  StepMetrics, update_ratio=0.5, log_z=4.0, skipped=False, blank_rows=0, load_cv=0.0
)


def test_summary_is_a_mean_over_steps_and_a_share_over_choices():
  first = stats(1.0, 0.1, 2.0, 8, (moe([[8, 0], [4, 4]], 4), moe([[1, 7], [2, 6]], 0)))
  second = stats(3.0, 0.3, 4.0, 8, (moe([[0, 8], [4, 4]], 0), moe([[1, 7], [2, 6]], 0)))
  row = summarise([first, second])
  assert (row["loss"], row["aux_loss"], row["grad_norm"]) == (2.0, pytest.approx(0.2), 3.0)
  assert row["load"] == [[0.5, 0.5], [0.5, 0.5], [0.125, 0.875], [0.25, 0.75]]
  assert row["load_max_over_mean"] == 0.875 * 2
  assert row["drop_rate"] == pytest.approx(8 / 64)
  assert row["router_entropy"] == 0.5 and row["gate"] == 0.25


def test_router_health():
  """The worked load [3, 0, 1, 0] has a CV of 1.224745, an even one of 0; experts are dead when they
  are so over the whole interval."""
  first = stats(1.0, 0.1, 2.0, 8, (moe([[2, 0, 0, 0], [1, 1, 1, 1]], 0, nonfinite=2),))
  second = stats(1.0, 0.1, 2.0, 8, (moe([[1, 0, 1, 0], [0, 0, 0, 0]], 0, nonfinite=1),))
  row = summarise([first, second])
  assert row["load_cv"] == pytest.approx(1.224745 / 2, abs=1e-6)
  assert row["dead_experts"] == 2
  assert row["nonfinite"] == 6  # in both layers
  empty = summarise([stats(1.0, 0.1, 2.0, 8, (moe([[0, 0]], 0, tokens=0),))])
  assert empty["load_cv"] == 0 and empty["dead_experts"] == 2


def test_summary_of_a_dense_model_has_no_experts():
  assert summarise([stats(1.0, 0.0, 2.0, 8, ())]) == {
    "loss": 1.0, "aux_loss": 0.0, "grad_norm": 2.0, "update_ratio": 0.5, "log_z": 4.0,
  }  # fmt: skip


def test_rows_are_there_before_the_file_is_closed(tmp_path):
  writer = MetricsWriter(tmp_path)
  writer.write(1, {"loss": 2.5, "tokens_per_second": None})
  assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.5, "tokens_per_second": None}]
  writer.close()


def test_resuming_supersedes_rows_after_the_checkpoint(tmp_path):
  first = MetricsWriter(tmp_path)
  for step in range(1, 6):
    first.write(step, {"loss": float(step)})
  first.close()
  before = (tmp_path / "metrics.jsonl").read_text()
  second = MetricsWriter(tmp_path, resume_step=3)
  for step in (4, 5):
    second.write(step, {"loss": 10.0 * step})
  second.close()
  rows = read_metrics(tmp_path)
  assert [(r["step"], r["loss"]) for r in rows] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50)]
  (lost,) = read_history(tmp_path).abandoned
  assert [(r["step"], r["loss"]) for r in lost] == [(4, 4), (5, 5)]
  assert (tmp_path / "metrics.jsonl").read_text().startswith(before)  # nothing is written anew
  # TensorBoard is told that the old run's steps from 4 on are void.
  starts = [e for e in events(tmp_path) if e.session_log.status == SessionLog.START]
  assert [e.step for e in starts] == [4]
  assert scalars(tmp_path, "loss")[-2:] == [(4, 40.0), (5, 50.0)]


def test_events_hold_the_numbers(tmp_path):
  writer = MetricsWriter(tmp_path)
  writer.write(7, {"loss": 2.5, "load": [[0.5, 0.5]], "mfu": None, "grad_norm": math.inf})
  writer.close()
  assert scalars(tmp_path, "loss") == [(7, 2.5)]
  tags = {v.tag for e in events(tmp_path) for v in e.summary.value}
  assert tags == {"loss"}
  assert events(tmp_path)[0].file_version == "brain.Event:2"


def test_json_has_no_nan(tmp_path):
  writer = MetricsWriter(tmp_path)
  writer.write(1, {"loss": math.nan, "grad_norm": math.inf})
  writer.close()
  row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
  assert row == {"step": 1, "loss": None, "grad_norm": None}


def test_a_last_line_cut_off_by_a_crash_is_left_out(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
  assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]
  writer = MetricsWriter(tmp_path, resume_step=1)
  writer.write(2, {"loss": 3.0})
  writer.close()
  assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnoise\n{"step": 2}\n')
  with pytest.raises(ConfigError, match="line 2 is not JSON"):
    read_metrics(tmp_path)


def test_no_file_no_rows(tmp_path):
  assert read_metrics(tmp_path) == []


def test_a_run_that_goes_back_and_back_again(tmp_path):
  """By hand: 1..6, back to 4, 5 and 6 anew, back to 2 in a new process, 3..6."""
  writer = MetricsWriter(tmp_path)
  for step in range(1, 7):
    writer.write(step, {"loss": 1.0})
  writer.write(4, {"checkpoint_s": 1.0})  # a save that ended later
  writer.rewind(4)
  for step in (5, 6):
    writer.write(step, {"loss": 2.0})
  writer.write(6, {"heldout_loss": 0.5})
  writer.close()
  writer = MetricsWriter(tmp_path, resume_step=2)
  for step in range(3, 7):
    writer.write(step, {"loss": 3.0})
    if step % 2 == 0:
      writer.write(step, {"heldout_loss": 0.25})
  writer.close()
  rows, abandoned = read_history(tmp_path)
  assert [(r["step"], r.get("loss")) for r in rows] == [
    (1, 1.0), (2, 1.0), (3, 3.0), (4, 3.0), (4, None), (5, 3.0), (6, 3.0), (6, None),
  ]  # fmt: skip
  assert [[(r["step"], r.get("loss")) for r in branch] for branch in abandoned] == [
    [(5, 1.0), (6, 1.0)],
    [(3, 1.0), (4, 1.0), (4, None), (5, 2.0), (6, 2.0), (6, None)],
  ]
  starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
  assert starts == [5, 3]


def test_a_run_that_died_before_it_saved_starts_afresh(tmp_path):
  for loss in (1.0, 2.0):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": loss})
    writer.close()
  assert read_history(tmp_path) == ([{"step": 1, "loss": 2.0}], [[{"step": 1, "loss": 1.0}]])


def test_some_rows_of_a_long_run(tmp_path):
  """Every part's first and last row, each held-out one, and a share of the rest."""
  writer = MetricsWriter(tmp_path)
  for first, last in ((1, 777), (501, 1234), (1001, 3000)):
    if first > 1:
      writer.rewind(first - 1)
    for step in range(first, last + 1):
      writer.write(step, {"loss": 1.0})
      if step == 2345:
        writer.write(step, {"heldout_loss": 1.0})
  writer.close()
  rows, abandoned = read_history(tmp_path, most=50)
  whole = read_history(tmp_path)
  assert len(rows) + sum(map(len, abandoned)) < 70 < len(whole.rows)
  assert [branch[-1]["step"] for branch in abandoned] == [777, 1234]
  assert rows[0]["step"] == 1 and rows[-1]["step"] == 3000
  assert [r["step"] for r in rows if "heldout_loss" in r] == [2345]
  steps = [r["step"] for r in rows]
  assert steps == sorted(steps) and {501, 1001} <= set(steps)
  assert read_history(tmp_path, most=10_000) == whole
  assert read_history(tmp_path / "nowhere", most=10) == ([], [])


@contextlib.contextmanager
def full_disk():
  """No file grows beyond 10 bytes."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_for_a_while(tmp_path, monkeypatch):
  """No row is lost and no event torn; the scalars of that while are missing, and said to be."""
  monkeypatch.setattr("experiments.training.metrics._BOARD_SECONDS", -1.0)
  said = []
  writer = MetricsWriter(tmp_path, note=said.append)
  writer.write(1, {"loss": 1.0})
  with full_disk():
    writer.write(2, {"loss": 2.0})
    writer.write(3, {"loss": 3.0})
    assert writer.pending == 2 and [r["step"] for r in read_metrics(tmp_path)] == [1]
  writer.write(4, {"loss": 4.0})
  assert writer.pending == 0
  writer.close()
  assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4]
  assert scalars(tmp_path, "loss") == [(1, 1.0), (4, 4.0)]
  assert said == ["TensorBoard lacks rows that the disk refused: 2"]


def test_a_disk_that_stays_full(tmp_path):
  """What is lost is said with an error, and the files are closed."""
  said = []
  writer = MetricsWriter(tmp_path, note=said.append)
  with full_disk():
    writer.write(1, {"loss": 2.0})
    with pytest.raises(OSError, match=r"File too large; 1 row is lost: .*metrics\.jsonl"):
      writer.close()
  assert said == ["TensorBoard lacks rows that the disk refused: 1"]
  with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    del writer
    gc.collect()
  assert not warned
  assert str(tmp_path) not in " ".join(os.readlink(f"/proc/self/fd/{n}") for n in open_files())


def open_files():
  return [n for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")]
