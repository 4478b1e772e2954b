"""No mesh changes what is trained: eight devices against one, float32, jitter off."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.config import Config, DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from experiments.training.setup import batch_placer, build
from experiments.training.state import init_state
from experiments.training.step import make_train_step
from layers.spec import (
  AttentionSpec,
  HeadSpec,
  InitSpec,
  LayerSpec,
  LinearAttentionSpec,
  MlpSpec,
  ModelSpec,
  MoeSpec,
  NormSpec,
  RotarySpec,
  Segment,
)
from mesh.constrain import use_mesh

pytestmark = pytest.mark.xdist_group("devices")

B, T, V = 16, 64, 64
# Among so many choices rounding changes one sooner or later, and normalised queries and keys of
# embeddings that start near zero magnify it with each step.
STEPS = {"dense": 5, "moe": 5, "routers": 2, "linear": 1, "encoder": 5}
ATTENTION = AttentionSpec(num_heads=8, num_kv_heads=8, head_dim=8, position=RotarySpec())
# Groups of 4 tokens: the largest that lie on one device when a row lies on eight, in zigzag.
SLOTS = MoeSpec(
  num_experts=8, expert=MlpSpec(hidden=32), jitter=0.0, group_size=4, dispatch="capacity"
)
DEEPSEEK = MoeSpec(
  num_experts=8, expert=MlpSpec(hidden=32), experts_per_token=2, router="top_k", jitter=0.0,
  group_size=4, scores="sigmoid", normalize=True, num_groups=4, keep_groups=2, bias_rate=1e-3,
)  # fmt: skip
TOP_K = MoeSpec(
  num_experts=8, expert=MlpSpec(hidden=32), experts_per_token=2, router="top_k", jitter=0.0,
  group_size=4,
)  # fmt: skip
ROUTERS = {
  "mixtral": replace(TOP_K, normalize=True),
  "gpt-oss": replace(TOP_K, normalize=True, router_bias=True, exchange="ring"),
  "llama 4": replace(TOP_K, experts_per_token=1, scores="sigmoid", scale_input=True),
  "gshard": replace(TOP_K, router="gshard", dispatch="capacity"),
  "hash": replace(TOP_K, experts_per_token=1, router="hash", hash_vocab=V),
  "no token left behind": replace(TOP_K, router="no_token_left_behind", dispatch="capacity"),
  "expert choice": replace(
    TOP_K, router="expert_choice", experts_per_token=1, dispatch="capacity", noncausal=True
  ),
  "by gate": replace(SLOTS, priority="gate", noncausal=True),
  "dropout": replace(TOP_K, exchange="bounded", buffer_factor=8.0, expert_dropout=0.2),
}
MODELS = {
  "dense": (Segment((LayerSpec(ATTENTION, MlpSpec(hidden=64)),), 8),),
  "moe": (Segment((LayerSpec(ATTENTION, SLOTS),), 8), Segment((LayerSpec(ATTENTION, DEEPSEEK),))),
  "routers": (
    Segment((LayerSpec(ATTENTION, MlpSpec(hidden=64)),), 8),
    *(Segment((LayerSpec(ATTENTION, moe),)) for moe in ROUTERS.values()),
  ),
  # With a small eps results near zero, where little has been written, would be only rounding.
  "linear": tuple(
    Segment(
      (LayerSpec(LinearAttentionSpec(kind, 8, 8, norm=NormSpec(eps=0.1)), MlpSpec(64)),), repeats
    )
    for kind, repeats in (("gla", 2), ("delta", 1))
  ),
  "encoder": (
    Segment(
      (LayerSpec(replace(ATTENTION, causal=False, mask="BigBird(8, 8, 1)"), MlpSpec(hidden=64)),), 8
    ),
  ),
}
MESHES = {
  "data": {"data": 8},
  "fsdp": {"fsdp": 8},
  "expert": {"expert": 8},
  "context": {"context": 8},
  "tensor": {"tensor": 8},
  "stage": {"stage": 8, "microbatches": 8},
  "fsdp expert tensor": {"fsdp": 2, "expert": 2, "tensor": 2},
  "data context tensor": {"data": 2, "context": 2, "tensor": 2},
  "stage fsdp expert": {"stage": 2, "fsdp": 2, "expert": 2, "microbatches": 2},
  "dcn_data fsdp": {"dcn_data": 2, "fsdp": 4},
  "data fsdp context": {"data": 2, "fsdp": 2, "context": 2},
  "fsdp context, gathered": {"fsdp": 2, "context": 4, "context_method": "all_gather"},
  "stage expert, circular": {"stage": 4, "expert": 2, "circular": 2, "microbatches": 4},
  "stage context tensor": {"stage": 2, "context": 2, "tensor": 2, "microbatches": 4},
  "expert context tensor": {"expert": 2, "context": 2, "tensor": 2},
  "fsdp tensor, their rules": {"fsdp": 4, "tensor": 2, "rules": "fsdp_tensor"},
  "data fsdp, accumulated": {"data": 2, "fsdp": 4, "microbatches": 2},
  "explicit fsdp": {"fsdp": 8, "axis_types": "explicit"},
  "explicit fsdp expert tensor": {
    "fsdp": 2, "expert": 2, "tensor": 2, "axis_types": "explicit"
  },
  "explicit data context tensor": {
    "data": 2, "context": 2, "tensor": 2, "axis_types": "explicit"
  },
  "explicit stage fsdp expert": {
    "stage": 2, "fsdp": 2, "expert": 2, "microbatches": 2, "axis_types": "explicit"
  },
}  # fmt: skip
ROUTER_MESHES = (
  "expert", "tensor", "fsdp expert tensor", "stage fsdp expert", "expert context tensor",
  "explicit fsdp expert tensor",
)  # fmt: skip
ENCODER_MESHES = (
  "data context tensor", "stage fsdp expert", "fsdp context, gathered",
  "explicit fsdp expert tensor",
)  # fmt: skip
LINEAR_MESHES = ("fsdp expert tensor", "stage fsdp expert", "explicit fsdp expert tensor")
# Of linear attention `tests/layers/test_transformer.py` has a case on eight devices.
IN_DEFAULT_SUITE = {
  ("moe", "stage fsdp expert"), ("dense", "data context tensor"),
  ("encoder", "data context tensor"),
}  # fmt: skip
CASES = [
  pytest.param(
    model, name, id=f"{model}: {name}", marks=() if case in IN_DEFAULT_SUITE else pytest.mark.full
  )
  for model in MODELS
  for name in {"routers": ROUTER_MESHES, "linear": LINEAR_MESHES, "encoder": ENCODER_MESHES}.get(
    model, MESHES
  )
  for case in [(model, name)]
]


def config(model: str, optimizer: str, microbatches: int = 1, **mesh) -> Config:
  return Config(
    name="equality",
    model=ModelSpec(
      vocab_size=V,
      embed_dim=64,
      max_length=T,
      segments=MODELS[model],
      head=HeadSpec(transform="gelu") if model == "encoder" else HeadSpec(),
      init=InitSpec(stddev=0.3),  # routers whose choices rounding does not change
    ),
    mesh=MeshConfig(**mesh),
    data=DataConfig(
      source="synthetic",
      objective="masked" if model == "encoder" else "next_token",
      row_length=T,
      batch_size=B,
    ),
    optimizer=OptimizerConfig(
      name=optimizer,
      learning_rate=1e-2 if optimizer == "adamw" else 0.1,
      warmup_steps=1,
      weight_decay=0.0,
      clip_norm=None,
      momentum=0.9,
      eps=1e-3,  # AdamW would take whole steps where a gradient is nothing but rounding
    ),
    train=TrainConfig(compute_dtype="float32", microbatches=microbatches),
  )


def batches(number):
  """Rows of two documents each, some targets without weight."""
  rng = np.random.default_rng(0)
  for _ in range(number):
    ids_BT = rng.integers(0, V, (B, T + 1), dtype=np.int32)
    cut_B1 = rng.integers(5, T - 5, (B, 1))
    place_1T = np.arange(T, dtype=np.int32)[None]
    second_BT = place_1T >= cut_B1
    yield {
      "tokens": ids_BT[:, :-1],
      "targets": ids_BT[:, 1:],
      "segments": 1 + second_BT.astype(np.int32),
      "positions": np.where(second_BT, place_1T - cut_B1, place_1T).astype(np.int32),
      "weights": (rng.random((B, T)) > 0.1).astype(np.float32),
    }


def run(model: str, optimizer: str, **options):
  """(losses, momenta after the first step, loads of the first step, parameters at the end)."""
  setup = build(config(model, optimizer, **options))
  shell = setup.model.clone(unroll=1)  # one compiled layer, not eight
  with use_mesh(setup.mesh, setup.rules):
    state = init_state(shell, setup.optimizer, setup.abstract, seed=0)
    step = make_train_step(shell, setup.optimizer, seed=0, microbatches=setup.accumulate)
    step = jax.jit(step, donate_argnums=0)
    place, losses, first = batch_placer(setup), [], None
    for batch in batches(STEPS[model]):
      state, metrics = step(state, place(batch))
      losses.append(float(metrics.loss) + float(metrics.aux_loss))
      if first is None:
        loads = [np.asarray(stats.load_E) for stats in metrics.moe]
        first = (jax.tree.map(np.asarray, state.opt_state), loads)
    return np.array(losses), *first, jax.tree.map(np.asarray, state.params)


@functools.cache
def on_one_device(model: str, optimizer: str):
  return run(model, optimizer, data=1)


def assert_close(tree, wanted):
  """Each leaf: ||a - b|| <= 1e-5 ||b|| + 1e-7 of the norm of the whole tree."""
  norm = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(wanted)))
  assert norm > 1e-3
  for (path, a), b in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(wanted), strict=True):
    error = np.linalg.norm(np.asarray(a, np.float64) - b)
    assert error <= 1e-5 * np.linalg.norm(b) + 1e-7 * norm, jax.tree_util.keystr(path)


@pytest.mark.parametrize(("model", "mesh"), CASES)
def test_eight_devices_train_as_one(model, mesh):
  losses, first, loads, params = run(model, "sgd", **MESHES[mesh])
  wanted_losses, wanted_first, wanted_loads, wanted_params = on_one_device(model, "sgd")
  np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)
  assert_close(first, wanted_first)  # the first step's momenta are its gradients
  assert_close(params, wanted_params)
  jax.tree.map(np.testing.assert_array_equal, loads, wanted_loads)


@pytest.mark.full  # AdamW divides gradients near zero by themselves: losses only
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_losses_under_adamw(model, mesh):
  losses, *_ = run(model, "adamw", **MESHES[mesh])
  np.testing.assert_allclose(losses, on_one_device(model, "adamw")[0], rtol=1e-5)
