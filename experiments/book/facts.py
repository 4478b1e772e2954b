"""What a run's logbook and metrics tell: how far it is, what it took, what happened."""

import datetime
import functools
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from mesh.hardware import CHIPS, Chip, find_chip

from ..config import Config, ConfigError
from ..planning.cost import Bill, Prices, bill
from ..planning.search import abstract_mesh
from ..planning.speed import count_work
from ..training.folder import read_config
from ..training.logbook import CLASSES, read_logbook
from ..training.metrics import History, read_history
from ..training.setup import build_on
from .ledger import Attempt, Ledger, ledger, when


class Work(NamedTuple):
  """Tokens and FLOPs that count, and those of all steps that ran; None is unknown."""

  tokens: int | None
  all_tokens: int | None
  flops: float | None  # model FLOPs, PaLM's convention
  stepping: float | None  # MFU over the productive seconds
  running: float | None  # MFU over all seconds in which a process ran
  hardware: float | None  # HFU over the same: all steps, recomputation and padding counted


class Facts(NamedTuple):
  """Of a run directory."""

  folder: Path
  events: list[dict[str, Any]]
  problems: list[str]  # of the logbook's files, in words
  history: History
  ledger: Ledger | None
  launch: dict[str, Any]  # details of the newest launch; empty without one
  step: int
  work: Work
  bills: list[Bill]  # one a kind of chip
  device_hours: float

  @property
  def name(self) -> str:
    return self.launch.get("config", self.folder.name)

  def of(self, *kinds: str) -> list[dict[str, Any]]:
    """Events of these kinds."""
    return [event for event in self.events if event["kind"] in kinds]


def gather(folder: Path, *, most: int | None = None) -> Facts:
  """All of it; prices are the shipped ones, and those of `prices.toml` in the folder over them.

  Args:
    most: rows of metrics to read, of a longer file only some (`read_history`).

  Raises:
    ConfigError: there is neither a logbook nor metrics; a line of the metrics is damaged; the
      prices are.
  """
  events, problems = read_logbook(folder)
  history = read_history(folder, most=most)
  if not events and not history.rows:
    raise ConfigError(f"{folder} has no logbook and no metrics: nothing was trained there yet")
  every = [row for branch in (*history.abandoned, history.rows) for row in branch]
  clocked = sorted((row for row in every if "clock" in row), key=lambda row: row["time"])
  times = ledger(events, clocked)
  launches = {e["run"]: e["detail"] for e in events if e["kind"] == "launch"}
  launch = list(launches.values())[-1] if launches else {}
  step = max((row["step"] for row in history.rows), default=0)
  if times:
    step = max(step, times.attempts[-1].last_step)
  prices = _prices(folder)
  attempts = times.attempts if times else []
  return Facts(
    folder, events, problems, history, times, launch, step,
    _work(folder, events, step, times, launches, launch), _bills(attempts, launches, prices),
    sum(_hours(a) * launches[a.run]["devices"] for a in attempts if a.run in launches),
  )  # fmt: skip


def _hours(attempt: Attempt) -> float:
  return (attempt.end - attempt.begin) / 3600


def chip_of(launch: dict[str, Any]) -> Chip | None:
  return find_chip(SimpleNamespace(device_kind=launch.get("device_kind", "")))


def _prices(folder: Path) -> Prices:
  own = folder / "prices.toml"
  return Prices.load(own if own.is_file() else None)


def _bills(attempts: list[Attempt], launches: dict[str, Any], prices: Prices) -> list[Bill]:
  """One a kind of chip, of `attempts` by what `launches` says of their machines."""
  hours: Counter[str] = Counter()
  most: Counter[str] = Counter()
  for attempt in attempts:
    launch = launches.get(attempt.run, {})
    chip = chip_of(launch)
    if chip is not None and chip.name != "cpu":
      chips = launch["devices"] / chip.devices_per_chip
      hours[chip.name] += _hours(attempt) * chips
      most[chip.name] = max(most[chip.name], math.ceil(chips))
  return [bill(name, most[name], hours[name] / most[name], prices) for name in hours]


