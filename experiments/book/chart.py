"""Pictures of a run: the loss over steps with what happened, steps over time, and small curves."""

import json
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..markup import escape
from .facts import Facts, brief, class_name, interventions, span
from .ledger import Attempt, when
from .plot import Frame, axes, frame, line, number, svg
from .text import human_lines

# Lanes below the loss, in this order; those without a mark are left out.
LANES = ("restarts", "rewinds", "spikes", "faults", "changes", "notes", "saves", "evals")
_LANE, _NEAR = 17, 5  # height of a lane; marks so near each other are one
_MOST_HAIRS = 25  # of a lane, through the curve
_MOST_LINES = 9  # of a mark's text
_POINTS = 500  # of a curve that answer to the pointer


class Mark(NamedTuple):
  lane: str
  step: float
  text: str
  bad: bool = False


def marks(facts: Facts) -> list[Mark]:
  """What happened, by lane; an event without a step stands where the run was at that time."""
  branches = (*facts.history.abandoned, facts.history.rows)
  rows = sorted(
    (row for branch in branches for row in branch if "time" in row), key=lambda row: row["time"]
  )
  times, steps = [row["time"] for row in rows], [row["step"] for row in rows]

  def place(event: dict[str, Any]) -> float:
    if event["step"] is not None:
      return event["step"]
    at = bisect_right(times, when(event))
    return steps[at - 1] if at else 0

  found = [
    Mark("restarts", attempt.first_step, _restart(before, attempt), before.failed)
    for before, attempt in pairwise(facts.ledger.attempts if facts.ledger else ())
  ]
  changed = {event["id"]: text for event, text in interventions(facts)}
  for event in facts.events:
    lane = "changes" if event["id"] in changed else _lane(event)
    if lane:
      words = "\n".join(human_lines(event))
      found.append(Mark(lane, place(event), words, event["severity"] in ("error", "page")))
  return found


def _lane(event: dict[str, Any]) -> str | None:
  kind, detail = event["kind"], event["detail"]
  if kind == "action":
    of = {"rewind": "rewinds", "rewind_skip": "rewinds", "restart": None}
    return of.get(detail["policy"], "spikes")
  if kind == "anomaly" and detail["signal"] == "step_time":
    return "faults"  # of a host, not of the loss
  if kind == "checkpoint":
    return None if detail["status"] == "started" else "saves"
  of = {"anomaly": "spikes", "fault": "faults", "note": "notes", "postmortem": "notes"}
  return (of | {"milestone": "notes", "eval": "evals"}).get(kind)


def _restart(before: Attempt, attempt: Attempt) -> str:
  why = brief(before.cause) or (
    "finished" if before.reason == "finished" else "died without a word"
  )
  cls = f"{class_name(before.cls)}: " if before.cls else ""
  lost = f"{before.lost_steps:,} steps done again, " if before.lost_steps else ""
  gap = span(max(0.0, attempt.begin - before.end))
  return f"{attempt.run} from step {attempt.first_step:,}\nafter {cls}{why}\n{lost}{gap} between"


def loss_chart(facts: Facts, width: int) -> str:
  """Training and held-out loss over steps, the branches that were taken back, and the lanes."""
  rows = [row for row in facts.history.rows if "loss" in row]
  lost = [[row for row in branch if "loss" in row] for branch in facts.history.abandoned]
  held = [row for row in facts.history.rows if row.get("heldout_loss") is not None]
  if not rows:
    return ""
  last = max(row["step"] for row in [*rows, *(row for branch in lost for row in branch)])
  values = [row["loss"] for row in rows] + [row["heldout_loss"] for row in held]
  left = 60 if width < 600 else 74
  f = frame(width, left=left, top=12, height=250 if width < 600 else 330, x=(0, last), y=values)
  parts = axes(f, x_label="step")
  events = marks(facts)
  for lane in ("restarts", "changes"):
    places = sorted({round(f.px(mark.step)) for mark in events if mark.lane == lane})
    if len(places) <= _MOST_HAIRS:
      parts += [f'<path class="hair {lane}" d="M{x} {f.top}V{f.bottom}"/>' for x in places]
  parts += [line(f, *_xy(branch, "loss"), "lost") for branch in lost if branch]
  parts += [_leap(f, e) for e in facts.of("action") if _lane(e) == "rewinds"]
  parts.append(line(f, *_xy(rows, "loss"), "main"))
  parts += [_heldout(f, row) for row in held]
  height = f.bottom + 42
  for lane in LANES:
    own = [mark for mark in events if mark.lane == lane]
    if own:
      parts.append(f'<text class="lane" x="0" y="{height + 4}">{lane}</text>')
      parts.append(f'<path class="grid" d="M{f.left} {height}H{f.right}"/>')
      parts += [_mark(f.px(mark.step), height, mark) for mark in _merged(f, own)]
      height += _LANE
  kind = "narrow" if width < 600 else "wide"
  return _answering(svg(width, height, parts, kind=kind, label="Loss over steps"), f, rows, "loss")


