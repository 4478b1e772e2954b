"""Training of adapters: nothing else is trained or takes memory for it, on any mesh."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.config import (
  Config,
  DataConfig,
  LoraConfig,
  MeshConfig,
  OptimizerConfig,
  TrainConfig,
)
from experiments.planning.memory import training_bytes
from experiments.training.compiled_step import jit_step
from experiments.training.setup import batch_placer, build, count_trained
from experiments.training.state import init_state
from layers.lora import split
from layers.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, RotarySpec, Segment
from mesh.constrain import use_mesh

ALL = ("query", "key", "value", "out", "up", "gate", "down")
LAYER = LayerSpec(AttentionSpec(2, 64, position=RotarySpec()), MlpSpec(512))
SPEC = ModelSpec(
  vocab_size=256, embed_dim=128, max_length=16, segments=(Segment((LAYER,), 2),)
)  # fmt: skip
CONFIG = Config(
  "adapted",
  SPEC,
  mesh=MeshConfig(data=1),
  data=DataConfig(source="synthetic", row_length=16, batch_size=8),
  optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=0),
  train=TrainConfig(steps=4, remat="full"),
  lora=LoraConfig(rank=4, alpha=8.0, targets=ALL),
)
# By hand: of 2 layers, rank times inputs and outputs of four matrices of 128 x 128 and three of
# 128 x 512; and all weights, with two norms a layer, one at the end and two tables.
ADAPTERS = 2 * 4 * (4 * 256 + 3 * 640)
WEIGHTS = 2 * (4 * 128 * 128 + 3 * 128 * 512 + 2 * 128) + 128 + 2 * 256 * 128


def batch():
  ids = np.random.default_rng(0).integers(256, size=(8, 17), dtype=np.int32)
  positions = np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16))
  return {
    "tokens": ids[:, :-1], "targets": ids[:, 1:], "segments": np.ones((8, 16), np.int32),
    "positions": positions, "weights": np.ones((8, 16), np.float32),
  }  # fmt: skip


def setup_of(**mesh):
  mesh = MeshConfig(**mesh) if mesh else CONFIG.mesh
  return build(replace(CONFIG, mesh=mesh))


def start(setup):
  return init_state(setup.model, setup.optimizer, setup.abstract, 0)


def two_steps(setup):
  """(losses, parameters after)."""
  step, place = jit_step(setup), batch_placer(setup)
  with use_mesh(setup.mesh, setup.rules):
    state, losses = start(setup), []
    for _ in range(2):
      state, metrics = step(state, place(batch()))
      losses.append(float(metrics.loss))
  return losses, jax.device_get(state.params)


@pytest.fixture(scope="module")
def alone():
  return two_steps(setup_of())


def size(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_memory_is_that_of_the_adapters():
  setup = setup_of()
  assert count_trained(CONFIG) == ADAPTERS and count_trained(
    replace(CONFIG, lora=LoraConfig())
  ) == (WEIGHTS)
  assert size(setup.abstract.params) == WEIGHTS + ADAPTERS
  counts = [leaf for leaf in jax.tree.leaves(setup.abstract.opt_state) if leaf.ndim == 0]
  assert size(setup.abstract.opt_state) == 2 * ADAPTERS + len(counts)
  # Weights; adapters with gradients and two moments; and what counts steps.
  assert training_bytes(setup) == 4 * (WEIGHTS + 4 * ADAPTERS + len(counts))


@pytest.mark.parametrize("rank", [4, pytest.param(0, marks=pytest.mark.full)])
def test_the_compiled_step_holds_no_gradient_of_the_rest(rank):
  """Of layers in a loop, whose weights in use are few of all. A gradient of all weights is as large
  as they are, and so would be a copy of them with adapters merged."""
  layer = LayerSpec(AttentionSpec(2, 32, position=RotarySpec()), MlpSpec(512))
  spec = replace(SPEC, embed_dim=64, segments=(Segment((layer,), 16),))
  config = replace(CONFIG, model=spec, lora=replace(CONFIG.lora, rank=rank))
  setup, size = build(config), 4 * count_trained(replace(config, lora=LoraConfig()))
  place = batch_placer(setup)
  with use_mesh(setup.mesh, setup.rules):
    used = jit_step(setup).lower(setup.abstract, place(batch())).compile().memory_analysis()
  assert used.temp_size_in_bytes < 0.8 * size if rank else used.temp_size_in_bytes > size
  assert used.alias_size_in_bytes > size  # weights stay where they are


@pytest.mark.full
def test_the_rest_stays(alone):
  setup = setup_of()
  with use_mesh(setup.mesh, setup.rules):
    before = jax.device_get(start(setup).params)
  _, after = alone
  (adapters, frozen), (moved, same) = split(before), split(after)
  assert jax.tree.structure(before) == jax.tree.structure(after)
  assert all(map(np.array_equal, jax.tree.leaves(frozen), jax.tree.leaves(same)))
  assert not any(map(np.array_equal, jax.tree.leaves(adapters), jax.tree.leaves(moved)))


@pytest.mark.full
def test_the_first_loss_is_that_of_the_weights(alone):
  plain = build(replace(CONFIG, lora=LoraConfig()))
  with use_mesh(plain.mesh, plain.rules):
    params = start(plain).params
    at = batch()
    run = jax.jit(lambda p: plain.model.apply({"params": p}, at["tokens"]).logits_BTV)
    log_p = np.asarray(jax.nn.log_softmax(run(params)), np.float64)
  expected = -np.take_along_axis(log_p, at["targets"][..., None], axis=2).mean()
  assert alone[0][0] == pytest.approx(expected, rel=1e-6)
  assert alone[0][1] < alone[0][0]


@pytest.mark.full
@pytest.mark.parametrize(
  "axes",
  [
    {"fsdp": 2, "tensor": 2, "context": 2},
    {"stage": 2, "data": 2, "fsdp": 2},
    {"fsdp": 8, "axis_types": "explicit"},
  ],
)
def test_no_mesh_matters(alone, axes):
  losses, params = two_steps(setup_of(**axes))
  np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(alone[1]), strict=True):
    # Adam divides by the root of squares: a gradient that is next to nothing has either sign.
    close = np.isclose(a, b, rtol=1e-3, atol=1e-4)
    assert close.mean() > 0.999
