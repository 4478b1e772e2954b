"""The plan as one page: memory and time as bars, the mesh on its axes, options, the bill.

Nothing but HTML and CSS in one file: no script, no font, no picture from elsewhere.
"""

import html
import math
from collections.abc import Iterable, Sequence

from mesh.hardware import Chip

from .cost import Bill
from .estimate import memory_rows
from .memory import gigabytes
from .search import Option, loses_by
from .speed import mfu, time_rows

_COLORS = (
  "#3b6ea5", "#7aa6d2", "#c0392b", "#e08e79", "#4f8f5b", "#9cc5a1", "#8e6bb0", "#c9b3dd", "#b8860b",
  "#e3c878", "#5f6a72",
)  # fmt: skip
_AXIS_SHOWN = 16  # devices of an axis that are drawn one by one
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
.track { display: grid; grid-template-columns: 8rem 1fr 5rem; gap: .6rem; align-items: center;
  margin: .25rem 0; font-size: 13px; } .track .bar { height: 1rem; }
.axis { display: grid; grid-template-columns: 8rem 1fr; gap: .6rem; align-items: center;
  margin: .25rem 0; } .cells { display: flex; gap: 2px; }
.cells b { flex: 0 0 1.1rem; height: 1.1rem; background: #3b6ea5; border-radius: 2px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td:not(.text) { white-space: nowrap; }
code { background: #f3f3f3; padding: .1rem .3rem; border-radius: 3px; word-break: break-word; }
"""


def write_page(
  title: str, own: Option, options: Sequence[Option], chip: Chip, available: int, bill: Bill
) -> str:
  """The whole file.

  Args:
    own: the config as it is.
    options: of `search`.
    available: bytes of a device.
  """
  best = options[0] if options and options[0].fits else None
  parts = [
    f"<h1>{_text(title)}</h1>",
    f"<p class=quiet>{_text(own.name)}. Estimates from shapes and data sheets.</p>",
    "<h2>Memory of a device</h2>",
    _memory(own, available),
    "<h2>Time of a step</h2>",
    _time(own, chip),
    "<h2>Mesh</h2>",
    _mesh(own),
    "<h2>The run</h2>",
    _table(("", "", "on which grounds"), bill.rows(), text=(2,)),
  ]
  if options:
    rows = [_row(option, options[0], chip, available) for option in options[:12]]
    head = ("mesh, recomputation, parts", "memory", "seconds", "MFU", "why not the first")
    parts += ["<h2>Options</h2>", _table(head, rows, text=(4,))]
  if best is not None:
    parts.append(
      f"<p>The first: <code>{_text(' '.join(best.overrides(own.setup.config)))}</code></p>"
    )
  body = "\n".join(parts)
  return (
    f"<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>{_text(title)}</title>"
    f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
  )


def _text(value: object) -> str:
  return html.escape(str(value))


def _bar(amounts: Iterable[tuple[str, float, str]], whole: float) -> str:
  """A bar of parts, each (name, amount, as text), and its legend."""
  shown = [item for item in amounts if item[1] > 0]
  spans, legend = [], []
  for i, (name, amount, text) in enumerate(shown):
    color, label = _COLORS[i % len(_COLORS)], f"{_text(name)} {_text(text)}"
    width = f"width:{100 * amount / whole:.2f}%"
    spans.append(f'<span style="background:{color};{width}" title="{label}"></span>')
    legend.append(f'<span><i style="background:{color}"></i>{label}</span>')
  return f"<div class=bar>{''.join(spans)}</div><div class=legend>{''.join(legend)}</div>"


def _memory(option: Option, available: int) -> str:
  needed = option.memory.total
  amounts = [(name, n, gigabytes(n)) for name, n in memory_rows(option.memory)]
  share = f"{gigabytes(needed)} of {gigabytes(available)}"
  verdict = (
    f"<p>{share}: fits</p>" if needed <= available else f"<p class=bad>{share}: too much</p>"
  )
  return _bar(amounts, max(available, needed)) + verdict


def _time(option: Option, chip: Chip) -> str:
  step = option.step
  amounts = [(name, seconds, f"{seconds:.3f} s") for name, seconds in time_rows(step)]
  tracks = [("computing", step.compute), *step.traffic.items()]
  lines = []
  for name, seconds in tracks:
    width = min(100.0, 100 * seconds / step.total)
    color = "#3b6ea5" if name == "computing" else "#b8860b"
    lines.append(
      f'<div class=track><span>{_text(name)}</span><div class=bar><span style="background:{color};'
      f'width:{width:.2f}%"></span></div><span>{seconds:.3f} s</span></div>'
    )
  share = f"{step.total:.3f} s, MFU {mfu(option.setup, chip, step.total):.1%}"
  hidden = sum(step.traffic.values()) - step.exposed
  note = f"traffic behind the computing {hidden:.3f} s, in the open {step.exposed:.3f} s"
  return f"{_bar(amounts, step.total)}<p>{share}; {note}</p>{''.join(lines)}"


def _mesh(option: Option) -> str:
  """Each axis with its devices."""
  lines = []
  for axis, size in option.setup.mesh.shape.items():
    if size > 1:
      more = f" … {size}" if size > _AXIS_SHOWN else ""
      cells = "<b></b>" * min(size, _AXIS_SHOWN)
      name = f"<span>{_text(axis)} {size}</span>"
      lines.append(f"<div class=axis>{name}<div class=cells>{cells}{more}</div></div>")
  devices = math.prod(option.setup.mesh.shape.values())
  return "".join(lines) + f"<p class=quiet>{devices} devices</p>"


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


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text: Sequence[int] = ()) -> str:
  def line(tag: str, cells: Sequence[str]) -> str:
    kind = lambda i: " class=text" if i in text else ""
    return "".join(f"<{tag}{kind(i)}>{_text(cell)}</{tag}>" for i, cell in enumerate(cells))

  body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
  return f"<table><tr>{line('th', head)}</tr>{body}</table>"
