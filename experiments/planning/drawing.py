"""Pictures of the plan's page as SVG: the time line of a step, and the mesh on its machine."""

import html
from collections.abc import Sequence

import numpy as np

from mesh.axes import MESH_AXES
from mesh.hardware import Chip

from .network import DCN, leaving
from .places import Places
from .speed import HIDDEN_AXES, Step, hides, rates_of, time_rows

COMPUTE, HIDDEN, EXPOSED, WAITING = "#3b6ea5", "#4f8f5b", "#c0392b", "#bbbbbb"
_WIDTH, _LEFT = 1088, 90  # of a picture, and of the names beside its tracks
_TRACK, _GAP = 26, 8
_MOST = 512  # devices that are drawn
_CELLS = (20, 18, 16, 14)  # sides of a device, the largest that has room


def tracks(step: Step, sizes: dict[str, int], chip: Chip) -> dict[str, list[tuple]]:
  """By track, parts of a step as (name, begin, end, color) in seconds.

  As the estimate has it: traffic of HIDDEN_AXES runs one after the other from the start, as far as
  computing hides it, that between slices beside the other; what is left of it follows, then that
  of other axes with nothing beside it.
  """
  found: dict[str, list[tuple]] = {"compute": []}
  clock = 0.0
  for name, seconds in time_rows(step):
    if name != "traffic nothing hides":
      color = WAITING if name.startswith("waiting") else COMPUTE
      found["compute"].append((name, clock, clock + seconds, color))
      clock += seconds
  inner, outer = ("ICI", "DCN") if chip.is_tpu else (_inside(chip), "network")
  found |= {inner: [], outer: []}
  outside = {} if chip.is_tpu else leaving(sizes)
  track = lambda axis: found[outer if axis in outside or axis.startswith(DCN) else inner]
  place = lambda axis: HIDDEN_AXES.index(axis.removeprefix(DCN))
  room = rates_of(chip).overlap * step.compute
  begin, left = [0.0, 0.0], [clock, clock]  # on links within slices, between slices
  for axis in sorted(filter(hides, step.traffic), key=place):
    which = axis.startswith(DCN)
    under = min(step.traffic[axis], room - begin[which])
    rest = step.traffic[axis] - under
    rest = rest if rest > 1e-9 * step.total else 0.0  # what is left of sums
    track(axis).append((axis, begin[which], begin[which] + under, HIDDEN))
    track(axis).append((axis, left[which], left[which] + rest, EXPOSED))
    begin[which], left[which] = begin[which] + under, left[which] + rest
  clock = max(left)
  for axis, seconds in step.traffic.items():
    if not hides(axis):
      track(axis).append((axis, clock, clock + seconds, EXPOSED))
      clock += seconds
  return found


def _inside(chip: Chip) -> str:
  """What connects the GPUs of a node."""
  assert chip.interconnect
  return "NVLink" if chip.interconnect >= 300e9 else "PCIe"


def duration(seconds: float, total: float) -> str:
  """Of a part of `total`, which sets the unit."""
  return f"{1000 * seconds:.3f} ms" if total < 0.1 else f"{seconds:.3f} s"


def timeline(found: dict[str, list[tuple]], total: float) -> str:
  """The tracks, one below the other, over a step of `total` seconds."""
  place = lambda seconds: _LEFT + seconds / total * (_WIDTH - _LEFT)
  height = len(found) * (_TRACK + _GAP)
  drawn = []
  for i, (name, parts) in enumerate(found.items()):
    top = i * (_TRACK + _GAP)
    drawn.append(f'<text x="0" y="{top + 18}">{html.escape(name)}</text>')
    drawn.append(_rect(_LEFT, top, _WIDTH - _LEFT, "#eeeeee"))
    for part, begin, end, color in parts:
      wide = place(end) - place(begin)
      if wide <= 0:
        continue
      label = f"{html.escape(part)} {duration(end - begin, total)}"
      drawn.append(_rect(place(begin), top, wide, color, label))
      if text := next((t for t in (label, html.escape(part)) if wide > 7.5 * len(t)), ""):
        drawn.append(f'<text class="on" x="{place(begin) + 6:.1f}" y="{top + 18}">{text}</text>')
  drawn.append(f'<text x="{_LEFT}" y="{height + 12}">0</text>')
  drawn.append(f'<text class="end" x="{_WIDTH}" y="{height + 12}">{duration(total, total)}</text>')
  return _svg(_WIDTH, height + 18, drawn)


def _rect(x: float, y: float, width: float, color: str, title: str = "") -> str:
  size = f'x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{_TRACK}" fill="{color}"'
  return f"<rect {size}><title>{title}</title></rect>" if title else f"<rect {size}/>"


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
  size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
  return f'<svg {size} role="img">{"".join(parts)}</svg>'


def mesh_picture(found: Places, axis: int) -> tuple[str, str]:
  """(devices by their place along a mesh axis, which part of the machine is drawn if not all).

  Planes of a torus beside each other, x to the right and y down; nodes of GPUs as two rows of four;
  of many planes or nodes some.
  """
  of_axis = np.indices(found.places.shape[:-1])[axis].ravel()
  x, y, z, core = found.places.reshape(-1, 4).T
  nodes = found.names[2] == "node"
  if nodes:
    x, y = x % 4, x // 4
  cores = core.max() + 1
  columns, rows, planes = x.max() + 1, y.max() + 1, z.max() + 1
  each = columns * rows * cores
  every = -(-planes // max(1, _MOST // each))  # one plane in so many is drawn
  shown = -(-planes // every)
  fitting = (c for c in _CELLS if shown * (columns * c + _GAP) <= _WIDTH)
  cell = next(fitting, _CELLS[-1])
  in_line = max(1, min(shown, _WIDTH // (columns * cell + _GAP)))
  wide, high = columns * cell + _GAP, rows * cell + 20
  side, up = (cell - 1) / cores, cell - 1
  left = z // every % in_line * wide + x * cell + core * side
  top = z // every // in_line * high + y * cell
  visible = (z % every == 0) & (y * columns * cores + x * cores + core < _MOST)
  parts = []
  size = found.places.shape[axis]
  for value in range(size):
    here = np.flatnonzero(visible & (of_axis == value))
    squares = "".join(f"M{left[i]:g} {top[i]}h{side:g}v{up}h-{side:g}z" for i in here)
    name = f"<title>{MESH_AXES[axis]} {value}</title>"
    parts.append(f'<path d="{squares}" fill="{_color(value, size)}">{name}</path>')
  if len(str(size - 1)) * 5.5 <= side:
    middle = left + side / 2
    parts += [
      f'<text class="in" x="{middle[i]:g}" y="{top[i] + cell / 2 + 3:g}">{of_axis[i]}</text>'
      for i in np.flatnonzero(visible)
    ]
  if planes > 1:
    parts += [
      f'<text class="under" x="{p % in_line * wide}" y="{(p // in_line + 1) * high - 8}">'
      f"{found.names[2]}{' ' if nodes else '='}{p * every}</text>"
      for p in range(shown)
    ]
  note = ""
  if every > 1:
    note = f"drawn is one in {every} of {planes} {'nodes' if nodes else 'planes'}"
  elif each > _MOST:
    note = f"drawn are {_MOST} of {each} devices"
  return _svg(in_line * wide, -(-shown // in_line) * high, parts), note


def _color(value: int, size: int) -> str:
  return f"hsl({210 + round(300 * value / size)},55%,74%)"
