"""Compute a step again: `python -m experiments.replay --workdir=PATH --step=K`.

From the checkpoint before step K, on the mesh of the run: loss and gradient norm of each logged
step are compared with what was recorded, bit for bit, and so is the state if step K was saved.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from mesh.constrain import use_mesh

from . import bucket, cli
from .config import Config, ConfigError
from .data.load import load
from .data.loader import make_loader
from .training.checkpoint import Checkpoints
from .training.compiled_step import Limit, jit_step
from .training.folder import own_tokenizer, read_config
from .training.manifest import saved_steps
from .training.metrics import bits_of, read_metrics
from .training.recovery import Recovery
from .training.setup import Setup, batch_placer, batch_rows, build
from .training.state import TrainState
from .training.verify import Verifier

_STEP = flags.DEFINE_integer("step", None, "The step to compute again.")
_SHOWN = 10


def main() -> int:
  folder = cli.require_workdir()
  stored = read_config(folder)
  assert stored is not None
  step = _STEP.value
  if step is None or step < 1:
    saved = ", ".join(map(str, saved_steps(bucket.checkpoints(folder))))
    raise ConfigError(f"--step=K: give a step after a saved one (saved: {saved or 'none'})")
  config = own_tokenizer(cli.override_config(stored), folder)
  setup = build(config)
  with Checkpoints(bucket.checkpoints(folder), read_only=True) as checkpoints:
    start = checkpoints.before(step - 1)
    if start is None:
      raise ConfigError(f"there is no intact checkpoint from before step {step} in {folder}")
    print(f"from the checkpoint of step {start} to step {step}, mesh {dict(setup.mesh.shape)}\n")
    computed, state = _compute(setup, config, folder, checkpoints, start, step)
    different = _compare_steps(folder, computed)
    if step in saved_steps(bucket.checkpoints(folder)):
      different += _compare_states(state, checkpoints.restore(step, setup.abstract)[0], step)
  if different:
    print(f"\ndifferent: {', '.join(different[:_SHOWN])}")
    return cli.OUR_FAULT
  print("\nall that was recorded is equal, to the bit")
  return cli.FINISHED


def _compute(
  setup: Setup, config: Config, folder: Path, checkpoints: Checkpoints, start: int, step: int
) -> tuple[dict[int, str], TrainState]:
  """Bits of the steps after `start`, and the state after `step`."""
  dataset = load(config.data, config.model.vocab_size)
  loader = make_loader(dataset, config.data, "train", local_rows=batch_rows(setup))
  recovery = Recovery(config, folder, primary=False)
  verifier = Verifier(setup) if config.train.verify_every else None  # it is part of the program
  run, place = jit_step(setup, verifier and verifier.digest), batch_placer(setup)
  limit, found = Limit(setup.mesh), {}
  try:
    with use_mesh(setup.mesh, setup.rules):
      state, kept = checkpoints.restore(start, setup.abstract)
      loader.avoid(recovery.windows)
      loader.restore(kept)
      recovery.guard.restore(kept["guard"])
      for now in range(start + 1, step + 1):
        position = loader.state()["position"]
        state, metrics = run(state, place(next(loader)), limit(recovery.guard.limit))
        recovery.ran(now, metrics, position)
        recovery.judge(0)
        found[now] = bits_of(jax.device_get(metrics._replace(moe=(), digests=None)))
  finally:
    loader.close()
  return found, state


def _compare_steps(folder: Path, computed: dict[int, str]) -> list[str]:
  recorded = {row["step"]: row["bits"] for row in read_metrics(folder) if "bits" in row}
  both = [step for step in computed if step in recorded]
  print(f"{'step':>8}  {'recorded':<18} computed again")
  for step in both[-_SHOWN:]:
    same = "equal" if recorded[step] == computed[step] else "DIFFERENT"
    print(f"{step:>8}  {recorded[step]:<18} {computed[step]:<18} {same}")
  if not both:
    print("      no step between is logged (train.log_every=1 logs all)")
  return [f"step {step}" for step in both if recorded[step] != computed[step]]


def _compare_states(computed: TrainState, saved: TrainState, step: int) -> list[str]:
  def differs(a: Any, b: Any) -> bool:
    parts = zip(a.addressable_shards, b.addressable_shards, strict=True)
    return any(np.asarray(x.data).tobytes() != np.asarray(y.data).tobytes() for x, y in parts)

  pairs = zip(jax.tree.leaves_with_path(computed), jax.tree.leaves(saved), strict=True)
  found = [jax.tree_util.keystr(path) for (path, a), b in pairs if differs(a, b)]
  count = len(jax.tree.leaves(saved))
  print(f"\nthe state saved after step {step}: {count - len(found)} of {count} arrays equal")
  return found


if __name__ == "__main__":
  cli.run(main)
