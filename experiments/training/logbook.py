"""The logbook of a run: one JSON line an event, each with the hash of the line before it.

    logbook = Logbook(folder, clock=clock)      # process 0 only; a new attempt
    logbook.launch(environment(), config="moe_tiny", ...)
    logbook.event("checkpoint", "saved", step=500, status="finished", bytes=...)
    logbook.close()

The trainer writes `logbook.jsonl`, the supervisor outside `logbook.supervisor.jsonl`, and people
`logbook.notes.jsonl` (`python -m experiments.logbook note`): a file each, so that chains of hashes
don't mix. `read_logbook(folder)` merges them by time and says where a chain is broken.

KINDS has the kinds of events and the fields of their details. Times are RFC 3339 with a zone. A run
is called LINEAGE.ATTEMPT, say 1.43: each start of the trainer is an attempt, a change of what the
run is (`--allow_config_change`) begins a lineage. A disk's refusal stops nobody (`Journal`).
"""

import datetime
import hashlib
import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from .environment import env_changes
from .goodput import Clock
from .journal import Journal, parse, plain, read_lines

FILES = {
  "trainer": "logbook.jsonl",
  "supervisor": "logbook.supervisor.jsonl",
  "human": "logbook.notes.jsonl",
}
SEVERITIES = ("info", "warn", "error", "page")
# What went wrong, or was changed: A hardware, B network, C storage, D provider or scheduler,
# E numerics, F intervention, G architecture, H software, I data, J processes disagree, K slowness.
CLASSES = {
  "A": "hardware", "B": "network", "C": "storage", "D": "provider", "E": "numerics",
  "F": "intervention", "G": "architecture", "H": "software", "I": "data", "J": "consistency",
  "K": "performance",
}  # fmt: skip

# The details of each kind: a type, or the words there are. What may be None may be left out; more
# fields than these are kept. Numbers that are NaN or infinite are written as null.
_TEXT, _COUNT, _NUMBER = str | None, int | None, float | None
KINDS: dict[str, dict[str, Any]] = {
  # A start of the trainer. restore: {step, manifest_sha256, verified}, None for a fresh start.
  # hosts: [{id, devices, health}]. config_diff: [{key, old, new}]. FLOPs are model FLOPs, PaLM's.
  "launch": {
    "config": str, "config_sha256": str, "config_diff": list, "env_lock_sha256": str,
    "versions": dict, "git_commit": _TEXT, "git_dirty": bool | None, "mesh": dict, "hosts": list,
    "restore": dict | None, "seed": int, "data_state_sha256": _TEXT, "device_kind": str,
    "devices": int, "steps": int, "tokens_per_step": int, "flops_per_token": float,
    "parameters": _COUNT, "active_parameters": _COUNT,
  },
  # Optimizer values as read back from the restored state, and as asked for.
  "effective_config": {"optimizer": dict, "requested": dict, "match": bool},
  "checkpoint": {
    "step": int, "bytes": _COUNT, "files": _COUNT, "block_s": _NUMBER, "total_s": _NUMBER,
    "manifest_sha256": _TEXT, "status": ("started", "finished", "failed", "refused"),
  },
  "anomaly": {
    "signal": ("loss", "grad_norm", "loss_scale", "act_norm", "nan", "step_time", "drop_rate",
               "replica_mismatch", "hang", "nonfinite", "update_ratio", "log_z", "load_cv", "bits"),
    "value": _NUMBER, "baseline": _NUMBER, "deviations": _NUMBER, "window": _COUNT,
    "first_bad": _TEXT, "batch_ids": list | None,
  },
  # change: [{key, old, new, until_step}]. cause: id of an event.
  "action": {
    "policy": ("none", "skip_update", "lr_scale", "rewind", "rewind_skip", "restart", "swap_host",
               "stop"),
    "from_step": _COUNT, "to_step": _COUNT, "skipped": list | None, "change": list | None,
    "cause": _TEXT, "outcome": ("pending", "recovered", "recurred", "abandoned"),
  },
  "fault": {
    "host": str, "device": _COUNT, "error": str, "first_seen_step": _COUNT, "lost_steps": _COUNT,
    "lost_s": _NUMBER, "stack_groups": list | None,
  },
  "health": {"host": str, "test": str, "pass": bool, "value": _NUMBER, "limit": _NUMBER},
  "eval": {"suite": str, "metrics": dict, "seconds": _NUMBER},
  # Of the steps since the last. host_*: seconds a step of a host's own work, over the hosts
  # (`training.hosts`). goodput: the process's clock so far.
  "perf": {
    "steps": int, "tok_s": _NUMBER, "tflops_model": _NUMBER, "convention": str, "mfu": _NUMBER,
    "host_p50_s": _NUMBER, "host_max_s": _NUMBER, "goodput": dict,
  },
  "env_change": {"package": str, "old": str, "new": str, "intended": bool},
  # Of an attempt, from its process's birth. watts_source None: unknown, or of a prices.toml.
  "energy": {
    "kwh": _NUMBER, "chip_hours": float, "watts": _NUMBER,
    "watts_source": ("tdp", "measured", None), "pue": float, "kg_per_kwh": float, "scope": str,
  },
  "milestone": {"what": str},  # once a lineage
  "note": {"text": str, "tags": list},
  "postmortem": {
    "trigger": str, "timeline": list, "root_cause": str, "fix": str, "follow_up": str,
  },
  "stop": {"reason": ("finished", "human", "policy", "crash", "preempted"), "exit_code": int},
}  # fmt: skip


