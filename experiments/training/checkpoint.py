"""Orbax checkpoints of the state and of the data position; saved in the background."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ..config import ConfigError
from .state import TrainState


def saved_steps(folder: Path) -> list[int]:
  """Steps of the finished checkpoints in a `checkpoints/` folder, oldest first."""
  return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


class Checkpoints:
  """The `checkpoints/` folder of a run: one numbered folder a saved step.

  Use as a context manager: leaving it waits for saves under way.
  """

  def __init__(self, folder: Path, *, keep: int = 2, read_only: bool = False):
    self._folder = folder
    options = ocp.CheckpointManagerOptions(
      max_to_keep=None if read_only else keep,
      read_only=read_only,
      create=not read_only,
      cleanup_tmp_directories=not read_only,  # what a killed process left half written
    )
    handlers = {
      "params": ocp.StandardCheckpointHandler(),
      "optimizer": ocp.StandardCheckpointHandler(),
      "data": ocp.JsonCheckpointHandler(),
    }
    self._manager = ocp.CheckpointManager(
      folder.absolute(), item_handlers=handlers, options=options
    )

  def __enter__(self) -> "Checkpoints":
    self._unraisable = sys.unraisablehook
    sys.unraisablehook = self._late_callback
    return self

  def __exit__(self, *_: Any) -> None:
    try:
      with _system_errors(self._folder):
        self._manager.close()
    finally:
      sys.unraisablehook = self._unraisable

  def _late_callback(self, unraisable: Any) -> None:
    """After a failed write, which is raised, TensorStore still calls into Orbax's ended loop."""
    if str(unraisable.exc_value) != "Event loop is closed":
      self._unraisable(unraisable)

  def newest(self) -> int | None:
    """The newest finished step, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, data: dict[str, Any]) -> None:
    """Start saving; returns once the arrays are copied. A step already there is left alone.

    Raises:
      OSError: this save, or the one before it, could not be written. Finished ones are intact.
    """
    if self._manager.latest_step() == step:
      return
    args = ocp.args.Composite(
      params=ocp.args.StandardSave(state.params),
      optimizer=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
      data=ocp.args.JsonSave(data),
    )
    with _system_errors(self._folder):
      self._manager.save(step, args=args, force=True)

  def wait(self) -> None:
    """Until every save has finished.

    Raises:
      OSError: one could not be written.
    """
    with _system_errors(self._folder):
      self._manager.wait_until_finished()

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
    restored = self._manager.restore(step, args=args)
    rest = restored["optimizer"]
    return TrainState(rest["step"], restored["params"], rest["opt_state"]), restored["data"]

  def restore_params(self, step: int, abstract_params: Any) -> Any:
    """Parameters alone, on the mesh of `abstract_params`."""
    self._check(step, "params", abstract_params)
    args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract_params))
    return self._manager.restore(step, args=args)["params"]

  def _check(self, step: int, item: str, abstract: Any) -> None:
    # Orbax casts dtypes without a word, so compare before restoring.
    saved = self._manager.item_metadata(step)[item]
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


def _owner(item: str) -> str:
  return "model" if item == "params" else "optimizer"


def _name(path) -> str:
  return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


@contextlib.contextmanager
def _system_errors(folder: Path) -> Iterator[None]:
  """TensorStore wraps what the system refuses in a ValueError; make it an OSError again."""
  try:
    yield
  except ValueError as e:
    code = re.search(r"os_error_code='(\d+)'", str(e))
    if code is None:
      raise
    raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from e
