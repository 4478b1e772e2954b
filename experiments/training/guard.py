"""The guard: watches the numbers of every step and says continue, skip, rewind or stop.

Each signal is compared with its own recent past by robust statistics. The level is the median of
the last `_RECENT` values that were taken as normal; the spread is the median absolute deviation of
the distances from it over the window, with a floor. Except for log Z all of this is in logarithms,
so that a spread is a relative one and a gradient norm, which is roughly lognormal, is symmetric.

An anomaly begins at `deviations` spreads above the level (for the loss also at two steps in a row
above `_WARN`) and ends after `_CALM` steps in a row below `_LEAVE`; what lies between is not taken
into the window. What is done:

- A gradient norm above `limit`, or one that is not finite: the step has skipped its own update.
- 20 skips in 50 steps, or a loss that stays above for 60: rewind, as PaLM did by hand (section 5.1
  of arXiv 2204.02311); BLOOM's first spike healed by itself in about 30. A second time near the
  same step more batches are skipped, after that the run stops for a person.
- A loss that rises slowly for hundreds of steps: a notice, then stop; other batches do not cure it.
- Too many steps in a row that are not finite: stop.

Pure: no clock, no randomness, no JAX. All processes run it on the same numbers.
"""

import math
from collections.abc import Iterator
from statistics import median
from typing import Any, Literal, NamedTuple

from ..config import GuardConfig

_RECENT = 16  # values in a level
_HISTORY = 32  # values needed before anything is judged
_WARN, _LEAVE, _CALM = 4.0, 3.0, 8
_SKIPS, _SKIPS_WITHIN = 20, 50
_LASTING = 60  # steps
_NEIGHBOURHOOD = 1000  # steps within which a second rewind is for the same trouble
_MAD_TO_SIGMA = 1.4826  # of a normal distribution


class _Rule(NamedTuple):
  title: str
  log: bool
  floor: float  # of the spread
  drift: float  # slow rise over the lowest level, the least that is worth a notice


# The floors: half a percent of the loss, or 3 % for an outlier; a factor 4 for the others, since
# norms of three times the usual are ordinary. The update ratio rises with the learning rate.
_RULES = {
  "loss": _Rule("loss", True, 0.005, 0.05),
  "grad_norm": _Rule("gradient norm", True, math.log(4) / 6, math.log(4)),
  "update_ratio": _Rule("update/parameter ratio", True, math.log(4) / 6, math.inf),
  "log_z": _Rule("log Z", False, 0.25, 5.0),
  "load_cv": _Rule("spread of the experts' load", True, math.log(4) / 6, math.inf),
}


class Observation(NamedTuple):
  """The numbers of one finished step; any may be NaN or infinite, None is not measured."""

  step: int
  loss: float  # nats
  grad_norm: float  # before clipping
  update_ratio: float | None = None  # norm of the update over that of the parameters
  log_z: float | None = None  # of the vocabulary softmax, mean
  load_cv: float | None = None  # standard deviation of the experts' load over its mean
  skipped: bool = False  # the step left parameters and optimizer as they were


class Anomaly(NamedTuple):
  """A value that is not as its past was: what the logbook records of it."""

  signal: str  # loss, grad_norm, update_ratio, log_z, load_cv or nonfinite
  value: float
  baseline: float  # what it would be
  deviations: float  # spreads between the two
  window: int  # values that the baseline and the spread rest on
  first: int  # step
  last: int  # step


class Notice(NamedTuple):
  """Something to record; nothing is to be done."""

  reason: str  # one sentence
  anomaly: Anomaly
  recovered: bool = False  # the end of an anomaly that an earlier notice or decision began


class Decision(NamedTuple):
  """What to do after a step.

  `skip` says that the step has skipped its update; nothing remains to be done. `rewind` asks for
  the newest checkpoint of a step at most `anomaly.first - back`, and to leave out the batches from
  `anomaly.first` to `skip` batches after `anomaly.last`.
  """

  action: Literal["continue", "skip", "rewind", "stop"] = "continue"
  reason: str = ""  # one sentence
  anomaly: Anomaly | None = None
  back: int = 0
  skip: int = 0
  notices: tuple[Notice, ...] = ()


