"""What a person sees while a run trains: live lines in a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

_PLAIN_SECONDS = 10.0  # between lines when the output is a file
_BLOCKS = "▁▂▃▄▅▆▇█"
_SHOWN_LAYERS, _SHOWN_EXPERTS = 4, 16


def load_bars(share_E: list[float]) -> str:
  """A layer's expert load as one character an expert: full height is twice the fair share, a
  blank is an expert that got nothing."""
  fair = 1 / len(share_E)
  top = len(_BLOCKS) - 1
  level = lambda s: _BLOCKS[min(top, round(s / fair / 2 * top))] if s > 0 else " "
  return "".join(map(level, share_E))


def duration(seconds: float) -> str:
  """1:02:03 or 2:03."""
  minutes, seconds = divmod(int(seconds + 0.5), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def describe_speed(row: dict[str, Any]) -> str:
  """Loss, speed, and MFU where the chip is known."""
  parts = ["loss nan" if row["loss"] is None else f"loss {row['loss']:.3f}"]
  if row.get("tokens_per_second"):
    parts.append(f"{row['tokens_per_second']:,.0f} tok/s")
  if row.get("mfu") is not None:
    parts.append(f"MFU {row['mfu']:.1%}")
  return "   ".join(parts)


def describe_experts(row: dict[str, Any]) -> str:
  """Expert load of the first MoE layers, the fullest expert, what was dropped; experts that nobody
  chose and tokens whose logits are not finite, where there are any; empty if dense."""
  load = row.get("load")
  if not load:
    return ""
  parts = []
  if len(load[0]) <= _SHOWN_EXPERTS:
    more = " …" if len(load) > _SHOWN_LAYERS else ""
    parts.append(" ".join(f"│{load_bars(share)}│" for share in load[:_SHOWN_LAYERS]) + more)
  parts.append(f"fullest {row['load_max_over_mean']:.1f}x")
  parts.append(f"dropped {row['drop_rate']:.1%}")
  if row["dead_experts"]:
    parts.append(f"dead {row['dead_experts']}")
  if row["nonfinite"]:
    parts.append(f"not finite {row['nonfinite']:.0f}")
  return "experts " + "   ".join(parts)


class ProgressDisplay:
  """`live(start)` around the steps, `update(step, row)` after a logged one, `note(text)` for
  events. Writes nothing unless `enabled`: one process of several speaks."""

  def __init__(self, total: int, label: str, *, enabled: bool = True):
    self._total, self._label, self._enabled = total, label, enabled
    self._start = 0
    self._console = Console(soft_wrap=True, highlight=False)
    self._live: _Live | None = None
    self._began = self._last_line = time.monotonic()

  @contextlib.contextmanager
  def live(self, start: int) -> Iterator[None]:
    """Show progress from `start` finished steps on."""
    self._start = start
    if not (self._enabled and self._console.is_terminal):
      self.note(f"{self._label}  compiling the step")
      yield
      return
    with _Live(self._console) as self._live:
      self._task = self._live.add_task(
        self._label, total=self._total, completed=start, left="compiling the step"
      )
      yield
    self._live = None

  def started(self) -> None:
    """The first step has finished: time left counts from here."""
    self._began = time.monotonic()

  def update(self, step: int, row: dict[str, Any]) -> None:
    """Show a metrics row."""
    now = time.monotonic()
    done = step - self._start - 1  # the first step, with its compilation, is not counted
    left = ""
    if done > 0 and step < self._total:
      left = f"{duration((now - self._began) / done * (self._total - step))} left"
    elif step == self._total:
      left = "done"
    speed, experts = describe_speed(row), describe_experts(row)
    if self._live is not None:
      self._live.lines = [speed, experts]
      self._live.update(self._task, completed=step, left=left)
    elif now - self._last_line >= _PLAIN_SECONDS or step == self._total or done <= 0:
      self._last_line = now
      parts = (f"{self._label}  step {step}/{self._total}", speed, experts, left)
      self.note("   ".join(filter(None, parts)))

  def note(self, text: str) -> None:
    """A line that stays."""
    if not self._enabled:
      return
    if self._live is not None:
      self._live.console.print(text, markup=False)
    else:
      print(text, flush=True)


class _Live(Progress):
  """A bar, and below it lines of text that are cut, not wrapped, in a narrow terminal."""

  def __init__(self, console: Console):
    self.lines: list[str] = []
    super().__init__(
      TextColumn("[bold]{task.description}"),
      BarColumn(bar_width=24),
      TextColumn("step {task.completed}/{task.total}"),
      TextColumn("{task.fields[left]}"),
      console=console,
      refresh_per_second=4,
    )

  def get_renderables(self) -> Iterable[RenderableType]:
    yield self.make_tasks_table(self.tasks)
    for line in filter(None, self.lines):
      yield Text(f"  {line}", no_wrap=True, overflow="ellipsis")