def energy(folder: Path, launch: dict[str, Any], seconds: float) -> tuple[str, dict[str, Any]]:
  """What an attempt of so many seconds takes: a line, and the fields of its `energy` event.

  Of machines without a price and a power, such as CPUs, `chip_hours` are device-hours.

  Raises:
    ConfigError: the folder's `prices.toml` is damaged.
  """
  prices = _prices(folder)
  attempt = Attempt("", 0.0, seconds, 0, 0, "", None, "", 0, 0.0)
  detail: dict[str, Any] = {
    "pue": prices.pue.value, "kg_per_kwh": prices.carbon.kg_per_kwh, "scope": prices.carbon.scope,
  }  # fmt: skip
  bills = _bills([attempt], {"": launch}, prices)
  if not bills:
    kind, hours = launch["device_kind"], launch["devices"] * seconds / 3600
    text = f"{small(hours, f'device-hours of {kind}')}, power unknown"
    return text, detail | {"chip": kind, "chip_hours": hours}
  [made] = bills
  detail |= {"chip": made.chip, "chip_hours": made.chip_hours}
  text = small(made.chip_hours, f"chip-hours of {made.chip}")
  if made.power is None:
    return f"{text}, power unknown", detail
  detail |= {"kwh": made.kwh, "watts": made.power.watts, "kg_co2e": made.kg_co2e}
  detail |= {"watts_from": made.power.source}
  if made.chip not in prices.power:
    detail["watts_source"] = "measured" if CHIPS[made.chip].is_tpu else "tdp"
  return f"{text}, {small(made.kwh, 'kWh')}, {small(made.kg_co2e, 'kg CO2e')}", detail


def _work(
  folder: Path, events: list[dict[str, Any]], step: int, times: Ledger | None,
  launches: dict[str, Any], launch: dict[str, Any],
) -> Work:  # fmt: skip
  if not launch or times is None:
    return Work(None, None, None, None, None, None)
  each = launch["tokens_per_step"]
  told = [e for e in events if e["tokens"] is not None and e["step"] is not None]
  last = told[-1] if told else {"tokens": 0, "step": 0}
  tokens = last["tokens"] + (step - last["step"]) * each
  done = tokens + times.lost_steps * each
  flops = tokens * launch["flops_per_token"]
  seconds = peak = 0.0
  for attempt in times.attempts:
    of = launches.get(attempt.run, {})
    chip = chip_of(of)
    rate = chip.flops_per_device if chip else None
    if rate is None:
      return Work(tokens, done, flops, None, None, None)
    seconds += attempt.end - attempt.begin
    peak += (attempt.end - attempt.begin) * of["devices"] * rate
  share = times.seconds["productive"] / max(seconds, 1e-9)
  executed = _executed_per_token(folder, launch)
  hardware = None if executed is None else done * executed / peak
  stepping = flops / (peak * share) if share else None
  return Work(tokens, done, flops, stepping, flops / peak, hardware)


def _executed_per_token(folder: Path, launch: dict[str, Any]) -> float | None:
  """FLOP that a machine executes for a token, by the planner's count; None without a config."""
  config = read_config(folder)
  if config is None:
    return None
  per_step = _executed_per_step(config, tuple(launch["mesh"].items()))
  return None if per_step is None else per_step / launch["tokens_per_step"]


@functools.cache
def _executed_per_step(config: Config, mesh: tuple[tuple[str, int], ...]) -> float | None:
  try:
    return sum(count_work(build_on(config, abstract_mesh(dict(mesh)), "tpu")))
  except ConfigError:  # what made the run need not be what reads its book
    return None