class Logbook:
  """Appends events to one file of the logbook in run directory `folder`.

  Args:
    source: who writes, of FILES. A `trainer` begins a new attempt; others speak about the one that
      the trainer's file ends with.
    owner: who acted, or is on call.
    clock: its seconds are put beside every event, for the goodput ledger.
    new_lineage: the config's identity changed: it is another run from here on.

  Raises:
    OSError: the file can't be opened, for another reason than that the disk is full.
  """

  def __init__(
    self,
    folder: Path,
    source: str = "trainer",
    *,
    owner: str | None = None,
    clock: Clock | None = None,
    new_lineage: bool = False,
  ):
    self._source, self._owner, self._clock = source, owner, clock
    self._trainers = folder / FILES["trainer"]
    self._journal = Journal(folder / FILES[source], sync=True, shared=source == "human")
    self._lock = threading.Lock()
    self._stamp = 0
    # The last launch before this attempt; None for the first. And what this lineage has reached.
    self.previous: dict[str, Any] | None = None
    self.earlier: list[dict[str, Any]] = []
    self.lineage, self.attempt, self.parent = 1, 1, None
    if source == "trainer":
      self._begin(new_lineage)

  def _begin(self, new_lineage: bool) -> None:
    """Number this attempt after those in the file."""
    rows = [row for line in read_lines(self._trainers) if (row := parse(line))]
    rows = [row for row in rows if isinstance(row.get("attempt"), int)]
    if not rows:
      return
    last = rows[-1]
    self.parent = last["run"]
    self.lineage = last["lineage"] + new_lineage
    self.attempt = 1 if new_lineage else last["attempt"] + 1
    launches = [row for row in rows if row.get("kind") == "launch"]
    self.previous = launches[-1] if launches else None
    self.earlier = [
      row
      for row in rows
      if row.get("kind") in ("milestone", "eval") and row.get("lineage") == self.lineage
      if not check(row)  # one that was damaged tells nothing
    ]

  @property
  def run(self) -> str:
    return f"{self.lineage}.{self.attempt}"

  @property
  def pending(self) -> int:
    """Events that a full disk has refused so far."""
    return self._journal.pending

  def launch(
    self, environment: dict[str, Any], *, step: int = 0, tokens: int = 0, intended: bool = False,
    summary: str = "", **detail: Any,
  ) -> list[str]:  # fmt: skip
    """The `launch` event of this attempt, and an `env_change` for each package that is another one
    than in the attempt before.

    Args:
      environment: of `environment()`.
      step: finished before.
      intended: was the change of packages.
      detail: the other fields of the kind.

    Returns:
      The changes of packages in words.
    """
    before = self.previous
    if detail.get("restore") is None:
      self.parent = None
    kind = "restart" if before else "start"
    words = summary or f"{kind} at step {step:,} on {detail['devices']} x {detail['device_kind']}"
    cause = self.event("launch", words, step=step, tokens=tokens, **environment, **detail)
    said = []
    changes = [] if before is None else env_changes(before["detail"], environment)
    for change in changes:
      said.append(f"{change.package} {change.old} -> {change.new}")
      self.event(
        "env_change", said[-1], step=step, tokens=tokens, cls="H", refs=(cause,),
        severity="info" if intended else "warn", intended=intended, **change._asdict(),
      )  # fmt: skip
    return said

  def event(
    self,
    kind: str,
    summary: str,
    *,
    step: int | None = None,
    tokens: int | None = None,
    severity: str = "info",
    cls: str | None = None,
    refs: Sequence[str] = (),
    owner: str | None = None,
    detail: dict[str, Any] | None = None,
    **more: Any,
  ) -> str:
    """Write an event; returns its id.

    Args:
      kind: of KINDS.
      summary: one line.
      step: the last that is finished; also the detail's own `step`, where the kind has one.
      tokens: consumed so far.
      cls: of CLASSES.
      refs: ids of events that this one explains or amends.
      detail: fields of the kind, and any others.
      more: the same, one by one.

    Raises:
      ValueError: an unknown kind, or a detail that is missing or of another type.
    """
    fields = dict.fromkeys(KINDS.get(kind, ()))
    if "step" in fields:
      fields["step"] = step
    with self._lock:
      if self._source != "trainer":
        self._follow()
      row = {
        "schema": 1,
        "id": self._id(),
        "time": datetime.datetime.now().astimezone().isoformat(timespec="milliseconds"),
        "run": self.run,
        "lineage": self.lineage,
        "attempt": self.attempt,
        "parent": self.parent,
        "step": step,
        "tokens": tokens,
        "source": self._source,
        "owner": owner or self._owner,
        "kind": kind,
        "class": cls,
        "severity": severity,
        "summary": " ".join(summary.split()),
        "detail": plain(fields | (detail or {}) | more),
        "refs": list(refs),
        "prev": _sha256(self._journal.last),
      }
      if self._clock is not None:
        row["clock"] = self._clock.seconds
      if wrong := check(row):
        raise ValueError(wrong)
      self._journal.append(row)
    return row["id"]

  def close(self) -> None:
    """Write what waits.

    Raises:
      OSError: the disk still refuses events, which are lost.
    """
    self._journal.close()

  def _follow(self) -> None:
    """Speak about the trainer's newest attempt."""
    for line in reversed(read_lines(self._trainers)):
      row = parse(line)
      if row and isinstance(row.get("attempt"), int):
        self.lineage, self.attempt, self.parent = (row.get(k) for k in _RUN)
        return

  def _id(self) -> str:
    """Later ids are larger: microseconds since 1970, and four random digits."""
    self._stamp = max(self._stamp + 1, time.time_ns() // 1000)
    return f"{self._stamp:014x}{os.urandom(2).hex()}"


_RUN = ("lineage", "attempt", "parent")
_COMMON: dict[str, Any] = {
  "schema": int, "id": str, "time": str, "run": str, "lineage": int, "attempt": int,
  "parent": _TEXT, "step": _COUNT, "tokens": _COUNT, "source": tuple(FILES), "owner": _TEXT,
  "kind": tuple(KINDS), "class": (*CLASSES, None), "severity": SEVERITIES, "summary": str,
  "detail": dict, "refs": list, "prev": str,
}  # fmt: skip


def check(row: dict[str, Any]) -> str:
  """What is wrong with an event, in words; empty if nothing is."""
  wrong = _misfit("event", _COMMON, row)
  return wrong or _misfit(row["kind"], KINDS[row["kind"]], row["detail"])


def _misfit(what: str, fields: dict[str, Any], values: dict[str, Any]) -> str:
  for name, wanted in fields.items():
    if name not in values:
      return f"{what} lacks {name}"
    value = values[name]
    if isinstance(wanted, tuple):
      if value not in wanted:
        return f"{what}.{name} is {value!r}, none of {', '.join(map(str, wanted))}"
    elif not _is_a(value, wanted):
      return f"{what}.{name} is {value!r}, not {getattr(wanted, '__name__', wanted)}"
  return ""


def _is_a(value: Any, wanted: Any) -> bool:
  if isinstance(value, bool):
    return bool in (wanted, *get_args(wanted))
  whole = isinstance(value, int) and isinstance(0.0, wanted)  # 1 for 1.0
  return whole or isinstance(value, wanted)


def _sha256(line: str | None) -> str:
  return "" if line is None else hashlib.sha256(line.encode()).hexdigest()


def digest_of(value: Any) -> str:
  """SHA-256 of a value as JSON."""
  return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()


class Book(NamedTuple):
  """Events by time, and sentences about lines that are damaged or were edited."""

  events: list[dict[str, Any]]
  problems: list[str]


def read_logbook(folder: Path) -> Book:
  """All events of a run. A last line that a crash cut off is left out without a word."""
  events, problems = [], []
  for name in FILES.values():
    found, wrong = read_chain(folder / name)
    latest = ""
    for row in found:  # a clock set back does not turn the order of a file round
      latest = max(latest, row["id"])
      events.append((latest, row))
    problems += wrong
  events.sort(key=lambda item: item[0])
  return Book([row for _, row in events], problems)


def read_chain(path: Path) -> Book:
  """Events of one file, in its order; each line checked against the hash that the next one has."""
  events, problems, before = [], [], None
  lines = read_lines(path)
  for number, line in enumerate(lines, start=1):
    row = parse(line)
    wrong = "it is not JSON" if row is None else check(row)
    if row is not None and row.get("prev") != _sha256(before):
      last = f"line {number - 1} is not as it was written" if before else "lines before it are gone"
      problems.append(f"{path.name}: {last} (the hash in line {number} is of another)")
    if wrong:
      problems.append(f"{path.name} line {number}: {wrong}")
    else:
      events.append(row)
    before = line
  return Book(events, problems)
