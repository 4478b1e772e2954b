"""The guard: looks at the numbers of every step and says continue, skip, rewind or stop.

Each signal is compared with its own recent past. Its level is the median of the last 16 values that
were normal; its spread the median absolute deviation, over a window, of such values from the levels
before them, with a floor: neither a trend nor the noise of a plateau is an anomaly. All but log Z
are taken as logarithms: gradient norms are roughly lognormal, and losses compared by ratios.

An anomaly begins `deviations` spreads above the level, for the loss also at two steps in a row
above 4, and ends after 8 steps in a row within 3. Of its steps only those within 3 enter the
window. After 60 without an end the new level is taken as normal, unless

- the loss is still 5 % above, or 20 of 50 steps were skipped: rewind and leave out batches, as was
  done by hand for PaLM (arXiv 2204.02311, section 5.1; BLOOM's spike healed alone in 30 steps).
  The second time near the same step more batches are left out; then it stops for a person;
- the loss rises slowly for hundreds of steps: a notice, then stop. Other batches do not cure that.

Pure: no clock, no randomness. Every process runs it on the same numbers and decides the same.
"""

import copy
import math
from collections.abc import Iterator
from statistics import median
from typing import Any, Literal, NamedTuple

from ..config import GuardConfig

_RECENT, _HISTORY = 16, 32  # values in a level, and before anything is judged
_WARN, _LEAVE = 4.0, 3.0  # deviations
_CALM, _LASTING = 8, 60  # steps to the end of an anomaly, and of one that does not end
_SKIPS, _SKIPS_WITHIN = 20, 50
_NEIGHBOURHOOD = 1000  # steps within which another rewind is for the same trouble
_FACTOR_4 = math.log(4)
_BACK = "{value:.4g} is back where it was before step {first}"
_STAYED = "has stayed at {value:.4g} since step {first}: taken as its level"
_RISEN = "has risen slowly, from {baseline:.4g} at step {first} to {value:.4g}"
_DOWN = "is down at {value:.4g} after its slow rise"

