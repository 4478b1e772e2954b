"""GPT-J 6B (EleutherAI): parallel blocks, rotary positions on a quarter of each head, z-loss.

Command: python -m experiments.run --config=gpt_j:6b --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: 6,050,882,784 parameters, training state 97 GB; from v5p-8 (4 chips) up. Theirs was a TPU
v3-256. The vocabulary has 50,257 tokens in 50,400 rows; the 6,053,381,344 of their README also
count copies of vectors on tensor-parallel devices.
Data: the Pile, 402e9 tokens; the cosine ended at 300,000 of 383,500 steps, and the rate stayed.
What writes to the residual started from 2 / (layers x sqrt(width)), here from
1 / sqrt(2 x layers x inputs).
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

LENGTH = 2048
VOCAB = 50_400
SIZES = ("6b",)


def model(size: str) -> ModelSpec:
  del size  # there is one
  norm = NormSpec("layer", eps=1e-5, bias=True)
  attention = AttentionSpec(16, 256, position=RotarySpec(dims=64, interleaved=True))
  mlp = MlpSpec(16_384, "gelu_tanh", gated=False, bias=True)
  return ModelSpec(
    vocab_size=VOCAB,
    embed_dim=4096,
    max_length=LENGTH,
    segments=(Segment((LayerSpec(attention, mlp, norm, parallel=True),), 28),),
    final_norm=norm,
    head=HeadSpec(bias=True),
    init=InitSpec(kind="fan_in", embed_stddev=VOCAB**-0.5),
  )


def config(size: str) -> Config:
  return Config(
    name=f"gpt_j:{size}",
    model=model(size),
    data=DataConfig(source="shards", tokenizer="", row_length=LENGTH, batch_size=512),
    optimizer=OptimizerConfig(
      name="adamw",
      learning_rate=1.2e-4,
      warmup_steps=3000,
      decay_steps=300_000,
      final_fraction=0.1,
      beta1=0.9,
      beta2=0.999,
      weight_decay=0.1,
      clip_norm=1.0,
    ),
    train=TrainConfig(steps=383_500, compute_dtype="bfloat16", remat="full", z_loss=1e-4),
    eval=EvalConfig(every=1000, batches=32),
  )
