"""One start of a supervised run: what files tell of its progress, how it ended, and the logbook's
entries about it. Without JAX."""

import contextlib
import datetime
import json
import os
import platform
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from . import bucket, paths
from .exits import FINISHED, OUR_FAULT, RESTART, WATCHDOG
from .training import manifest
from .training.logbook import Logbook

_WORDS = {
  OUR_FAULT: "a crash", RESTART: "wants a restart", WATCHDOG: "watchdog: no step finished",
  134: "aborted, as JAX does when it has lost a peer",
}  # fmt: skip


class Progress(NamedTuple):
  """What files of a run directory tell."""

  sealed: frozenset[tuple[str, float]]  # finished checkpoints and near copies, by path and time
  checkpoint: int  # step of the newest; 0 is none
  saved_at: float  # its time, in seconds since 1970
  step: int  # last that was logged


def progress(folder: Path) -> Progress:
  """Of a run and of what it trains in folders below (`eval.twin`)."""
  sealed, home = [], bucket.home(folder)
  runs = (home, *(home / name for name in paths.names(home)))
  for steps in (*(run / "checkpoints" for run in runs), *_near_copies(folder)):
    for step in manifest.saved_steps(steps):
      with contextlib.suppress(OSError):  # it is just being removed
        path = steps / str(step)
        sealed.append((manifest.sealed_at(path), step, str(path)))
  at, checkpoint, _ = max(sealed, default=(0.0, 0, ""))
  found = frozenset((path, time) for time, _, path in sealed)
  return Progress(found, checkpoint, at, _last_step(folder))


def _near_copies(folder: Path) -> Iterator[Path]:
  """Folders of this host (`training/near.py`), from which the next attempt may go on."""
  for path in (*folder.glob("near.json"), *folder.glob("*/near.json")):
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
      yield from Path(json.loads(path.read_text())["folder"]).glob("*-of-*")


def _last_step(folder: Path) -> int:
  newest, step = 0.0, 0
  for path in (*folder.glob("metrics.jsonl"), *folder.glob("*/metrics.jsonl")):
    with contextlib.suppress(OSError), path.open("rb") as file:
      status = os.fstat(file.fileno())
      file.seek(max(0, status.st_size - (1 << 16)))
      for line in reversed(file.read().split(b"\n")):
        with contextlib.suppress(ValueError, TypeError, AttributeError):
          row = json.loads(line)
          found = int(row.get("step", row.get("resumed_after")))
          if status.st_mtime >= newest:
            newest, step = status.st_mtime, found
          break
  return step


class Ended(NamedTuple):
  """One attempt."""

  number: int
  began: float  # seconds since 1970
  seconds: float
  returncode: int  # negative: the signal that killed it
  before: Progress
  after: Progress
  lines: list[str]  # the last that it said
  log: Path

  @property
  def code(self) -> int:
    """As a shell has it."""
    return self.returncode if self.returncode >= 0 else 128 - self.returncode

  @property
  def how(self) -> str:
    if self.returncode < 0:
      return f"was killed by {signal.Signals(-self.returncode).name}"
    words = f" ({_WORDS[self.code]})" if self.code in _WORDS else ""
    return f"ended with exit code {self.code}{words}"

  @property
  def advanced(self) -> bool:
    """Whether it left a new checkpoint or near copy."""
    return bool(self.after.sealed - self.before.sealed)


def write_events(book: Logbook, ended: Ended, reason: str, folder: Path, *, again: bool) -> None:
  """What happened, when and at which step; and if so, that it is started `again`."""
  after, step = ended.after, ended.after.step
  attempt = {
    "began": stamp(ended.began), "ended": stamp(ended.began + ended.seconds),
    "seconds": round(ended.seconds, 3), "log": f"attempts/{ended.log.name}",
  }  # fmt: skip
  refs: list[str] = []
  summary = f"attempt {ended.number} {ended.how}"
  if reason == "crash":
    since = max(ended.began, after.saved_at)
    fault = book.event(
      "fault", summary, step=step, severity="error", host=platform.node(),
      error="\n".join(ended.lines) or ended.how, first_seen_step=step,
      lost_steps=max(0, step - after.checkpoint),
      lost_s=round(ended.began + ended.seconds - since, 3),
      stack_groups=_stack_groups(folder, ended),
    )  # fmt: skip
    refs = [fault]
  stop = book.event(
    "stop", summary, step=step, severity="info" if ended.code == FINISHED else "warn", refs=refs,
    reason=reason, exit_code=ended.code, checkpoint=after.checkpoint, **attempt,
  )  # fmt: skip
  if again:
    book.event(
      "action", f"start again after step {after.checkpoint:,}", step=step, refs=[stop],
      policy="restart", from_step=step, to_step=after.checkpoint, cause=(refs or [stop])[0],
      outcome="pending",
    )  # fmt: skip


def _stack_groups(folder: Path, ended: Ended) -> list[dict] | None:
  """What a watchdog of this attempt noted."""
  for path in sorted((folder / "stacks").glob("*.json"), reverse=True):
    with contextlib.suppress(OSError, ValueError, KeyError):
      if path.stat().st_mtime >= ended.began:
        return json.loads(path.read_text())["stack_groups"]
  return None


def stamp(seconds: float) -> str:
  """RFC 3339, of seconds since 1970."""
  at = datetime.datetime.fromtimestamp(seconds).astimezone()
  return at.isoformat(timespec="milliseconds")


def duration(seconds: float) -> str:
  """For a person."""
  if seconds < 120:
    return f"{seconds:.1f} s"
  minutes = seconds / 60
  return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
