"""The guard: looks at the numbers of every step and says continue, skip, rewind or stop.

Each signal is compared with its own recent past. Its level is the median of the last 16 values that
were normal; its spread the median absolute deviation, over a window, of such values from the levels
before them. So a trend is no anomaly, and a floor keeps a quiet window from making one of noise.
All but log Z are taken as logarithms: gradient norms are roughly lognormal, losses relative.

An anomaly begins `deviations` spreads above the level, for the loss also at two steps in a row
above 4, and ends after 8 steps in a row within 3. Of these steps only those within 3 enter the
window. After 60 steps without an end the new level is taken as normal, unless:

- the loss is still 5 % above, or 20 of 50 steps were skipped: rewind and leave out batches, as was
  done by hand for PaLM (arXiv 2204.02311, section 5.1); 60 because BLOOM's spike healed alone in 30.
  The second time near the same step more batches are left out; then it stops for a person.
- the loss rises slowly, for hundreds of steps: a notice, then stop. Other batches do not cure that.
- ten steps in a row are not finite: stop.

Pure: no clock, no randomness. Every process runs it on the same numbers and decides the same.
"""

import copy
import math
from collections.abc import Iterator
from statistics import median
from typing import Any, Literal, NamedTuple

from ..config import GuardConfig

_RECENT = 16  # values in a level
_HISTORY = 32  # values before anything is judged
_WARN, _LEAVE, _CALM = 4.0, 3.0, 8
_LASTING = 60  # steps of an anomaly
_SKIPS, _SKIPS_WITHIN = 20, 50
_NEIGHBOURHOOD = 1000  # steps within which another rewind is for the same trouble
_BEFORE = 10  # batches before an anomaly that may have caused it
_MAD_TO_SIGMA = 1.4826  # of a normal distribution


class _Rule(NamedTuple):
  title: str
  log: bool
  floor: float  # of the spread
  rise: float  # of the level, the least that matters


# Floors: half a percent of the loss, so 3 % for an outlier; a factor 4 for the others, since norms
# of three times the usual are ordinary. The update ratio rises with the learning rate, as it should.
_FACTOR_4 = math.log(4)
_RULES = {
  "loss": _Rule("loss", True, 0.005, 0.05),
  "grad_norm": _Rule("gradient norm", True, _FACTOR_4 / 6, _FACTOR_4),
  "update_ratio": _Rule("update/parameter ratio", True, _FACTOR_4 / 6, math.inf),
  "log_z": _Rule("log Z", False, 0.25, 5.0),
  "load_cv": _Rule("variation of expert load", True, _FACTOR_4 / 6, math.inf),
}


class Observation(NamedTuple):
  """The numbers of one finished step; each may be NaN or infinite, None is not measured."""

  step: int
  loss: float  # nats
  grad_norm: float  # before clipping
  update_ratio: float | None = None  # norm of the update over that of the parameters
  log_z: float | None = None  # mean, of the vocabulary softmax
  load_cv: float | None = None  # standard deviation of the experts' load over its mean
  skipped: bool = False  # the step left parameters and optimizer state as they were


class Anomaly(NamedTuple):
  """A value that is not as those before it, for the logbook."""

  signal: str  # a field of Observation, or nonfinite
  value: float
  baseline: float  # its level
  deviations: float  # spreads between the two; 0 with too little history
  window: int  # values the baseline and the spread rest on
  first: int  # step
  last: int  # step


class Notice(NamedTuple):
  """Something to record; nothing is to be done."""

  reason: str  # one sentence
  anomaly: Anomaly
  recovered: bool = False  # the end of what an earlier notice or decision began


class Decision(NamedTuple):
  """What to do after a step. `skip`: the step itself has skipped its update, nothing remains."""

  action: Literal["continue", "skip", "rewind", "stop"] = "continue"
  reason: str = ""  # one sentence
  anomaly: Anomaly | None = None
  back: int = 0  # rewind: steps from the anomaly's first to the checkpoint, at least
  skip_batches: int = 0  # rewind: batches to leave out after the anomaly's last
  notices: tuple[Notice, ...] = ()

  @property
  def left_out(self) -> tuple[int, int]:
    """Rewind: the first and the last step whose batch is to be left out."""
    assert self.anomaly is not None
    return max(self.anomaly.first - _BEFORE, 1), self.anomaly.last + self.skip_batches


