"""A LLaMA-shaped decoder of 1,235,814,400 parameters (the shape of Llama 3.2 1B).

Command: python -m experiments.run --config=dense_1b --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: training state of 20 GB; from one 80 GB GPU or a v5e-8 up.
Data: 25e9 tokens (20 a parameter).
Result: not yet run.
"""

from experiments.config import (
  CheckpointConfig,
  Config,
  DataConfig,
  EvalConfig,
  OptimizerConfig,
  TrainConfig,
)
from layers.spec import (
  AttentionSpec,
  HeadSpec,
  LayerSpec,
  MlpSpec,
  ModelSpec,
  NormSpec,
  RotarySpec,
  Segment,
)

_POSITION = RotarySpec(theta=500_000.0)
_LAYER = LayerSpec(
  AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=64, position=_POSITION),
  MlpSpec(hidden=8192, activation="silu", gated=True),
  norm=NormSpec(eps=1e-5),
)


def model() -> ModelSpec:
  return ModelSpec(
    vocab_size=128_256,
    embed_dim=2048,
    max_length=4096,
    segments=(Segment((_LAYER,), repeats=16),),
    final_norm=NormSpec(eps=1e-5),
    head=HeadSpec(tied=True),
  )


def config() -> Config:
  return Config(
    name="dense_1b",
    model=model(),
    data=DataConfig(source="shards", tokenizer="", row_length=4096, batch_size=256),
    optimizer=OptimizerConfig(
      name="adamw", learning_rate=4e-4, schedule="cosine", warmup_steps=1000, final_fraction=0.1
    ),
    # 23,800 steps of 256 x 4096 = 1.05e6 tokens: 2.5e10 tokens.
    train=TrainConfig(steps=23_800, compute_dtype="bfloat16", remat="minimal", z_loss=1e-4),
    checkpoint=CheckpointConfig(every=1000, keep=3),
    eval=EvalConfig(every=1000, batches=32),
  )
