"""The plan as one page: memory and time as bars, the mesh on its axes, options, the bill.

Nothing but HTML and CSS in one file: no script, no font, no picture from elsewhere.
"""

import math
from collections.abc import Sequence

from mesh.hardware import CHIPS, Chip
from mesh.slices import Topology

from ..config import Config
from ..markup import bar, escape, table
from . import drawing
from .cost import Bill
from .estimate import memory_rows
from .fixes import FIX_COLUMNS, Fix, fix_rows, no_fix
from .flops import flop_rows, per_device, step_flops
from .machines import where
from .memory import gigabytes
from .network import NODE, inside_sizes, slices_along
from .places import Places, places, run_of
from .search import ROOM, Option, loses_by
from .speed import HIDDEN_AXES, mfu, time_rows
from .tables import LARGEST_COLUMNS, dcn_text, largest_rows

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 68rem;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .3rem 0; } .quiet { color: #666; } .bad { color: #c0392b; font-weight: 600; }
.bar { display: flex; height: 2.2rem; background: #eee; border-radius: 3px; overflow: hidden; }
.bar span { display: block; min-width: 1px; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .4rem 0; font-size: 13px; }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px;
  margin-right: .4rem; vertical-align: -1px; }
figure { margin: .8rem 0 0; overflow-x: auto; } figcaption { font-size: 13px; }
svg { display: block; font-size: 12px; max-width: 100%; height: auto; } svg .on { fill: #fff; }
svg .end { text-anchor: end; } svg .in { font-size: 9px; text-anchor: middle; }
svg .under { fill: #666; font-size: 11px; }
.mesh { display: flex; flex-wrap: wrap; gap: 0 2rem; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td:not(.text) { white-space: nowrap; }
code { background: #f3f3f3; padding: .1rem .3rem; border-radius: 3px; word-break: break-word; }
"""


def write_page(
  config: Config,
  topology: Topology,
  own: Option,
  options: Sequence[Option],
  available: int,
  bill: Bill,
  found: Sequence[Fix] = (),
  note: str = "",
) -> str:
  """The whole file.

  Args:
    config: as it was asked for.
    topology: the machine, or each slice of it.
    own: the config as it is, or the option in its place that `note` explains.
    options: of `search`.
    available: bytes of a device.
    found: of `fixes`, where `own` does not fit.
  """
  chip = CHIPS[topology.chip]
  title = f"{config.name} on {where(config, topology)}"
  best = options[0] if options and options[0].fits else None
  parts = [
    f"<h1>{escape(title)}</h1>",
    f"<p class=quiet>{escape(own.name)}. Estimates from shapes and data sheets.</p>",
    *([f"<p class=bad>{escape(note)}</p>"] if note else []),
    "<h2>Memory of a device</h2>",
    _memory(own, available),
    *(_changes(own, found, available) if not own.fits else []),
    "<h2>Time of a step</h2>",
    _time(own, chip),
    "<h2>Work of a device</h2>",
    _work(own, chip),
    "<h2>Mesh</h2>",
    _mesh(own, topology),
    "<h2>The run</h2>",
    table(("", "", "on which grounds"), bill.rows(), words=(2,)),
  ]
  if options:
    rows = [_row(option, options[0], chip, available) for option in options[:12]]
    head = ("mesh, recomputation, parts", "memory", "seconds", "MFU", "why not the first")
    parts += ["<h2>Options</h2>", table(head, rows, words=(4,))]
  if best is not None:
    parts.append(f"<p>The first: <code>{escape(' '.join(best.overrides(config)))}</code></p>")
  body = "\n".join(parts)
  return (
    f"<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>{escape(title)}</title>"
    f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
  )


def _memory(option: Option, available: int) -> str:
  needed = option.memory.total
  amounts = [(name, n, gigabytes(n)) for name, n in memory_rows(option.memory)]
  share = f"{gigabytes(needed)} of {gigabytes(available)}"
  verdict = (
    f"<p>{share}: fits</p>" if needed <= available else f"<p class=bad>{share}: too much</p>"
  )
  return bar(amounts, max(available, needed)) + verdict


def _changes(option: Option, found: Sequence[Fix], available: int) -> list[str]:
  """The largest arrays, and what to change, as the terminal has them."""
  parts = [
    "<h2>What does not fit</h2>",
    table(LARGEST_COLUMNS, largest_rows(option.setup)),
    "<h2>What to change</h2>",
  ]
  if found:
    parts.append(table(FIX_COLUMNS, fix_rows(found, int(ROOM * available))))
  if not any(fix.fits for fix in found):
    parts.append(f"<p class=bad>{escape(no_fix(option.setup.config))}</p>")
  return parts


def _work(option: Option, chip: Chip) -> str:
  flops = per_device(step_flops(option.setup, chip), option.setup)
  rows = [(name, n, f"{n:.3g}") for name, n in flop_rows(flops)]
  assert chip.flops_per_device
  hfu = flops.total / option.step.total / chip.flops_per_device
  return bar(rows, flops.total) + f"<p>{flops.total:.3g} FLOP, HFU {hfu:.1%}</p>"


def _time(option: Option, chip: Chip) -> str:
  step = option.step
  text = lambda seconds: drawing.duration(seconds, step.total)
  amounts = [(name, seconds, text(seconds)) for name, seconds in time_rows(step)]
  found = drawing.tracks(step, dict(option.setup.mesh.shape), chip)
  share = f"{text(step.total)}, MFU {mfu(option.setup, chip, step.total):.1%}"
  kinds = ((drawing.HIDDEN, "hidden under the computing"), (drawing.EXPOSED, "hidden by nothing"))
  legend = [
    (color, f"{axis} {text(end - begin)}, {kind}")
    for color, kind in kinds
    for parts in found.values()
    for axis, begin, end, shown in parts
    if shown == color and end > begin
  ]
  if step.bubble:
    legend.append((drawing.WAITING, f"waiting for other stages {text(step.bubble)}"))
  drawn = "".join(f'<span><i style="background:{c}"></i>{line}</span>' for c, line in legend)
  idle = [track for track, parts in found.items() if not parts]
  notes = [
    f"As the estimate has it: traffic of weights and gradients ({', '.join(HIDDEN_AXES)}) runs "
    "while layers compute, the rest on its own. In a step both come layer by layer."
  ]
  if idle:
    why = ", since this is one slice" if idle == ["DCN"] else ""
    notes.append(f"Nothing goes over {' or '.join(idle).replace('network', 'the network')}{why}.")
  if between := dcn_text(option.setup, chip):
    notes.append(f"{between[0].upper()}{between[1:]}.")
  return (
    f"{bar(amounts, step.total)}<p>{share}</p>"
    f"<figure>{drawing.timeline(found, step.total)}</figure><div class=legend>{drawn}</div>"
    f"<p class=quiet>{' '.join(notes)}</p>"
  )


def _mesh(option: Option, topology: Topology) -> str:
  """Each axis on the machine."""
  sizes = inside_sizes(option.setup, CHIPS[topology.chip])
  if math.prod(sizes.values()) == 1:
    return "<p class=quiet>One device.</p>"
  found = places(topology, sizes)
  figures = []
  for i, (axis, size) in enumerate(sizes.items()):
    if size > 1:
      picture, part = drawing.mesh_picture(found, i)
      text = "; ".join(([run_of(found, i)] if found.known else []) + ([part] if part else []))
      name = f"<b>{escape(axis)} {size}</b> {escape(text)}"
      figures.append(f"<figure><figcaption>{name}</figcaption>{picture}</figure>")
  return (
    f"<p class=quiet>{escape(_slices(option, topology) + _where(topology, found))}</p>"
    f"<div class=mesh>{''.join(figures)}</div>"
  )


def _slices(option: Option, topology: Topology) -> str:
  """Which axes span slices, all of which look the same; empty for one."""
  along = slices_along(option.setup, CHIPS[topology.chip])
  spans = ", ".join(f"{axis} over {n}" for axis, n in along.items())
  return f"Each of {math.prod(along.values())} slices, {spans} of them: " if along else ""


def _where(topology: Topology, found: Places) -> str:
  count = math.prod(found.places.shape[:-1])
  numbers = "A number, and a color, is a device's place along the axis."
  if not found.known:
    why = "their places on the machine show only where it runs"
    return f"{count} devices in the order of the mesh: {why}. {numbers}"
  if found.names[2] == "node":
    return f"{count} GPUs in nodes of {NODE}, in their order. {numbers}"
  sides = " x ".join(map(str, topology.shape))
  return f"{count} devices on {sides} chips, laid as a run would lay them. {numbers}"


def _row(option: Option, best: Option, chip: Chip, available: int) -> tuple[str, ...]:
  size = gigabytes(option.memory.total)
  if not option.fits:
    return (
      option.name,
      size,
      "",
      "",
      f"{gigabytes(max(0, option.memory.total - available))} too much",
    )
  seconds = option.step.total
  why = "" if option is best else loses_by(option, best)
  return option.name, size, f"{seconds:.2f}", f"{mfu(option.setup, chip, seconds):.1%}", why