# Title, floor of the spread, least rise of the level that matters. So an outlier is at least 3 % of
# the loss or a factor 4: norms of three times the usual are ordinary. The update ratio may rise.
_RULES = {
  "loss": ("loss", 0.005, 0.05),
  "grad_norm": ("gradient norm", _FACTOR_4 / 6, _FACTOR_4),
  "update_ratio": ("update/parameter ratio", _FACTOR_4 / 6, math.inf),
  "log_z": ("log Z", 0.25, 5.0),
  "load_cv": ("variation of expert load", _FACTOR_4 / 6, math.inf),
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

  signal: str  # a field of Observation
  value: float
  baseline: float  # its level
  deviations: float  # spreads between the two; 0 with too little history
  window: int  # values the baseline and the spread rest on
  first: int  # step
  last: int  # step

  def describe(self, what: str = "") -> str:
    """A sentence; `what` may name the fields."""
    if not what:
      what = "{value:.4g} is {deviations:.0f} deviations above {baseline:.4g}"
      if self.last > self.first:
        what += f" for {self.last - self.first + 1} steps"
    return f"{_RULES[self.signal][0]} {what.format(**self._asdict())}"


class Notice(NamedTuple):
  """Something to record; nothing is to be done."""

  reason: str  # one sentence
  anomaly: Anomaly
  recovered: bool = False  # the end of what an earlier notice or decision began


class Decision(NamedTuple):
  """What to do after a step. `skip`: the step itself has skipped its update, nothing remains."""

  action: Literal["continue", "skip", "rewind", "stop"] = "continue"
  reason: str = ""  # one sentence
  anomaly: Anomaly | None = None  # None only to continue
  back: int = 0  # rewind: steps from the anomaly's first to the checkpoint, at least
  skip_batches: int = 0  # rewind: batches to leave out after the anomaly's last
  notices: tuple[Notice, ...] = ()

  @property
  def left_out(self) -> tuple[int, int]:
    """Rewind: the first and the last step whose batch is to be left out; ten may have caused it."""
    assert self.anomaly is not None
    return max(self.anomaly.first - 10, 1), self.anomaly.last + self.skip_batches


class _Signal:
  """One stream of finite numbers: those that were normal, and the anomaly it may be in."""

  def __init__(self, name: str, settings: GuardConfig):
    self._name, self._settings = name, settings
    _, self._floor, self._rise = _RULES[name]
    self.values: list[float] = []  # transformed
    self.residuals: list[float] = []  # of the values, from the level before each
    self.first: int | None = None  # step at which the present anomaly began
    self.since: list[float] = []  # all values since then
    self.high = self.calm = 0  # steps in a row
    self.lowest: tuple[float, int] | None = None  # level of half a window, step
    self.risen = 0  # 1: a slow rise was noticed; 2: one that goes on

  def _transform(self, value: float) -> float:
    return value if self._name == "log_z" else math.log(max(value, 1e-8))

  def _raw(self, x: float) -> float:
    return x if self._name == "log_z" else math.exp(min(x, 700.0))

  @property
  def level(self) -> float:
    return median(self.values[-_RECENT:])

  @property
  def spread(self) -> float:
    middle = median(self.residuals)
    mad = median([abs(r - middle) for r in self.residuals])
    return math.hypot(1.4826 * mad, self._floor)  # that of a normal distribution

  def compare(self, step: int, value: float) -> Anomaly:
    x = self._transform(value)
    level = self.level if self.values else x
    deviations = (x - level) / self.spread if len(self.values) >= _HISTORY else 0.0
    first = step if self.first is None else self.first
    return Anomaly(self._name, value, self._raw(level), deviations, len(self.values), first, step)

  def observe(self, step: int, value: float) -> Iterator[Notice]:
    """Takes in a value; yields where an anomaly or a slow rise begins and ends."""
    found, x = self.compare(step, value), self._transform(value)
    self.high = self.high + 1 if found.deviations > _WARN else 0
    pair = self._name == "loss" and self.high == 2
    if self.first is None and (pair or found.deviations > self._settings.deviations):
      self.first, self.since, self.calm = step - self.high + 1, [], 0
      found = found._replace(first=self.first)
      yield Notice(found.describe(), found)
    if self.first is not None:
      self.since.append(x)
      self.calm = self.calm + 1 if found.deviations <= _LEAVE else 0
      if self.calm == _CALM:
        self.first, self.since = None, []
        yield Notice(found.describe(_BACK), found, recovered=True)
      elif len(self.since) > _LASTING and not self.lasting:
        yield self._settle(step)
        return
    if self.first is None or self.calm:
      self.residuals.append(x - self.level if self.values else 0.0)
      self.values.append(x)
      del self.values[: -self._settings.window], self.residuals[: -self._settings.window]
      found, stage = self.rise(step)
      if stage > self.risen:
        yield Notice(found.describe(_RISEN), found)
        self.risen = stage
      elif stage < 0 < self.risen:
        yield Notice(found.describe(_DOWN), found, recovered=True)
        self.risen = 0

  @property
  def lasting(self) -> bool:
    """Is this a loss that stays so far above its level that it matters?"""
    lasting = self._name == "loss" and len(self.since) > _LASTING
    return lasting and median(self.since[-_RECENT:]) - self.level >= self._rise

  def _settle(self, step: int) -> Notice:
    """Takes the values of the present anomaly as normal."""
    middle = median(self.since)
    found = self.compare(step, self._raw(middle))
    self.values, self.residuals = self.since, [x - middle for x in self.since]
    self.first, self.since, self.high = None, [], 0
    return Notice(found.describe(_STAYED), found, recovered=True)

  def rise(self, step: int) -> tuple[Anomaly, int]:
    """The level of half a window over the lowest it has been; -1 if low, 1 if high for two windows
    or twice as high for one, 2 if twice as high for four or four times for two, else 0."""
    window, spread = self._settings.window, self.spread
    level = median(self.values[-(window // 2) :])
    if self.lowest is None or level < self.lowest[0] or len(self.values) < window // 2:
      self.lowest = level, step
    lowest, first = self.lowest
    rise = (level - lowest) / max(self._rise, 2 * spread)
    area = rise * (step - first) / window if step - first >= window else 0.0
    stage = (rise >= 1 and area >= 2) + (rise >= 2 and area >= 8) - (rise < 0.5)
    values = self._raw(level), self._raw(lowest), (level - lowest) / spread, len(self.values)
    return Anomaly(self._name, *values, first, step), stage


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
    """Goes back to `state`, saved with the checkpoint, or to no history; remembers the rewind."""
    rewinds = self._rewinds + ([] if self._asked is None else [self._asked])
    self.reset()
    if state is not None:
      self.restore(state)
    self._rewinds, self._asked = rewinds, None

  def state(self) -> dict[str, Any]:
    """For the checkpoint, as JSON."""
    signals = {name: {k: v for k, v in vars(signal).items() if k[0] != "_"}
               for name, signal in self._signals.items()}  # fmt: skip
    rest = {"skips": self._skips, "nonfinite": self._nonfinite, "rewinds": self._rewinds}
    return copy.deepcopy({"signals": signals, **rest})

  def restore(self, state: dict[str, Any]) -> None:
    state = copy.deepcopy(state)
    for name, signal in self._signals.items():
      vars(signal).update(state["signals"][name])
    self._skips, self._nonfinite, self._rewinds = map(state.get, ("skips", "nonfinite", "rewinds"))

  @property
  def limit(self) -> float:
    """The gradient norm above which a step is to skip its update."""
    norms = self._signals["grad_norm"]
    known = self._settings.mode == "act" and len(norms.values) >= _HISTORY
    return math.exp(norms.level + self._settings.deviations * norms.spread) if known else math.inf

  def observe(self, o: Observation) -> Decision:
    if self._settings.mode == "off":
      return Decision()
    notices: list[Notice] = []
    decision = self._judge(o, notices)
    if self._settings.mode == "observe" and decision.action in ("rewind", "stop"):
      notices.append(Notice(f"would {decision.action}: {decision.reason}", decision.anomaly))
      self.reset()  # so that it is said once
      decision = Decision()
    # A skip is said by the decision alone.
    return decision._replace(notices=tuple(n for n in notices if n.anomaly != decision.anomaly))

  def _judge(self, o: Observation, notices: list[Notice]) -> Decision:
    norm, loss = self._signals["grad_norm"].compare(o.step, o.grad_norm), self._signals["loss"]
    bad = [name for name in ("grad_norm", "loss") if not math.isfinite(getattr(o, name))]
    self._nonfinite = self._nonfinite + 1 if bad else 0
    if bad:
      first, value = o.step - self._nonfinite + 1, getattr(o, bad[0])
      norm = norm._replace(signal=bad[0], value=value, deviations=math.inf, first=first)
    else:
      for name, signal in self._signals.items():
        value = getattr(o, name)
        if value is not None and math.isfinite(value):
          notices += signal.observe(o.step, value)
    what = norm.describe("is not finite" if bad else "")
    if o.skipped or norm.deviations > self._settings.deviations:
      self._skips.append(o.step)
    self._skips = [step for step in self._skips if step > o.step - _SKIPS_WITHIN]

    if self._nonfinite >= self._settings.nonfinite_steps:
      return Decision("stop", f"{what} for {self._nonfinite} steps in a row", norm)
    if len(self._skips) >= _SKIPS:
      what = f"{what}; {_SKIPS} of {_SKIPS_WITHIN} updates were skipped"
      return self._rewind(norm._replace(first=self._skips[0]), what)
    if loss.risen == 2:
      found = loss.rise(o.step)[0]
      return Decision("stop", f"{found.describe(_RISEN)}; other batches do not cure that", found)
    if loss.lasting:
      return self._rewind(found := loss.compare(o.step, o.loss), found.describe())
    if o.skipped:
      return Decision("skip", what, norm)
    if bad:
      notices.append(Notice(f"{what}, and the update was made", norm))
    return Decision()

  def _rewind(self, found: Anomaly, reason: str) -> Decision:
    before = sum(abs(step - found.first) <= _NEIGHBOURHOOD for step in self._rewinds)
    if before >= len(self._settings.skip_batches):
      return Decision("stop", f"{reason}, after {before} rewinds near this step", found)
    self._asked, batches = found.first, self._settings.skip_batches[before]
    return Decision("rewind", reason, found, self._settings.rewind_steps, batches)
