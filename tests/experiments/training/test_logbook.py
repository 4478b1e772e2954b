"""The logbook itself: what it takes, what outlives crashes and full disks, what shows edits."""

import datetime
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.training import environment as env
from experiments.training.goodput import Clock
from experiments.training.logbook import KINDS, Logbook, read_chain, read_logbook

ROOT = Path(__file__).parents[3]
SOFTWARE = {
  "versions": {"python": "3.11.9", "jax": "0.10.2", "numpy": "2.1.0"},
  "env_lock_sha256": "0" * 64,
  "git_commit": "0123456789abcdef",
  "git_dirty": False,
}


def launch(book, software=SOFTWARE, restore=None, **more):
  return book.launch(
    software, config="debug", config_sha256="c" * 64, config_diff=[], mesh={"data": 8},
    hosts=[{"id": "here", "devices": 8, "health": "ok"}], restore=restore, seed=0,
    device_kind="cpu", devices=8, steps=100, tokens_per_step=4096, flops_per_token=1e6, **more,
  )  # fmt: skip


def note(book, text, **more):
  return book.event("note", text, text=text, tags=[], **more)


def write(folder, *texts, source="trainer"):
  book = Logbook(folder, source)
  for text in texts:
    note(book, text)
  book.close()


def lines(folder, name="logbook.jsonl"):
  return (folder / name).read_text().splitlines()


def test_an_event_as_the_schema_has_it(tmp_path):
  book = Logbook(tmp_path, owner="ada")
  launch(book)
  cause = book.event("anomaly", "loss 2.20->5.10", step=37_000, tokens=9, severity="warn", cls="E",
                     signal="loss", value=5.1, baseline=2.2, deviations=7, own="kept")  # fmt: skip
  book.event("action", "100 back", step=36_900, policy="rewind_skip", from_step=37_000,
             to_step=36_900, skipped=[36_990, 37_190], cause=cause, outcome="pending",
             refs=[cause])  # fmt: skip
  book.close()
  first, second, third = map(json.loads, lines(tmp_path))
  assert list(second)[:18] == [
    "schema", "id", "time", "run", "lineage", "attempt", "parent", "step", "tokens", "source",
    "owner", "kind", "class", "severity", "summary", "detail", "refs", "prev",
  ]  # fmt: skip
  assert second["schema"] == 1 and second["run"] == "1.1" and second["parent"] is None
  assert (second["step"], second["tokens"], second["class"]) == (37_000, 9, "E")
  assert second["source"] == "trainer" and second["owner"] == "ada"
  assert second["detail"] == {
    "signal": "loss", "value": 5.1, "baseline": 2.2, "deviations": 7, "window": None,
    "first_bad": None, "batch_ids": None, "own": "kept",
  }  # fmt: skip
  assert third["detail"]["cause"] == cause == second["id"] and third["refs"] == [cause]
  assert first["id"] < second["id"] < third["id"]
  assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", second["time"])
  age = time.time() - datetime.datetime.fromisoformat(second["time"]).timestamp()
  assert 0 <= age < 60
  texts = lines(tmp_path)
  assert first["prev"] == ""
  assert second["prev"] == hashlib.sha256(texts[0].encode()).hexdigest()
  assert third["prev"] == hashlib.sha256(texts[1].encode()).hexdigest()


def test_attempts_and_lineages_are_counted(tmp_path):
  parents = []
  for new in (False, False, True, False):
    book = Logbook(tmp_path, new_lineage=new)
    launch(book, restore={"step": 3, "manifest_sha256": "", "verified": True})
    note(book, "at work")
    parents.append((book.run, book.parent))
    book.close()
  assert parents == [("1.1", None), ("1.2", "1.1"), ("2.1", "1.2"), ("2.2", "2.1")]
  rows = [json.loads(line) for line in lines(tmp_path)]
  assert [row["run"] for row in rows if row["kind"] == "note"] == ["1.1", "1.2", "2.1", "2.2"]
  # An attempt that found nothing to restore continues nothing.
  book = Logbook(tmp_path)
  launch(book)
  assert json.loads(lines(tmp_path)[-1])["parent"] is None
  # The supervisor speaks of the newest attempt, one that began after it, too.
  outside = Logbook(tmp_path, "supervisor")
  note(outside, "looking")
  book.close()
  book = Logbook(tmp_path)
  note(book, "again")
  note(outside, "still looking")
  assert [json.loads(x)["run"] for x in lines(tmp_path, "logbook.supervisor.jsonl")] == [
    "2.3", "2.4",
  ]  # fmt: skip
  outside.close()
  book.close()


