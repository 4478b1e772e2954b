"""A trained model from its run directory, for programs that only read it."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from . import bucket, cli, paths
from .config import ConfigError, MeshConfig
from .training.checkpoint import Checkpoints
from .training.folder import read_config
from .training.setup import Setup, build


class Trained(NamedTuple):
  setup: Setup
  step: int
  params: Any


def open_run(folder: Path, *, batch: bool) -> Setup:
  """The setup of a run, on the mesh that the devices here suggest, with the command's overrides.

  The stored mesh sizes are dropped, since this machine may be another.

  Args:
    batch: whether batches of the config's size will be run.

  Raises:
    ConfigError: no run in the folder, or its model does not suit the devices.
  """
  stored = read_config(folder)
  if stored is None:
    raise ConfigError(f"{folder} holds no run (no config.json)")
  here = dataclasses.replace(stored, mesh=MeshConfig(rules=stored.mesh.rules))
  return build(cli.override_config(here), batch=batch)


def restore(setup: Setup, folder: Path) -> Trained:
  """Parameters of the newest checkpoint.

  Raises:
    ConfigError: no finished checkpoint in the folder, or one of another model.
  """
  if not paths.names(bucket.checkpoints(folder)):
    raise ConfigError(f"{folder} has no checkpoint yet")
  with Checkpoints(bucket.checkpoints(folder), read_only=True) as checkpoints:
    step = checkpoints.newest()
    if step is None:
      raise ConfigError(f"{folder} has no finished checkpoint yet")
    return Trained(setup, step, checkpoints.restore_params(step, setup.abstract.params))
