"""The step that draws a token, compiled for TPUs that are not there: see `compiling`.

Weights are bfloat16; each row of the config's batch has a cache of the config's row length.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from layers.cache import KVCache, stack_axes
from layers.transformer import init_caches
from mesh.constrain import use_mesh
from mesh.rules import spec_for

from .. import cli
from ..training.setup import Setup, build
from .compiling import compile_here


def lower_decode(setup: Setup) -> jax.stages.Lowered:
  """One token for every row, lowered for the setup's (described) devices."""
  model, rows = setup.model, setup.config.data.batch_size
  empty = lambda: init_caches(model.spec, rows, setup.config.data.row_length, model.dtype)

  def place(leaf, names) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(setup.mesh, spec_for(names, setup.rules, setup.mesh))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  def step(params, caches, token_B, position_B):
    out = model.apply(
      {"params": params}, token_B[:, None], positions_BT=position_B[:, None], caches=caches
    )
    return jnp.argmax(out.logits_BTV[:, 0], -1).astype(jnp.int32), out.caches

  half = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=leaf.sharding)
  is_cache = lambda x: isinstance(x, KVCache) or hasattr(x, "state_BNHU")
  caches: Any = jax.tree.map(
    lambda cache: jax.tree.map(place, cache, stack_axes(cache)),
    jax.eval_shape(empty),
    is_leaf=is_cache,
  )
  each = place(jax.ShapeDtypeStruct((rows,), jnp.int32), ("cache_batch",))
  with use_mesh(setup.mesh, setup.rules):
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (each, caches))
    jitted = jax.jit(step, donate_argnums=1, out_shardings=shardings)
    return jitted.lower(jax.tree.map(half, setup.abstract.params), caches, each, each)


def main() -> None:
  """Compile, and leave a summary and XLA's dump."""
  config = cli.requested_config()
  compile_here(lower_decode(build(config, cli.described_devices(config))), cli.workdir(""))


if __name__ == "__main__":
  cli.run(main)
