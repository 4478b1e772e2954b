"""The training loop: restore or draw the state, step, log, evaluate, save, report."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
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
from ..data.loader import make_loader
from .checkpoint import Checkpoints
from .evaluate import HeldOut, evaluate
from .metrics import MetricsWriter, summarise
from .progress import ProgressDisplay
from .report import write_report
from .setup import Setup
from .state import TrainState, init_state
from .step import make_eval_step, make_train_step

# A CPU process that lets many collective steps pile up can deadlock; a few hide all latency.
_IN_FLIGHT = 4


class Outcome(NamedTuple):
  """How a call of `train` ended."""

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


class CompileOnce:
  """A jitted step that says so, and why, if an input makes it compile a second time."""

  def __init__(self, step: Callable, note: Callable[[str], None]):
    self._step, self._note = step, note
    self._seen: dict[str, tuple] | None = None

  def __call__(self, *args: Any) -> Any:
    now = {
      jax.tree_util.keystr(path): (x.shape, x.dtype, x.sharding)
      for path, x in jax.tree.leaves_with_path(args)
    }
    if self._seen is not None and now != self._seen:
      changed = [k for k in now.keys() | self._seen.keys() if now.get(k) != self._seen.get(k)]
      first = min(changed)
      self._note(
        f"recompiling the step: {len(changed)} inputs changed, e.g. {first} "
        f"from {self._seen.get(first)} to {now.get(first)}"
      )
    self._seen = now
    return self._step(*args)


def train(
  setup: Setup,
  dataset: Dataset,
  folder: Path,
  *,
  profile: Profile | None = None,
  baselines: Callable[[], dict[str, float]] = dict,
) -> Outcome:
  """Train to `config.train.steps` in run directory `folder`, resuming from its newest checkpoint.

  Args:
    baselines: called for the report, bits a byte by name.

  Ctrl-C and SIGTERM finish the step, save, and return with `stopped_by` set.
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
    microbatches=config.train.microbatches,
    z_loss=config.train.z_loss,
  )
  shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract)
  jitted = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))

  with contextlib.ExitStack() as stack:
    stack.enter_context(use_mesh(mesh, setup.rules))
    checkpoints = stack.enter_context(
      Checkpoints(folder / "checkpoints", keep=config.checkpoint.keep)
    )

    # Restore or draw the state
    start = checkpoints.newest() or 0
    if start:
      state, position = checkpoints.restore(start, setup.abstract)
      loader.restore(position)
    else:
      state = init_state(setup.model, setup.optimizer, setup.abstract, config.train.seed)
    writer = stack.enter_context(contextlib.closing(MetricsWriter(folder, resume_step=start)))
    display = stack.enter_context(ProgressDisplay(total, start, config.name))
    stop = stack.enter_context(_stop_signal())
    timer = _StepTimer(config, mesh)
    step_fn = CompileOnce(jitted, display.note)
    if start:
      display.note(f"resumed from step {start}")

    # Step
    pending, heldout, tracing = [], None, False
    batch = place(next(loader)) if start < total else None
    for step in range(start + 1, total + 1):
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

      # Log
      if step % config.train.log_every == 0 or step == total or step == start + 1:
        host = jax.device_get(pending)
        row = summarise(host) | {"learning_rate": float(setup.schedule(step - 1))}
        row |= timer.interval(0 if step == start + 1 else len(pending))
        writer.write(step, row)
        display.update(step, row)
        pending = []

      # Evaluate, save
      if config.eval.every and step % config.eval.every == 0 and step < total:
        with timer.pause():
          heldout = held_out(setup, dataset, eval_step, state.params, place)
          writer.write(step, _heldout_row(heldout))
          display.note(f"step {step}  held-out {heldout.bits_per_byte:.3f} bits/byte")
      if step % config.checkpoint.every == 0 or step == total or stop.received:
        with timer.pause():
          checkpoints.save(step, state, position)
      if tracing and (step + 1 == profile.stop or step == total):
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        tracing = False
        display.note(f"profile of steps {profile.start}:{step + 1} in {folder / 'profile'}")
      if stop.received:
        break

    # Finish
    final = int(state.step)
    if final == total:
      heldout = held_out(setup, dataset, eval_step, state.params, place)
      if start < total:
        writer.write(final, _heldout_row(heldout))
    checkpoints.wait()
  if is_primary():
    layers = [i for group in moe_layers(config.model) for i in group]
    lines = baselines() if final == total else {}
    write_report(folder, title=_title(setup), moe_layer_indices=layers, baselines=lines)
  return Outcome(final, state, heldout, stop.received, timer.seconds, setup)


def batch_rows(setup: Setup) -> np.ndarray:
  """The rows of a global batch that this process loads."""
  spec = spec_for(("act_batch", "act_seq"), setup.rules, setup.mesh)
  return local_rows(setup.mesh, spec, setup.config.data.batch_size)


def batch_placer(setup: Setup) -> Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]:
  """Puts this host's part of a batch on the mesh: rows over the batch axes, length over context."""
  spec = spec_for(("act_batch", "act_seq"), setup.rules, setup.mesh)
  return lambda batch: host_batch_to_global(batch, setup.mesh, spec)


def make_held_out_step(setup: Setup, dataset: Dataset):
  """The jitted evaluation step; synthetic tokens stand for no bytes."""
  tokenizer = dataset.tokenizer
  lengths_V = np.zeros(0, np.int32) if tokenizer is None else tokenizer.byte_lengths_V
  return jax.jit(make_eval_step(setup.model, lengths_V))


def held_out(setup: Setup, dataset: Dataset, eval_step, params: Any, place) -> HeldOut:
  """Held-out loss over the evaluation split, or its first `eval.batches` batches."""
  config = setup.config
  loader = make_loader(dataset, config.data, "heldout", local_rows=batch_rows(setup))
  batches = (b for i, b in enumerate(loader) if config.eval.batches is None
             or i < config.eval.batches)  # fmt: skip
  return evaluate(eval_step, params, batches, place)


def _heldout_row(heldout: HeldOut) -> dict[str, float]:
  return {"heldout_loss": heldout.loss, "heldout_bits_per_byte": heldout.bits_per_byte}


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


class _Stop:
  received: int | None = None


@contextlib.contextmanager
def _stop_signal() -> Iterator[_Stop]:
  """Note SIGINT and SIGTERM instead of dying; a second Ctrl-C interrupts at once."""
  stop = _Stop()

  def receive(number: int, _frame: Any) -> None:
    if stop.received is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    stop.received = number

  previous = {n: signal.signal(n, receive) for n in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield stop
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
