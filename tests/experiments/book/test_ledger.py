"""The goodput ledger on runs whose every second was counted by hand."""

import pytest

from experiments.book.ledger import TIMES, ledger
from tests.experiments.book.life import Life


def killed_once():
  """50 steps of 1 s, of which 40 are saved; 3 s later it is killed, the supervisor sees it after
  another 4; 6 s nothing; then to step 60."""
  life = Life()
  life.birth()
  life.spend(5, "start")
  life.launch()
  life.spend(10, "compile")
  life.steps(1, 40, 1.0)
  life.spend(2, "checkpoint")
  life.event("checkpoint", 40)
  life.steps(41, 50, 1.0)
  life.now += 7
  life.event("fault", source="supervisor", cls="A", severity="error", error="killed")
  life.now += 2
  life.event("note", source="human", text="saw it", tags=[])
  life.now += 4
  life.birth()
  life.spend(4, "start")
  life.spend(3, "restore")
  life.launch(40)
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
  life.launch()
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
    life.launch(first)
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
  life.launch()
  life.steps(1, 14, 1.0)
  life.event("checkpoint", 10, status="finished")
  life.steps(15, 20, 1.0)
  found = ledger(life.events, life.rows)
  assert found.lost_steps == 0 and found.seconds["productive"] == pytest.approx(20)


def endings(*events):
  """(reason, class, cause) of an attempt with these last events, after which another began."""
  life = Life()
  life.birth()
  life.launch()
  life.steps(1, 10, 1.0)
  for kind, more in events:
    life.event(kind, 10, **more)
  life.birth()
  life.launch()
  first = ledger(life.events, life.rows).attempts[0]
  return first.reason, first.cls, first.cause


def test_what_an_attempt_ended_by():
  row = ("fault", {"cls": "I", "severity": "error", "summary": "row 7 is damaged"})
  drift = ("fault", {"cls": "A", "severity": "error", "summary": "device 3 adds wrongly"})
  halt = ("action", {"cls": "E", "summary": "stopped", "policy": "stop"})
  stop = ("stop", {"reason": "policy", "exit_code": 77, "summary": "the guard stopped it"})
  slower = ("action", {"cls": "F", "summary": "slower", "policy": "none"})
  killed = ("fault", {"source": "supervisor", "cls": "B", "summary": "no step for 300 s"})
  crash = ("stop", {"reason": "crash", "exit_code": 1, "summary": "ValueError"})
  gone = {"source": "supervisor", "reason": "crash", "exit_code": -9, "summary": "killed"}
  assert endings() == ("died", None, "")
  assert endings(row) == ("died", None, "")  # hours before, perhaps
  assert endings(row, killed) == ("died", "B", "no step for 300 s")
  assert endings(drift, halt, stop) == ("policy", "E", "the guard stopped it")
  assert endings(drift, crash) == ("crash", "A", "ValueError")
  assert endings(slower, crash) == ("crash", None, "ValueError")
  assert endings(slower, ("stop", gone)) == ("crash", None, "killed")
  assert endings(crash, ("stop", gone)) == ("crash", None, "ValueError")


def test_time_after_a_finished_run_is_no_loss():
  life = Life()
  life.birth()
  life.launch()
  life.steps(1, 10, 1.0)
  life.event("stop", 10, reason="finished", exit_code=0)
  life.now += 86_400
  life.birth()
  life.launch(10)
  life.steps(11, 20, 1.0)
  life.event("stop", 20, reason="preempted", exit_code=75)
  found = ledger(life.events, life.rows)
  assert found.seconds["paused"] == pytest.approx(86_400) and found.seconds["down"] == 0
  assert found.goodput == pytest.approx(1) and [a.failed for a in found.attempts] == [False, True]


def test_a_clock_that_was_set_is_seen():
  """Somebody set the time an hour ahead while it ran."""
  life = Life()
  life.birth()
  life.launch()
  life.steps(1, 10, 1.0)
  life.now += 3600
  life.event("stop", 10, reason="finished", exit_code=0)
  assert ledger(life.events, life.rows).unexplained == pytest.approx(3600, abs=1e-3)


def test_a_book_without_clocks():
  assert ledger([]) is None


def test_the_figures_of_an_end_do_not_hide_its_reason():
  """Speed and energy stand between what the guard said and `stop`, the next start behind it."""
  life = Life()
  life.birth()
  life.launch()
  life.steps(1, 20, 1.0)
  life.event("action", 20, cls="E", policy="stop", outcome="abandoned", summary="the loss rises")
  life.event("perf", 20, steps=20, convention="PaLM", goodput={})
  life.event("energy", 20, chip_hours=1.0, pue=1.1, kg_per_kwh=0.4, scope="the grid")
  life.event("stop", 20, reason="policy", exit_code=77, summary="the guard stopped the run")
  life.event("stop", 20, source="supervisor", reason="policy", exit_code=77)
  life.event("action", 20, source="supervisor", policy="restart", outcome="pending")
  (attempt,) = ledger(life.events, life.rows).attempts
  assert (attempt.cls, attempt.cause) == ("E", "the guard stopped the run")
