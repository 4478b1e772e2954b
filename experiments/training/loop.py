"""The training loop: restore or draw the state, step, log, evaluate, save, report."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from layers.count import train_flops_per_token
from layers.transformer import moe_layers
from mesh.constrain import use_mesh
from mesh.hardware import find_chip
from mesh.multihost import host_batch_to_global, is_primary, local_rows
from mesh.rules import spec_for

from ..config import Config
from ..data.load import Dataset
from ..data.loader import Loader, make_loader
from ..overrides import Change
from .checkpoint import Checkpoints
from .evaluate import HeldOut, evaluate
from .folder import record_changes, write_config
from .metrics import MetricsWriter, summarise
from .progress import ProgressDisplay
from .report import write_report
from .setup import Setup
from .state import TrainState, init_state
from .step import make_eval_step, make_train_step
from .stop import Stop, stop_signal

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


class Profile(NamedTuple):
  """An xprof trace of steps start..stop - 1."""

  start: int
  stop: int


class Resume(NamedTuple):
  """What a resumed run changes (`overrides.check_resume`), why, and may its data be other data?"""

  changes: Sequence[Change] = ()
  reason: str = ""
  allow_other_data: bool = False


class CompileOnce:
  """A jitted step that says so, and why, if an input makes it compile a second time."""

  def __init__(self, step: Any, note: Callable[[str], None]):
    self._step, self._note = step, note
    self._seen: list[dict[str, tuple]] = []  # inputs of each compilation

  def __call__(self, *args: Any) -> Any:
    result = self._step(*args)
    if self._step._cache_size() != len(self._seen):
      now = {  # donated arrays still tell shape and sharding
        jax.tree_util.keystr(path): (str(x.aval), x.sharding)
        for path, x in jax.tree.leaves_with_path(args)
      }
      if self._seen:
        self._note(self._cause(now))
      self._seen.append(now)
    return result

  def _cause(self, now: dict[str, tuple]) -> str:
    if now in self._seen:
      return "recompiled the step: no input changed, so a context did (mesh, rules, JAX settings)"
    last = self._seen[-1]
    changed = sorted(k for k in now.keys() | last.keys() if now.get(k) != last.get(k))
    before, after = (" ".join(map(str, x.get(changed[0], ("absent",)))) for x in (last, now))
    return (
      f"recompiled the step: {len(changed)} inputs changed, e.g. {changed[0]} from {before} "
      f"to {after}"
    )


def train(
  setup: Setup,
  dataset: Dataset,
  folder: Path,
  *,
  profile: Profile | None = None,
  resume: Resume | None = None,
  baselines: Callable[[], dict[str, float]] = dict,
) -> Outcome:
  """Train to `config.train.steps` in run directory `folder`, resuming from its newest checkpoint.

  Args:
    baselines: called for the report, bits a byte by name.

  Ctrl-C and SIGTERM finish the step, save, and return with `stopped_by` set.

  Raises:
    ConfigError: the checkpoint is of another model, optimizer or data.
    OSError: the disk refused a write; checkpoints finished before are whole.
  """
  config, mesh = setup.config, setup.mesh
  total = config.train.steps
  place = batch_placer(setup)
  loader = make_loader(dataset, config.data, "train", local_rows=batch_rows(setup))
  eval_step = make_held_out_step(setup, dataset)
  train_step = make_train_step(
    setup.model,
    setup.optimizer,
    seed=config.train.seed,
    microbatches=setup.accumulate,
    z_loss=config.train.z_loss,
  )
  shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract)
  jitted = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))

  with contextlib.ExitStack() as stack:
    stack.enter_context(use_mesh(mesh, setup.rules))
    stack.enter_context(contextlib.closing(loader))
    stop = stack.enter_context(stop_signal())
    checkpoints = stack.enter_context(
      Checkpoints(folder / "checkpoints", keep=config.checkpoint.keep)
    )
    primary = is_primary()
    display = ProgressDisplay(total, config.name, enabled=primary)

    # Restore or draw the state
    start = checkpoints.newest() or 0
    if start:
      state, position = checkpoints.restore(start, setup.abstract)
      if start < total:
        display.note(f"resuming after step {start}")
        _restore_data(loader, position, resume, display.note)
    else:
      state = init_state(setup.model, setup.optimizer, setup.abstract, config.train.seed)
    writer = None
    if primary:
      write_config(folder, config)
      if start and resume is not None and resume.changes:
        record_changes(folder, start, resume.reason, resume.changes)
      writer = stack.enter_context(contextlib.closing(MetricsWriter(folder, resume_step=start)))
    if profile is not None and not start < profile.start <= total:
      display.note(f"no profile: step {profile.start} is not among those left of {total}")
    timer = _StepTimer(config, mesh)
    step_fn = CompileOnce(jitted, display.note)

    # Step
    pending, tracing, stopped = [], False, stop.asked()
    if start < total:
      stack.enter_context(display.live(start))
      batch = place(next(loader))
    for step in () if stopped else range(start + 1, total + 1):
      if profile is not None and step == profile.start:
        jax.profiler.start_trace(str(folder / "profile"))
        tracing = True
      with (
        jax.transfer_guard("disallow"),
        jax.profiler.StepTraceAnnotation("train", step_num=step),
      ):
        state, metrics = step_fn(state, batch)
      pending.append(metrics)
      position = loader.state()
      if step < total:
        batch = place(next(loader))
      if len(pending) > _IN_FLIGHT:
        jax.block_until_ready(pending[-_IN_FLIGHT].loss)
      if step == start + 1:
        jax.block_until_ready(metrics.loss)
        timer.restart()
        display.started()
      stopped = stop.asked()  # once a step: a signal may come at any moment
      last = stopped or step == total

      # Log
      if step % config.train.log_every == 0 or last or step == start + 1:
        host = jax.device_get(pending)
        row = summarise(host) | {"learning_rate": float(setup.schedule(step - 1))}
        row |= timer.interval(0 if step == start + 1 else len(pending))
        if writer:
          writer.write(step, row)
        display.update(step, row)
        pending = []

      # Save, evaluate
      if step % config.checkpoint.every == 0 or last:
        if stopped:
          display.note(f"stopping: saving step {step} (Ctrl-C again stops at once)")
        with timer.pause():
          checkpoints.save(step, state, position)
      if tracing and (step + 1 == profile.stop or last):
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        tracing = False
        display.note(f"profile of steps {profile.start}:{step + 1} in {folder / 'profile'}")
      if stopped:
        break
      if config.eval.every and step % config.eval.every == 0 and step < total:
        with timer.pause():
          result = held_out(setup, dataset, eval_step, state.params, place, stop)
        if result is not None and writer:
          writer.write(step, _heldout_row(result))
          display.note(f"step {step}  held out: {_describe(result, config)}")

    # Finish
    heldout = None
    if not stopped:
      heldout = held_out(setup, dataset, eval_step, state.params, place, stop)
    if heldout is not None and writer and start < total:
      writer.write(int(state.step), _heldout_row(heldout))
    checkpoints.wait()
  if primary:
    layers = [i for group in moe_layers(config.model) for i in group]
    lines = {} if heldout is None else baselines()
    write_report(folder, title=_title(setup), moe_layer_indices=layers, baselines=lines)
  return Outcome(start, int(state.step), state, heldout, stop.by, timer.seconds, setup)


def _restore_data(
  loader: Loader, position: dict[str, Any], resume: Resume | None, note: Callable[[str], None]
) -> None:
  """Continue in the data where `position` says; in other data, if allowed, from its start."""
  may_differ = resume is not None and resume.allow_other_data
  if may_differ and position["fingerprint"] != loader.state()["fingerprint"]:
    note("the data is not what the checkpoint was trained on: reading it from its start")
  else:
    loader.restore(position)


def batch_rows(setup: Setup) -> np.ndarray:
  """The rows of a global batch that this process loads."""
  spec = spec_for(("act_batch", "act_seq"), setup.rules, setup.mesh)
  return local_rows(setup.mesh, spec, setup.config.data.batch_size)


def batch_placer(setup: Setup) -> Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]:
  """Puts this host's part of a batch on the mesh: rows over the batch axes, length over context."""
  spec = spec_for(("act_batch", "act_seq"), setup.rules, setup.mesh)
  return lambda batch: host_batch_to_global(batch, setup.mesh, spec)


