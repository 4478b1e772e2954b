"""Ends a run in which no step finishes any more: a thread that asks all processes for their stacks.

    with Watchdog(config.train.hang_seconds, folder) as dog:
      for step in ...:
        ...                  # one step
        dog.beat(step)
        with dog.patience():
          ...                # a save, an evaluation, a compilation: takes as long as it takes

A rank that is alive but stuck sends its heartbeats for ever and keeps all others waiting in a
collective, so nobody else notices. When no beat came for the limit, the stacks of all threads of
all processes that still answer go to `stacks/`, the summary names those that do not, and the
process ends with exit code 76. A supervisor starts the run again.

The thread counts its own ticks: a process that was stopped as a whole and went on (a debugger, a
laptop's lid, a virtual machine that moved) has not been stuck. Code that keeps Python's lock for
ever stops this thread too; the other processes see it.
"""

import collections
import contextlib
import datetime
import faulthandler
import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mesh import multihost

from .. import bucket
from ..exits import WATCHDOG

LEAST_SECONDS = 300.0  # of an automatic limit, which is else
STEPS = 20  # times the longest of the last
_RECENT = 50
PATIENCE_SECONDS = 3600.0  # before the first beat, where programs compile, and in `patience`
_ANSWER_SECONDS = 2.0
_GRACE_SECONDS = 1.0  # to write and to tell the others, beyond that
_FRAMES = 3  # of ours, in the summary of a stack
_ROOT = Path(__file__).parents[2]
_OURS = ("experiments/", "layers/", "mesh/")

Groups = dict[tuple[str, ...], list[int]]  # stack -> processes

_names = itertools.count()  # of watchdogs, as all processes make them in the same order


class Watchdog:
  """A context manager; every process of a run makes one at the same place.

  Args:
    limit: seconds without a beat; None: 20 times the longest of the last 50 steps, at least 300;
      0: never.
    folder: the run directory.
  """

  def __init__(self, limit: float | None, folder: Path):
    self._limit, self._folder = limit, folder / "stacks"
    self._several = multihost.joined()
    self._process, self._count = multihost.process_numbers() if self._several else (0, 1)
    self._question = f"stacks/{next(_names)}"
    self._main = threading.get_ident()
    self._lock = threading.Lock()
    self._ended = threading.Event()
    self._waited, self._patience, self._step = 0.0, 1, None  # patience until the first beat
    self._recent: collections.deque[float] = collections.deque(maxlen=_RECENT)
    self._last: float | None = None

  def __enter__(self) -> "Watchdog":
    if self._limit != 0:
      if self._several:
        multihost.answer(self._question, self._reply)
      threading.Thread(target=self._watch, daemon=True).start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._ended.set()

  def beat(self, step: int) -> None:
    """Step `step` has finished, or something else of which there are many."""
    now = time.monotonic()
    with self._lock:
      if self._step is None:
        self._patience -= 1
      elif self._last is not None and not self._patience:
        self._recent.append(now - self._last)
      self._step, self._last, self._waited = step, now, 0.0

  @contextlib.contextmanager
  def patience(self) -> Iterator[None]:
    """What happens meanwhile is no step, and may last an hour, or an hour between beats."""
    with self._lock:
      self._patience += 1
      self._waited = 0.0
    try:
      yield
    finally:
      with self._lock:
        self._patience -= 1
        self._waited, self._last = 0.0, None

  @property
  def limit(self) -> float:
    """Seconds without a beat that are too many now."""
    with self._lock:
      usual = self._limit
      if usual is None:
        usual = max(LEAST_SECONDS, STEPS * max(self._recent, default=0.0))
      return max(usual, PATIENCE_SECONDS) if self._patience else usual

  def _watch(self) -> None:
    usual = self._limit or LEAST_SECONDS
    tick = min(1.0, usual / 20)
    before = time.monotonic()
    while not self._ended.wait(tick):
      now = time.monotonic()
      with self._lock:
        self._waited += min(now - before, usual / 4)  # more: this process did not run
        waited = self._waited
      before = now
      if waited > (limit := self.limit):
        self._fire(waited, limit)

  def _fire(self, waited: float, limit: float) -> None:
    """Say what is known, and end the process, though disk, terminal or coordinator hang as well."""
    report = threading.Thread(target=self._report, args=(waited, limit), daemon=True)
    report.start()
    report.join(_ANSWER_SECONDS + _GRACE_SECONDS)
    os._exit(WATCHDOG)

  def _report(self, waited: float, limit: float) -> None:
    after = "before the first step" if self._step is None else f"after step {self._step}"
    _say(f"watchdog: nothing finished for {waited:.0f} s {after} (limit {limit:g} s)")
    mine = self._stack()
    writing = threading.Thread(target=self._write, daemon=True)  # on a disk that may hang
    writing.start()
    said: dict[int, str] | None = {self._process: mine}
    if self._several:
      said = self._ask(mine)
    if said is None:  # another process has fired: it has our answer, and ends us
      time.sleep(_ANSWER_SECONDS + _GRACE_SECONDS)
      return
    groups = group(said)
    silent = sorted(set(range(self._count)) - said.keys())
    _say("\n".join([*summary(groups, silent, self._count), f"  all stacks: {self._folder}"]))
    if self._several and 0 in said:  # the coordinator carries what we say
      multihost.announce_failure(WATCHDOG)
    writing.join()
    self._note(limit, groups, silent)
    bucket.flush(_ANSWER_SECONDS)

  def _ask(self, mine: str) -> dict[int, str] | None:
    """What the others say; nothing where the coordinator does not answer."""
    heard: list[dict[int, str] | None] = []
    ask = lambda: heard.append(multihost.ask(self._question, mine, seconds=_ANSWER_SECONDS))
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_ANSWER_SECONDS + 0.2)
    return heard[0] if heard else {self._process: mine}

  def _reply(self) -> str:
    self._write()
    return self._stack()

  def _write(self) -> None:
    """The stacks of all threads of this process."""
    with contextlib.suppress(OSError):
      self._folder.mkdir(parents=True, exist_ok=True)
      with (self._folder / f"{_now()}-process{self._process}.txt").open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)

  def _stack(self) -> str:
    """Of the main thread, innermost first, as JSON."""
    frame = sys._current_frames().get(self._main)
    stack = [] if frame is None else traceback.extract_stack(frame)
    return json.dumps([f"{_where(f.filename)}:{f.lineno} {f.name}" for f in reversed(stack)])

  def _note(self, limit: float, groups: Groups, silent: list[int]) -> None:
    """For the supervisor, which puts it into the logbook."""
    stacks = [{"frame": brief(stack), "ranks": ranks} for stack, ranks in groups.items()]
    note = {"step": self._step, "limit": limit, "stack_groups": stacks, "silent": silent}
    with contextlib.suppress(OSError):
      (self._folder / f"{_now()}.json").write_text(json.dumps(note) + "\n")


