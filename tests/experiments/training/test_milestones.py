"""Milestones: each told once, at the step that was counted by hand, whatever is done again."""

import pytest

from experiments.training.logbook import read_logbook
from experiments.training.milestones import Milestones
from tests.experiments.programs import QUICK, call

DAY = 86_400
# A step is 10 rows of 50 tokens. A million tokens are 2,000 steps; the data of 250,005 rows was
# read in the 25,001st.
SIZES = {"batch_rows": 10, "row_tokens": 50, "data_rows": 250_005}
TOTAL = 40_000


def milestones(start=0, total=TOTAL, earlier=()):
  return Milestones(start, total, position=10 * start, earlier=earlier, **SIZES)


def told(book, *steps, age=0.0):
  found = []
  for step in steps:
    found += [(m.what, m.step) for m in book.reached(step, 10 * step, age)]
  return found


def event(kind, step, **detail):
  return {"kind": kind, "step": step, "detail": detail, "summary": f"held out: words of {step}"}


ALL = [
  ("1 million tokens", 2_000), ("a quarter of 40,000 steps", 10_000),
  ("10 million tokens", 20_000), ("half of 40,000 steps", 20_000),
  ("all of the data was read once", 25_001), ("three quarters of 40,000 steps", 30_000),
]  # fmt: skip


@pytest.mark.parametrize("every", (1, 7, 1_000, 40_000))
def test_all_of_a_run_by_hand(every):
  """However seldom it is asked; the end is told by the `stop` event."""
  book = milestones()
  found = told(book, *range(every, TOTAL + 1, every), TOTAL)
  assert found == ALL


def test_nothing_is_told_again_after_a_rewind_or_a_resume():
  book = milestones()
  assert len(told(book, 21_000)) == 4
  book.rewound(9_000)
  assert told(book, 15_000, 24_000) == []
  # The next attempt begins before what the last one has told, as after a crash.
  earlier = [event("milestone", step, what=what) for what, step in ALL[:4]]
  assert told(milestones(9_000, earlier=earlier), 24_000, 26_000) == ALL[4:5]
  # One that knows of none does not tell what lies before its start.
  assert told(milestones(20_000), 24_000, 30_000) == ALL[4:]


def test_a_run_that_is_made_longer_has_new_quarters():
  """Of 60,000 steps the first quarter is behind it at step 40,000, and the half too."""
  earlier = [event("milestone", step, what=what) for what, step in ALL]
  found = told(milestones(40_000, total=60_000, earlier=earlier), 60_000)
  assert found == [("three quarters of 60,000 steps", 45_000)]


def test_long_runs_have_few():
  """PaLM: 255,000 steps, about 780 billion tokens."""
  book = Milestones(
    0, 255_000, batch_rows=1_500, row_tokens=2_048, data_rows=10**9, position=0
  )  # fmt: skip
  found = [what for step in range(100, 255_001, 100)
           for what, _, _ in book.reached(step, 1_500 * step, 0.0)]  # fmt: skip
  assert [what for what in found if "tokens" in what] == [
    "1 million tokens", "10 million tokens", "100 million tokens", "1 billion tokens",
    "10 billion tokens", "100 billion tokens",
  ]  # fmt: skip
  assert len(found) == 9


def test_a_day_without_a_restart_is_told_once():
  book, found = milestones(), []
  for hours in range(1, 24 * 8):
    found += [(what, hours) for what, _ in told(book, hours, age=3600.0 * hours)]
  assert found == [("a day without a restart", 24), ("a week without a restart", 7 * 24)]
  earlier = [event("milestone", 24, what="a day without a restart")]
  assert told(milestones(24, earlier=earlier), 25, age=2 * DAY) == []


def test_quarters_say_the_best_that_counts():
  """A loss of a branch that was taken back is none; one that is not finite neither."""
  earlier = [
    event("eval", 5_000, metrics={"heldout_loss": 3.0}),
    event("eval", 9_000, metrics={"heldout_loss": 1.0}),
    event("eval", 7_000, metrics={"heldout_loss": 2.5}),
    event("eval", 7_500, metrics={}),
  ]
  book = milestones(8_000, earlier=earlier)
  book.heldout(8_500, float("nan"), "no")
  book.heldout(12_000, 2.0, "taken back")
  book.rewound(9_500)
  book.heldout(9_800, 2.6, "worse")
  (quarter,) = book.reached(10_000, 100_000, 0.0)
  assert quarter.more == "best so far held out: words of 7000, at step 7,000"
  book.heldout(20_000, 2.25, "held out: 2.25 nats")
  *_, half = book.reached(20_000, 200_000, 0.0)
  assert half.more == "best so far held out: 2.25 nats, at step 20,000"
  assert milestones().reached(10_000, 100_000, 0.0)[-1].more == ""


def test_a_run_writes_them_and_what_it_took(tmp_path):
  """Eight steps, then sixteen: quarters of both, and at each end speed and energy before `stop`."""
  folder = tmp_path / "run"
  steps = lambda n: f"--config.train.steps={n}"
  for total in (8, 16):
    result = call("run", *QUICK, f"--workdir={folder}", steps(total), "--config.eval.every=3")
    assert result.code == 0, result.err
  book = read_logbook(folder)
  assert book.problems == []
  found = [(e["detail"]["what"], e["step"], e["tokens"]) for e in book.events
           if e["kind"] == "milestone"]  # fmt: skip
  assert found == [
    ("a quarter of 8 steps", 2, 1024), ("half of 8 steps", 4, 2048),
    ("three quarters of 8 steps", 6, 3072), ("three quarters of 16 steps", 12, 6144),
  ]  # fmt: skip
  for run, steps in (("1.1", 7), ("1.2", 7)):
    own = [e for e in book.events if e["run"] == run]
    perf, energy, stop = own[-3:]
    assert [e["kind"] for e in (perf, energy, stop)] == ["perf", "energy", "stop"]
    assert own[-3:] == [e for e in own if e["kind"] in ("perf", "energy", "stop")]
    detail = perf["detail"]
    assert detail["steps"] == steps  # the compiled one has no speed
    seconds = detail["steps"] * 512 / detail["tok_s"]
    spent = perf["clock"]["productive"] + perf["clock"]["data"]
    assert 0 < seconds <= spent
    assert detail["goodput"].keys() == perf["clock"].keys() and detail["mfu"] is None
    hours = sum(energy["clock"].values()) / 3600
    assert energy["detail"]["chip_hours"] == pytest.approx(hours, rel=0.01)  # one device
    assert energy["detail"]["kwh"] is None and "power unknown" in energy["summary"]
    assert energy["detail"]["pue"] >= 1 and energy["detail"]["scope"]
  text = (folder / "LOGBOOK.md").read_text()
  assert text.count("MILESTONE") == 4 and " PERF " not in text and " ENERGY " not in text
  assert "| speed | " in text and perf["summary"] in text


def test_prices_that_are_damaged_change_no_exit_code(tmp_path):
  folder = tmp_path / "run"
  folder.mkdir()
  (folder / "prices.toml").write_text("[pue]\nvalue = 0.5\n")
  result = call("run", *QUICK, f"--workdir={folder}", "--config.train.steps=2")
  assert result.code == 0, result.err
  assert "no energy in the logbook: " in result.out and "pue.value" in result.out
  assert read_logbook(folder).events[-1]["kind"] == "stop"