def test_a_crash_before_the_launch_event_counts_too(tmp_path):
  book = Logbook(tmp_path)
  note(book, "died early")
  book.close()
  assert Logbook(tmp_path).run == "1.2"


@pytest.mark.parametrize(
  ("kind", "detail", "words"),
  (
    ("party", {}, "event.kind is 'party', none of launch, effective_config"),
    ("note", {"text": "x"}, "note.tags is None, not list"),
    ("note", {"text": 3, "tags": []}, "note.text is 3, not str"),
    ("checkpoint", {"step": 3, "status": "done"}, "checkpoint.status is 'done', none of started"),
    ("health", {"host": "a", "test": "b", "pass": 1}, "health.pass is 1, not bool"),
    ("stop", {"reason": "finished", "exit_code": True}, "stop.exit_code is True, not int"),
  ),
)
def test_what_an_event_must_not_be(tmp_path, kind, detail, words):
  book = Logbook(tmp_path)
  with pytest.raises(ValueError, match=re.escape(words)):
    book.event(kind, "x", **detail)
  with pytest.raises(ValueError, match=r"event.severity is 'loud'"):
    note(book, "x", severity="loud")
  with pytest.raises(ValueError, match=r"event.class is 'Z', none of A"):
    note(book, "x", cls="Z")
  assert lines(tmp_path) == []
  book.close()


def test_an_unknown_kind_in_the_file_is_an_error(tmp_path):
  write(tmp_path, "one", "two")
  path = tmp_path / "logbook.jsonl"
  last = json.loads(lines(tmp_path)[-1])
  path.write_text(lines(tmp_path)[0] + "\n" + json.dumps(last | {"kind": "party"}) + "\n")
  book = read_logbook(tmp_path)
  assert [e["summary"] for e in book.events] == ["one"]
  (problem,) = book.problems
  assert problem.startswith("logbook.jsonl line 2: event.kind is 'party'")


def test_every_kind_of_the_reference_is_there():
  reference = "launch effective_config checkpoint anomaly action fault health eval perf env_change"
  assert set(KINDS) == {
    *reference.split(), "energy", "note", "postmortem", "stop", "milestone",
  }  # fmt: skip


def test_a_truncated_last_line_is_tolerated(tmp_path):
  write(tmp_path, "one", "two", "three")
  path = tmp_path / "logbook.jsonl"
  path.write_bytes(path.read_bytes()[:-20])
  book = read_logbook(tmp_path)
  assert [e["summary"] for e in book.events] == ["one", "two"] and book.problems == []
  write(tmp_path, "four")  # the crashed attempt's next
  book = read_logbook(tmp_path)
  assert [(e["summary"], e["run"]) for e in book.events] == [
    ("one", "1.1"), ("two", "1.1"), ("four", "1.2"),
  ]  # fmt: skip
  assert book.problems == []


def test_an_edited_line_is_reported(tmp_path):
  write(tmp_path, "one", "two", "three", "four")
  path = tmp_path / "logbook.jsonl"
  path.write_text(path.read_text().replace('"two"', '"2"'))
  book = read_logbook(tmp_path)
  assert book.problems == [
    "logbook.jsonl: line 2 is not as it was written (the hash in line 3 is of another)"
  ]
  assert [e["summary"] for e in book.events] == ["one", "2", "three", "four"]


