"""Orbax checkpoints of the state and of the data position: saved in the background, then sealed
with digests (`manifest`), without which a step counts as never finished."""

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from mesh.multihost import agree_in_turn

from .. import paths
from ..config import CheckpointConfig, ConfigError
from ..paths import Place, Url
from . import manifest
from .manifest import REFUSED, saved_steps
from .state import TrainState

# What processes wait for each other's digests, of which each makes its own.
_SEAL_SECONDS = 1800.0
_TEMPORARY = ".orbax-checkpoint-tmp"
_DEFAULT = CheckpointConfig()


class Saved(NamedTuple):
  """A save that ended."""

  step: int
  bytes: int  # of this process's files, as `files`
  files: int
  sha256: str  # of their digests
  block_s: float  # that training stood still for
  total_s: float
  error: OSError | None = None  # why it could not be written


class Checkpoints:
  """The `checkpoints/` folder of a run: one numbered folder a saved step.

  Use as a context manager: leaving it waits for saves under way.

  Args:
    policy: which steps to keep.
    read_only: for programs that only look.
    note: told what a person must know: steps that are damaged.
  """

  def __init__(
    self,
    folder: Place,
    policy: CheckpointConfig = _DEFAULT,
    *,
    read_only: bool = False,
    note: Callable[[str], None] = print,
  ):
    self._remote = isinstance(folder, Url)
    self._folder = folder if isinstance(folder, Url) else folder.absolute()
    self._policy, self._read_only = policy, read_only
    self._note = note
    handler = ocp.CompositeCheckpointHandler(
      params=ocp.StandardCheckpointHandler(),
      optimizer=ocp.StandardCheckpointHandler(),
      data=ocp.JsonCheckpointHandler(),
    )
    # A mark says that a step in a bucket is finished; to rename it would be to copy it.
    mode = ocp.options.AtomicityMode.COMMIT_FILE if self._remote else ocp.options.AtomicityMode.AUTO
    options = ocp.options.AtomicityOptions(mode=mode)
    self._orbax = ocp.AsyncCheckpointer(handler, atomicity_options=options)
    self._sealing: threading.Thread | None = None
    self._ended: list[Saved] = []
    self._failure: BaseException | None = None
    if not read_only and _is_first():
      if not isinstance(self._folder, Url):
        self._folder.mkdir(parents=True, exist_ok=True)
      self._clear_temporaries()

  def __enter__(self) -> "Checkpoints":
    self._unraisable = sys.unraisablehook
    sys.unraisablehook = self._late_callback
    return self

  def __exit__(self, *_: Any) -> None:
    try:
      self._join()
      with _system_errors(self._folder):
        self._orbax.close()
    finally:
      sys.unraisablehook = self._unraisable

  def _late_callback(self, unraisable: Any) -> None:
    """After a failed write, which is raised, TensorStore still calls into Orbax's ended loop."""
    if str(unraisable.exc_value) != "Event loop is closed":
      self._unraisable(unraisable)

  def newest(self) -> int | None:
    """The newest step that is what was saved, or None if none was ever finished.

    Newer ones that are damaged are refused aloud and, but for a reader, set aside. Processes share
    the reading and get one answer.

    Raises:
      ConfigError: finished ones are there, and all are damaged.
    """
    return self.before(sys.maxsize)

  def before(self, bound: int) -> int | None:
    """`newest` of the steps up to `bound`."""
    steps = [step for step in manifest.steps(self._folder) if step <= bound]
    finished = [step for step in saved_steps(self._folder) if step <= bound]
    for step in reversed(steps):
      if self._is_intact(step):
        return step
      if not self._read_only:
        self._set_aside(step)
    if finished:
      raise ConfigError(
        f"{self._folder} has no intact checkpoint left: put back a copy of one, or remove the "
        "folder to start from the beginning"
      )
    return None

  def chosen(self, which: str) -> int | None:
    """The step that `which` names: "newest", "best" by held-out loss, or a number.

    Raises:
      ConfigError: it is not there or damaged; none was evaluated.
    """
    if which == "newest":
      return self.newest()
    judged = self._by_loss()
    wanted = [step for _, step in judged] if which == "best" else [int(which)]
    steps = saved_steps(self._folder)
    found = next((step for step in wanted if step in steps and self._is_intact(step)), None)
    if found is None:
      what = "evaluated checkpoint" if which == "best" else f"intact checkpoint of step {which}"
      held = ", ".join(map(str, steps)) or "none"
      raise ConfigError(
        f"{self._folder} has no {what} (saved: {held}); with checkpoint.keep_best=1 a run keeps "
        "the best of those it evaluates"
      )
    return found

  def is_best(self, loss: float) -> bool:
    """Whether a step of this held-out loss would be kept for it."""
    better = [other for other, _ in self._by_loss() if other <= loss]
    return len(better) < self._policy.keep_best

  def _by_loss(self) -> list[tuple[float, int]]:
    """(held-out loss, step) of finished steps that were evaluated, the least loss first."""
    steps = saved_steps(self._folder)
    losses = {s: manifest.read_facts(self._folder / str(s)).get("loss") for s in steps}
    return sorted((loss, step) for step, loss in losses.items() if loss is not None)

  def _is_intact(self, step: int) -> bool:
    why = self._damage(step)
    if why is not None:
      self._note(f"checkpoint of step {step} refused: {why}")
    return why is None

  def forget_after(self, step: int) -> None:
    """Set aside what was saved after `step`, to which the run goes back."""
    self.wait()
    self._set_aside(*(later for later in manifest.steps(self._folder) if later > step))

  def _damage(self, step: int) -> str | None:
    process, count = jax.process_index(), jax.process_count()
    items = ("params",) if self._read_only else ()
    mine = manifest.damage(self._folder / str(step), part=process, parts=count, items=items)
    if count == 1:
      return mine
    return agree_in_turn(mine or "", lambda said: next(filter(None, said), "")) or None

  def _set_aside(self, *steps: int) -> None:
    """Out of the way of later saves of these steps. Of all that ever were, the last one stays for a
    person to look at; more would fill the disk."""
    if _is_first() and steps:
      for name in paths.names(self._folder):
        if name.endswith(REFUSED):
          self._remove_aside(name)
      *more, last = sorted(steps)
      for step in more:
        self._remove(step)
      paths.set_aside(self._folder / str(last), REFUSED)
    if (
      jax.process_count() > 1
    ):  # nobody goes on before; what the others list meanwhile is no matter
      agree_in_turn("", lambda said: "")

  def _path(self, step: int) -> str:
    return str(self._folder / str(step))

  def _remove_aside(self, name: str) -> None:
    if self._remote:  # the mark last: the step must not come back
      self._remove(int(name.removesuffix(REFUSED)))
    paths.remove(self._folder / name)

  def _remove(self, step: int) -> None:
    manifest.unseal(self._folder / str(step))  # first: half a step must not look like a whole
    paths.remove(self._folder / str(step))

  def _clear_temporaries(self) -> None:
    """What a killed process left half written."""
    for name in paths.names(self._folder):
      if _TEMPORARY in name:
        paths.remove(self._folder / name)

  def save(
    self, step: int, state: TrainState, data: dict[str, Any], *, loss: float | None = None
  ) -> None:
    """Start saving; returns once the arrays are copied. A step already there is left alone.

    How it ends is told by `ended`. The save before this one is waited for.

    Args:
      loss: held out, by which `keep_best` judges.
    """
    self._join()
    began = time.monotonic()
    if step in manifest.steps(self._folder) and manifest.is_sealed(self._folder / str(step)):
      return
    if self._remote and _is_first():  # a step of this number that was set aside
      self._remove_aside(f"{step}{REFUSED}")
    args = ocp.args.Composite(
      params=ocp.args.StandardSave(state.params),
      optimizer=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
      data=ocp.args.JsonSave(data),
    )
    try:
      with _system_errors(self._folder):
        self._orbax.save(self._path(step), args=args, force=True)
    except OSError as e:
      self._end(step, began, time.monotonic() - began, e)
      return
    blocked = time.monotonic() - began
    self._sealing = threading.Thread(target=self._seal, args=(step, began, blocked, loss))
    self._sealing.start()

  def _seal(self, step: int, began: float, blocked: float, loss: float | None) -> None:
    """Once the step is written: digests, then away with steps that need not be kept."""
    try:
      with _system_errors(self._folder):
        self._orbax.wait_until_finished()
      path, index, count = self._folder / str(step), jax.process_index(), jax.process_count()
      made = manifest.seal(path, index, count, loss=loss)
      self._ended.append(Saved(step, *made, blocked, time.monotonic() - began))
      if index == 0:
        self._await_seals(path)
        self._retire()
    except OSError as e:
      self._end(step, began, blocked, e)
    except BaseException as e:  # not the disk's: raised where the next save would begin
      self._failure = e

  def _end(self, step: int, began: float, blocked: float, error: OSError) -> None:
    if _is_first():
      self._clear_temporaries()
      if not manifest.is_sealed(self._folder / str(step)):
        paths.remove(self._folder / str(step))
    self._ended.append(Saved(step, 0, 0, "", blocked, time.monotonic() - began, error))

  def _await_seals(self, step: Place) -> None:
    until = time.monotonic() + _SEAL_SECONDS
    while not manifest.is_sealed(step):
      if time.monotonic() > until:
        raise OSError(f"{step}: no digests from the other processes for {_SEAL_SECONDS:g} s")
      time.sleep(0.05)

  def _retire(self) -> None:
    steps, policy = saved_steps(self._folder), self._policy
    kept = set(steps[-policy.keep :])
    if policy.keep_every:
      kept |= {step for step in steps if step % policy.keep_every == 0}
    if policy.keep_best:
      kept |= {step for _, step in self._by_loss()[: policy.keep_best]}
    for step in steps:
      if step not in kept:
        self._remove(step)

  def ended(self) -> list[Saved]:
    """Saves that ended since the last call."""
    ended, self._ended = self._ended, []
    return ended

  def _join(self) -> None:
    if self._sealing is not None:
      self._sealing.join()
      self._sealing = None
    if self._failure is not None:
      failure, self._failure = self._failure, None
      raise failure

  def wait(self) -> None:
    """Until every save has ended."""
    self._join()

  def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """State on the mesh of `abstract`, and the data position.

    Raises:
      ConfigError: a leaf that is missing, extra, or of another shape or dtype, by name.
    """
    optimizer = {"step": abstract.step, "opt_state": abstract.opt_state}
    self._check(step, "params", abstract.params)
    self._check(step, "optimizer", optimizer)
    args = ocp.args.Composite(
      params=ocp.args.StandardRestore(abstract.params),
      optimizer=ocp.args.StandardRestore(optimizer),
      data=ocp.args.JsonRestore(),
    )
    restored = self._orbax.restore(self._path(step), args=args)
    rest = restored["optimizer"]
    return TrainState(rest["step"], restored["params"], rest["opt_state"]), restored["data"]

  def restore_params(self, step: int, abstract_params: Any) -> Any:
    """Parameters alone, on the mesh of `abstract_params`."""
    self._check(step, "params", abstract_params)
    args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract_params))
    return self._orbax.restore(self._path(step), args=args)["params"]

  def _check(self, step: int, item: str, abstract: Any) -> None:
    # Orbax casts dtypes without a word, so compare before restoring.
    saved = self._orbax.metadata(self._path(step)).item_metadata[item]
    if saved is None:
      raise ConfigError(f"checkpoint of step {step} in {self._folder} has no readable {item!r}")
    have = {_name(p): leaf for p, leaf in jax.tree.leaves_with_path(saved.tree)}
    want = {_name(p): leaf for p, leaf in jax.tree.leaves_with_path(abstract)}
    for name in sorted(have.keys() ^ want.keys()):
      where = "is only in the checkpoint" if name in have else "is not in the checkpoint"
      raise ConfigError(
        f"checkpoint of step {step}: {item}/{name} {where}; the {_owner(item)} must be the one "
        "that was saved"
      )
    for name, leaf in want.items():
      saved_kind, kind = (have[name].shape, have[name].dtype), (leaf.shape, leaf.dtype)
      if saved_kind != kind:
        raise ConfigError(
          f"checkpoint of step {step}: {item}/{name} is {saved_kind[1]}{list(saved_kind[0])}, the "
          f"config needs {kind[1]}{list(kind[0])}; the {_owner(item)} must be as it was saved"
        )


def _is_first() -> bool:
  return jax.process_index() == 0


def _owner(item: str) -> str:
  return "model" if item == "params" else "optimizer"


def _name(path) -> str:
  return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


@contextlib.contextmanager
def _system_errors(folder: Place) -> Iterator[None]:
  """TensorStore wraps what the system refuses in a ValueError; make it an OSError again, like
  whatever goes wrong on the way to a bucket."""
  if isinstance(folder, Url):
    with paths.reaching(folder):
      yield
    return
  try:
    yield
  except ValueError as e:
    code = re.search(r"os_error_code='(\d+)'", str(e))
    if code is None:
      raise
    raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from e