def interventions(facts: Facts) -> list[tuple[dict[str, Any], str]]:
  """(event, what changed) of what people or policies changed: the config, and software."""
  found: list[tuple[dict[str, Any], str]] = []
  packages: dict[str, list[dict[str, Any]]] = {}
  told = {event["run"] for event in facts.of("action") if event["detail"]["change"]}
  for event in facts.of("action", "env_change", "effective_config"):
    detail = event["detail"]
    if event["kind"] == "env_change":
      packages.setdefault(event["run"], []).append(event)
    elif event["kind"] == "action" and detail["change"]:
      changes = (f"{c['key']} {c['old']} -> {c['new']}" for c in detail["change"])
      found.append((event, ", ".join(changes)))
    elif event["kind"] == "effective_config" and not detail["match"] and event["run"] not in told:
      found.append((event, event["summary"]))
  for group in packages.values():
    shown = [
      f"{e['detail']['package']} {e['detail']['old']} -> {e['detail']['new']}" for e in group
    ]
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    found.append((group[0], ", ".join(shown[:3]) + more))
  return sorted(found, key=lambda item: when(item[0]))


def outcome(facts: Facts, event: dict[str, Any]) -> str:
  """What came of an action: the last word of an event that refers to it, else its own; a rewind
  that has none has passed the step it came from, or not yet."""
  told = [event, *(e for e in facts.events if event["id"] in e["refs"])]
  words = [e["detail"]["outcome"] for e in told if "outcome" in e["detail"]]
  word = words[-1] if words else ""
  if word != "pending":
    return word
  origin = event["detail"]["from_step"]
  if event["detail"]["policy"] in ("rewind", "rewind_skip") and origin is not None:
    return f"passed step {origin:,}" if facts.step > origin else f"step {origin:,} lies ahead"
  return ""


def state(facts: Facts) -> str:
  """How the run stands, in a sentence."""
  total = facts.launch.get("steps")
  where = f"step {facts.step:,}" + (f" of {total:,}" if total else "")
  if facts.ledger is None:
    return f"At {where}"
  last = facts.ledger.attempts[-1]
  if last.reason == "finished":
    return f"Finished at step {facts.step:,}"
  if last.reason == "open":
    return f"At {where}; the last record is of {moment(last.end)}, and no end is on record"
  return f"Stopped at {where}: {brief(last.cause) or last.reason}"


def brief(words: str, most: int = 140) -> str:
  """The beginning of a long message."""
  return words if len(words) <= most else words[:most].rpartition(" ")[0] + " ..."


def class_name(letter: str | None) -> str:
  return f"{letter} {CLASSES[letter]}" if letter in CLASSES else "unknown"


def moment(seconds: float) -> str:
  """A time in the zone of this machine: 2026-03-02 09:41:07 +01:00."""
  time = datetime.datetime.fromtimestamp(seconds).astimezone()
  return stamp(time.isoformat(timespec="seconds"))


def stamp(time: str) -> str:
  """An event's time, to the second."""
  date, clock, zone = time[:10], time[11:19], time[19:]
  zone = zone[zone.index(".") + 4 :] if "." in zone else zone
  return f"{date} {clock} {zone}"


def span(seconds: float) -> str:
  """2 d 3 h, 1 h 02 min, 4 min 05 s, 34 s, 0.31 s."""
  if seconds < 10:
    return f"{seconds:.2f} s"
  whole = round(seconds)
  for unit, size, below, least in (("d", 86400, "h", 3600), ("h", 3600, "min", 60),
                                   ("min", 60, "s", 1)):  # fmt: skip
    if whole >= size:
      rest = whole % size // least
      return f"{whole // size} {unit}" + (f" {rest:02} {below}" if rest else "")
  return f"{whole} s"


def big(number: float) -> str:
  """12,345 as it is, 1.23e+12 beyond a million."""
  if number < 1e6:
    return f"{number:,.0f}"
  for unit, scale in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6)):
    if number >= scale:
      return f"{number / scale:,.3g} {unit}" if number < 1e15 else f"{number:.3g}"
  raise AssertionError


def small(number: float | None, unit: str) -> str:
  """Three digits, or unknown."""
  if number is None:
    return "unknown"
  return f"{number:,.0f} {unit}" if number >= 1000 else f"{number:.3g} {unit}"