def _xy(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float | None]]:
  return [row["step"] for row in rows], [row.get(name) for row in rows]


def _heldout(f: Frame, row: dict[str, Any]) -> str:
  bits = row.get("heldout_bits_per_byte")
  more = "" if bits is None else f", {bits:.3f} bits a byte"
  text = f"held out at step {row['step']:,}: {row['heldout_loss']:.4g}{more}"
  x, y = f.px(row["step"]), float(f.py(row["heldout_loss"]))
  return _hover(f'<circle class="held" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>', text)


def _leap(f: Frame, event: dict[str, Any]) -> str:
  """From the step where a rewind came, back to where it went."""
  begin, end = (event["detail"][name] for name in ("from_step", "to_step"))
  if begin is None or end is None:
    return ""
  a, b = f.px(begin), f.px(end)
  if a - b < 14:
    return ""  # too near for an arrow; its lane has it
  high = f.top + max(2.0, 26 - (a - b) / 4)
  low = f.top + 34
  d = f"M{a:.1f} {low}C{a:.1f} {high:.1f} {b:.1f} {high:.1f} {b:.1f} {low}m-3 -7l3 7l4 -6"
  return _hover(f'<path class="leap" d="{d}"/>', "\n".join(human_lines(event)))


def _merged(f: Frame, own: Sequence[Mark]) -> list[Mark]:
  """Marks of a lane, those that would cover each other as one."""
  found: list[list[Mark]] = []
  for mark in sorted(own, key=lambda m: m.step):
    if found and f.px(mark.step) - f.px(found[-1][0].step) < _NEAR:
      found[-1].append(mark)
    else:
      found.append([mark])
  merged = []
  for group in found:
    lines = "\n".join(mark.text for mark in group).splitlines()
    if len(lines) > _MOST_LINES:
      lines = [*lines[: _MOST_LINES - 1], f"and {len(lines) - _MOST_LINES + 1} lines more"]
    bad = any(mark.bad for mark in group)
    merged.append(Mark(group[0].lane, group[0].step, "\n".join(lines), bad))
  return merged


_SHAPES = {
  "restarts": "m-5 5h10l-5 -9z", "rewinds": "m5 -5v10l-9 -5z", "spikes": "m-4 5l4 -10l4 10z",
  "faults": "m-4 -4l8 8m0 -8l-8 8", "changes": "m0 -5l5 5l-5 5l-5 -5z",
  "notes": "m-4 -5h8v7h-4l-4 3z", "saves": "m0 -5v10", "evals": "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5"
  " 0 1 0 -7 0z",
}  # fmt: skip


def _mark(x: float, y: float, mark: Mark) -> str:
  bad = " bad" if mark.bad else ""
  shape = f'<path class="{mark.lane}{bad}" d="M{x:.1f} {y}{_SHAPES[mark.lane]}"/>'
  room = f'<rect class="room" x="{x - 6:.1f}" y="{y - 8}" width="12" height="16"/>'
  return _hover(room + shape, mark.text)


def _hover(drawn: str, text: str) -> str:
  return f'<g class="m">{drawn}<title>{escape(text)}</title></g>'


