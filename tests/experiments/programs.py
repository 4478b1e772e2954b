"""Programs of `experiments` as a user runs them: in this process, or in one of their own."""

import contextlib
import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl.testing import flagsaver

from experiments import cli, convert, evaluate, generate, logbook, plan, replay, run
from experiments.training.checkpoint import Checkpoints
from experiments.training.folder import read_config
from experiments.training.metrics import read_metrics
from experiments.training.setup import build
from experiments.training.state import param_layout

ROOT = Path(__file__).parents[2]
PROGRAMS = {
  "run": run, "generate": generate, "evaluate": evaluate, "plan": plan, "logbook": logbook,
  "replay": replay, "convert": convert,
}  # fmt: skip

# Config `debug` on one of the eight devices that tests have, its schedule independent of the
# number of steps, so that one compiled program serves all runs; and the same without a sample.
ONE = "--config.mesh.data=1"
DEBUG = ("--config=debug", ONE, "--config.optimizer.decay_steps=40")
QUICK = (*DEBUG, "--config.eval.sample_prompt=", "--config.eval.batches=2")


class Result(NamedTuple):
  code: int
  out: str
  err: str


def call(program: str, *arguments: object) -> Result:
  """A program in this process."""
  out, err = io.StringIO(), io.StringIO()
  argv = [f"experiments/{program}.py", *map(str, arguments)]
  with (
    flagsaver.flagsaver(),
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
  ):
    code = cli.execute(PROGRAMS[program].main, argv)
  return Result(code, out.getvalue(), err.getvalue())


def environment(folder: Path, **more: str) -> dict[str, str]:
  """Of a user whose home and temporary folder lie in `folder`.

  XLA_FLAGS, and with it eight devices, are those of the tests, so that compiled programs are found
  in their cache.
  """
  home, temporary = folder / "home", folder / "tmp"
  home.mkdir(exist_ok=True)
  temporary.mkdir(exist_ok=True)
  kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_", "MPL"))}
  return kept | {
    "PYTHONPATH": str(ROOT),
    "HOME": str(home),
    "TMPDIR": str(temporary),
    "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    **more,
  }


def spawn(folder: Path, program: str, *arguments: object, script: str = "", **more: str) -> Result:
  """A program in a process of its own, working in `folder`.

  Args:
    script: Python that runs first, in place of `python -m`.
    more: environment variables.
  """
  command = [sys.executable, "-m", f"experiments.{program}"]
  if script:
    start = f"\nfrom experiments import cli, {program} as program\ncli.run(program.main)"
    command = [sys.executable, "-c", script + start]
  process = subprocess.run(
    [*command, *map(str, arguments)],
    cwd=folder,
    env=environment(folder, **more),
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  return Result(process.returncode, process.stdout, process.stderr)


def metrics(folder: Path) -> list[dict]:
  """Rows of training steps."""
  return [row for row in read_metrics(folder) if "loss" in row]


def losses(folder: Path) -> np.ndarray:
  return np.array([row["loss"] for row in metrics(folder)])


def steps(folder: Path) -> list[int]:
  return [row["step"] for row in metrics(folder)]


def state_hash(folder: Path) -> tuple[int, str, dict]:
  """Of the newest checkpoint: step, sha256 of parameters and optimizer state, data position."""
  config = read_config(folder)
  assert config is not None
  setup = build(config, jax.devices()[:1])
  with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
    step = checkpoints.newest()
    state, position = checkpoints.restore(step, setup.abstract)
  digest = hashlib.sha256()
  for path, leaf in jax.tree.leaves_with_path(state):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.asarray(leaf).tobytes())
  return step, digest.hexdigest(), position


def random_params(model, scale: float, seed: int = 0):
  """Normal weights by numpy: compiling a model's own draw takes longer than its forward pass."""
  rng = np.random.default_rng(seed)
  shapes = param_layout(model).shapes
  draw = lambda s: jax.numpy.asarray(scale * rng.standard_normal(s.shape, np.float32))
  return jax.tree.map(draw, shapes)