def group(said: dict[int, str]) -> Groups:
  """Processes by equal stack, innermost frame first."""
  groups: Groups = {}
  for process, text in sorted(said.items()):
    groups.setdefault(tuple(json.loads(text)), []).append(process)
  return groups


def summary(groups: Groups, silent: list[int], count: int) -> list[str]:
  """Lines for a person: where which processes are, and which say nothing."""
  lines = []
  for stack, ranks in groups.items():
    who = "" if count == 1 else f"process {_ranges(ranks)} "
    lines.append(f"  {who}at {brief(stack)}")
  if silent:
    why = "gave no answer: stopped, dead, or stuck outside of Python"
    lines.append(f"  process {_ranges(silent)} {why}")
  return lines


def _ranges(numbers: list[int]) -> str:
  """0, 2-511 and so on; `numbers` are sorted."""
  runs: list[list[int]] = []
  for n in numbers:
    if runs and runs[-1][-1] == n - 1:
      runs[-1].append(n)
    else:
      runs.append([n])
  return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def brief(stack: Sequence[str]) -> str:
  """The innermost frame, and then those of our own code."""
  ours = [frame for frame in stack[1:] if frame.startswith(_OURS)]
  return " < ".join([*stack[:1], *ours[:_FRAMES]])


def _where(path: str) -> str:
  """Of our files the path below the root, of others the last two parts."""
  if path.startswith(f"{_ROOT}/"):
    return path.removeprefix(f"{_ROOT}/")
  return "/".join(Path(path).parts[-2:])


def _now() -> str:
  return datetime.datetime.now().strftime("%Y%m%d-%H%M%S")


def _say(text: str) -> None:
  # Not through sys.stderr, whose lock the main thread may hold.
  os.write(2, f"{text}\n".encode())
