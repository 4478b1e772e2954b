"""A run directory that begins with given weights: config.json and a sealed checkpoint of step 0.

At step 0 nothing is trained: the checkpoint holds parameters and no optimizer state, and a run that
starts from it may choose its data and recipe.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..config import Config
from ..training.checkpoint import Checkpoints
from ..training.folder import write_config
from ..training.state import TrainState
from .landing import refuse_without_room
from .save import Written


def write(
  folder: Path,
  config: Config,
  params: Any,
  files: dict[str, bytes],
  progress: Callable[[int, int], None],
) -> Written:
  """Write the run into `folder`, which is there and empty.

  Args:
    files: more files, by name: of the tokenizer, which the run has for its own if
      `data.tokenizer` is empty.

  Raises:
    ConfigError: the disk has no room for it, or its checkpoint is not what was written.
    OSError: the disk refuses.
  """
  leaves = jax.tree.leaves(params)
  size = sum(leaf.nbytes for leaf in leaves)
  refuse_without_room(folder, size)
  write_config(folder, config)
  for name, data in files.items():
    (folder / name).write_bytes(data)
  progress(0, 2)
  with Checkpoints(folder / "checkpoints") as checkpoints:
    checkpoints.save(0, TrainState(jnp.zeros((), jnp.int32), params, ()), {})
    checkpoints.wait()
    for save in checkpoints.ended():
      if save.error is not None:
        raise save.error
    progress(1, 2)
    checkpoints.newest()  # refuses a step that is not what was written
  progress(2, 2)
  return Written(len(leaves), sum(leaf.size for leaf in leaves), size, ["checkpoints/0"])
