"""The life of a run, told second by second, as the trainer and the supervisor would write it."""

import datetime
import hashlib
import json
from pathlib import Path

from experiments.training.goodput import BUCKETS
from experiments.training.logbook import FILES, KINDS

DAY = datetime.datetime(2026, 3, 2, 9, tzinfo=datetime.UTC).timestamp()

MACHINE = {
  "config": "dense_1b", "config_sha256": "c" * 64, "config_diff": [], "env_lock_sha256": "e" * 64,
  "versions": {"python": "3.11.9", "jax": "0.10.2"}, "git_commit": "0123456789abcdef",
  "git_dirty": False, "mesh": {"data": 1, "fsdp": 16}, "seed": 0, "data_state_sha256": None,
  "hosts": [{"id": "a", "devices": 16, "health": "ok"}], "device_kind": "NVIDIA H100 80GB HBM3",
  "devices": 16, "steps": 100, "tokens_per_step": 1000, "flops_per_token": 6e9,
  "parameters": 1_000_000_000, "active_parameters": 1_000_000_000,
}  # fmt: skip


class Life:
  """Events and rows of metrics of one attempt after the other."""

  def __init__(self, **machine):
    self.now, self.events, self.rows, self.attempt = 0.0, [], [], 0
    self.clock: dict[str, float] = {}
    self.machine = MACHINE | machine

  def birth(self):
    self.attempt += 1
    self.clock = dict.fromkeys(BUCKETS, 0.0)

  def spend(self, seconds, bucket):
    self.now += seconds
    self.clock[bucket] += seconds

  def event(
    self, kind, step=None, source="trainer", cls=None, severity="info", summary=None, refs=(),
    owner=None, **detail,
  ):  # fmt: skip
    """Returns its id. Times have the zone +01:00."""
    zone = datetime.timezone(datetime.timedelta(hours=1))
    time = datetime.datetime.fromtimestamp(DAY + self.now, zone)
    number = len(self.events)
    event = {
      "schema": 1, "id": f"{int((DAY + self.now) * 1e6):014x}{number:04x}",
      "time": time.isoformat(timespec="milliseconds"), "run": f"1.{self.attempt}", "lineage": 1,
      "attempt": self.attempt, "parent": None, "step": step,
      "tokens": None if step is None else step * self.machine["tokens_per_step"],
      "source": source, "owner": owner, "kind": kind, "class": cls, "severity": severity,
      "summary": summary or f"{kind} of {source}",
      "detail": dict.fromkeys(KINDS[kind]) | detail, "refs": list(refs),
    }  # fmt: skip
    if kind == "checkpoint":
      event["detail"]["step"] = step
    if source == "trainer":
      event["clock"] = dict(self.clock)
    self.events.append(event)
    return event["id"]

  def launch(self, step=0, **machine):
    restore = {"step": step, "verified": True} if step else None
    kind = "restart" if step else "start"
    summary = f"{kind} at step {step}"
    self.event("launch", step, restore=restore, summary=summary, **self.machine, **machine)

  def row(self, step, **values):
    row = {"step": step, **(values or {"loss": 1.0})}
    self.rows.append(row | {"time": DAY + self.now, "clock": dict(self.clock)})

  def steps(self, first, last, seconds, every=10):
    for step in range(first, last + 1):
      self.spend(seconds, "productive")
      if step % every == 0 or step == first:
        self.row(step)

  def back(self, step):
    """The next rows begin after this step again."""
    self.rows.append({"resumed_after": step})

  def save(self, folder: Path) -> Path:
    """The run directory."""
    for source, name in FILES.items():
      own, before = [event for event in self.events if event["source"] == source], ""
      for event in own:
        line = json.dumps(event | {"prev": before and hashlib.sha256(before.encode()).hexdigest()})
        with (folder / name).open("a") as file:
          file.write(line + "\n")
        before = line
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.rows))
    return folder
