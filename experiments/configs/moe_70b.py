"""A 70-billion-parameter Switch decoder: 70,317,772,800 parameters, 3,729,002,496 active.

32 layers of width 4096; every second one holds 64 experts, of which a token passes one.

Command: python -m experiments.run --config=moe_70b --workdir=/SHARED/moe_70b \
    --config.data.path=gs://BUCKET/shards --config.data.tokenizer=gs://BUCKET/tokenizer
Hardware: v5p-128 (64 chips): compiled peak 32.1 GB a chip of 102, 17.6 GB of it state (1.125 TB in
all, 16 bytes a parameter): `python -m experiments.plan --config=moe_70b --topology=v5p-128`.
Data: 74.6e9 tokens (20 an active parameter), tokenised with a 32,768-entry vocabulary.
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
  InitSpec,
  LayerSpec,
  MlpSpec,
  ModelSpec,
  MoeSpec,
  RotarySpec,
  Segment,
)

_ATTENTION = AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=128, position=RotarySpec())
_MLP = MlpSpec(hidden=5376, activation="silu", gated=True)
_MOE = MoeSpec(
  num_experts=64, expert=_MLP, dispatch="capacity", capacity_factor=1.25, eval_capacity_factor=2.0
)


def model() -> ModelSpec:
  return ModelSpec(
    vocab_size=32_768,
    embed_dim=4096,
    max_length=4096,
    segments=(
      Segment(layers=(LayerSpec(_ATTENTION, _MLP), LayerSpec(_ATTENTION, _MOE)), repeats=16),
    ),
    init=InitSpec(kind="fan_in", scale=0.1),  # Switch's smaller initialisation
  )


def config() -> Config:
  return Config(
    name="moe_70b",
    model=model(),
    data=DataConfig(source="shards", tokenizer="", row_length=4096, batch_size=1024),
    optimizer=OptimizerConfig(
      name="adamw",
      learning_rate=2e-4,
      schedule="cosine",
      warmup_steps=1000,
      final_fraction=0.1,
      beta1=0.9,
      beta2=0.95,
      weight_decay=0.1,
      clip_norm=1.0,
    ),
    # 17,800 steps of 1024 x 4096 = 4.19e6 tokens: 7.47e10 tokens.
    train=TrainConfig(
      steps=17_800,
      microbatches=4,
      compute_dtype="bfloat16",
      remat="full",
      z_loss=1e-4,
      log_every=10,
    ),
    checkpoint=CheckpointConfig(every=500, keep=3),
    eval=EvalConfig(every=1000, batches=32),
  )