def make_held_out_step(setup: Setup, dataset: Dataset):
  """The jitted evaluation step; only next tokens of a text stand for bytes."""
  tokenizer = dataset.tokenizer if setup.config.data.objective == "next_token" else None
  lengths_V = np.zeros(0, np.int32) if tokenizer is None else tokenizer.byte_lengths_V
  return jax.jit(make_eval_step(setup.model, lengths_V))


def held_out(
  setup: Setup, dataset: Dataset, eval_step, params: Any, place, stop: Stop | None = None
) -> HeldOut | None:
  """Held-out loss over the evaluation split, or its first `eval.batches` batches.

  None when `stop` was set before the end: part of a split is not comparable.
  """
  stop = Stop() if stop is None else stop
  data = setup.config.data
  loader = make_loader(dataset, data, "heldout", local_rows=batch_rows(setup))
  with contextlib.closing(loader):
    batches = itertools.islice(loader, setup.config.eval.batches)
    whole = itertools.takewhile(lambda _: not stop.asked(), batches)
    result = evaluate(eval_step, params, whole, place)
  return result if stop.by is None else None


def _heldout_row(heldout: HeldOut) -> dict[str, Any]:
  return {"heldout_loss": heldout.loss, "heldout_bits_per_byte": heldout.bits_per_byte}


def _describe(heldout: HeldOut, config: Config) -> str:
  if heldout.bits_per_byte is None:
    return f"{heldout.loss:.3f} nats a {config.data.target}"
  return f"{heldout.bits_per_byte:.3f} bits a byte"


def _title(setup: Setup) -> str:
  devices = setup.mesh.devices.flat[0].device_kind
  return f"{setup.config.name}: {setup.mesh.devices.size} x {devices}"


class _StepTimer:
  """Time spent in steps: intervals between logs, less what `pause` covers."""

  def __init__(self, config: Config, mesh: jax.sharding.Mesh):
    self._tokens = config.data.batch_size * config.data.row_length
    self._flops = train_flops_per_token(config.model, config.data.row_length)
    chip = find_chip(mesh.devices.flat[0])
    peak = chip.flops_per_device if chip else None
    self._peak = peak * mesh.devices.size if peak else None
    self.seconds = 0.0
    self.restart()

  def restart(self) -> None:
    self._mark, self._paused = time.monotonic(), 0.0

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    began = time.monotonic()
    yield
    self._paused += time.monotonic() - began

  def interval(self, steps: int) -> dict[str, Any]:
    """Rates since the last call; `steps` 0 marks the compiling step, whose rate means nothing."""
    seconds = max(time.monotonic() - self._mark - self._paused, 1e-9)
    self.restart()
    if not steps:
      return {"tokens_per_second": None, "mfu": None}
    self.seconds += seconds
    rate = steps * self._tokens / seconds
    return {
      "tokens_per_second": rate,
      "mfu": rate * self._flops / self._peak if self._peak else None,
    }
