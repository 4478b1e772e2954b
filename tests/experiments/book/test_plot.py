"""Axes and lines of plots: round ticks, and extremes that thinning out must not lose."""

import math
import re

import pytest

from experiments.book.plot import axes, frame, line, log_ticks, ticks, time_label, time_ticks


@pytest.mark.parametrize(
  ("low", "high", "most", "expected"),
  (
    (0, 100, 5, [0, 20, 40, 60, 80, 100]),
    (0, 10_000, 5, [0, 2000, 4000, 6000, 8000, 10_000]),
    (0.28, 0.42, 3, [0.3, 0.35, 0.4]),
    (-1, 1, 4, [-1, -0.5, 0, 0.5, 1]),
  ),
)
def test_ticks_are_round(low, high, most, expected):
  assert ticks(low, high, most) == pytest.approx(expected)


def test_ticks_of_decades():
  assert log_ticks(2, 11, 8) == pytest.approx([2, 3, 4, 5, 7, 10])
  assert log_ticks(0.5, 2000, 5) == pytest.approx([1, 10, 100, 1000])
  assert log_ticks(2.1, 2.9, 4) == pytest.approx([2.2, 2.4, 2.6, 2.8])  # no power near


def test_ticks_of_time():
  labels = lambda seconds, most: [time_label(t) for t in time_ticks(seconds, most)]
  assert labels(24_300, 8) == ["0", "1 h", "2 h", "3 h", "4 h", "5 h", "6 h"]
  assert labels(189, 7) == ["0", "30 s", "1 min", "1 min 30", "2 min", "2 min 30", "3 min"]
  assert labels(86_400 * 54, 6) == ["0", "10 d", "20 d", "30 d", "40 d", "50 d"]


def points(path):
  return [tuple(map(float, p.split())) for p in re.findall(r"[ML]([\d.]+ [\d.]+)", path)]


def test_a_spike_survives_thinning():
  """One of 100,000 values stands out; the line has a few points a pixel, and the spike."""
  values = [2.0 + 0.001 * (i % 7) for i in range(100_000)]
  values[54_321] = 3.0
  f = frame(500, left=50, top=0, height=100, x=(0, 100_000), y=values)
  drawn = points(line(f, range(100_000), values, "main"))
  assert len(drawn) < 5 * 500
  x, y = min(drawn, key=lambda p: p[1])
  assert x == pytest.approx(50 + 0.54321 * 442, abs=0.1) and y == pytest.approx(f.py(3.0), abs=0.1)


def test_missing_and_infinite_values_leave_gaps():
  values = [1.0, 2.0, None, 3.0, math.nan, math.inf, 2.0, 1.0]
  f = frame(100, left=10, top=0, height=50, x=(0, 7), y=values)
  assert line(f, range(8), values, "main").count("M") == 3
  assert line(f, [1], [None], "main") == ""


def test_a_divergence_leaves_the_picture():
  """A loss that falls from 10 to 2 and then explodes: the curve keeps the room."""
  values = [10 * 0.99**i + 2 for i in range(500)] + [1e6, 1e9]
  f = frame(500, left=50, top=0, height=100, x=(0, 502), y=values)
  assert f.log and f.y[1] < 40
  assert float(f.py(1e9)) == f.top  # at the edge


def test_a_few_values_of_any_kind():
  for values in ([], [None], [0.0], [5.0], [0.0, 0.0], [-1.0, 1.0]):
    f = frame(300, left=50, top=0, height=80, x=(0, 0), y=values)
    assert f.y[0] < f.y[1]
    assert all("nan" not in part and "inf" not in part for part in axes(f, x_label="step"))
