"""Where the time of a run went, over all its attempts: the goodput ledger.

Every event and every row of metrics carries its process's clock (`training.goodput`). An attempt
ran from its process's birth to its last record; between attempts nothing ran. Steps that were done
anew, after a restart or a rewind, were productive only once: the first time is `lost`.
"""

import datetime
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import groupby, takewhile
from typing import Any, NamedTuple

from ..training.goodput import BUCKETS

# lost: steps that were done again, and what ran after the last record; down: no process ran;
# paused: none did, after the run had finished or a person had stopped it.
TIMES = (*BUCKETS, "lost", "down", "paused")
_PLANNED = ("finished", "human")  # ways to end that are no failure
_OPEN = "open"  # no end is on record


class Attempt(NamedTuple):
  """One process of the trainer; times in seconds since 1970."""

  run: str
  begin: float
  end: float
  first_step: int  # finished before
  last_step: int
  reason: str  # of its end: that of its `stop` event; "died"; "open" for the last without an end
  cls: str | None
  cause: str  # of its end, in words
  lost_steps: int  # of it and of those before, done again by the next
  lost_seconds: float

  @property
  def failed(self) -> bool:
    return self.reason not in (*_PLANNED, _OPEN)


class Ledger(NamedTuple):
  """Seconds by bucket of TIMES, from the first process's birth to the last record."""

  seconds: dict[str, float]
  wall: float
  attempts: list[Attempt]
  lost_steps: int  # done again, by rewinds too

  @property
  def unexplained(self) -> float:
    """What the buckets lack of the wall clock's time: clocks that were set, machines asleep."""
    return self.wall - sum(self.seconds.values())

  @property
  def running(self) -> float:
    return self.wall - self.seconds["down"] - self.seconds["paused"]

  @property
  def goodput(self) -> float:
    """Share of the time that went into steps that count; pauses are left out."""
    return self.seconds["productive"] / max(self.wall - self.seconds["paused"], 1e-9)

  @property
  def failures(self) -> list[Attempt]:
    return [attempt for attempt in self.attempts if attempt.failed]

  @property
  def mtbf(self) -> float | None:
    """Mean time between failures: seconds in which a process ran, by failures; None without one."""
    return self.running / len(self.failures) if self.failures else None


class _Sample(NamedTuple):
  """A clock that was read."""

  time: float
  run: str
  step: int | None
  clock: dict[str, float]
  back_to: int | None = None  # the run goes on from this step


def ledger(events: Sequence[dict[str, Any]], rows: Iterable[dict[str, Any]] = ()) -> Ledger | None:
  """Of a logbook's events by time; None if no event of the trainer has a clock.

  Args:
    rows: of metrics, those that were taken back too; they say more closely than events when steps
      were done and when a process died.
  """
  samples = [_sample(e) for e in events if e["source"] == "trainer" and "clock" in e]
  if not samples:
    return None
  begins: dict[str, float] = {}
  for sample in samples:
    begins.setdefault(sample.run, sample.time - sum(sample.clock.values()))
  runs, starts = list(begins), list(begins.values())
  for row in rows:
    if "clock" in row and row["time"] >= starts[0]:
      run = runs[bisect_right(starts, row["time"]) - 1]
      samples.append(_Sample(row["time"], run, row["step"], row["clock"]))
  samples.sort(key=lambda sample: (begins[sample.run], sample.time))
  by_run = {run: list(own) for run, own in groupby(samples, key=lambda sample: sample.run)}
  work = _Work()
  seconds = dict.fromkeys(TIMES, 0.0)
  attempts: list[Attempt] = []
  for i, run in enumerate(runs):
    own = by_run[run]
    said = [e for e in events if e["run"] == run and e["source"] != "human"]
    if attempts:
      attempts[-1] = _close(attempts[-1], work, own[0].back_to)
      gap = "paused" if attempts[-1].reason in _PLANNED else "down"
      seconds[gap] += max(0.0, begins[run] - attempts[-1].end)
    first = work.step
    work.attempt()
    for sample in own:
      work.add(sample)
    for bucket in BUCKETS:
      seconds[bucket] += own[-1].clock.get(bucket, 0.0)
    last = i == len(runs) - 1
    end = _end(own[-1].time, said, None if last else starts[i + 1])
    seconds["lost"] += end - own[-1].time
    attempts.append(_attempt(run, begins[run], end, first, work.step, said, last=last))
  lost = work.lost_seconds + work.loose
  seconds["productive"] -= lost
  seconds["lost"] += lost
  return Ledger(seconds, attempts[-1].end - attempts[0].begin, attempts, work.lost_steps)


