"""Which of several hosts is slower than the others.

In a program over all devices every host waits, in every step, for the slowest of them: the time of
a step does not tell whose fault it was, and neither does that of one device. What can be told apart
is what a host does by itself: it reads and places the next batch, starts the step, looks at
numbers, logs. `HostTimes` adds up these seconds: those that the clock counts as steps or as data,
less those in which the host waits for results. At log steps, every 10 seconds at most, each process
leaves its seconds a step with the coordinator, waiting for nobody, and process 0 reads what the
others left.

`SlowHosts` calls a host slow whose own seconds were above the median at 6 such looks in a row: half
as long again, and by a fifth of a step. It says so once, and once more when it is over.

What it can't find: a slow accelerator, memory or link, for which all wait alike; processors that
were stopped or taken away while the host waited anyway. On CPU starting a step is computing it, so
there reading data is most of what is a host's own. And what it finds need not cost time yet: up to
four steps are in flight, so devices that take longer than their host hide it.
"""

import contextlib
import itertools
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median, median_low
from typing import Any, NamedTuple

import jax

from mesh.multihost import is_primary, tell, told

from .goodput import Clock

_SECONDS = 10.0  # between two looks
_LOOKS = 6  # in a row: to call a host slow, and to call that over
_SHARE, _RATIO = 0.2, 1.5  # of a step, and over the median
_LEAST = 0.01  # seconds a step; what is less is the noise of an operating system

_runs = itertools.count()  # of a program: a twin's processes are not those of the run before


class Found(NamedTuple):
  """A host that became slow, or is slow no longer."""

  process: int
  host: str
  seconds: float  # of its own, a step
  median: float  # of all
  step_seconds: float  # a step takes
  slow: bool

  @property
  def looks(self) -> int:
    return _LOOKS

  def describe(self) -> str:
    who = f"process {self.process} on {self.host}"
    if not self.slow:
      return f"{who} is no longer slower than the others"
    return (
      f"{who} is slow: {self.seconds:.3g} s a step for its own work (data, dispatch), where "
      f"{self.median:.3g} s is the median and a step takes {self.step_seconds:.3g} s"
    )


class SlowHosts:
  """Decides; pure."""

  def __init__(self):
    self._slow: set[int] = set()
    self._looks: dict[int, int] = {}  # in a row that speak against what is thought of a process

  def look(self, own: Mapping[int, float], step_seconds: float) -> list[tuple[int, bool]]:
    """(process, is it slow) where that has changed.

    Args:
      own: seconds a step by process; of those that have said something new.
      step_seconds: of a step, the same for all.
    """
    if len(own) < 2:
      return []
    middle = median_low(own.values())  # of two, the faster
    changed = []
    for process, seconds in own.items():
      was = process in self._slow
      factor = 0.5 if was else 1.0  # it is over when half of what began it is no longer there
      excess = max(_LEAST, _SHARE * step_seconds, (_RATIO - 1) * middle) * factor
      now = seconds - middle > excess
      self._looks[process] = self._looks.get(process, 0) + 1 if now != was else 0
      if self._looks[process] == _LOOKS:
        self._looks[process] = 0
        self._slow ^= {process}
        changed.append((process, now))
    return changed


class HostTimes:
  """Of this process; where there are several, process 0 compares them."""

  def __init__(self, clock: Clock):
    self._clock, self._several = clock, jax.process_count() > 1
    self._dispatch_waits = jax.devices()[0].platform == "cpu"
    self._name = f"host_times/{next(_runs)}"
    self._judge = SlowHosts()
    self._seen: dict[int, int] = {}  # by process, the step of what it said last
    self._known: dict[int, tuple[str, float]] = {}  # host, seconds a step
    self._steps, self._waited = 0, 0.0
    self._began, self._mark = time.monotonic(), (0, 0.0, 0.0)

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Meanwhile this host waits for devices, and through them for the others."""
    before = self._stepping
    try:
      yield
    finally:
      self._waited += self._stepping - before

  def wait(self, function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns that waits for results."""
    with self.waiting():
      return function(*args)

  @contextlib.contextmanager
  def dispatching(self) -> Iterator[None]:
    """Meanwhile a step is started."""
    self._steps += 1
    with self.waiting() if self._dispatch_waits else contextlib.nullcontext():
      yield

  @property
  def _stepping(self) -> float:
    return self._clock.spent("productive") + self._clock.spent("data")

  def look(self) -> list[Found]:
    """Tell the others, and compare them; to be called now and then, here as in all processes."""
    steps, stepping, waited = (
      now - then
      for now, then in zip((self._steps, self._stepping, self._waited), self._mark, strict=True)
    )
    if not steps or time.monotonic() - self._began < _SECONDS:
      return []
    self._began, self._mark = time.monotonic(), (self._steps, self._stepping, self._waited)
    own, host = (stepping - waited) / steps, platform.node()
    if not self._several:
      self._known = {0: (host, own)}
      return []
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator: others will notice
      tell(self._name, json.dumps([self._steps, host, own]))
      return self._compare(stepping / steps) if is_primary() else []
    return []

  def _compare(self, step_seconds: float) -> list[Found]:
    own = {}
    for process, text in told(self._name).items():
      step, host, seconds = json.loads(text)
      if step > self._seen.get(process, 0):
        self._seen[process], self._known[process] = step, (host, seconds)
        own[process] = seconds
    return [
      Found(process, *self._known[process], median_low(own.values()), step_seconds, slow)
      for process, slow in self._judge.look(own, step_seconds)
    ]

  def spread(self) -> dict[str, Any]:
    """For a `perf` event: median and longest of what hosts took last, and whose that was."""
    if not self._known:
      return {}
    process, (host, longest) = max(self._known.items(), key=lambda item: item[1][1])
    spread = {
      "host_p50_s": median(seconds for _, seconds in self._known.values()),
      "host_max_s": longest,
    }
    return spread | ({"host_max": f"process {process} on {host}"} if self._several else {})
