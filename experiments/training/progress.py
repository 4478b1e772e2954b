"""What a person sees while a run trains: one live line in a terminal, plain lines elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

_PLAIN_SECONDS = 10.0  # between lines when the output is a file
_BLOCKS = " ▁▂▃▄▅▆▇█"


def load_bars(share_E: list[float]) -> str:
  """A layer's expert load as one character an expert; full height is twice the fair share."""
  fair = 1 / len(share_E)
  level = lambda s: min(len(_BLOCKS) - 1, round(s / fair / 2 * (len(_BLOCKS) - 1)))
  return "".join(_BLOCKS[level(s)] for s in share_E)


def duration(seconds: float) -> str:
  """1:02:03 or 2:03."""
  minutes, seconds = divmod(int(seconds + 0.5), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def describe(row: dict[str, Any], seconds_left: float | None) -> str:
  """Loss, speed, expert load and time left of one metrics row."""
  parts = [f"loss {row['loss']:.3f}"]
  if row.get("tokens_per_second"):
    parts.append(f"{row['tokens_per_second']:,.0f} tok/s")
  if row.get("mfu") is not None:
    parts.append(f"MFU {row['mfu']:.1%}")
  if row.get("load"):
    shown = row["load"] if len(row["load"]) <= 4 else row["load"][:4]
    if all(len(share) <= 16 for share in shown):
      parts.append("experts " + " ".join(f"[{load_bars(share)}]" for share in shown))
    parts.append(f"max/mean {row['load_max_over_mean']:.1f}")
    parts.append(f"drop {row['drop_rate']:.1%}")
  if seconds_left is not None:
    parts.append(f"{duration(seconds_left)} left")
  return "  ".join(parts)


class ProgressDisplay:
  """Context manager; `update(step, row)` after each logged step, `note(text)` for events."""

  def __init__(self, total: int, start: int, label: str):
    self._total, self._start, self._label = total, start, label
    self._console = Console(soft_wrap=True)
    self._live: Progress | None = None
    self._began = self._last_line = time.monotonic()

  def __enter__(self) -> "ProgressDisplay":
    if self._console.is_terminal:
      columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}"),
      )
      self._live = Progress(*columns, console=self._console, refresh_per_second=4)
      self._task = self._live.add_task(
        self._label, total=self._total, completed=self._start, text="compiling"
      )
      self._live.start()
    return self

  def __exit__(self, *_: Any) -> None:
    if self._live is not None:
      self._live.stop()

  def started(self) -> None:
    """The first step has finished: time left counts from here."""
    self._began = time.monotonic()

  def update(self, step: int, row: dict[str, Any]) -> None:
    now = time.monotonic()
    done = step - self._start - 1  # the first step, with its compilation, is not counted
    left = (now - self._began) / done * (self._total - step) if done > 0 else None
    text = describe(row, left)
    if self._live is not None:
      self._live.update(self._task, completed=step, text=text)
    elif now - self._last_line >= _PLAIN_SECONDS or step == self._total or done <= 0:
      self._last_line = now
      self.note(f"{self._label}  step {step}/{self._total}  {text}")

  def note(self, text: str) -> None:
    """A line that stays."""
    if self._live is not None:
      self._live.console.print(text, highlight=False, markup=False)
    else:
      print(text, flush=True)
