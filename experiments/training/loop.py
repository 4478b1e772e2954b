"""The training loop: restore or draw the state, step, judge, log, evaluate, save, report."""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from layers.transformer import moe_layers
from mesh.constrain import use_mesh
from mesh.multihost import is_primary

from .. import bucket
from ..config import Config, HaltError
from ..data.load import Dataset
from ..data.loader import Loader, make_loader
from ..exits import GUARD
from ..overrides import Change
from .checkpoint import Checkpoints, saved_steps
from .compiled_step import CompileOnce, Limit, jit_step
from .evaluate import HeldOut, held_out, make_held_out_step
from .folder import write_config
from .goodput import Clock
from .guard import Decision
from .metrics import bits_of, summarise
from .near import NearCopies
from .optimizer import hyperparameters, refuse_other_values
from .record import Record
from .recovery import Recovery
from .report import write_report
from .setup import Setup, batch_placer, batch_rows
from .state import TrainState, init_state
from .stop import Stop, stop_signal
from .timing import Profile, StepTimer, Trace
from .verify import Fault, Verifier
from .watchdog import Watchdog

# A CPU process that lets many collective steps pile up can deadlock; a few hide all latency.
_IN_FLIGHT = 4


class Outcome(NamedTuple):
  """How a call of `train` ended."""

  start: int  # steps that were finished before
  step: int
  state: TrainState
  heldout: HeldOut | None  # None when stopped early
  stopped_by: int | None  # the signal that stopped it
  seconds: float  # spent in steps
  setup: Setup


class Resume(NamedTuple):
  """What a resumed run changes (`overrides.check_resume`), why, and may its data be other data?"""

  changes: Sequence[Change] = ()
  reason: str = ""
  allow_other_data: bool = False
  base: Config | None = None  # the named config, from which the run's differs


def train(
  setup: Setup,
  dataset: Dataset,
  folder: Path,
  *,
  profile: Profile | None = None,
  resume: Resume | None = None,
  baselines: Callable[[], dict[str, float]] = dict,
  deadline: float | None = None,
) -> Outcome:
  """Train to `config.train.steps` in run directory `folder`, resuming from its newest checkpoint.

  Args:
    baselines: called for the report, bits a byte by name.
    deadline: a `time.monotonic` at which to save and stop, as by SIGTERM.

  Ctrl-C and SIGTERM finish the step, save, and return with `stopped_by` set.

  Raises:
    ConfigError: the checkpoint is of another model, optimizer or data; all are damaged.
    HaltError: the guard gave up, or a device computes wrongly.
    OSError: the disk refused the last checkpoint; those finished before are whole.
  """
  config, total = setup.config, setup.config.train.steps
  with contextlib.ExitStack() as stack:
    resume = Resume() if resume is None else resume
    run = _Run(setup, dataset, folder, resume, stack, stop_signal(deadline))
    run.restore()
    start = run.step
    trace = Trace(profile, folder, run.note, start, total)
    if start < total:
      run.open()
    while run.step < total and not run.stopped:
      trace.before(run.step + 1)
      run.advance()
      step, last = run.step, run.stopped or run.step == total
      log = step % config.train.log_every == 0 or last or step == start + 1
      save = step % config.checkpoint.every == 0 or last
      copy = run.near.every and step % run.near.every == 0 and not last
      if run.went_back(0 if log or save or copy else _IN_FLIGHT):
        continue
      if log:
        run.log()
      loss = None
      if config.eval.every and step % config.eval.every == 0 and step < total and not last:
        loss = run.evaluate()
      if copy:
        run.copy()
      if save:
        run.save(loss)
      trace.after(step, run.state, last)
    heldout = run.finish() if run.step >= total and not run.stopped else None
    run.close()
    if run.primary:
      layers = [i for group in moe_layers(config.model) for i in group]
      lines = {} if heldout is None else baselines()
      write_report(folder, title=_title(setup), moe_layer_indices=layers, baselines=lines)
    return Outcome(start, run.step, run.state, heldout, run.stop.by, run.seconds, setup)


