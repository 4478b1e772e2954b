"""Training throughput of a small dense decoder: 4 layers, width 256, 4 heads of 64, gated MLP of
1024, vocabulary 32,000 untied, batch 4 x 256, AdamW, clipping. The twin of torch_dense.py.

python benchmarks/dense.py [--steps=20]
"""

import argparse
import json
import resource
import time

import jax
import numpy as np

from experiments import platform
from experiments.config import Config, DataConfig, OptimizerConfig, TrainConfig
from experiments.training.setup import batch_placer, build
from experiments.training.state import init_state
from experiments.training.step import make_train_step
from layers.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, RotarySpec, Segment
from mesh.constrain import use_mesh

LAYER = LayerSpec(
  AttentionSpec(num_heads=4, head_dim=64, position=RotarySpec()), MlpSpec(hidden=1024)
)
CONFIG = Config(
  name="dense_20m",
  model=ModelSpec(
    vocab_size=32_000, embed_dim=256, max_length=256, segments=(Segment((LAYER,), 4),)
  ),
  data=DataConfig(source="synthetic", row_length=256, batch_size=4),
  optimizer=OptimizerConfig(name="adamw", learning_rate=3e-4, warmup_steps=10),
  train=TrainConfig(steps=1000),
)


def random_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
  B, T = CONFIG.data.batch_size, CONFIG.data.row_length
  ids_BT = rng.integers(0, CONFIG.model.vocab_size, (B, T + 1), dtype=np.int32)
  return {
    "tokens": ids_BT[:, :-1],
    "targets": ids_BT[:, 1:],
    "segments": np.ones((B, T), np.int32),
    "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
    "weights": np.ones((B, T), np.float32),
  }


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--steps", type=int, default=20)
  steps = parser.parse_args().steps
  platform.prepare()
  jax.config.update("jax_compilation_cache_dir", None)
  setup = build(CONFIG)
  place, rng = batch_placer(setup), np.random.default_rng(0)
  with use_mesh(setup.mesh, setup.rules):
    began = time.monotonic()
    state = init_state(setup.model, setup.optimizer, setup.abstract, 0)
    step = jax.jit(make_train_step(setup.model, setup.optimizer, seed=0), donate_argnums=0)
    for _ in range(3):
      state, metrics = step(state, place(random_batch(rng)))
    jax.block_until_ready(state)
    warm = time.monotonic() - began
    times = []
    for _ in range(steps):
      began = time.monotonic()
      state, metrics = step(state, place(random_batch(rng)))
      loss = float(metrics.loss)
      times.append(time.monotonic() - began)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  tokens = CONFIG.data.batch_size * CONFIG.data.row_length
  print(json.dumps({"name": f"meshyard, jax {jax.__version__}", "seconds": times, "warm_up": warm,
                    "loss": loss, "peak_bytes": peak, "tokens": tokens}))  # fmt: skip


if __name__ == "__main__":
  main()
