"""The step as it is compiled, and what is told if that happens twice."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .setup import Setup
from .step import make_train_step


def jit_step(setup: Setup, digest: Callable[[Any], jax.Array] | None = None) -> Any:
  """The jitted training step, which takes the place of its state.

  Args:
    digest: of `make_train_step`.
  """
  config = setup.config
  step = make_train_step(
    setup.model,
    setup.optimizer,
    seed=config.train.seed,
    microbatches=setup.accumulate,
    z_loss=config.train.z_loss,
    digest=digest,
  )
  shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract)
  on_gpu = setup.mesh.devices.flat[0].platform == "gpu"
  options = {"xla_gpu_deterministic_ops": True} if config.train.deterministic and on_gpu else None
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)


class CompileOnce:
  """A jitted step that says so, and why, if an input makes it compile a second time."""

  def __init__(self, step: Any, note: Callable[[str], None]):
    self._step, self._note = step, note
    self._seen: list[dict[str, tuple]] = []  # inputs of each compilation

  def __call__(self, *args: Any) -> Any:
    result = self._step(*args)
    if self._step._cache_size() != len(self._seen):
      now = {  # donated arrays still tell shape and sharding
        jax.tree_util.keystr(path): (str(x.aval), x.sharding)
        for path, x in jax.tree.leaves_with_path(args)
      }
      if self._seen:
        self._note(self._cause(now))
      self._seen.append(now)
    return result

  def _cause(self, now: dict[str, tuple]) -> str:
    if now in self._seen:
      return "recompiled the step: no input changed, so a context did (mesh, rules, JAX settings)"
    last = self._seen[-1]
    changed = sorted(k for k in now.keys() | last.keys() if now.get(k) != last.get(k))
    before, after = (" ".join(map(str, x.get(changed[0], ("absent",)))) for x in (last, now))
    return (
      f"recompiled the step: {len(changed)} inputs changed, e.g. {changed[0]} from {before} "
      f"to {after}"
    )


class Limit:
  """The gradient norm above which a step is skipped, on all devices; sent when it has changed."""

  def __init__(self, mesh: Mesh):
    self._everywhere = NamedSharding(mesh, PartitionSpec())
    self.nothing = self._send(-np.inf)  # of a step that is only tried
    self._sent, self._array = np.inf, self._send(np.inf)

  def _send(self, value: float) -> jax.Array:
    number = np.float32(value)
    return jax.make_array_from_callback((), self._everywhere, lambda _: number)

  def __call__(self, value: float) -> jax.Array:
    if value != self._sent:
      self._sent, self._array = value, self._send(value)
    return self._array
