"""The goodput ledger on runs whose every second was counted by hand."""

import datetime

import pytest

from experiments.book.ledger import TIMES, ledger
from experiments.training.goodput import BUCKETS

DAY = datetime.datetime(2026, 3, 2, 9, tzinfo=datetime.UTC).timestamp()


class Life:
  """Writes events and rows of attempts, each second of which is told."""

  def __init__(self):
    self.now, self.events, self.rows, self.attempt = 0.0, [], [], 0
    self.clock: dict[str, float] = {}

  def birth(self):
    self.attempt += 1
    self.clock = dict.fromkeys(BUCKETS, 0.0)

  def spend(self, seconds, bucket):
    self.now += seconds
    self.clock[bucket] += seconds

  def event(self, kind, step=None, source="trainer", cls=None, severity="info", **detail):
    time = datetime.datetime.fromtimestamp(DAY + self.now, datetime.UTC).isoformat()
    event = {
      "time": time, "run": f"1.{self.attempt}", "step": step, "source": source, "kind": kind,
      "class": cls, "severity": severity, "summary": f"{kind} of {source}", "detail": detail,
    }  # fmt: skip
    if source == "trainer":
      event["clock"] = dict(self.clock)
    self.events.append(event)

  def row(self, step):
    self.rows.append({"step": step, "loss": 1.0, "time": DAY + self.now, "clock": dict(self.clock)})

  def steps(self, first, last, seconds, every=10):
    for step in range(first, last + 1):
      self.spend(seconds, "productive")
      if step % every == 0 or step == first:
        self.row(step)


def killed_once():
  """50 steps of 1 s, of which 40 are saved; 3 s later it is killed, the supervisor sees it after
  another 4; 6 s nothing; then to step 60."""
  life = Life()
  life.birth()
  life.spend(5, "start")
  life.event("launch", 0, restore=None)
  life.spend(10, "compile")
  life.steps(1, 40, 1.0)
  life.spend(2, "checkpoint")
  life.event("checkpoint", 40)
  life.steps(41, 50, 1.0)
  life.now += 7
  life.event("fault", source="supervisor", cls="A", severity="error", error="killed")
  life.now += 6
  life.birth()
  life.spend(4, "start")
  life.spend(3, "restore")
  life.event("launch", 40, restore={"step": 40})
  life.spend(1, "compile")
  life.steps(41, 60, 1.0)
  life.spend(2, "checkpoint")
  life.spend(5, "evaluation")
  life.spend(0.5, "other")
  life.event("stop", 60, reason="finished", exit_code=0)
  return life


def test_a_run_that_was_killed_once():
  life = killed_once()
  found = ledger(life.events, life.rows)
  expected = {
    "start": 9, "restore": 3, "compile": 11, "productive": 60, "data": 0, "checkpoint": 4,
    "evaluation": 5, "other": 0.5, "lost": 10 + 7, "down": 6, "paused": 0,
  }  # fmt: skip
  assert found.seconds == pytest.approx(expected, abs=1e-3) and list(found.seconds) == list(TIMES)
  assert found.wall == pytest.approx(sum(expected.values()), abs=1e-3)
  assert found.lost_steps == 10
  assert found.goodput == pytest.approx(60 / 115.5, abs=1e-4)
  assert found.mtbf == pytest.approx(109.5, abs=1e-3)
  first, second = found.attempts
  assert (first.run, first.first_step, first.last_step, first.reason) == ("1.1", 0, 50, "died")
  assert (first.cls, first.cause, first.lost_steps) == ("A", "fault of supervisor", 10)
  assert (second.first_step, second.last_step, second.reason) == (40, 60, "finished")
  assert not second.failed and second.lost_steps == 0


def test_events_alone_know_less():
  """Without rows the last that is known of the first attempt is its save: all after is down."""
  life = killed_once()
  events = [e for e in life.events if e["source"] == "trainer"]
  found = ledger(events)
  assert found.lost_steps == 0
  assert found.seconds["productive"] == pytest.approx(60) and found.seconds["lost"] == 0
  assert found.seconds["down"] == pytest.approx(10 + 7 + 6)
  assert sum(found.seconds.values()) == pytest.approx(found.wall)


def test_rewinds_lose_what_they_take_back():
  """By hand: back from 35 to 20, again from 30 to 10, then to 40; a second each."""
  life = Life()
  life.birth()
  life.event("launch", 0, restore=None)
  life.steps(1, 35, 1.0)
  life.event("action", 35, policy="rewind_skip", from_step=35, to_step=20)
  life.steps(21, 30, 1.0)
  life.event("action", 30, policy="rewind", from_step=30, to_step=10)
  life.steps(11, 40, 1.0)
  life.event("stop", 40, reason="finished", exit_code=0)
  found = ledger(life.events, life.rows)
  assert found.seconds["productive"] == pytest.approx(40, abs=1e-3)
  assert found.seconds["lost"] == pytest.approx(15 + 20, abs=1e-3)
  assert found.lost_steps == 35 and found.wall == pytest.approx(75)
  assert found.mtbf is None and found.goodput == pytest.approx(40 / 75)


def test_a_restart_loses_steps_of_the_attempt_before_last_too():
  """Three attempts: 1..30, saved at 20; 21..28 not saved; from 20 again; slow, then quick."""
  life = Life()
  for first, last, seconds in ((0, 30, 1.0), (20, 28, 2.0), (20, 50, 0.5)):
    life.birth()
    life.event("launch", first, restore={"step": first} if first else None)
    life.steps(first + 1, last, seconds, every=1)
    life.now += 1
  found = ledger(life.events, life.rows)
  assert found.seconds["productive"] == pytest.approx(20 + 15, abs=1e-3)
  assert found.seconds["lost"] == pytest.approx(10 + 16, abs=1e-3)
  assert found.seconds["down"] == pytest.approx(2, abs=1e-3)
  assert [a.lost_steps for a in found.attempts] == [10, 8, 0]
  assert [a.reason for a in found.attempts] == ["died", "died", "open"]


def test_a_save_that_ends_later_takes_no_step_back():
  life = Life()
  life.birth()
  life.event("launch", 0, restore=None)
  life.steps(1, 14, 1.0)
  life.event("checkpoint", 10, status="finished")
  life.steps(15, 20, 1.0)
  found = ledger(life.events, life.rows)
  assert found.lost_steps == 0 and found.seconds["productive"] == pytest.approx(20)


def test_time_after_a_finished_run_is_no_loss():
  life = Life()
  life.birth()
  life.event("launch", 0, restore=None)
  life.steps(1, 10, 1.0)
  life.event("stop", 10, reason="finished", exit_code=0)
  life.now += 86_400
  life.birth()
  life.event("launch", 10, restore={"step": 10})
  life.steps(11, 20, 1.0)
  life.event("stop", 20, reason="preempted", exit_code=75)
  found = ledger(life.events, life.rows)
  assert found.seconds["paused"] == pytest.approx(86_400) and found.seconds["down"] == 0
  assert found.goodput == pytest.approx(1) and [a.failed for a in found.attempts] == [False, True]


def test_a_clock_that_was_set_is_seen():
  """Somebody set the time an hour ahead while it ran."""
  life = Life()
  life.birth()
  life.event("launch", 0, restore=None)
  life.steps(1, 10, 1.0)
  life.now += 3600
  life.event("stop", 10, reason="finished", exit_code=0)
  assert ledger(life.events, life.rows).unexplained == pytest.approx(3600, abs=1e-3)


def test_a_book_without_clocks():
  assert ledger([]) is None
