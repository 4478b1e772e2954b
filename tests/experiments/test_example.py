"""The run in docs/example: its book is whole, holds what its script did to it, and names nobody."""

import json
import re
import shutil
from pathlib import Path

import pytest

from experiments.book.facts import gather
from experiments.training.logbook import read_logbook
from experiments.training.metrics import read_metrics
from tests.experiments.programs import ROOT, call

EXAMPLE = ROOT / "docs" / "example"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A copy, as reading a book writes LOGBOOK.md anew."""
  return Path(shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("example") / "moe_tiny"))


@pytest.fixture(scope="module")
def events(folder):
  book = read_logbook(folder)
  assert book.problems == []
  return book.events


def test_it_is_shown_without_a_complaint(folder):
  result = call("logbook", "show", f"--workdir={folder}")
  assert result.code == 0 and result.err == ""
  assert result.out.startswith("moe_tiny: Finished at step 320\n")
  for words in ("was killed by SIGKILL", "stopped by SIGTERM", "REWIND_SKIP", "NOTE", "MILESTONE"):
    assert words in result.out


def test_each_fault_is_in_the_book(events):
  """kill -9 twice, SIGTERM to the run and to its supervisor, a flipped bit, a batch that is not
  finite, 23 that are too steep, a row that can't be read, a change by a person, notes."""
  of = lambda kind, **more: [
    e for e in events
    if e["kind"] == kind and all(e["detail"].get(name) == value for name, value in more.items())
  ]  # fmt: skip
  killed = [e for e in of("fault") if e["source"] == "supervisor"]
  assert ["SIGKILL" in e["summary"] for e in killed] == [True, True]
  assert len(of("action", policy="restart")) == 3
  ends = [(e["detail"]["reason"], e["detail"]["exit_code"]) for e in of("stop")
          if e["source"] == "trainer"]  # fmt: skip
  assert ends == [("preempted", 75), ("preempted", 75), ("finished", 0)]
  assert [e["attempt"] for e in of("launch")] == [1, 2, 3, 4, 5]

  [refused] = of("checkpoint", status="refused")
  assert "step 100 refused" in refused["summary"]
  [nan, steep] = of("action", policy="skip_update")
  assert nan["step"] == 61 and "not finite" in nan["summary"] and steep["step"] == 141
  [back] = of("action", policy="rewind_skip")
  first, end = back["detail"]["skipped"]
  assert back["detail"]["to_step"] == 120 and first <= 140 * 16 and end >= 163 * 16
  rows = [e for e in of("fault") if e["class"] == "I"]
  assert {"row 1000 of the data left out" in e["summary"] for e in rows} == {True}
  [change] = of("action", policy="none")
  assert change["detail"]["change"][0]["key"] == "optimizer.learning_rate"
  assert "restless" in change["summary"]
  assert [e["owner"] for e in of("note")] == ["ada", "ada"] and of("note")[0]["refs"] == [
    back["id"]
  ]

  told = [e["detail"]["what"] for e in of("milestone")]
  assert sorted(told) == sorted({
    "a quarter of 320 steps", "half of 320 steps", "three quarters of 320 steps",
    "all of the data was read once", "1 million tokens",
  })  # fmt: skip
  assert len(of("perf")) == len(of("energy")) == 3  # at each end but kill -9
  assert len(of("eval")) >= 8 and len(of("checkpoint", status="finished")) >= 16


def test_the_ledger_explains_the_time(folder):
  facts = gather(folder)
  times = facts.ledger
  assert abs(times.unexplained) < 0.01 * times.wall
  assert times.seconds["lost"] > 0 and times.seconds["down"] > 0
  assert len(times.failures) == 4 and times.lost_steps > 40
  rows = [row for row in read_metrics(folder) if "loss" in row]
  assert rows[-1]["step"] == 320 and rows[-1]["loss"] < 0.4 * rows[0]["loss"]


def test_it_is_small_and_names_no_machine():
  files = [path for path in EXAMPLE.iterdir() if path.name != "make.py"]
  assert {path.name for path in files} == {
    "config.json", "metrics.jsonl", "logbook.jsonl", "logbook.supervisor.jsonl",
    "logbook.notes.jsonl", "LOGBOOK.md", "logbook.html",
  }  # fmt: skip
  assert sum(path.stat().st_size for path in files) < 1_000_000
  for path in files:
    text = path.read_text()
    assert not re.search(r"(^|[\s\"'=(])/(home|tmp|root|usr|work|var|opt|Users)\b", text), path
  for line in (EXAMPLE / "logbook.jsonl").read_text().splitlines():
    assert json.loads(line)["detail"].get("host") in (None, "host-1")


def test_the_page_is_whole():
  text = (EXAMPLE / "logbook.html").read_text()
  assert text.startswith("<!doctype html>") and text.endswith("</html>\n")
  assert set(re.findall(r"https?://[^'\"\s<]+", text)) == {"http://www.w3.org/2000/svg"}
  assert "Finished at step 320" in text and 'class="leap"' in text
  assert "<b>MILESTONE</b>" in text and "<b>PERF</b>" not in text and "<b>ENERGY</b>" not in text
