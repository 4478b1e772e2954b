"""PaLM (arXiv 2204.02311): parallel blocks, one head of keys, heads of 256, gated SiLU.

Command: python -m experiments.run --config=palm:540b --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: 540b: 540,356,474,880 parameters; theirs were 6,144 TPU v4 chips. Adafactor keeps next to
nothing beside a weight: training state 4.3 TB.
Data: 780e9 tokens. Batches grew from 512 to 1,024 rows at step 50,000 and to 2,048 at 115,000; here
they have 2,048 throughout. Their Adafactor did not factor and had momentum; ours factors, without.
Result: not yet run.
"""

from experiments.config import Config, DataConfig, EvalConfig, OptimizerConfig, TrainConfig
from layers.spec import (
  AttentionSpec,
  HeadSpec,
  InitSpec,
  LayerSpec,
  MlpSpec,
  ModelSpec,
  NormSpec,
  RotarySpec,
  Segment,
)

# Layers, heads, width.
SIZES = {"8b": (32, 16, 4096), "62b": (64, 32, 8192), "540b": (118, 48, 18_432)}
LENGTH = 2048


def model(size: str) -> ModelSpec:
  layers, heads, width = SIZES[size]
  norm = NormSpec("layer", eps=1e-6)
  attention = AttentionSpec(heads, 256, num_kv_heads=1, position=RotarySpec())
  layer = LayerSpec(attention, MlpSpec(4 * width, "silu", gated=True), norm, parallel=True)
  return ModelSpec(
    vocab_size=256_000,
    embed_dim=width,
    max_length=LENGTH,
    segments=(Segment((layer,), layers),),
    final_norm=norm,
    head=HeadSpec(tied=True, scale=width**-0.5),
    init=InitSpec(embed_stddev=1.0, depth_scaled=False),
  )


def config(size: str) -> Config:
  return Config(
    name=f"palm:{size}",
    model=model(size),
    data=DataConfig(source="shards", tokenizer="", row_length=LENGTH, batch_size=2048),
    optimizer=OptimizerConfig(
      name="adafactor",
      learning_rate=1e-2,
      schedule="inverse_sqrt",
      warmup_steps=10_000,
      weight_decay=0.0,
    ),
    train=TrainConfig(steps=186_000, compute_dtype="bfloat16", remat="full", z_loss=1e-4),
    eval=EvalConfig(every=1000, batches=32),
  )
