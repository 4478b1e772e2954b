"""What a person would write down of a run that goes well: each once, whatever is done again.

- Tokens: a million, and every tenfold.
- A quarter, a half and three quarters of the steps, with the best held-out loss so far. A run that
  is made longer has new quarters; those that lie behind it are not told late.
- The first time that all of the data was read.
- The first day, week and month in which the run needed no restart.

Pure: `training.record` says when, and writes them into the logbook.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

_FIRST_TOKENS = 1_000_000
_UNITS = (("trillion", 10**12), ("billion", 10**9), ("million", 10**6))
_PARTS = ((1, "a quarter"), (2, "half"), (3, "three quarters"))
_STRETCHES = ((86_400, "a day"), (7 * 86_400, "a week"), (30 * 86_400, "30 days"))


class Milestone(NamedTuple):
  what: str  # the same words for the same milestone, in every attempt
  step: int  # the first by whose end it was reached
  more: str = ""  # to be said with it


class Milestones:
  """Of one attempt.

  Args:
    start: steps that were finished before; what lies before them is not told.
    total: steps of the run.
    batch_rows: rows a step.
    row_tokens: tokens a row.
    data_rows: rows of the training data.
    position: rows of the data that were read before.
    earlier: events of the same lineage, `milestone` and `eval`; others are passed over.
  """

  def __init__(
    self, start: int, total: int, *, batch_rows: int, row_tokens: int, data_rows: int,
    position: int, earlier: Iterable[dict[str, Any]] = (),
  ):  # fmt: skip
    self._step, self._total, self._batch_rows = start, total, batch_rows
    self._tokens, self._data_rows = batch_rows * row_tokens, data_rows
    self._position, self._age = position, 0.0
    self._told, self._losses = set(), {}
    for event in earlier:
      if event["kind"] == "milestone":
        self._told.add(event["detail"]["what"])
      elif event["kind"] == "eval" and event["step"] is not None and event["step"] <= start:
        loss = event["detail"]["metrics"].get("heldout_loss")
        self.heldout(event["step"], loss, event["summary"])

  def heldout(self, step: int, loss: float | None, words: str) -> None:
    """A held-out loss was measured, and put into words."""
    if loss is not None and math.isfinite(loss):
      self._losses[step] = loss, words  # one that is measured again, after a rewind, is another

  def rewound(self, step: int) -> None:
    """The run goes on after an earlier step."""
    self._step = step
    self._losses = {at: found for at, found in self._losses.items() if at <= step}

  def reached(self, step: int, position: int, age: float) -> list[Milestone]:
    """What was reached since the last call, and was never told.

    Args:
      step: the last that is finished.
      position: rows of the data read so far.
      age: seconds that this attempt has run.
    """
    found = [*self._by_tokens(step), *self._by_steps(step)]
    if self._position < self._data_rows <= position:
      before = (position - self._data_rows) // self._batch_rows
      found.append(Milestone("all of the data was read once", max(self._step + 1, step - before)))
    found += [
      Milestone(f"{words} without a restart", step)
      for seconds, words in _STRETCHES
      if self._age < seconds <= age
    ]
    self._step, self._position, self._age = step, position, age
    new = sorted((m for m in found if m.what not in self._told), key=lambda m: m.step)
    self._told.update(m.what for m in new)
    return new

  def _by_tokens(self, step: int) -> list[Milestone]:
    found, tokens = [], _FIRST_TOKENS
    while tokens <= step * self._tokens:
      at = -(-tokens // self._tokens)
      if at > self._step:
        name, size = next((unit for unit in _UNITS if tokens >= unit[1]), _UNITS[-1])
        found.append(Milestone(f"{tokens // size:,} {name} tokens", at))
      tokens *= 10
    return found

  def _by_steps(self, step: int) -> list[Milestone]:
    if self._total < 4:
      return []
    places = ((-(-self._total * part // 4), words) for part, words in _PARTS)
    return [
      Milestone(f"{words} of {self._total:,} steps", at, self._best())
      for at, words in places
      if self._step < at <= min(step, self._total - 1)
    ]

  def _best(self) -> str:
    if not self._losses:
      return ""
    step, (_, words) = min(self._losses.items(), key=lambda item: item[1][0])
    return f"best so far {words}, at step {step:,}"
