"""A small model's train step compiled for a TPU slice that is not there."""

import functools
import math
from dataclasses import replace
from typing import NamedTuple

import jax
import pytest

from experiments.config import Config, DataConfig, MeshConfig, TrainConfig
from experiments.planning.compiling import lower_step
from experiments.planning.program import compile_with_text
from experiments.planning.traffic import Collective, collectives
from experiments.training.setup import Setup, build
from layers.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, MoeSpec, RotarySpec, Segment
from mesh.topology import describe_devices

B, T, D, V, LAYERS = 64, 512, 512, 4096, 4
ATTENTION = AttentionSpec(num_heads=8, num_kv_heads=8, head_dim=64, position=RotarySpec())
EXPERTS = MoeSpec(num_experts=16, expert=MlpSpec(hidden=512), group_size=64, dispatch="capacity")
LAYER = {
  "dense": LayerSpec(ATTENTION, MlpSpec(hidden=1536)),
  "palm": LayerSpec(
    replace(ATTENTION, num_kv_heads=1), MlpSpec(hidden=1536, gated=True), parallel=True
  ),
  "moe": LayerSpec(ATTENTION, EXPERTS),
  "dropless": LayerSpec(
    ATTENTION,
    replace(
      EXPERTS, dispatch="dropless", exchange="all_to_all", router="top_k", experts_per_token=2
    ),
  ),
}


class Program(NamedTuple):
  setup: Setup
  found: list[Collective]
  memory: object  # XLA's analysis, bytes a device
  text: str


@functools.cache
def compiled(kind: str, topology: str, **mesh) -> Program:
  """The step in bfloat16, every layer recomputed in the backward pass, or as `remat` says."""
  pytest.importorskip(
    "libtpu", reason="compiling for TPUs needs libtpu, which is Linux x86-64 only"
  )
  microbatches, remat = mesh.pop("microbatches", 1), mesh.pop("remat", "full")
  config = Config(
    name="pod",
    model=ModelSpec(
      vocab_size=V, embed_dim=D, max_length=T, segments=(Segment((LAYER[kind],), LAYERS),)
    ),
    mesh=MeshConfig(**mesh),
    data=DataConfig(source="synthetic", row_length=T, batch_size=B),
    train=TrainConfig(compute_dtype="bfloat16", remat=remat, microbatches=microbatches),
  )
  setup = build(config, describe_devices(topology))
  cached = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)  # nothing here can read it back
  program, text = compile_with_text(lower_step(setup))
  jax.config.update("jax_enable_compilation_cache", cached)
  return Program(setup, collectives(text, setup.mesh), program.memory_analysis(), text)


def received(program: Program, *kinds: str, axis: str, dtype: str | None = None) -> float:
  """Bytes a device receives in a step by these kinds of collectives over an axis."""
  return sum(
    c.total
    for c in program.found
    if c.kind in kinds and axis in c.axes and dtype in (None, c.dtype)
  )


def parameters(program: Program, *names: str, without: str = "") -> int:
  """Elements of the parameters whose path has one of `names` and not `without`."""
  leaves = jax.tree.leaves_with_path(program.setup.abstract.params)
  paths = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]
  chosen = (
    leaf
    for path, leaf in paths
    if any(n in path for n in names) and not (without and without in path)
  )
  return sum(math.prod(leaf.shape) for leaf in chosen)
