"""A trained model from its run directory, for programs that only read it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from . import cli
from .config import Config, ConfigError
from .overrides import from_json
from .training.checkpoint import Checkpoints
from .training.setup import Setup, build


class Trained(NamedTuple):
  setup: Setup
  step: int
  params: Any


def restore(folder: Path) -> Trained:
  """Parameters of the newest checkpoint, on the mesh that the devices here suggest.

  The stored mesh sizes are dropped, since this machine may be another; overrides still apply.

  Raises:
    ConfigError: no run or no checkpoint in the folder.
  """
  stored: Config = from_json(json.loads((folder / "config.json").read_text()))
  setup = build(cli.override_config(stored))
  if not (folder / "checkpoints").is_dir():
    raise ConfigError(f"{folder} has no checkpoint yet")
  with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
    step = checkpoints.newest()
    if step is None:
      raise ConfigError(f"{folder} has no finished checkpoint yet")
    return Trained(setup, step, checkpoints.restore_params(step, setup.abstract.params))
