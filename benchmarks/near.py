"""Near copies in memory beside Orbax checkpoints with digests on a disk, in one process:

    python -m benchmarks.near [CONFIG ...]

Milliseconds, medians of REPEATS after one that warms up, the two in turn: how long training stands
still, how long until a step is written and sealed, and how long it takes to find the newest step,
verify it and have its state on the device.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from experiments.cli import named_config
from experiments.overrides import apply_overrides
from experiments.training.checkpoint import Checkpoints
from experiments.training.near import NearCopies
from experiments.training.setup import build
from experiments.training.state import init_state

REPEATS = 9


def measure(name: str) -> None:
  with (
    tempfile.TemporaryDirectory() as disk,
    tempfile.TemporaryDirectory(dir="/dev/shm") as memory,
  ):
    overrides = [("checkpoint.near", memory), ("train.steps", "1000")]
    config = apply_overrides(named_config(name), overrides)
    setup = build(config, jax.devices()[:1])
    drawn = init_state(setup.model, setup.optimizer, setup.abstract, config.train.seed)
    state, target = jax.block_until_ready(drawn), setup.abstract
    with Checkpoints(Path(disk) / "c") as orbax, NearCopies(config, Path(disk)) as near:
      near.begin()
      ways = {
        "near": (near, near.wait, lambda: near.newest([], target)),
        "orbax": (orbax, orbax.wait, orbax.newest),
      }
      rows = {way: [] for way in ways}
      for step in range(1, REPEATS + 2):
        for way, (copies, wait, newest) in ways.items():
          began = time.perf_counter()
          copies.save(step, state, {})
          still = time.perf_counter()
          wait()
          written = time.perf_counter()
          assert newest() == step
          found, _ = jax.block_until_ready(copies.restore(step, target))
          rows[way].append((still - began, written - began, time.perf_counter() - written))
          for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True):
            np.testing.assert_array_equal(a, b)
  size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
  print(f"{name}, {size:.0f} MB {'still':>12} {'written':>9} {'restored':>9}")
  medians = {w: [statistics.median(c) for c in zip(*r[1:], strict=True)] for w, r in rows.items()}
  for way, values in medians.items():
    print(f"  {way:<20}" + "".join(f"{1e3 * v:>10.1f}" for v in values))
  ratios = [o / n for n, o in zip(*medians.values(), strict=True)]
  print(f"  {'orbax / near':<20}" + "".join(f"{v:>10.1f}" for v in ratios))


if __name__ == "__main__":
  for config_name in sys.argv[1:] or ("moe_tiny", "dense_tiny"):
    measure(config_name)
