"""`--show_mesh=PARAM`: which device holds which part of a parameter and of the batch."""

import difflib
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mesh.multihost import is_primary
from mesh.rules import spec_for

from . import cli, joining
from .config import ConfigError
from .planning.placement import (
  Placed,
  Tiles,
  device_numbers,
  held_text,
  mesh_axes,
  numbers,
  size_text,
  tiles,
)
from .start import Request
from .training.setup import Setup, build

_MOST_ROWS, _WIDTH = 16, 96  # of the drawing in the terminal


def show_mesh(request: Request, param: str, place: joining.Place) -> None:
  """Print and draw one parameter and the batch of a config, on the devices here or described.

  Nothing is allocated on a device. The picture goes to the work directory, if there is one yet,
  else to the current folder.

  Raises:
    ConfigError: `param` names no parameter or several, the mesh is impossible, the picture can't be
      written, or other processes do not come.
  """
  config = request.config
  devices = cli.described_devices(config)
  if devices is None:
    joining.join(place, config, request.folder)
  setup = build(config, devices)
  arrays = [_parameter(setup, param), _batch(setup)]
  joining.done()
  if not is_primary():
    return
  title = f"{config.name} on {_devices(setup.mesh)}, rules {setup.rules.name}"
  print(title)
  for line in _torus(setup.mesh):
    print(line)
  for placed in arrays:
    print(f"\n{describe(placed)}\n\n{draw(tiles(placed))}")
  folder = request.folder if request.folder.is_dir() else Path()
  path = folder / f"mesh_{arrays[0].name.replace('/', '_')}.png"
  try:
    save_picture(arrays, title, path)
  except OSError as e:
    raise ConfigError(f"can't write the picture {path}: {e.strerror or e}") from e
  print(f"\npicture {path}")


def find(param: str, names: Sequence[str]) -> str:
  """The one of `names` (paths with slashes) that is `param` or has it as a part.

  Raises:
    ConfigError: there is none (the nearest are named), or there are several (they are listed).
  """
  if param in names:
    return param
  matches = [name for name in names if param in name]
  if len(matches) == 1:
    return matches[0]
  if matches:
    listed = "\n".join(f"  {name}" for name in matches)
    raise ConfigError(
      f"--show_mesh={param} is part of {len(matches)} parameters; give more of the path:\n{listed}"
    )
  parts = param.count("/") + 1

  def likeness(name: str) -> float:
    words = name.split("/")
    runs = ("/".join(words[i : i + parts]) for i in range(max(1, len(words) - parts + 1)))
    return max(difflib.SequenceMatcher(None, param, run).ratio() for run in runs)

  nearest = sorted(names, key=likeness, reverse=True)[:3]
  raise ConfigError(
    f"--show_mesh={param}: there is no such parameter; nearest: {', '.join(nearest)} "
    "(--show_mesh=/ lists all)"
  )


def _parameter(setup: Setup, param: str) -> Placed:
  path_of = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  leaves = jax.tree.leaves_with_path(setup.abstract.params)
  arrays = {path_of(path): leaf for path, leaf in leaves}
  logical = jax.tree.leaves(setup.layout.axes, is_leaf=lambda x: isinstance(x, tuple))
  name = find(param, list(arrays))
  return Placed(name, dict(zip(arrays, logical, strict=True))[name], arrays[name])


def _batch(setup: Setup) -> Placed:
  data, logical = setup.config.data, ("act_batch", "act_seq")
  shape = (data.batch_size, data.row_length)
  spec = spec_for(logical, setup.rules, setup.mesh, shape, name="batch")
  sharding = NamedSharding(setup.mesh, spec)
  return Placed("batch", logical, jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding))


def _devices(mesh: Mesh) -> str:
  devices = list(mesh.devices.flat)
  axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
  hosts = len({d.process_index for d in devices})
  spread = f" on {hosts} hosts" if hosts > 1 else ""
  return f"{len(devices)} x {devices[0].device_kind}{spread}" + (f", mesh {axes}" if axes else "")


def _torus(mesh: Mesh) -> Iterable[str]:
  """For TPUs: how a row of devices along each mesh axis lies among the chips."""
  if mesh.devices.flat[0].platform != "tpu":
    return
  for axis, (name, size) in enumerate(mesh.shape.items()):
    if size == 1:
      continue
    row = np.moveaxis(mesh.devices, axis, -1).reshape(-1, size)[0]
    chips = {tuple(d.coords) for d in row}
    sides = [max(side) - min(side) + 1 for side in zip(*chips, strict=True)]
    where = f"{'x'.join(map(str, sides))} chips"
    if len({getattr(d, "slice_index", 0) for d in row}) > 1:
      where = "over slices"
    elif math.prod(sides) != len(chips):
      where = f"{len(chips)} chips of {where.removesuffix(' chips')}, others between"
    yield f"  {f'{name}={size}':<12} {where}"


