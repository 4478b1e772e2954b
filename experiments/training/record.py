"""What a run says while it trains: lines in the terminal, metrics, and its logbook."""

import contextlib
import platform
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from layers.count import count_params, train_flops_per_token

from ..config import Config, HaltError
from ..data.faults import RowFault
from ..exits import GUARD
from ..overrides import Change, difference, flatten
from .checkpoint import Saved
from .environment import environment
from .folder import record_changes
from .goodput import Clock
from .guard import Anomaly, Decision, Notice
from .hosts import Found
from .logbook import Logbook, digest_of
from .metrics import MetricsWriter
from .milestones import Milestones
from .progress import ProgressDisplay
from .recovery import Rewind
from .setup import Setup
from .timing import StepTimer, describe_perf

_BOOK_SECONDS = 600.0  # between writings of LOGBOOK.md, at a save
_PERF_SECONDS = 600.0  # between `perf` events, at a save


class Record:
  """Of one process; all but the primary say and write nothing."""

  def __init__(self, setup: Setup, folder: Path, clock: Clock, timer: StepTimer, *, primary: bool):
    self.config, self._setup, self._folder, self._clock = setup.config, setup, folder, clock
    self._timer, self._primary = timer, primary
    self.display = ProgressDisplay(self.config.train.steps, self.config.name, enabled=primary)
    self.note = self.display.note
    self._metrics: MetricsWriter | None = None
    self._book: Logbook | None = None
    self._tokens = self.config.data.batch_size * self.config.data.row_length
    self._refused: list[str] = []  # checkpoints, before there was a logbook to say it in
    self._written = self._performed = time.monotonic()  # the readable book, and `perf`
    self._step = 0  # last that was logged

  def refused(self, text: str) -> None:
    """A checkpoint that is damaged."""
    self.note(text)
    if self._book is None:
      self._refused.append(text)
    else:
      self._refuse(text)

  def _refuse(self, text: str) -> None:
    step = int(re.findall(r"\d+", text)[0])
    self.event(
      "checkpoint", text, step=step, severity="error", cls="C", detail={"status": "refused"}
    )

  def open(
    self,
    start: int,
    data: dict[str, Any],
    rows: int,
    *,
    base: Config,
    new_lineage: bool,
    near: bool = False,
  ) -> None:
    """Begin to write, after `start` finished steps.

    Args:
      data: the loader's state.
      rows: of the training data.
      base: the named config, from which this one differs.
      near: whether the state comes from near copies.
    """
    if not self._primary:
      return
    self._metrics = MetricsWriter(self._folder, resume_step=start, note=self.note)
    self._book = Logbook(self._folder, clock=self._clock, new_lineage=new_lineage)
    config, mesh, counts = self.config, self._setup.mesh, count_params(self.config.model)
    devices = mesh.devices.flat
    self._milestones = Milestones(
      start, config.train.steps, batch_rows=config.data.batch_size,
      row_tokens=config.data.row_length, data_rows=rows, position=data["position"],
      earlier=self._book.earlier,
    )  # fmt: skip
    self._launch = launch = {
      "config": config.name,
      "config_sha256": digest_of(flatten(config)),
      "config_diff": [{"key": k, "old": a, "new": b} for k, a, b in difference(base, config)],
      "mesh": dict(mesh.shape),
      "hosts": [
        {"id": f"process {i}", "devices": jax.local_device_count(), "health": "unknown"}
        for i in range(jax.process_count())
      ],
      "restore": {"step": start, "verified": True, "near": near} if start else None,
      "seed": config.train.seed,
      "data_state_sha256": digest_of(data),
      "device_kind": devices[0].device_kind,
      "devices": mesh.devices.size,
      "steps": config.train.steps,
      "tokens_per_step": self._tokens,
      "flops_per_token": float(train_flops_per_token(config.model, config.data.row_length)),
      "parameters": counts.total,
      "active_parameters": counts.active,
    }
    changed = self._book.launch(environment(), step=start, tokens=start * self._tokens, **launch)
    if changed:
      self.note(f"other software than before: {', '.join(changed)}")
    for text in self._refused:
      self._refuse(text)

  def close(self) -> None:
    try:
      if self._metrics is not None:
        self._metrics.close()
    finally:
      if self._book is not None:
        self._book.close()

  def event(
    self,
    kind: str,
    summary: str,
    *,
    step: int | None = None,
    detail: dict[str, Any] | None = None,
    **more: Any,
  ) -> str:
    """Into the logbook; returns the event's id. See `Logbook.event`."""
    if self._book is None:
      return ""
    tokens = None if step is None else step * self._tokens
    fields = {k: v for k, v in (detail or {}).items() if k != "step"}
    return self._book.event(kind, summary, step=step, tokens=tokens, **more, **fields)

  def row(self, step: int, row: dict[str, Any], position: int) -> None:
    """Metrics of the steps since the last row; `position` is how far the data was read."""
    if self._metrics is not None:
      self._metrics.write(step, row | self._clock.row())
    self.display.update(step, row)
    self._step = step
    if self._book is None:
      return
    for m in self._milestones.reached(step, position, sum(self._clock.seconds.values())):
      more = m.more or f"loss {row['loss']:.4g}"
      self.event("milestone", f"{m.what}; {more}", step=m.step, detail={"what": m.what})

  def changed(self, step: int, changes: Sequence[Change], reason: str) -> None:
    """What a person changed of a run in flight."""
    if changes and self._primary:
      record_changes(self._folder, step, reason, changes)
    for c in changes:
      entry = {"key": c.path, "old": c.stored, "new": c.requested, "until_step": None}
      self.event(
        "action",
        f"{c.path} from {c.stored!r} to {c.requested!r}: {reason}",
        step=step,
        severity="warn",
        cls="F",
        detail={"policy": "none", "change": [entry], "outcome": "pending", "reason": reason},
      )

  def effective(self, step: int, restored: dict[str, Any], requested: dict[str, Any]) -> None:
    same = restored == requested
    text = "optimizer as restored" if same else "optimizer as asked for, not as it was saved"
    detail = {"optimizer": restored, "requested": requested, "match": same}
    severity = "info" if same else "warn"
    self.event("effective_config", text, step=step, severity=severity, detail=detail)

  def heldout(self, step: int, row: dict[str, Any], text: str, seconds: float) -> None:
    if self._metrics is not None:
      self._metrics.write(step, row | self._clock.row())
    metrics = {k: v for k, v in row.items() if v is not None}
    detail = {"suite": "heldout", "metrics": metrics, "seconds": seconds}
    words = f"held out: {text}"
    self.event("eval", words, step=step, detail=detail)
    if self._book is not None:
      self._milestones.heldout(step, row.get("heldout_loss"), words)

  def saved(self, saves: list[Saved]) -> None:
    """Saves that ended."""
    for s in saves:
      detail = {
        "step": s.step, "bytes": s.bytes, "files": s.files, "block_s": s.block_s,
        "total_s": s.total_s, "manifest_sha256": s.sha256,
      }  # fmt: skip
      if s.error is None:
        if self._metrics is not None:
          row = {"checkpoint_bytes": s.bytes, "checkpoint_s": s.total_s}
          self._metrics.write(s.step, row | {"checkpoint_block_s": s.block_s})
          self._latest(s)
        text = f"saved, {s.bytes:,} bytes in {s.total_s:.1f} s"
        self.event("checkpoint", text, step=s.step, detail={**detail, "status": "finished"})
        if time.monotonic() - self._written > _BOOK_SECONDS:
          self._write_book()
        if time.monotonic() - self._performed > _PERF_SECONDS:
          self._perf()
        continue
      text = f"step {s.step} could not be saved: {s.error.strerror or s.error}"
      self.note(f"{text}; training goes on, and saves again later")
      detail |= {"status": "failed"}
      self.event("checkpoint", text, step=s.step, severity="error", cls="C", detail=detail)

  def _latest(self, saved: Saved) -> None:
    """For people: the newest checkpoint in one line."""
    tokens = saved.step * self._tokens
    line = f"step {saved.step:,} ({tokens:,} tokens) in checkpoints/{saved.step}"
    try:
      (self._folder / "latest").write_text(f"{line}, {saved.bytes:,} bytes, digests intact\n")
    except OSError:
      return  # the disk has become full; the next save writes it

  def judged(self, decision: Decision, step: int, skipped: int) -> None:
    """What the guard says, but for `rewind` and `stop`.

    Args:
      skipped: updates of this attempt that were skipped so far.
    """
    for notice in decision.notices:
      self._anomaly(notice, step)
    if decision.action == "skip" and decision.anomaly is not None:
      found = decision.anomaly
      if found.first == step:  # one line an episode; metrics count
        self.note(f"step {step}: update skipped, {decision.reason} ({skipped} so far)")
        cause = self._anomaly(Notice(decision.reason, found), step, quiet=True)
        detail = {"policy": "skip_update", "from_step": step, "to_step": step, "cause": cause}
        text = f"update skipped: {decision.reason}"
        self.event("action", text, step=step, severity="warn", cls="E",
                   detail={**detail, "outcome": "pending"})  # fmt: skip

  def _anomaly(self, notice: Notice, step: int, *, quiet: bool = False) -> str:
    found: Anomaly = notice.anomaly
    if not quiet:
      self.note(f"step {step}: {notice.reason}")
    detail = {
      "signal": found.signal, "value": found.value, "baseline": found.baseline,
      "deviations": found.deviations, "window": found.window, "first_bad": None,
      "batch_ids": None, "recovered": notice.recovered, "first_step": found.first,
    }  # fmt: skip
    severity = "info" if notice.recovered else "warn"
    return self.event("anomaly", notice.reason, step=step, severity=severity, cls="E",
                      detail=detail)  # fmt: skip

  def rewound(self, decision: Decision, step: int, target: Rewind) -> None:
    assert decision.anomaly is not None
    cause = self._anomaly(Notice(decision.reason, decision.anomaly), step, quiet=True)
    rows = ""
    if target.skipped is not None:
      rows = f", rows {target.skipped[0]:,}-{target.skipped[1] - 1:,} of the data are left out"
    text = f"back from step {step} to {target.step}{rows}: {decision.reason}"
    self.note(text)
    detail = {
      "policy": "rewind_skip" if target.skipped else "rewind", "from_step": step,
      "to_step": target.step, "skipped": list(target.skipped or ()) or None, "cause": cause,
      "outcome": "pending",
    }  # fmt: skip
    self.event("action", text, step=step, severity="error", cls="E", detail=detail)
    if self._metrics is not None:
      self._metrics.rewind(target.step)
      self._milestones.rewound(target.step)
    self._write_book()

  def faulty(self, step: int, error: str, *, cls: str, device: int | None = None) -> None:
    """Hardware or data that failed."""
    self.note(f"step {step}: {error}")
    detail = {"host": platform.node(), "device": device, "error": error, "first_seen_step": step}
    self.event("fault", error, step=step, severity="error", cls=cls, detail=detail)

  def hosts(self, step: int, found: list[Found]) -> None:
    """Those that became slow, and those that no longer are."""
    for host in found:
      self.note(f"step {step}: {host.describe()}")
      detail = {
        "signal": "step_time", "value": host.seconds, "baseline": host.median,
        "window": host.looks, "recovered": not host.slow, "host": host.host,
        "process": host.process, "step_s": host.step_seconds,
      }  # fmt: skip
      severity = "warn" if host.slow else "info"
      self.event("anomaly", host.describe(), step=step, severity=severity, cls="K", detail=detail)

  def unread(self, step: int, faults: list[RowFault]) -> None:
    """Rows that this process had trouble with; those of others are on their standard error."""
    for fault in faults:
      what = "left out" if fault.skipped else f"read at try {fault.tries}"
      text = f"row {fault.row} of the data {what}: {fault.reason}"
      self.faulty(step, text, cls="I")
      if not self._primary:
        print(f"step {step}: {text}", file=sys.stderr)

  def halted(self, step: int, decision: Decision) -> None:
    """The guard's last word."""
    cause = ""
    if decision.anomaly is not None:
      cause = self._anomaly(Notice(decision.reason, decision.anomaly), step, quiet=True)
    detail = {"policy": "stop", "from_step": step, "to_step": step, "cause": cause}
    self.event("action", f"stopped: {decision.reason}", step=step, severity="page", cls="E",
               detail={**detail, "outcome": "abandoned"})  # fmt: skip
    self._stop(step, "policy", GUARD, f"the guard stopped the run: {decision.reason}")

  @contextlib.contextmanager
  def ending(self) -> Iterator[None]:
    """Writes down an error that ends the run."""
    try:
      yield
    except (Exception, KeyboardInterrupt) as e:
      if not isinstance(e, HaltError):
        reason, code = ("human", 130) if isinstance(e, KeyboardInterrupt) else ("crash", 1)
        said = str(e).strip().splitlines()
        text = f"{type(e).__name__}: {said[0] if said else ''}"
        self._stop(None, reason, code, text)
      raise

  def ended(self, step: int, signal_number: int | None) -> None:
    """The run is finished, or a signal stopped it."""
    if signal_number is None:
      self._stop(step, "finished", 0, f"finished at step {step:,}")
    elif signal_number == signal.SIGINT:
      self._stop(step, "human", 130, f"stopped by Ctrl-C at step {step:,}")
    else:
      name = signal.Signals(signal_number).name
      self._stop(step, "preempted", 75, f"stopped by {name} at step {step:,}")

  def _stop(self, step: int | None, reason: str, code: int, text: str) -> None:
    if self._book is not None:
      self._perf()
      self._energy(step)
    severity = "info" if code == 0 else "warn"
    detail = {"reason": reason, "exit_code": code}
    self.event("stop", text, step=step, severity=severity, detail=detail)
    self._write_book()

  def _perf(self) -> None:
    """How fast the steps since the last such event were."""
    self._performed = time.monotonic()
    measured = self._timer.perf()
    if measured is None:
      return
    detail = measured | {"goodput": self._clock.seconds}
    self.event("perf", describe_perf(detail), step=self._step, detail=detail)

  def _energy(self, step: int | None) -> None:
    """What this attempt took, by the book's figures."""
    # The planner's prices and formulas, which training needs at its end only.
    from ..book.facts import energy

    try:
      summary, detail = energy(self._folder, self._launch, sum(self._clock.seconds.values()))
      self.event("energy", summary, step=step, detail=detail)
    except Exception as e:  # the user's prices; no reason to end otherwise than it does
      self.note(f"no energy in the logbook: {e}")

  def _write_book(self) -> None:
    """LOGBOOK.md, from all that was written down."""
    if self._book is None:
      return
    # Reads the whole run again, which training needs only now and then.
    from ..book.text import write_book

    write_book(self._folder, self.note)
    self._written = time.monotonic()
