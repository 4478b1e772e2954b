"""Two real processes, one of which needs long to read its data: it is named, and nobody else."""

import time

import pytest

from experiments.training.logbook import read_logbook
from tests.experiments.test_faults import FOUR, LONG, patched, running
from tests.experiments.test_processes import devices
from tests.experiments.test_supervise import eventually

pytestmark = pytest.mark.xdist_group("devices")

# Looks every second in place of every ten, and fewer of them.
HASTE = """
import os, sys
if "--process_id" in " ".join(sys.orig_argv):
  from experiments.training import hosts
  hosts._SECONDS, hosts._LOOKS = 1.0, 4
"""
# Process 1 needs longer for its batches as long as the file is there.
SLOW = (
  HASTE
  + """
if "--process_id=1" in sys.orig_argv:
  import time
  from experiments.data import loader
  following = loader.Loader.__next__
  def slow(self):
    if os.path.exists("slow"):
      time.sleep(1.0)
    return following(self)
  loader.Loader.__next__ = slow
"""
)


def anomalies(folder):
  book = read_logbook(folder)
  assert book.problems == []
  return [e for e in book.events if e["kind"] == "anomaly" and e["class"] == "K"]


@pytest.mark.full
def test_a_host_that_reads_slowly_is_named_until_it_recovers(tmp_path):
  flags = (*FOUR, LONG, "--processes=2")
  with running(tmp_path, *flags, PYTHONPATH=patched(tmp_path, SLOW), **devices(2)) as run:
    run.steps_beyond(10)
    time.sleep(8)  # undisturbed, for as many looks
    assert anomalies(run.folder) == []
    (tmp_path / "slow").touch()
    begun = run.last_step
    eventually(lambda: len(anomalies(run.folder)) == 1, 150)
    assert "process 1 on " in run.out and " is slow: " in run.out
    (tmp_path / "slow").unlink()
    eventually(lambda: len(anomalies(run.folder)) == 2, 150)
    assert run.end(15) == 75
  slow, over = anomalies(run.folder)
  assert slow["step"] > begun and slow["severity"] == "warn" and over["severity"] == "info"
  detail = slow["detail"]
  assert (detail["signal"], detail["process"], detail["recovered"]) == ("step_time", 1, False)
  assert detail["host"] and detail["value"] == pytest.approx(1.0, rel=0.3)
  assert detail["baseline"] < 0.5 * detail["value"] < detail["step_s"]
  assert over["detail"]["process"] == 1 and over["detail"]["recovered"]
  [perf] = [e["detail"] for e in read_logbook(run.folder).events if e["kind"] == "perf"]
  assert perf["host_max"].startswith("process ") and perf["host_p50_s"] <= perf["host_max_s"]
  text = (run.folder / "LOGBOOK.md").read_text()
  assert text.count(" ANOMALY process 1 on ") == 2


@pytest.mark.full
def test_an_undisturbed_pair_names_nobody(tmp_path):
  flags = (*FOUR, LONG, "--processes=2")
  with running(tmp_path, *flags, PYTHONPATH=patched(tmp_path, HASTE), **devices(2)) as run:
    run.steps_beyond(1)
    run.steps_beyond(100)
    assert run.end(15) == 75
  assert anomalies(run.folder) == [] and " is slow" not in run.out