def test_lines_that_are_gone_or_damaged_are_reported(tmp_path):
  write(tmp_path, "one", "two", "three", "four")
  whole = lines(tmp_path)
  path = tmp_path / "logbook.jsonl"
  path.write_text("\n".join(whole[2:]) + "\n")
  assert "lines before it are gone" in read_logbook(tmp_path).problems[0]
  path.write_text("\n".join([whole[0], "noise", *whole[2:]]) + "\n")
  book = read_logbook(tmp_path)
  assert "logbook.jsonl line 2: it is not JSON" in book.problems
  assert [e["summary"] for e in book.events] == ["one", "three", "four"]
  write(tmp_path, "five")  # and a run goes on all the same
  assert read_logbook(tmp_path).events[-1]["run"] == "1.2"


@given(st.lists(st.text(max_size=12), min_size=2, max_size=6), st.data())
def test_the_chain_shows_every_edit(tmp_path_factory, texts, data):
  """Any byte of any line but the last changed to another, any such line left out or doubled, any
  two swapped: a problem is reported, and none before."""
  folder = tmp_path_factory.mktemp("chain")
  write(folder, *texts)
  path = folder / "logbook.jsonl"
  found = read_chain(path)
  assert found.problems == [] and [e["detail"]["text"] for e in found.events] == texts
  rows = path.read_bytes().splitlines()
  i = data.draw(st.integers(0, len(rows) - 2))
  match data.draw(st.sampled_from(["byte", "drop", "double", "swap"])):
    case "byte":
      at = data.draw(st.integers(0, len(rows[i]) - 1))
      other = data.draw(st.integers(32, 126).filter(lambda byte: byte != rows[i][at]))
      rows[i] = rows[i][:at] + bytes([other]) + rows[i][at + 1 :]
    case "drop":
      del rows[i]
    case "double":
      rows.insert(i, rows[i])
    case "swap":
      rows[i], rows[i + 1] = rows[i + 1], rows[i]
  path.write_bytes(b"\n".join(rows) + b"\n")
  assert read_chain(path).problems


def test_two_sources_are_merged_by_time(tmp_path):
  trainer, supervisor = Logbook(tmp_path), Logbook(tmp_path, "supervisor")
  order = [trainer, supervisor, supervisor, trainer, supervisor]
  for number, book in enumerate(order):
    note(book, str(number))
    time.sleep(0.002)
  human = Logbook(tmp_path, "human", owner="bo")
  note(human, "5")
  for book in (trainer, supervisor, human):
    book.close()
  book = read_logbook(tmp_path)
  assert [e["summary"] for e in book.events] == list("012345") and book.problems == []
  assert [e["source"] for e in book.events] == [
    "trainer", "supervisor", "supervisor", "trainer", "supervisor", "human",
  ]  # fmt: skip
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "logbook.jsonl", "logbook.notes.jsonl", "logbook.supervisor.jsonl",
  ]  # fmt: skip


def test_a_clock_that_was_set_back(tmp_path, monkeypatch):
  """Events of one file keep their order."""
  write(tmp_path, "one")
  earlier = time.time_ns() - 10**12
  monkeypatch.setattr(time, "time_ns", lambda: earlier)
  write(tmp_path, "two", "three")
  assert [e["summary"] for e in read_logbook(tmp_path).events] == ["one", "two", "three"]


def test_a_changed_dependency_is_an_event(tmp_path):
  book = Logbook(tmp_path)
  assert launch(book) == []
  book.close()
  newer = SOFTWARE | {
    "versions": {"python": "3.11.9", "jax": "0.10.3", "optax": "0.3"},
    "git_dirty": True,
  }
  book = Logbook(tmp_path)
  said = launch(book, newer, restore={"step": 9})
  book.close()
  assert said == [
    "code 0123456789ab -> 0123456789ab with changes", "jax 0.10.2 -> 0.10.3",
    "numpy 2.1.0 -> absent", "optax absent -> 0.3",
  ]  # fmt: skip
  rows = [json.loads(line) for line in lines(tmp_path)]
  changes = [row for row in rows if row["kind"] == "env_change"]
  assert changes[1]["detail"] == {
    "package": "jax", "old": "0.10.2", "new": "0.10.3", "intended": False,
  }  # fmt: skip
  assert {row["class"] for row in changes} == {"H"} and len(changes) == 4
  assert {tuple(row["refs"]) for row in changes} == {(rows[1]["id"],)}


