"""Orbax checkpoints of the state and of the data position; saved in the background."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ..config import ConfigError
from .state import TrainState


class Checkpoints:
  """The `checkpoints/` folder of a run: one numbered folder a saved step.

  Use as a context manager: leaving it waits for saves under way.
  """

  def __init__(self, folder: Path, *, keep: int = 2, read_only: bool = False):
    options = ocp.CheckpointManagerOptions(
      max_to_keep=None if read_only else keep, read_only=read_only, create=not read_only
    )
    self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_: Any) -> None:
    self._manager.close()

  def newest(self) -> int | None:
    """The newest finished step, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, data: dict[str, Any]) -> None:
    """Start saving; returns once the arrays are copied. A step already there is left alone."""
    if self._manager.latest_step() == step:
      return
    args = ocp.args.Composite(
      params=ocp.args.StandardSave(state.params),
      optimizer=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
      data=ocp.args.JsonSave(data),
    )
    self._manager.save(step, args=args, force=True)

  def wait(self) -> None:
    """Until every save has finished; raises what a background save raised."""
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
    saved = self._manager.item_metadata(step)[item].tree
    have = {_name(p): leaf for p, leaf in jax.tree.leaves_with_path(saved)}
    want = {_name(p): leaf for p, leaf in jax.tree.leaves_with_path(abstract)}
    for name in sorted(have.keys() ^ want.keys()):
      where = "is only in the checkpoint" if name in have else "is not in the checkpoint"
      raise ConfigError(f"checkpoint of step {step}: {item}/{name} {where}; model changed?")
    for name, leaf in want.items():
      saved_kind, kind = (have[name].shape, have[name].dtype), (leaf.shape, leaf.dtype)
      if saved_kind != kind:
        raise ConfigError(
          f"checkpoint of step {step}: {item}/{name} is {saved_kind[1]}{list(saved_kind[0])}, "
          f"the config needs {kind[1]}{list(kind[0])}"
        )


def _name(path) -> str:
  return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