def describe(placed: Placed) -> str:
  """The rule of each dim, what a device holds, and how many copies there are."""
  name, logical, array = placed
  sharding = array.sharding
  held = sharding.shard_shape(array.shape)
  rows = [("dim", "logical axis", "mesh axes", "size", "parts", "a device")]
  for i, (axis, size, part) in enumerate(zip(logical, array.shape, held, strict=True)):
    over = " x ".join(f"{a}={sharding.mesh.shape[a]}" for a in mesh_axes(sharding, i)) or "-"
    rows.append((str(i), axis or "-", over, f"{size:,}", str(size // part), f"{part:,}"))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [f"{name}: {size_text(array.shape, array.dtype)}"]
  for row in rows:
    padded = (
      cell.ljust(width) if i < 3 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )  # fmt: skip
    lines.append("  " + "  ".join(padded).rstrip())
  return "\n".join([*lines, f"  {held_text(placed)}"])


def draw(t: Tiles) -> str:
  """The tiles as text: a row a line, with the devices that hold each; long parts left out."""
  cells = [[numbers(cell) for cell in row] for row in t.holders]
  shown_rows = _ends(len(cells), _MOST_ROWS)
  side = max(len(t.rows[r]) for r in shown_rows if r is not None)
  width = max(len(text) for text in [*t.columns, *(c for row in cells for c in row)])
  shown = _ends(len(t.columns), max(3, (_WIDTH - side - 4) // (width + 3)))

  def line(label: str, texts: Sequence[str], edge: str) -> str:
    picked = (f"{'...' if c is None else texts[c]:^{width if c is not None else 3}}" for c in shown)
    return f"  {label:>{side}} {edge}" + edge.join(f" {text} " for text in picked) + edge

  rule = (
    f"  {'':>{side}} +" + "+".join("-" * (2 + (3 if c is None else width)) for c in shown) + "+"
  )
  titles = (t.row_title or "not cut", t.column_title or "not cut")
  lines = ["  rows: {}; columns: {}; cells: devices".format(*titles)]
  if t.column_title:
    lines.append(line("", t.columns, " ").rstrip())
  lines.append(rule)
  for row, following in zip(shown_rows, [*shown_rows[1:], 0], strict=True):
    if row is None:
      hidden = len(cells) - (len(shown_rows) - 1)
      lines.append(f"  {'...':>{side}} : {hidden} more rows{_regular(t.holders)}")
      continue
    lines.append(line(t.rows[row], cells[row], "|"))
    if following is not None and following % t.outer == 0:
      lines.append(rule)
  return "\n".join(lines)


def _ends(count: int, most: int) -> list[int | None]:
  """Indices to show: all, or the first ones, None for those left out, and the last ones."""
  if count <= most:
    return list(range(count))
  last = max(1, most // 4)
  return [*range(most - 1 - last), None, *range(count - last, count)]


def _regular(holders: list[list[list[int]]]) -> str:
  """Is each row the one before with all devices shifted by the same number?"""
  rows = [np.array(row) for row in holders]
  steps = {step for a, b in pairwise(rows) for step in np.unique(b - a).tolist()}
  return f", each {steps.pop()} devices further" if len(steps) == 1 else ""


def save_picture(arrays: Sequence[Placed], title: str, path: Path) -> None:
  """A PNG with a panel for each array: tiles, in them a coloured field for each device."""
  # Matplotlib takes a second to import, so only a program that draws pays for it.
  import matplotlib
  from matplotlib.collections import PolyCollection
  from matplotlib.figure import Figure

  style = {f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")} | {
    "font.size": 9, "axes.titlesize": 10.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "xtick.top": True, "xtick.labeltop": True, "xtick.bottom": False,
    "xtick.labelbottom": False, "xtick.major.size": 0, "ytick.major.size": 0,
  }  # fmt: skip
  with matplotlib.rc_context(style):
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    mesh = arrays[0].array.sharding.mesh
    figure.suptitle(title, fontsize=11)
    torus = "      ".join(": ".join(line.split(maxsplit=1)) for line in _torus(mesh))
    if torus:
      figure.supxlabel(torus, fontsize=8.5)
    colours = _colours(mesh, matplotlib.colormaps["turbo"])
    for axes, placed in zip(figure.subplots(1, len(arrays)), arrays, strict=True):
      _panel(axes, placed, colours, PolyCollection)
    temporary = path.with_suffix(".png.tmp")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(path)


def _colours(mesh: Mesh, colormap: Any) -> dict[int, np.ndarray]:
  """RGB of each device, by number; devices that are near in the mesh look alike."""
  number = device_numbers(mesh)
  shades = colormap(np.linspace(0.06, 0.94, mesh.size))[:, :3] * 0.62 + 0.38  # room for labels
  return {number[d]: shade for d, shade in zip(mesh.devices.flat, shades, strict=True)}


_PANEL = (4.9, 5.4)  # inches of a panel that tiles may fill, to choose sizes of fields and letters


def _panel(axes: Any, placed: Placed, colours: dict[int, np.ndarray], polygons: Any) -> None:
  t = tiles(placed)
  gaps = [(row // t.outer) * (0.3 if t.outer > 1 else 0.0) for row in range(len(t.rows))]
  tops = np.arange(len(t.rows)) + np.array(gaps)
  tall, wide = tops[-1] + 1, len(t.columns)
  width, height = _PANEL[0] / wide, _PANEL[1] / tall
  holders = len(t.holders[0][0])
  # Fields of a tile, one a device that holds it, as broad as a label likes.
  split = [k for k in range(1, holders + 1) if holders % k == 0]
  across = min(split, key=lambda k: abs(math.log(width / k / (height * k / holders) / 1.6)))
  down = holders // across
  rim_x, rim_y = (min(0.05, 0.03 / side) if side > 0.05 else 0.0 for side in (width, height))
  step_x, step_y = (1 - 2 * rim_x) / across, (1 - 2 * rim_y) / down
  corners, shades, centres, outlines = [], [], {}, []
  for row, top in enumerate(tops):
    for column, cell in enumerate(t.holders[row]):
      outlines.append(_box(column + rim_x, top + rim_y, 1 - 2 * rim_x, 1 - 2 * rim_y))
      for i, device in enumerate(cell):
        x = column + rim_x + (i % across) * step_x
        y = top + rim_y + (i // across) * step_y
        corners.append(_box(x, y, step_x, step_y))
        shades.append(colours[device])
        centres[device] = (x + step_x / 2, y + step_y / 2)
  axes.add_collection(polygons(corners, facecolors=shades, edgecolors="none"))
  if holders > 1 and height > 0.15:  # copies touch, and a frame holds them together
    axes.add_collection(polygons(outlines, facecolors="none", edgecolors="#333333"))
  axes.set(xlim=(0, wide), ylim=(tall, 0))
  axes.set_title(f"{placed.name}\n{size_text(placed.array.shape, placed.array.dtype)}", pad=14)
  axes.text(0, -0.02, held_text(placed), transform=axes.transAxes, va="top", color="#444444")
  _ticks(axes.yaxis, tops + 0.5, t.rows if t.row_title else [], 24)
  _ticks(axes.xaxis, np.arange(wide) + 0.5, t.columns if t.column_title else [], 8)
  axes.set_ylabel(t.row_title)
  axes.set_xlabel(t.column_title)
  axes.xaxis.set_label_position("top")
  for (x, y), text, size in _labels(t, tops, centres, step_x * width, step_y * height, height):
    axes.text(x, y, text, ha="center", va="center", fontsize=size)


def _box(x: float, y: float, width: float, height: float) -> list[tuple[float, float]]:
  return [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]


def _ticks(axis: Any, places: np.ndarray, texts: Sequence[str], most: int) -> None:
  every = max(1, -(-len(texts) // most))
  axis.set_ticks(places[: len(texts) : every], texts[::every], fontsize=8)


def _labels(
  t: Tiles, tops: np.ndarray, centres: dict[int, tuple[float, float]],
  field_width: float, field_height: float, height: float,
) -> Iterable[tuple[tuple[float, float], str, float]]:  # fmt: skip
  """(place, text, font size): a number in each field or, where there is no room, one text for all
  devices of a tile, or of as many tiles below each other as a line of text needs."""
  digits = len(str(max(centres)))
  size = min(11.0, 72 * field_height * 0.6, 72 * field_width / digits / 0.7)
  if size >= 5:
    yield from ((place, str(device), size) for device, place in centres.items())
    return
  needed = min(t.outer, math.ceil(10 / 72 / height))
  rows = next(n for n in range(needed, t.outer + 1) if t.outer % n == 0)
  for column in range(len(t.columns)):
    for start in range(0, len(tops), rows):
      block = range(start, start + rows)
      devices = sorted(device for row in block for device in t.holders[row][column])
      middle = (tops[block[0]] + tops[block[-1]] + 1) / 2
      text = numbers(devices)
      room = 72 * _PANEL[0] / len(t.columns) / len(text) / 0.6
      if room >= 4:
        yield (column + 0.5, middle), text, min(7.0, room)