class _Run:
  """What the parts of `train` share."""

  def __init__(
    self,
    setup: Setup,
    dataset: Dataset,
    folder: Path,
    resume: Resume,
    stack: contextlib.ExitStack,
    stop: contextlib.AbstractContextManager[Stop],
  ):
    config = setup.config
    self._setup, self._config, self._dataset, self._folder = setup, config, dataset, folder
    self._resume, self._stack = resume, stack
    self.primary = is_primary()
    self._clock = Clock()
    self._place = batch_placer(setup)
    self._loader = make_loader(dataset, config.data, "train", local_rows=batch_rows(setup))
    self._eval_step = make_held_out_step(setup, dataset)
    self._timer = StepTimer(config, setup.mesh, self._clock)
    self._record = Record(setup, folder, self._clock, self._timer, primary=self.primary)
    self.note = self._record.note
    self._recovery = Recovery(config, folder, primary=self.primary)
    self._verifier = Verifier(setup) if config.train.verify_every else None
    self._fault: Fault | None = None
    self._limit = Limit(setup.mesh)
    self._step_fn = CompileOnce(
      jit_step(setup, self._verifier and self._verifier.digest), self.note
    )
    self.step, self._pending, self._skipped, self._blank = 0, [], 0, 0
    stack.enter_context(use_mesh(setup.mesh, setup.rules))
    stack.enter_context(contextlib.closing(self._loader))
    self.stop = stack.enter_context(stop)
    self._checkpoints = stack.enter_context(
      Checkpoints(bucket.checkpoints(folder), config.checkpoint, note=self._record.refused)
    )
    self.near = stack.enter_context(
      NearCopies(config, folder, note=self.note, refused=self._record.refused)
    )
    self._dog = stack.enter_context(Watchdog(config.train.hang_seconds, folder))

  def restore(self) -> None:
    """From the newest near copy or checkpoint, or the first draw."""
    config, setup = self._config, self._setup
    with self._clock.phase("restore"):
      near = self.near.newest(saved_steps(bucket.checkpoints(self._folder)), setup.abstract)
      newest = near or self._checkpoints.newest()
      self.step = newest or 0
      self._loader.avoid(self._recovery.windows)
      self._kept = {}
      if not self.step:
        params = None
        if newest is not None:  # weights that were converted; nothing else was saved
          params = self._checkpoints.restore_params(0, setup.abstract.params)
        self.state = init_state(
          setup.model, setup.optimizer, setup.abstract, config.train.seed, params
        )
      else:
        source = self.near if near else self._checkpoints
        self.state, self._kept = source.restore(self.step, setup.abstract)
      if self.step and self.step < config.train.steps:
        self.note(f"resuming after step {self.step}" + (", from near copies" if near else ""))
        refuse_other_values(self._kept["optimizer"], config, self._resume.reason)
        _restore_data(self._loader, self._kept, self._resume, self.note)
        if not self._resume.changes:  # else levels may move: the guard learns them anew
          self._recovery.restore(self._kept["guard"])
    self.stopped = self.stop.asked()

  def open(self) -> None:
    """Begin to write down, and to step."""
    record, resume, near = self._record, self._resume, self.near.restored is not None
    if self.primary:
      write_config(self._folder, self._config)
    self.near.begin()
    self._stack.enter_context(contextlib.closing(record))
    base = resume.base or self._config
    data, other, rows = self._loader.state(), resume.allow_other_data, len(self._dataset.train)
    record.open(self.step, data, rows, base=base, new_lineage=other, near=near)
    record.changed(self.step, resume.changes, resume.reason)
    if self._kept:
      record.effective(self.step, self._kept["optimizer"], hyperparameters(self._config))
    for text in self._dataset.skipped:
      record.faulty(self.step, f"data left out: {text}", cls="I")
    self._stack.enter_context(record.ending())
    self._stack.enter_context(record.display.live(self.step))
    self._next_batch()
    if near:
      self.save(None)  # a host that is lost next would take it along
    self._clock.switch("compile")
    self._compiled = False

  def _next_batch(self) -> None:
    self._position = self._loader.state()  # before it
    self._batch = self._place(next(self._loader))

  def advance(self) -> None:
    """One step, and the batch of the next."""
    self.step += 1
    position, verify = self._position["position"], self._config.train.verify_every
    tried, limit = None, self._limit(self._recovery.guard.limit)
    with (
      jax.transfer_guard("disallow"),
      jax.profiler.StepTraceAnnotation("train", step_num=self.step),
      self._timer.hosts.dispatching(),
    ):
      if self._verifier is not None and self.step % verify == 0:
        self.state, tried = self._step_fn(self.state, self._batch, self._limit.nothing)
      self.state, metrics = self._step_fn(self.state, self._batch, limit)
    self._pending.append(metrics)
    self._recovery.ran(self.step, metrics, position)
    if self._verifier is not None and tried is not None:
      self._fault = self._verifier.check(self.step, tried, metrics, self.state)
    if self.step < self._config.train.steps:
      began = time.monotonic()
      self._next_batch()
      if metrics.loss.is_ready():  # the devices had nothing left to do
        self._clock.move(time.monotonic() - began, "data")
    else:
      self._position = self._loader.state()
    if len(self._pending) > _IN_FLIGHT:
      self._timer.hosts.wait(jax.block_until_ready, self._pending[-_IN_FLIGHT].loss)
    if not self._compiled:
      jax.block_until_ready(metrics.loss)
      self._compiled = True
      self._clock.switch("productive")
      self._record.display.started()
    self._dog.beat(self.step)
    self.stopped = self.stop.asked()  # once a step: a signal may come at any moment

  def went_back(self, in_flight: int) -> bool:
    """Hear the guard on all but the last steps, and go back to a checkpoint if it says so.

    Raises:
      HaltError: it says stop.
    """
    if self._fault is not None:
      fault, self._fault = self._fault, None
      self._record.faulty(self.step, fault.reason, cls="A", device=fault.device)
      if fault.decision.action == "stop":
        self._halt(fault.decision)
      self._go_back(fault.decision)
      return True
    for decision, step in self._timer.hosts.wait(self._recovery.judge, in_flight):
      self._skipped += decision.action == "skip"
      self._record.judged(decision, step, self._skipped)
      if decision.action == "stop":
        self._halt(decision)
      if decision.action == "rewind":
        self._go_back(decision)
        return True
    self._record.unread(self.step, self._loader.faults())
    return False

  def _halt(self, decision: Decision) -> None:
    self._record.halted(self.step, decision)
    self.near.forget()
    raise HaltError(f"step {self.step}: {decision.reason}", GUARD)

  def _go_back(self, decision: Decision) -> None:
    with self._clock.phase("restore"), self._dog.patience():
      self.near.forget()  # first: killed from here on, the run must not find what lies ahead
      before = self.step
      position = self._loader.state()["position"]
      target = self._recovery.rewind(decision, self._checkpoints, position)
      if target is None:
        self._halt(decision._replace(reason=f"{decision.reason}; no checkpoint lies before it"))
      self._record.rewound(decision, before, target)
      self.step = target.step
      self.state, kept = self._checkpoints.restore(self.step, self._setup.abstract)
      self._loader.avoid(self._recovery.windows)
      self._loader.restore(kept)
      self._recovery.guard.rewound(kept["guard"])
      self._pending = []
      self.stopped = self.stop.asked()
      self._next_batch()
    self._timer.restart()

  def log(self) -> None:
    """A row of metrics of the steps since the last."""
    host = self._timer.hosts.wait(jax.device_get, self._pending)
    self._blank += int(sum(m.blank_rows for m in host))
    row = summarise(host) | {"learning_rate": float(self._setup.schedule(self.step - 1))}
    row |= self._timer.interval(len(self._pending))
    row |= {"skipped_updates": self._skipped, "skipped_rows": self._blank}
    row |= {"bits": bits_of(host[-1])}
    self._record.row(self.step, row, self._position["position"])
    self._record.saved(self._checkpoints.ended())
    self._record.hosts(self.step, self._timer.hosts.look())
    self._pending = []

  def evaluate(self) -> float | None:
    """The held-out loss; None if a signal came meanwhile."""
    began = time.monotonic()
    with self._clock.phase("evaluation"), self._dog.patience():
      result = held_out(
        self._setup,
        self._dataset,
        self._eval_step,
        self.state.params,
        self._place_held_out,
        self.stop,
      )
    if result is None:
      return None
    text = _describe(result, self._config)
    if self.step < self._config.train.steps:
      self.note(f"step {self.step}  held out: {text}")
    self._record.heldout(self.step, _heldout_row(result), text, time.monotonic() - began)
    self._result = result
    return result.loss

  def _place_held_out(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    self._dog.beat(self.step)
    return self._place(batch)

  def save(self, loss: float | None) -> None:
    if self.stopped:
      self.note(f"stopping: saving step {self.step} (Ctrl-C again stops at once)")
    with self._clock.phase("checkpoint"), self._dog.patience():
      self._checkpoints.save(self.step, self.state, self._data(), loss=loss)

  def copy(self) -> None:
    with self._clock.phase("checkpoint"), self._dog.patience():
      self.near.save(self.step, self.state, self._data())

  def _data(self) -> dict[str, Any]:
    """What is saved beside the state."""
    optimizer, guard = hyperparameters(self._config), self._recovery.state()
    return {**self._position, "optimizer": optimizer, "guard": guard}

  def finish(self) -> HeldOut | None:
    """The last held-out loss."""
    self._clock.switch("other")
    return self._result if self.evaluate() is not None else None

  def close(self) -> None:
    """Until everything is on the disk.

    Raises:
      OSError: the last checkpoint is not.
    """
    with self._clock.phase("checkpoint"), self._dog.patience():
      self._checkpoints.wait()
    ended = self._checkpoints.ended()
    self._record.saved(ended)
    self._record.ended(self.step, self.stop.by)
    for save in ended:
      if save.error is not None and save.step == self.step:
        raise save.error
    self.near.remove()

  @property
  def seconds(self) -> float:
    return self._timer.seconds


def _restore_data(
  loader: Loader, position: dict[str, Any], resume: Resume, note: Callable[[str], None]
) -> None:
  """Continue in the data where `position` says; in other data, if allowed, from its start."""
  if resume.allow_other_data and position["fingerprint"] != loader.state()["fingerprint"]:
    note("the data is not what the checkpoint was trained on: reading it from its start")
  else:
    loader.restore(position)


def _heldout_row(heldout: HeldOut) -> dict[str, Any]:
  return {"heldout_loss": heldout.loss, "heldout_bits_per_byte": heldout.bits_per_byte}


def _describe(heldout: HeldOut, config: Config) -> str:
  if heldout.bits_per_byte is None:
    return f"{heldout.loss:.3f} nats a {config.data.target}"
  return f"{heldout.bits_per_byte:.3f} bits a byte"


def _title(setup: Setup) -> str:
  devices = setup.mesh.devices.flat[0].device_kind
  return f"{setup.config.name}: {setup.mesh.devices.size} x {devices}"