def when(event: dict[str, Any]) -> float:
  """Seconds since 1970."""
  return datetime.datetime.fromisoformat(event["time"]).timestamp()


def _sample(event: dict[str, Any]) -> _Sample:
  detail, back_to, step = event["detail"], None, event["step"]
  if event["kind"] == "launch":
    back_to = (detail["restore"] or {}).get("step", 0)
  elif event["kind"] == "action" and detail["policy"] in ("rewind", "rewind_skip"):
    back_to, step = detail["to_step"], detail["from_step"]
  return _Sample(when(event), event["run"], step, event["clock"], back_to)


class _Work:
  """Stretches of steps that count, each with the productive seconds it took."""

  def __init__(self):
    self.step, self.loose = 0, 0.0  # productive seconds since the last sample with a new step
    self.lost_steps, self.lost_seconds = 0, 0.0
    self._kept: list[tuple[int, int, float]] = []
    self._clock = 0.0

  def attempt(self) -> None:
    self._clock = 0.0

  def add(self, sample: _Sample) -> None:
    productive = sample.clock.get("productive", 0.0)
    self.loose += productive - self._clock
    self._clock = productive
    if sample.step is not None and sample.step > self.step:
      self._kept.append((self.step, sample.step, self.loose))
      self.step, self.loose = sample.step, 0.0
    if sample.back_to is not None:
      self.back(sample.back_to)

  def back(self, step: int) -> None:
    """What was done after `step` is done again."""
    self.lost_seconds += self.loose
    self.loose = 0.0
    while self._kept and self._kept[-1][1] > step:
      begin, end, seconds = self._kept.pop()
      kept = seconds * (step - begin) / (end - begin) if begin < step else 0.0
      if begin < step:
        self._kept.append((begin, step, kept))
      self.lost_seconds += seconds - kept
      self.lost_steps += end - max(begin, step)
    self.step = step


def _close(attempt: Attempt, work: _Work, back_to: int | None) -> Attempt:
  """An attempt after which another began, at `back_to`."""
  steps, seconds = work.lost_steps, work.lost_seconds
  work.back(work.step if back_to is None else min(back_to, work.step))
  reason = "died" if attempt.reason == _OPEN else attempt.reason
  return attempt._replace(
    reason=reason, lost_steps=work.lost_steps - steps, lost_seconds=work.lost_seconds - seconds
  )


def _end(last: float, said: Sequence[dict[str, Any]], following: float | None) -> float:
  """When a process was gone: at its last record, or when the supervisor says."""
  seen = [when(e) for e in said if e["source"] == "supervisor" and e["kind"] in ("stop", "fault")]
  return max([last, *(t for t in seen if following is None or t <= following)])


def _attempt(
  run: str, begin: float, end: float, first: int, last_step: int, said: Sequence[dict[str, Any]],
  *, last: bool,
) -> Attempt:  # fmt: skip
  """An attempt as its own and the supervisor's events have it."""
  stops = [e for e in said if e["kind"] == "stop"]
  stop = next((e for e in stops if e["source"] == "trainer"), stops[0] if stops else None)
  last_words = list(takewhile(_is_about_an_end, (e for e in reversed(said) if not _is_beside(e))))
  # What the trainer met before it died without a word need not be what killed it.
  own = any(e["source"] == "trainer" and e["kind"] != "fault" for e in last_words)
  words = [e for e in last_words if own or e["source"] == "supervisor"]
  faults = [e for e in words if e["kind"] == "fault"]
  open_or_died = "died" if faults and not last else _OPEN
  reason = open_or_died if stop is None else stop["detail"]["reason"]
  cls = next((e["class"] for e in words if e["class"]), None)
  cause = next((e["summary"] for e in ([stop] if stop else []) + words), "")
  return Attempt(run, begin, end, first, last_step, reason, cls, cause, 0, 0.0)


def _is_beside(event: dict[str, Any]) -> bool:
  """Stands among the words about an end, but says nothing about it."""
  again = event["kind"] == "action" and event["detail"]["policy"] == "restart"
  return again or event["kind"] in ("perf", "energy")


def _is_about_an_end(event: dict[str, Any]) -> bool:
  if event["kind"] == "action":
    return event["detail"]["policy"] == "stop"
  return event["kind"] in ("stop", "fault")