class _Signal:
  """One stream of finite numbers: those that were normal, and the anomaly it may be in."""

  def __init__(self, name: str, settings: GuardConfig):
    self._name, self._rule, self._settings = name, _RULES[name], settings
    self.values: list[float] = []  # transformed
    self.residuals: list[float] = []  # of the values, from the level before each
    self.first: int | None = None  # step at which the present anomaly began
    self.since: list[float] = []  # all values since then
    self.high = self.calm = 0  # steps in a row
    self.lowest: tuple[float, int] | None = None  # level of half a window, step
    self.risen = 0  # 1: a slow rise was noticed; 2: one that lasts

  def state(self) -> dict[str, Any]:
    return {name: value for name, value in vars(self).items() if name[0] != "_"}

  @property
  def ready(self) -> bool:
    return len(self.values) >= _HISTORY

  @property
  def level(self) -> float:
    return median(self.values[-_RECENT:])

  @property
  def spread(self) -> float:
    middle = median(self.residuals)
    mad = median([abs(r - middle) for r in self.residuals])
    return math.hypot(_MAD_TO_SIGMA * mad, self._rule.floor)

  @property
  def threshold(self) -> float:
    return self._raw(self.level + self._settings.deviations * self.spread)

  def _raw(self, x: float) -> float:
    return math.exp(min(x, 700.0)) if self._rule.log else x

  def compare(self, step: int, value: float) -> Anomaly:
    x = self._transform(value)
    level = self.level if self.values else x
    deviations = (x - level) / self.spread if self.ready else 0.0
    first = step if self.first is None else self.first
    baseline = self._raw(level)
    return Anomaly(self._name, value, baseline, deviations, len(self.values), first, step)

  def _transform(self, value: float) -> float:
    return math.log(max(value, 1e-8)) if self._rule.log else value

  def observe(self, step: int, value: float) -> Iterator[Notice]:
    """Takes in a value; yields where an anomaly or a slow rise begins and ends."""
    found, x = self.compare(step, value), self._transform(value)
    self.high = self.high + 1 if found.deviations > _WARN else 0
    if self.first is None:
      pair = self._name == "loss" and self.high == 2
      if found.deviations > self._settings.deviations or pair:
        self.first, self.since, self.calm = step - self.high + 1, [], 0
        found = found._replace(first=self.first)
        yield Notice(_sentence(found), found)
    else:
      self.calm = self.calm + 1 if found.deviations <= _LEAVE else 0
      if self.calm == _CALM:
        self.first = None
        text = f"{self._rule.title} {value:.4g} is back where it was before step {found.first}"
        yield Notice(text, found, recovered=True)
    if self.first is not None:
      self.since.append(x)
    if self.first is None or found.deviations <= _LEAVE:
      self.residuals.append(x - self.level if self.values else 0.0)
      self.values.append(x)
      del self.values[: -self._settings.window], self.residuals[: -self._settings.window]
    yield from self._watch_rise(step)

  @property
  def lasting(self) -> bool:
    """Is the present anomaly one that does not end, and does it matter?"""
    if self.first is None or len(self.since) <= _LASTING:
      return False
    return median(self.since[-_RECENT:]) - self.level >= self._rule.rise

  def settle(self, step: int) -> Iterator[Notice]:
    """Takes the values of an anomaly that does not end as normal."""
    if self.first is None or len(self.since) <= _LASTING:
      return
    middle = median(self.since)
    found = self.compare(step, self._raw(middle))
    text = f"has stayed at {found.value:.4g} since step {self.first}, which is its level now"
    yield Notice(f"{self._rule.title} {text}", found, recovered=True)
    window = self.since[-self._settings.window :]
    self.values, self.residuals = window, [x - middle for x in window]
    self.first, self.since, self.high = None, [], 0

  def rise(self, step: int) -> tuple[Anomaly, float]:
    """The level of half a window, and how far it is above the lowest it has been."""
    level = median(self.values[-(self._settings.window // 2) :])
    if self.lowest is None or level < self.lowest[0]:
      self.lowest = level, step
    lowest, start = self.lowest
    spread = self.spread
    found = Anomaly(self._name, self._raw(level), self._raw(lowest), (level - lowest) / spread,
                    len(self.values), start, step)  # fmt: skip
    return found, (level - lowest) / max(self._rule.rise, 2 * spread)

  def _watch_rise(self, step: int) -> Iterator[Notice]:
    window = self._settings.window
    if len(self.values) < max(window // 2, _HISTORY):
      return
    found, rise = self.rise(step)
    windows = (step - found.first) / window * (4 if rise >= 6 else 1)
    stage = (rise >= 1 and windows >= 2) + (rise >= 2 and windows >= 4)
    if stage > self.risen:
      self.risen = stage
      yield Notice(_sentence(found, _RISEN), found)
    elif self.risen and rise < 0.5:
      self.risen = 0
      text = f"{self._rule.title} {found.value:.4g} is down again after its slow rise"
      yield Notice(text, found, recovered=True)


_RISEN = "has risen slowly"


def _sentence(found: Anomaly, what: str = "") -> str:
  title = _RULES[found.signal].title
  if what:
    return f"{title} {what}, from {found.baseline:.4g} at step {found.first} to {found.value:.4g}"
  steps = found.last - found.first + 1
  text = (
    f"{title} {found.value:.4g} is {found.deviations:.0f} deviations above {found.baseline:.4g}"
  )
  return f"{text} for {steps} steps" if steps > 1 else text


class Guard:
  """The policy over all signals. `observe` takes every finished step, in order.

  A rewind or a stop is said again at every further step, until `rewound` or `reset`.
  """

  def __init__(self, settings: GuardConfig):
    self._settings = settings
    self._rewinds: list[int] = []  # first steps of the anomalies that were rewound
    self._asked: int | None = None  # the one a rewind was last asked for
    self.reset()

  def reset(self) -> None:
    """Forgets all levels: for an intervention that moves them (learning rate, batch size)."""
    self._signals = {name: _Signal(name, self._settings) for name in _RULES}
    self._skips: list[int] = []  # steps
    self._nonfinite = 0  # steps in a row

  def rewound(self, state: dict[str, Any] | None = None) -> None:
    """Goes back with a rewind that was asked for, which is remembered.

    Args:
      state: what `state` returned when the checkpoint was saved; None is a fresh start.
    """
    assert self._asked is not None, "no rewind was asked for"
    rewinds = [*self._rewinds, self._asked]
    self.reset()
    if state is not None:
      self.restore(state)
    self._rewinds, self._asked = rewinds, None

  def state(self) -> dict[str, Any]:
    """For the checkpoint, as JSON."""
    return copy.deepcopy(
      {
        "signals": {name: signal.state() for name, signal in self._signals.items()},
        "skips": self._skips,
        "nonfinite": self._nonfinite,
        "rewinds": self._rewinds,
      }
    )

  def restore(self, state: dict[str, Any]) -> None:
    state = copy.deepcopy(state)
    for name, signal in state["signals"].items():
      vars(self._signals[name]).update(signal)
    self._skips, self._nonfinite = state["skips"], state["nonfinite"]
    self._rewinds = state["rewinds"]

  @property
  def limit(self) -> float:
    """The gradient norm above which a step is to skip its update."""
    norms = self._signals["grad_norm"]
    return norms.threshold if self._settings.mode == "act" and norms.ready else math.inf

  def observe(self, o: Observation) -> Decision:
    if self._settings.mode == "off":
      return Decision()
    notices: list[Notice] = []
    decision = self._judge(o, notices)
    if self._settings.mode == "observe" and decision.action in ("rewind", "stop"):
      assert decision.anomaly is not None
      notices.append(Notice(f"would {decision.action}: {decision.reason}", decision.anomaly))
      self.reset()  # and says it once
      decision = Decision()
    return decision._replace(notices=tuple(notices))

  def _judge(self, o: Observation, notices: list[Notice]) -> Decision:
    norm = self._signals["grad_norm"].compare(o.step, o.grad_norm)
    bad = [name for name in ("grad_norm", "loss") if not math.isfinite(getattr(o, name))]
    self._nonfinite = self._nonfinite + 1 if bad else 0
    for name, signal in self._signals.items():
      value = getattr(o, name)
      if not bad and value is not None and math.isfinite(value):
        notices += signal.observe(o.step, value)
    if bad or o.skipped or norm.deviations > self._settings.deviations:
      self._skips.append(o.step)
    self._skips = [step for step in self._skips if step > o.step - _SKIPS_WITHIN]
    if not bad:
      return self._decide(o, norm, notices)
    found = norm._replace(
      signal=bad[0], value=getattr(o, bad[0]), deviations=math.inf,
      first=o.step - self._nonfinite + 1,
    )  # fmt: skip
    text = f"{_RULES[bad[0]].title} is not finite"
    if self._nonfinite >= self._settings.nonfinite_steps:
      return Decision("stop", f"{text} for {self._nonfinite} steps in a row", found)
    if o.skipped:
      return Decision("skip", f"{text}: update skipped", found)
    notices.append(Notice(f"{text}, and the update was made", found))
    return Decision()

  def _decide(self, o: Observation, norm: Anomaly, notices: list[Notice]) -> Decision:
    loss = self._signals["loss"]
    if loss.risen == 2:
      found = loss.rise(o.step)[0]
      return Decision("stop", f"{_sentence(found, _RISEN)}; other batches do not cure that", found)
    if loss.lasting:
      found = loss.compare(o.step, o.loss)
      return self._rewind(found, _sentence(found))
    if len(self._skips) >= _SKIPS:
      text = f"{len(self._skips)} updates were skipped since step {self._skips[0]}"
      return self._rewind(norm._replace(first=self._skips[0]), f"{text}; {_sentence(norm)}")
    for signal in self._signals.values():
      notices += signal.settle(o.step)
    if o.skipped:
      return Decision("skip", f"{_sentence(norm)}: update skipped", norm)
    return Decision()

  def _rewind(self, found: Anomaly, reason: str) -> Decision:
    near = [step for step in self._rewinds if abs(step - found.first) <= _NEIGHBOURHOOD]
    ladder = self._settings.skip_batches
    if len(near) >= len(ladder):
      return Decision("stop", f"{reason}, after {len(near)} rewinds near this step", found)
    self._asked = found.first
    return Decision("rewind", reason, found, self._settings.rewind_steps, ladder[len(near)])