def test_the_environment_of_this_process():
  found = env.environment()
  assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
  assert {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"} <= found["versions"].keys()
  lock = "".join(f"{name}=={version}\n" for name, version in sorted(found["versions"].items()))
  assert found["env_lock_sha256"] == hashlib.sha256(lock.encode()).hexdigest()
  git = lambda *args: subprocess.run(
    ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False
  )
  if git("rev-parse", "HEAD").returncode == 0:
    assert found["git_commit"] == git("rev-parse", "HEAD").stdout.strip()
  assert env.env_changes(found, found) == []


def test_code_outside_a_repository_has_no_commit(tmp_path, monkeypatch):
  """Nor has a copy that lies in somebody else's."""
  subprocess.run(["git", "init", "-q", tmp_path], check=True)
  monkeypatch.setattr(env, "_HERE", tmp_path / "environment.py")
  assert env.environment()["git_commit"] is None
  monkeypatch.setenv("PATH", "")
  assert env.environment()["git_dirty"] is None


def test_a_full_disk_delays_events_and_keeps_the_chain(tmp_path):
  book = Logbook(tmp_path)
  note(book, "one")
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(
    resource.RLIMIT_FSIZE, ((tmp_path / "logbook.jsonl").stat().st_size + 99, hard)
  )
  try:
    note(book, "two")
    note(book, "three")
    assert book.pending == 2
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  note(book, "four")
  assert book.pending == 0
  book.close()
  found = read_logbook(tmp_path)
  assert [e["summary"] for e in found.events] == ["one", "two", "three", "four"]
  assert found.problems == []


def test_killed_between_events(tmp_path):
  """At any moment, twenty times over: attempts count up, and the chain is whole."""
  script = """
import os, signal, sys, time
from pathlib import Path
from experiments.training.logbook import Logbook
file = Path(sys.argv[1]) / "logbook.jsonl"
size = lambda: file.stat().st_size if file.exists() else 0
for attempt in range(1, 21):
  before = size()
  child = os.fork()
  if not child:
    book = Logbook(Path(sys.argv[1]))
    assert book.run == f"1.{attempt}", book.run
    for n in range(10**6):
      book.event("note", str(n), text="x" * (n % 5000), tags=[])
  while size() < before + 1000:  # the first event at least
    time.sleep(0.001)
  time.sleep(0.0037 * attempt)
  os.kill(child, signal.SIGKILL)
  assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""
  command = [sys.executable, "-c", script, str(tmp_path)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  found = read_logbook(tmp_path)
  assert found.problems == []
  for attempt in range(1, 21):
    numbers = [int(e["summary"]) for e in found.events if e["attempt"] == attempt]
    assert numbers == list(range(len(numbers))) and numbers


def test_an_event_is_cheap(tmp_path, monkeypatch):
  """But for the disk, which is waited for."""
  monkeypatch.setattr(os, "fsync", lambda file: None)
  book = Logbook(tmp_path, clock=Clock())
  took = []
  for _ in range(200):
    began = time.perf_counter()
    note(book, "x")
    took.append(time.perf_counter() - began)
  book.close()
  assert sorted(took)[100] < 1e-3
  assert sum(json.loads(lines(tmp_path)[-1])["clock"].values()) > 0


def test_what_a_lineage_has_reached_is_known_to_its_next_attempt(tmp_path):
  """Another lineage is another run; a damaged line tells nothing."""
  book = Logbook(tmp_path)
  book.event("milestone", "a million tokens", step=3, what="a million tokens")
  note(book, "at work")
  book.event("eval", "held out: 2 nats", step=3, suite="heldout", metrics={"heldout_loss": 2.0})
  book.close()
  path = tmp_path / "logbook.jsonl"
  path.write_text(path.read_text() + lines(tmp_path)[0].replace('"what"', '"who"') + "\n")
  assert [e["kind"] for e in Logbook(tmp_path).earlier] == ["milestone", "eval"]
  assert Logbook(tmp_path, new_lineage=True).earlier == []
  assert Logbook(tmp_path, "human").earlier == []
