"""The logbook as one page for a browser: curves with what happened, time, cost, tables, time line.

One file that needs no network: styles and a short script are inside it.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from ..markup import bar, escape, table
from .chart import curves, loss_chart, progress_chart
from .facts import Facts, big, interventions, moment, outcome, small, span, stamp, state
from .ledger import TIMES
from .look import SCRIPT, STYLE
from .text import attempt_row, by_class, is_routine, totals, unexplained, word_of

_WIDE, _NARROW = 1080, 372  # pixels: of a desk, of a phone
_ORDER = ("productive", "lost", "down", "paused", *TIMES)  # of the bar
_OPEN = 60  # events up to which the time line is open at first

_KEY = (
  ("main", "training"),
  ("held", "held out"),
  ("lost", "taken back"),
)


def write_page(facts: Facts) -> Path:
  """Write `logbook.html` into the run directory."""
  path = facts.folder / "logbook.html"
  temporary = path.with_suffix(".html.tmp")
  temporary.write_text(page(facts), encoding="utf-8")
  os.replace(temporary, path)
  return path


def page(facts: Facts) -> str:
  """The whole file."""
  launch = facts.launch
  machine = f"{launch['devices']:,} x {launch['device_kind']}" if launch else ""
  parts = [
    f"<h1>{escape(facts.name)}</h1>",
    f"<p class=quiet>{escape(machine)}</p>",
    f"<p class=state>{escape(state(facts))}</p>",
    _alarm(facts.problems),
    _cards(facts),
    _loss(facts),
    _progress(facts),
    _goodput(facts),
    _curves(facts),
    _interventions(facts),
    _restarts(facts),
    "<h2>Totals</h2>",
    _scroll(table(("", ""), totals(facts), words=(1,))),
    _software(facts),
    _time_line(facts),
  ]
  body = "\n".join(part for part in parts if part)
  return (
    "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
    '<meta name=viewport content="width=device-width, initial-scale=1">'
    f"<title>{escape(facts.name)}: logbook</title><style>{STYLE}</style></head>\n"
    f"<body>\n{body}\n<script>{SCRIPT}</script>\n</body></html>\n"
  )


def _scroll(inner: str) -> str:
  return f"<div class=scroll>{inner}</div>"


def _alarm(problems: Sequence[str]) -> str:
  lines = "".join(f"<p>{escape(problem)}</p>" for problem in problems)
  return f"<div class=alarm><b>Not as it was written</b>{lines}</div>" if problems else ""


def _cards(facts: Facts) -> str:
  times, work, launch = facts.ledger, facts.work, facts.launch
  total = f"of {launch['steps']:,}" if launch else ""
  cards = [("steps", f"{facts.step:,}", total)]
  held = [row for row in facts.history.rows if row.get("heldout_loss") is not None]
  losses = [row for row in facts.history.rows if row.get("loss") is not None]
  if held:
    bits = held[-1].get("heldout_bits_per_byte")
    more = "" if bits is None else f"{bits:.3f} bits a byte"
    cards.append(("held-out loss", f"{held[-1]['heldout_loss']:.4g}", more))
  elif losses:
    cards.append(("loss", f"{losses[-1]['loss']:.4g}", ""))
  if work.tokens is not None:
    cards.append(("tokens", big(work.tokens), f"{work.flops:.2g} model FLOP"))
  if times:
    cards.append(("goodput", f"{times.goodput:.1%}", f"of {span(times.wall)}"))
    between = "none failed" if times.mtbf is None else f"{span(times.mtbf)} between failures"
    cards.append(("restarts", str(len(times.attempts) - 1), between))
  if work.stepping is not None:
    hardware = "" if work.hardware is None else f", HFU {work.hardware:.1%}"
    more = f"of all time: MFU {work.running:.1%}{hardware}"
    cards.append(("MFU while stepping", f"{work.stepping:.1%}", more))
  for bill in facts.bills:
    cards.append((f"{bill.chip} chip-hours", small(bill.chip_hours, ""), small(bill.usd, "USD")))
    carbon = "no published power" if bill.kwh is None else small(bill.kg_co2e, "kg CO2e")
    cards.append(("energy", small(bill.kwh, "kWh"), carbon))
  if not facts.bills and facts.device_hours:
    cards.append(("device-hours", small(facts.device_hours, ""), "cost and energy unknown"))
  drawn = "".join(
    f"<div class=card><span>{escape(name)}</span><b>{escape(value)}</b>"
    f"<small>{escape(more)}</small></div>"
    for name, value, more in cards
  )
  return f"<div class=cards>{drawn}</div>"


def _loss(facts: Facts) -> str:
  wide = loss_chart(facts, _WIDE)
  if not wide:
    return ""
  key = "".join(
    f'<span><i class=stroke style="background:var(--{color})"></i>{name}</span>'
    for color, name in _KEY
    if name != "taken back" or facts.history.abandoned
  )
  return (
    f"<h2>Loss, nats</h2>\n<div class=legend>{key}</div>\n"
    f"<figure>{wide}\n{loss_chart(facts, _NARROW)}</figure>"
  )


def _progress(facts: Facts) -> str:
  wide = progress_chart(facts, _WIDE)
  if not wide:
    return ""
  again = facts.ledger is not None and facts.ledger.lost_steps
  note = "In red, steps that were done again; in grey, time when nothing ran." if again else ""
  return (
    f"<h2>Steps over time</h2>\n<figure><figcaption>{note}</figcaption>"
    f"{wide}\n{progress_chart(facts, _NARROW)}</figure>"
  )


def _goodput(facts: Facts) -> str:
  times = facts.ledger
  if times is None:
    return ""
  names = [name for name in dict.fromkeys(_ORDER) if times.seconds[name] > 0]
  words = lambda name: f"{span(times.seconds[name])}, {times.seconds[name] / times.wall:.1%}"
  amounts = [(name, times.seconds[name], words(name)) for name in names]
  whole = max(times.wall, sum(times.seconds.values()))
  colors = [f"var(--{'t-lost' if name == 'lost' else name})" for name in names]
  begin, end = moment(times.attempts[0].begin), moment(times.attempts[-1].end)
  return (
    f"<h2>Where the time went</h2>\n{bar(amounts, whole, colors)}"
    f"<p class=quiet>{span(times.wall)}, from {begin} to {end}. {unexplained(facts)}</p>"
  )


def _curves(facts: Facts) -> str:
  drawn = "".join(
    f"<figure><figcaption>{escape(name)}</figcaption>{picture}</figure>\n"
    for name, picture in curves(facts)
  )
  return f"<h2>Health</h2>\n<div class=small-ones>\n{drawn}</div>" if drawn else ""


def _interventions(facts: Facts) -> str:
  rows = []
  for event, what in interventions(facts):
    step = "" if event["step"] is None else f"{event['step']:,}"
    why = event["detail"].get("reason") or ""
    rows.append((stamp(event["time"]), event["run"], step, what, why, outcome(facts, event)))
  head = ("time", "run", "step", "what changed", "why", "outcome")
  return f"<h2>Interventions</h2>\n{_scroll(table(head, rows, words=(3, 4, 5)))}" if rows else ""


def _restarts(facts: Facts) -> str:
  times = facts.ledger
  if times is None or len(times.attempts) < 2:
    return ""
  parts = ["<h2>Restarts</h2>"]
  if len(times.failures) > 2:
    head = ("cause", "times", "steps lost", "time lost")
    parts.append(_scroll(table(head, by_class(times.failures))))
  head = ("run", "began", "steps", "ran", "ended by", "steps lost")
  rows = [attempt_row(attempt) for attempt in times.attempts]
  every = _scroll(table(head, rows, words=(4,)))
  opened = " open" if len(rows) <= 12 else ""
  parts.append(f"<details{opened}><summary>{len(rows)} attempts</summary>{every}</details>")
  return "\n".join(parts)


_MAIN = (
  "python", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy", "meshyard",
)  # fmt: skip


def _software(facts: Facts) -> str:
  if not facts.launch:
    return ""
  versions = facts.launch["versions"]
  shown = [f"{name} {versions[name]}" for name in _MAIN if name in versions]
  commit = facts.launch["git_commit"]
  if commit:
    dirty = " with changes" if facts.launch["git_dirty"] else ""
    shown.append(f"code {commit[:12]}{dirty}")
  return f"<p class=quiet>{escape(', '.join(shown))}</p>"


def _time_line(facts: Facts) -> str:
  """Every event that is no routine, and what it says."""
  items = []
  for event in facts.events:
    if is_routine(event):
      continue
    step = "" if event["step"] is None else f"step {event['step']:,}: "
    note = event["detail"]["text"] if event["kind"] == "note" else event["summary"]
    who = f"{event['owner'] or event['source']} {event['run']}"
    items.append(
      f"<li class={event['severity']}><time>{stamp(event['time'])}</time>"
      f"<span class=who>{escape(who)}</span>"
      f"<span class=what><b>{word_of(event)}</b>{escape(step + note)}</span></li>"
    )
  if not items:
    return ""
  opened = " open" if len(items) <= _OPEN else ""
  return (
    f"<h2>Time line</h2>\n<details{opened}><summary>{len(items):,} events</summary>"
    f"<ol class=line>\n{chr(10).join(items)}\n</ol></details>"
  )
