"""Line plots as SVG: axes, ticks, and lines thinned out to what a screen shows."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..markup import escape


class Frame(NamedTuple):
  """The area of a plot in an SVG of `width`, and what its edges stand for."""

  width: int
  left: int
  top: int
  height: int
  x: tuple[float, float]
  y: tuple[float, float]
  log: bool = False

  @property
  def right(self) -> int:
    return self.width - 8

  @property
  def bottom(self) -> int:
    return self.top + self.height

  def px(self, x):
    """Where x lies; also of arrays."""
    low, high = self.x
    return self.left + (x - low) / max(high - low, 1e-12) * (self.right - self.left)

  def py(self, y):
    """Where y lies, at an edge if it is beyond; also of arrays."""
    low, high = map(math.log, self.y) if self.log else self.y
    if self.log:
      y = np.log(np.maximum(y, self.y[0]))
    share = (y - low) / max(high - low, 1e-12)
    return self.bottom - np.clip(share, 0, 1) * self.height


def frame(
  width: int, *, left: int, top: int, height: int, x: tuple[float, float], y: Sequence[float],
  zero: bool = False,
) -> Frame:  # fmt: skip
  """A plot with room for values `y`: over decades, logarithmic; of which a few far above the rest
  may leave the picture.

  Args:
    zero: the axis begins at 0.
  """
  values = np.asarray([v for v in y if v is not None and math.isfinite(v)] or [0.0, 1.0])
  low, high = float(values.min()), float(values.max())
  if len(values) >= 20:
    start = float(np.max(values[: max(1, len(values) // 100)]))  # falls from here
    high = min(high, max(start, 3 * float(np.quantile(values, 0.98))))
  if zero:
    return Frame(width, left, top, height, x, (min(0.0, low), max(1.08 * high, 1e-12)))
  if low > 0 and high / low > 2.5:
    return Frame(width, left, top, height, x, (low / 1.04, high * 1.04), log=True)
  room = 0.08 * max(high - low, 0.02 * abs(high), 1e-9)
  return Frame(width, left, top, height, x, (low - room, high + room))


def ticks(low: float, high: float, most: int) -> list[float]:
  """At most about `most` round values between two."""
  span = max(high - low, 1e-12)
  raw = span / max(most, 1)
  power = 10.0 ** math.floor(math.log10(raw))
  step = next(power * k for k in (1, 2, 5, 10) if power * k >= raw * 0.999)
  first = math.ceil(low / step - 1e-9)
  return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
  powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  for digits in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
    found = [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]
    if len(found) <= most:
      break
  return found if len(found) >= 2 else ticks(low, high, most)


_HOURS = (1, 5, 10, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)


def time_ticks(seconds: float, most: int) -> list[float]:
  """Round times from 0 to `seconds`."""
  days = (86400 * k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000))
  step = next((s for s in (*_HOURS, *days) if seconds / s < most + 1), seconds)
  return [n * step for n in range(math.floor(seconds / step + 1e-9) + 1)]


def time_label(seconds: float) -> str:
  for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
    if seconds >= size and seconds % size == 0:
      return f"{seconds // size:g} {unit}"
  if seconds > 3600:
    return f"{seconds // 3600:g} h {seconds % 3600 // 60:02.0f}"
  if seconds > 60:
    return f"{seconds // 60:g} min {seconds % 60:02.0f}"
  return f"{seconds:g} s" if seconds else "0"


def number(value: float) -> str:
  """An axis label."""
  if value == 0:
    return "0"
  if abs(value) >= 1e6:
    return next(
      f"{value / scale:.3g}{unit}" for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6))
      if abs(value) >= scale
    )  # fmt: skip
  return f"{value:,.6g}" if abs(value) >= 1e-3 else f"{value:.2g}"


def axes(f: Frame, *, x_label: str, seconds: bool = False) -> list[str]:
  """Grid, ticks and labels."""
  rows = max(3, f.height // 45)
  values = log_ticks(*f.y, rows + 1) if f.log else ticks(*f.y, rows)
  parts = []
  for value in values:
    y = float(f.py(value))
    parts.append(f'<path class="grid" d="M{f.left} {y:.1f}H{f.right}"/>')
    parts.append(f'<text class="end" x="{f.left - 6}" y="{y + 4:.1f}">{number(value)}</text>')
  most = max(3, (f.right - f.left) // 110)
  xs = time_ticks(f.x[1], most) if seconds else ticks(*f.x, most)
  label = time_label if seconds else number
  for value in xs:
    x = float(f.px(value))
    parts.append(f'<path class="grid" d="M{x:.1f} {f.bottom}v4"/>')
    end = x + 4 * len(label(value)) > f.right  # else it would hang over the edge
    place = f'class="end" x="{f.right}"' if end else f'class="mid" x="{x:.1f}"'
    parts.append(f'<text {place} y="{f.bottom + 17}">{label(value)}</text>')
  parts.append(f'<path class="axis" d="M{f.left} {f.bottom}H{f.right}"/>')
  parts.append(f'<text class="end" x="{f.right}" y="{f.bottom + 32}">{escape(x_label)}</text>')
  return parts


def line(f: Frame, xs: Sequence[float], ys: Sequence[float | None], kind: str) -> str:
  """A path through the points; where many share a column of pixels, through its extremes. Values
  that are missing or not finite leave a gap."""
  x_N = f.px(np.asarray(xs, float))
  raw_N = np.array([math.nan if y is None else y for y in ys], float)
  y_N = f.py(raw_N)
  pieces, pen = [], False
  for i in _kept(x_N, raw_N):
    if not math.isfinite(raw_N[i]):
      pen = False
      continue
    pieces.append(f"{'L' if pen else 'M'}{x_N[i]:.1f} {y_N[i]:.1f}")
    pen = True
  return f'<path class="{kind}" d="{"".join(pieces)}"/>' if pieces else ""


def _kept(x_N: np.ndarray, y_N: np.ndarray) -> Iterable[int]:
  """First, lowest, highest and last point of each column of pixels."""
  columns = np.floor(x_N).astype(int)
  begins = np.flatnonzero(np.diff(columns, prepend=columns[:1] - 1))
  for begin, end in zip(begins, [*begins[1:], len(x_N)], strict=True):
    if end - begin <= 4:
      yield from range(begin, end)
      continue
    part = y_N[begin:end]
    keep = {begin, end - 1}
    if np.isfinite(part).any():
      keep |= {begin + int(np.nanargmin(part)), begin + int(np.nanargmax(part))}
    gaps = np.flatnonzero(~np.isfinite(part))
    yield from sorted(keep | ({begin + int(gaps[0])} if len(gaps) else set()))


def svg(width: int, height: int, parts: Iterable[str], *, kind: str, label: str) -> str:
  """A picture of so many units, at least one a pixel."""
  body = "\n".join(part for part in parts if part)
  return (
    f'<svg class="{kind}" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
    f'role="img" aria-label="{escape(label)}">\n{body}\n</svg>'
  )
