"""`LOGBOOK.md`: the logbook as a page of text, made anew from the events each time."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..planning.memory import gigabytes
from .facts import (
  Facts,
  big,
  brief,
  class_name,
  gather,
  interventions,
  moment,
  outcome,
  small,
  span,
  stamp,
  state,
)
from .ledger import TIMES, Attempt

_MOST_ROWS = 3000  # of metrics: a trainer has no time for more
_MOST_ATTEMPTS = 60  # rows of the table of attempts: the first few, and the last
_ROUTINE = (
  "perf",
  "energy",
  "health",
  "effective_config",
)  # not in the time line while all is well
_OWN = "`prices.toml` in the run directory can say it"
_ID = 4  # last digits of an id that people read


def write_book(folder: Path, note: Callable[[str], None] = print) -> Path | None:
  """Make `LOGBOOK.md` of the events and metrics in `folder`. A book that can't be made stops no
  training: `note` is told why, and None returned."""
  path = folder / "LOGBOOK.md"
  temporary = path.with_suffix(".md.tmp")
  try:
    temporary.write_text(markdown(gather(folder, most=_MOST_ROWS)), encoding="utf-8")
    os.replace(temporary, path)
  except Exception as e:
    note(f"LOGBOOK.md could not be written: {e}")
    return None
  return path


def markdown(facts: Facts) -> str:
  """The whole page."""
  parts = [[f"# {_safe(facts.name)}: logbook", "", f"{_safe(state(facts))}."]]
  if facts.problems:
    parts.append(["**This logbook is not as it was written:**", "",
                  *(f"- {_safe(p)}" for p in facts.problems)])  # fmt: skip
  parts.append(table(("", ""), totals(facts)))
  parts += [_times(facts), _interventions(facts), _attempts(facts), _checkpoints(facts)]
  parts.append(["## Time line", "", "```text", *map(_fenced, time_line(facts)), "```"])
  made = "Made from " + ", ".join(f"`{name}`" for name in _files(facts)) + "; not to be edited. "
  parts.append([made + 'A note of yours: `python -m experiments.logbook note "..." --workdir=...`'])
  return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _files(facts: Facts) -> list[str]:
  names = sorted(p.name for p in facts.folder.glob("logbook*.jsonl"))
  return [*names, "metrics.jsonl"]


def totals(facts: Facts) -> list[tuple[str, str]]:
  """(what, how much), of the whole run so far."""
  launch, work, times = facts.launch, facts.work, facts.ledger
  rows = []
  if launch:
    counts = [big(launch["parameters"]) + " parameters"] if launch["parameters"] else []
    if launch["active_parameters"] not in (None, launch["parameters"]):
      counts.append(f"{big(launch['active_parameters'])} active")
    rows.append(("config", ", ".join([launch["config"], *counts])))
    axes = " x ".join(f"{axis}={size}" for axis, size in launch["mesh"].items() if size > 1)
    machine = f"{launch['devices']:,} x {launch['device_kind']}"
    rows.append(("devices", machine + (f", mesh {axes}" if axes else "")))
  again = times.lost_steps if times else 0
  total = f" of {launch['steps']:,}" if launch else ""
  twice = f"; {again:,} more were done again" if again else ""
  rows.append(("steps", f"{facts.step:,}{total}{twice}"))
  rows += _learned(facts)
  if work.tokens is not None:
    rows.append(("tokens", big(work.tokens)))
  if work.flops is not None:
    rows.append(("model FLOP", f"{work.flops:.3g} (PaLM's convention)"))
  if work.stepping is not None and work.running is not None:
    hardware = "" if work.hardware is None else f"; HFU {work.hardware:.1%}"
    rows.append(("MFU", f"{work.stepping:.1%} while stepping, {work.running:.1%} of all the time "
                        f"a process ran{hardware}"))  # fmt: skip
  rows += _speed(facts)
  if times:
    begin, end = moment(times.attempts[0].begin), moment(times.attempts[-1].end)
    rows.append(("time", f"{span(times.wall)}, from {begin} to {end}"))
    rows.append(("goodput", f"{times.goodput:.1%}"))
  return rows + _costs(facts)


def _speed(facts: Facts) -> list[tuple[str, str]]:
  """Of the newest steps that were measured."""
  told = facts.of("perf")
  if not told:
    return []
  last, hosts = told[-1]["detail"], ""
  if last.get("host_max"):
    hosts = (
      f"; hosts' own work {last['host_p50_s']:.3g} s a step in the middle, at most "
      f"{last['host_max_s']:.3g} s, {last['host_max']}"
    )
  return [("speed", told[-1]["summary"] + hosts)]


def _learned(facts: Facts) -> list[tuple[str, str]]:
  held = [row for row in facts.history.rows if row.get("heldout_loss") is not None]
  rows = []
  losses = [row for row in facts.history.rows if row.get("loss") is not None]
  if losses:
    rows.append(("loss", f"{losses[-1]['loss']:.4g} at step {losses[-1]['step']:,}"))
  if held:
    best, last = min(held, key=lambda row: row["heldout_loss"]), held[-1]
    lowest = "" if best is last else f"; lowest {best['heldout_loss']:.4g} at {best['step']:,}"
    bits = last.get("heldout_bits_per_byte")
    more = "" if bits is None else f" ({bits:.3f} bits a byte)"
    rows.append(
      ("held-out loss", f"{last['heldout_loss']:.4g}{more} at step {last['step']:,}{lowest}")
    )
  return rows


def _costs(facts: Facts) -> list[tuple[str, str]]:
  rows = []
  for bill in facts.bills:
    chip = bill.chip
    price = (
      f" at {bill.price.usd_per_hour:g} USD an hour"
      if bill.price
      else f": no price of {chip} ({_OWN})"
    )
    rows.append(("chip-hours", f"{small(bill.chip_hours, '')}of {chip}".replace("  ", " ")))
    rows.append(("cost", small(bill.usd, "USD") + price))
    if bill.power is None:
      rows.append(("energy", f"unknown: nobody published the power of {chip} ({_OWN})"))
      continue
    grounds = f" ({bill.power.watts:g} W a chip, PUE {bill.pue.value:g})"
    rows.append(("energy", small(bill.kwh, "kWh") + grounds))
    grounds = f" ({bill.carbon.kg_per_kwh:g} kg/kWh: {bill.carbon.scope})"
    rows.append(("carbon", small(bill.kg_co2e, "kg CO2e") + grounds))
  if not facts.bills and facts.device_hours:
    kind = facts.launch["device_kind"]
    rows.append(("device-hours", f"{small(facts.device_hours, '').strip()} of {kind}"))
    rows.append(("cost, energy", f"unknown: there is no price and no power of {kind}"))
  return rows


def times(facts: Facts) -> list[tuple[str, str, str]]:
  """The goodput ledger: (bucket, time, share of the whole)."""
  found = facts.ledger
  if found is None:
    return []
  return [
    (name, span(seconds), f"{seconds / found.wall:.1%}")
    for name in TIMES
    if (seconds := found.seconds[name]) >= 0.005
  ]


def _times(facts: Facts) -> list[str]:
  if facts.ledger is None:
    return []
  lines = ["## Where the time went", "", *table(("", "time", "share"), times(facts))]
  return [*lines, "", unexplained(facts)] if unexplained(facts) else lines


def unexplained(facts: Facts) -> str:
  """What the buckets lack, in words; empty up to a hundredth."""
  found = facts.ledger
  if found is None or abs(found.unexplained) <= 0.01 * found.wall:
    return ""
  amount = span(abs(found.unexplained))
  return f"{amount} are in no bucket, or in two: a clock was set, or the machine slept."


def _interventions(facts: Facts) -> list[str]:
  rows = [
    (stamp(event["time"]), event["run"], _step(event), what, event["detail"].get("reason") or "",
     outcome(facts, event))
    for event, what in interventions(facts)
  ]  # fmt: skip
  if not rows:
    return []
  head = ("time", "run", "step", "what changed", "why", "outcome")
  return ["## Interventions", "", *table(head, rows)]


def _attempts(facts: Facts) -> list[str]:
  """How often and why it ended, and each attempt."""
  times = facts.ledger
  if times is None or len(times.attempts) < 2:
    return []
  failures, lines = times.failures, ["## Restarts", ""]
  count = len(times.attempts)
  if times.mtbf is not None:
    words = "1 failure" if len(failures) == 1 else f"{len(failures)} failures"
    lines += [f"{count} attempts, {words}, {span(times.mtbf)} between failures on average.", ""]
  else:
    lines += [f"{count} attempts, none of which failed.", ""]
  if len(failures) > 2:
    lines += [*table(("cause", "times", "steps lost", "time lost"), by_class(failures)), ""]
  head = ("run", "began", "steps", "ran", "ended by", "steps lost")
  rows = [attempt_row(attempt) for attempt in times.attempts]
  if len(rows) > _MOST_ATTEMPTS:
    left = len(rows) - _MOST_ATTEMPTS
    rows[10 : 10 + left] = [(f"{left} more", "", "", "", "", "")]
  return lines + table(head, rows)


def by_class(failures: Sequence[Attempt]) -> list[tuple[str, ...]]:
  """(cause, times, steps lost, time lost), the most frequent first."""
  name_of = lambda attempt: class_name(attempt.cls) if attempt.cls else attempt.reason
  counts = Counter(map(name_of, failures))
  rows = []
  for name, count in counts.most_common():
    own = [attempt for attempt in failures if name_of(attempt) == name]
    steps, seconds = sum(a.lost_steps for a in own), sum(a.lost_seconds for a in own)
    rows.append((name, str(count), f"{steps:,}", span(seconds)))
  return rows


def attempt_row(a: Attempt) -> tuple[str, ...]:
  ended = {"open": "", "finished": "finished"}.get(a.reason)
  if ended is None:
    cls = f"{class_name(a.cls)}: " if a.cls else ""
    ended = f"{cls}{brief(a.cause) or 'died without a word'}"
  lost = f"{a.lost_steps:,}" if a.lost_steps else ""
  steps = f"{a.first_step:,} to {a.last_step:,}"
  return a.run, moment(a.begin), steps, span(a.end - a.begin), ended, lost


def _checkpoints(facts: Facts) -> list[str]:
  done = [e for e in facts.of("checkpoint") if e["detail"]["status"] == "finished"]
  bad = [e for e in facts.of("checkpoint") if e["detail"]["status"] in ("failed", "refused")]
  if not done and not bad:
    return []
  lines = ["## Checkpoints", ""]
  if done:
    last = done[-1]["detail"]
    size = "" if last["bytes"] is None else f", {gigabytes(last['bytes'])}"
    lines.append(f"{len(done):,} saved; the newest of step {last['step']:,}{size}.")
    block = [e["detail"]["block_s"] for e in done if e["detail"]["block_s"] is not None]
    if block:
      mean = sum(block) / len(block)
      lines.append(
        f"Saving held up training for {span(mean)} on average, {span(max(block))} at most."
      )
  lines += ["", *(f"- {stamp(e['time'])} {_safe(e['summary'])}" for e in bad)] if bad else []
  return lines


def time_line(facts: Facts) -> list[str]:
  """A line an event; saves that follow each other in one, and no routine measurements."""
  linked = {ref for e in facts.events for ref in (*e["refs"], e["detail"].get("cause"))}
  explained: dict[str, list[str]] = {}
  for event in facts.of("note", "postmortem"):
    if event["refs"]:
      linked.add(event["id"])
    for ref in event["refs"]:
      explained.setdefault(ref, []).append(event["id"][-_ID:])
  lines, saves = [], []
  for event in [*facts.events, None]:
    if event is not None and event["kind"] == "checkpoint" and event["severity"] == "info":
      if event["detail"]["status"] == "finished":
        saves.append(event)
      continue
    if event is not None and is_routine(event):
      continue
    if saves:
      lines += _saves(saves)
      saves = []
    if event is not None:
      lines += human_lines(event, linked=linked, explained=explained)
  return lines


def is_routine(event: dict[str, Any]) -> bool:
  """Figures that are in the totals, and what is as it should be."""
  return event["kind"] in _ROUTINE and event["severity"] == "info"


def _saves(saves: list[dict[str, Any]]) -> list[str]:
  if len(saves) == 1:
    return human_lines(saves[0])
  first, last = saves[0], saves[-1]
  steps = f"steps {first['detail']['step']:,} to {last['detail']['step']:,}"
  who = f"[{last['owner'] or last['source']}] {last['run']}"
  return [f"{stamp(last['time'])} {who} {steps} CHECKPOINT {len(saves)} saved"]


def human_lines(
  event: dict[str, Any],
  *,
  linked: Iterable[str] = (),
  explained: dict[str, list[str]] | None = None,
) -> list[str]:
  """An event for people: time [owner] run step WHAT summary; a note's further lines below.

  Args:
    linked: ids that other events speak of: such an event shows its own.
    explained: by id, events that explain it.
  """
  detail, kind = event["detail"], event["kind"]
  parts = [stamp(event["time"]), f"[{event['owner'] or event['source']}]", event["run"]]
  if event["step"] is not None:
    parts.append(f"step {_step(event)}")
  parts += [word_of(event), event["summary"]]
  line = " ".join(parts)
  if detail.get("cause"):
    line += f"; cause {detail['cause'][-_ID:]}"
  if event["id"] in linked:
    line += f" ({event['id'][-_ID:]})"
  for other in (explained or {}).get(event["id"], ()):
    line += f"  WARNING: see {other}"
  more = detail["text"].splitlines()[1:] if kind == "note" else []
  return [line, *(f"    {text}" for text in more)]


def word_of(event: dict[str, Any]) -> str:
  """What an event is, in capitals: its kind, or what was done."""
  policy = event["detail"]["policy"] if event["kind"] == "action" else "none"
  return (event["kind"] if policy == "none" else policy).upper()


def _step(event: dict[str, Any]) -> str:
  return "" if event["step"] is None else f"{event['step']:,}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
  """Of Markdown."""
  line = lambda cells: f"| {' | '.join(map(_safe, cells))} |"
  return [line(head), "|" + "---|" * len(head), *map(line, rows)]


def _safe(text: str) -> str:
  """Text that Markdown and HTML leave as it is."""
  text = " ".join(str(text).split())
  for mark, instead in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "'"), ("*", "\\*")):
    text = text.replace(mark, instead)
  return text


def _fenced(line: str) -> str:
  """A line that can't end the block it stands in, nor move a terminal's cursor."""
  kept = "".join(c if c.isprintable() or c == " " else "·" for c in line)
  return kept.replace("```", "'''")