def _answering(
  picture: str, f: Frame, rows: Sequence[dict[str, Any]], name: str, title: str = ""
) -> str:
  """The picture with the points that the pointer finds: x, y, and what to say."""
  shown = [row for row in rows if isinstance(row.get(name), int | float)]
  every = max(1, len(shown) // _POINTS)
  points = [
    [round(f.px(row["step"]), 1), round(float(f.py(row[name])), 1),
     f"step {row['step']:,}\n{title or name} {number(float(f'{row[name]:.4g}'))}"]
    for row in shown[::every]
  ]  # fmt: skip
  data = escape(json.dumps(points, separators=(",", ":")))
  return picture.replace("<svg ", f'<svg data-points="{data}" ', 1)


def progress_chart(facts: Facts, width: int) -> str:
  """Steps over the time of the clock: what was done again, and when nothing ran."""
  if facts.ledger is None:
    return ""
  begin = facts.ledger.attempts[0].begin
  kept = {id(row) for row in facts.history.rows}
  branches = (*facts.history.abandoned, facts.history.rows)
  rows = [row for branch in branches for row in branch if "loss" in row and "time" in row]
  rows.sort(key=lambda row: row["time"])
  if len(rows) < 2:
    return ""
  left = 60 if width < 600 else 74
  top = max(row["step"] for row in rows)
  f = frame(width, left=left, top=12, height=170 if width < 600 else 200,
            x=(0, facts.ledger.wall), y=[0, top], zero=True)  # fmt: skip
  parts = []
  for before, attempt in pairwise(facts.ledger.attempts):
    a, b = f.px(before.end - begin), f.px(attempt.begin - begin)
    wide = max(0.6, b - a)
    gap = f'<rect class="gap" x="{a:.1f}" y="{f.top}" width="{wide:.1f}" height="{f.height}"/>'
    parts.append(_hover(gap, _restart(before, attempt)))
  parts += axes(f, x_label="time since the start", seconds=True)
  for attempt in facts.ledger.attempts:
    own = [row for row in rows if attempt.begin <= row["time"] <= attempt.end]
    piece: list[dict[str, Any]] = []
    for row in [*own, None]:
      if row is None or (piece and row["step"] <= piece[-1]["step"]):
        parts += _piece(f, piece, kept, begin)
        piece = []
      if row is not None:
        piece.append(row)
  kind = "narrow" if width < 600 else "wide"
  return svg(width, f.bottom + 40, parts, kind=kind, label="Steps over time")


def _piece(f: Frame, rows: list[dict[str, Any]], kept: set[int], begin: float) -> list[str]:
  """Steps that follow each other: those that count, then those that don't."""
  split = next((i for i, row in enumerate(rows) if id(row) not in kept), len(rows))
  parts = []
  for part, kind in ((rows[:split], "main"), (rows[max(0, split - 1) :], "again")):
    if len(part) > 1:
      xs, ys = [row["time"] - begin for row in part], [row["step"] for row in part]
      parts.append(line(f, xs, ys, kind))
  return parts


# Small curves: the metric, its name, does its axis begin at 0?
_CURVES = (
  ("grad_norm", "Gradient norm", False),
  ("tokens_per_second", "Tokens a second", True),
  ("mfu", "MFU", True),
  ("learning_rate", "Learning rate", True),
  ("drop_rate", "Dropped choices of experts", True),
  ("load_cv", "Expert load CV (0 = even)", True),
)


def curves(facts: Facts, width: int = 400) -> list[tuple[str, str]]:
  """(name, picture) of each metric that was logged."""
  found = []
  for name, title, zero in _CURVES:
    rows = [row for row in facts.history.rows if isinstance(row.get(name), int | float)]
    if len(rows) < 2 or not np.isfinite([row[name] for row in rows]).any():
      continue
    values = [row[name] for row in rows]
    f = frame(
      width, left=62, top=8, height=110, x=(0, rows[-1]["step"]), y=values, zero=zero
    )  # fmt: skip
    parts = [*axes(f, x_label="step"), line(f, *_xy(rows, name), "main")]
    picture = svg(width, f.bottom + 36, parts, kind="small", label=title)
    found.append((title, _answering(picture, f, rows, name, title)))
  return found
