"""Gemma 2 (arXiv 2408.00118): four norms a layer, soft caps, local and global layers in turn.

Command: python -m experiments.run --config=gemma2:2b --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: 27b: 27,227,128,320 parameters, training state 436 GB; from v5p-16 (8 chips) up. Theirs
were 512 TPU v5e, 4,096 v4 and 6,144 v5p chips.
Data: 2e12, 8e12 and 13e12 tokens, not published. 2b and 9b learned from a larger model's
probabilities, here from the next token; optimizer and batches were not published and are ours.
Result: not yet run.
"""

from dataclasses import replace

from experiments.config import Config, DataConfig, EvalConfig, OptimizerConfig, TrainConfig
from layers.spec import (
  AttentionSpec,
  EmbeddingSpec,
  HeadSpec,
  LayerSpec,
  MlpSpec,
  ModelSpec,
  NormSpec,
  RotarySpec,
  Segment,
)

LENGTH = 8192
ROWS = 512
# Layers, width, heads, heads of keys, head size, hidden units, what logits are divided by the root
# of, tokens.
SIZES = {
  "2b": (26, 2304, 8, 4, 256, 9216, 256, 2e12),
  "9b": (42, 3584, 16, 8, 256, 14_336, 256, 8e12),
  "27b": (46, 4608, 32, 16, 128, 36_864, 144, 13e12),
}


def model(size: str) -> ModelSpec:
  layers, width, heads, kv_heads, head_dim, hidden, scale, _ = SIZES[size]
  norm = NormSpec(unit_offset=True)
  everything = LayerSpec(
    AttentionSpec(
      heads, head_dim, kv_heads, position=RotarySpec(), scale=scale**-0.5, softcap=50.0
    ),
    MlpSpec(hidden, "gelu_tanh"),
    norm,
    "both",
  )
  local = replace(everything, attention=replace(everything.attention, window=4096))
  return ModelSpec(
    vocab_size=256_000,
    embed_dim=width,
    max_length=LENGTH,
    segments=(Segment((local, everything), layers // 2),),
    embedding=EmbeddingSpec(scale_by_sqrt_dim=True),
    final_norm=norm,
    head=HeadSpec(tied=True, softcap=30.0),
  )


def config(size: str) -> Config:
  *_, tokens = SIZES[size]
  return Config(
    name=f"gemma2:{size}",
    model=model(size),
    data=DataConfig(source="shards", tokenizer="", row_length=LENGTH, batch_size=ROWS),
    optimizer=OptimizerConfig(name="adamw", learning_rate=3e-4, warmup_steps=2000),
    train=TrainConfig(
      steps=int(tokens / (ROWS * LENGTH)), compute_dtype="bfloat16", remat="full", z_loss=1e-4
    ),
    eval=EvalConfig(every=1000, batches=16),
  )