class _Signal:
  """One stream: its normal values, and the anomaly it may be in."""

  def __init__(self, name: str, settings: GuardConfig):
    self.name, self.rule, self._settings = name, _RULES[name], settings
    self.reset()

  def reset(self) -> None:
    self.steps: list[int] = []
    self.values: list[float] = []  # transformed
    self.residuals: list[float] = []  # distances from the level before
    self.first: int | None = None  # step at which the present anomaly began
    self.high = self.calm = 0  # steps in a row
    self.lowest: tuple[float, int] | None = None  # level, step
    self.drift = 0  # 1: noticed, 2: more than that

  def level(self) -> float:
    return median(self.values[-_RECENT:])

  def spread(self) -> float:
    residuals = self.residuals[-self._settings.window :]
    middle = median(residuals)
    return math.hypot(_MAD_TO_SIGMA * median([abs(r - middle) for r in residuals]), self.rule.floor)

  def ready(self) -> bool:
    return len(self.values) >= _HISTORY

  def threshold(self) -> float:
    """The value at `deviations` above the level."""
    return self._raw(self.level() + self._settings.deviations * self.spread())

  def _raw(self, x: float) -> float:
    return math.exp(min(x, 700.0)) if self.rule.log else x

  def compare(self, step: int, value: float) -> Anomaly:
    """The value against the level; no deviations while there is too little history."""
    x = math.log(max(value, 1e-8)) if self.rule.log else value
    level, off = (self.level(), 0.0) if self.values else (x, 0.0)
    if self.ready():
      off = (x - level) / self.spread()
    window = min(len(self.values), self._settings.window)
    first = step if self.first is None else self.first
    return Anomaly(self.name, value, self._raw(level), off, window, first, step)

  def observe(self, step: int, value: float) -> Iterator[Notice]:
    """Takes in a finite value; the beginning and the end of an anomaly, and of a slow rise."""
    found = self.compare(step, value)
    self.high = self.high + 1 if found.deviations > _WARN else 0
    if self.first is None:
      pair = self.name == "loss" and self.high >= 2
      if found.deviations > self._settings.deviations or pair:
        self.first, self.calm = step - self.high + 1, 0
        found = found._replace(first=self.first)
        yield Notice(describe(found), found)
    else:
      self.calm = self.calm + 1 if found.deviations <= _LEAVE else 0
      if self.calm >= _CALM:
        self.first = None
        text = f"{self.rule.title} {value:.4g} is back at the level of before step {found.first}"
        yield Notice(text, found, recovered=True)
    if self.first is None or found.deviations <= _LEAVE:
      self._accept(step, value)
      yield from self._rise(found)

  def _accept(self, step: int, value: float) -> None:
    x = math.log(max(value, 1e-8)) if self.rule.log else value
    self.residuals.append(x - self.level() if self.values else 0.0)
    self.values.append(x)
    self.steps.append(step)
    # What a rewind leaves must still be a window.
    keep = self._settings.window + self._settings.rewind_steps + _LASTING
    for kept in (self.steps, self.values, self.residuals):
      del kept[:-keep]

  def _rise(self, found: Anomaly) -> Iterator[Notice]:
    """Compares the median of half a window with the lowest it has been."""
    window = self._settings.window
    if len(self.values) < window // 2 or not self.ready():
      return
    level = median(self.values[-(window // 2) :])
    if self.lowest is None or level < self.lowest[0]:
      self.lowest = level, found.last
    least = max(self.rule.drift, 2 * self.spread())
    rise, since = (level - self.lowest[0]) / least, found.last - self.lowest[1]
    stage = max(
      1 if rise >= 1 and since >= 2 * window or rise >= 6 and since >= window // 2 else 0,
      2 if rise >= 2 and since >= 4 * window or rise >= 6 and since >= 2 * window else 0,
    )
    low = self._raw(self.lowest[0])
    slow = found._replace(
      value=self._raw(level), baseline=low, deviations=(level - self.lowest[0]) / self.spread(),
      first=self.lowest[1],
    )  # fmt: skip
    if stage > self.drift:
      self.drift = stage
      text = f"{self.rule.title} has risen slowly to {slow.value:.4g}, from {low:.4g} at step "
      yield Notice(f"{text}{slow.first}", slow)
    elif self.drift and rise < 0.5:
      self.drift = 0
      text = f"{self.rule.title} {slow.value:.4g} is down again after its slow rise"
      yield Notice(text, slow, recovered=True)

  def rewound(self, step: int) -> None:
    """Forgets what came after `step`."""
    kept = sum(s <= step for s in self.steps)
    for values in (self.steps, self.values, self.residuals):
      del values[kept:]
    if self.lowest is not None and self.lowest[1] > step:
      self.lowest = None
    self.first, self.high, self.calm, self.drift = None, 0, 0, 0

  def state(self) -> dict[str, Any]:
    return {k: v for k, v in vars(self).items() if k not in ("name", "rule", "_settings")}


def describe(found: Anomaly) -> str:
  steps = found.last - found.first + 1
  lasting = f" for {steps} steps" if steps > 1 else ""
  title = _RULES[found.signal].title
  return (
    f"{title} {found.value:.4g} is {found.deviations:.0f} deviations above "
    f"{found.baseline:.4g}{lasting}"
  )


class Guard:
  """The policy over all signals. `observe` every step once, in order.

  A rewind or a stop is repeated until `rewound` or `reset` is called.
  """

  def __init__(self, settings: GuardConfig):
    self._settings = settings
    self._signals = {name: _Signal(name, settings) for name in _RULES}
    self._rewinds: list[int] = []  # first steps of the anomalies that were rewound
    self._asked: int | None = None  # the one that a rewind was asked for
    self.reset()

  def reset(self) -> None:
    """Forgets all levels: after an intervention that moves them (batch size, learning rate)."""
    for signal in self._signals.values():
      signal.reset()
    self._skips: list[int] = []
    self._nonfinite = 0
    self._asked = None

  @property
  def limit(self) -> float:
    """The gradient norm above which a step is to skip its update."""
    norms = self._signals["grad_norm"]
    return norms.threshold() if self._settings.mode == "act" and norms.ready() else math.inf

  def observe(self, o: Observation) -> Decision:
    if self._settings.mode == "off":
      return Decision()
    notices: list[Notice] = []
    decision = self._judge(o, notices)
    if self._settings.mode == "observe" and decision.action != "continue":
      assert decision.anomaly is not None
      notices.append(Notice(f"would {decision.action}: {decision.reason}", decision.anomaly))
      if decision.action in ("rewind", "stop"):
        self.reset()
      decision = Decision()
    return decision._replace(notices=tuple(notices))

  def _judge(self, o: Observation, notices: list[Notice]) -> Decision:
    finite = math.isfinite(o.loss) and math.isfinite(o.grad_norm)
    self._nonfinite = 0 if finite else self._nonfinite + 1
    for name, signal in self._signals.items():
      value = getattr(o, name)
      if finite and value is not None and math.isfinite(value):
        notices += signal.observe(o.step, value)
    norm = self._signals["grad_norm"].compare(o.step, o.grad_norm)
    if o.skipped or not finite:
      self._skips.append(o.step)
    self._skips = [s for s in self._skips if s > o.step - _SKIPS_WITHIN]

    if not finite:
      found = Anomaly("nonfinite", o.loss if math.isfinite(o.grad_norm) else o.grad_norm,
                      norm.baseline, math.inf, norm.window, o.step - self._nonfinite + 1, o.step)
      if self._nonfinite >= self._settings.nonfinite_steps:
        return Decision("stop", f"{self._nonfinite} steps in a row were not finite", found)
    loss = self._signals["loss"]
    if loss.drift == 2:
      return Decision("stop", "slow")
    if loss.first is not None and o.step - loss.first >= _LASTING:
      return self._rewind(loss.compare(o.step, o.loss))
    if len(self._skips) >= _SKIPS:
      return self._rewind(norm._replace(first=self._skips[0]))
    if o.skipped or not finite:
      return Decision("skip", describe(norm), norm)
    return Decision()

  def _rewind(self, found: Anomaly) -> Decision:
    near = [f for f in self._rewinds if abs(f - found.first) <= _NEIGHBOURHOOD]
    ladder = self._settings.skip_batches
    if len(near) >= len(ladder):
      return Decision("stop", f"{describe(found)}, after {len(near)} rewinds near step {near[0]}", found)
    self._asked = found.first
    return Decision("rewind", describe(found), found, self._settings.rewind_steps, ladder[len(near)])
