"""GPT-3 (arXiv 2005.14165): dense layers and layers of a local band in turn.

Command: python -m experiments.run --config=gpt3:175b --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: 175b: 174,604,259,328 parameters, training state 2.8 TB; from v5p-128 (64 chips) up. The
small one trains on one chip.
The width of the band and the kind of the first layer were not published; 256 positions and a dense
one here, as in GPT-Neo. The GELU is GPT-2's, by tanh.
Data: 300e9 tokens, not published. Batches grew from 16 rows over the first 4 to 12e9 tokens and the
cosine ended at 260e9; here the batch is the last one and the cosine ends with the run.
Result: not yet run.
"""

from dataclasses import replace

from experiments.config import Config, DataConfig, EvalConfig, OptimizerConfig, TrainConfig
from layers.spec import (
  AttentionSpec,
  EmbeddingSpec,
  HeadSpec,
  InitSpec,
  LayerSpec,
  LearnedPositionSpec,
  MlpSpec,
  ModelSpec,
  NormSpec,
  Segment,
)

BAND = 256
LENGTH = 2048
# Layers, width, heads, rows of 2048 tokens a batch, learning rate. The paper prints 24 heads of 128
# for the 1.3B model and a width of 5140 for the 13B one; only these give its counts.
SIZES = {
  "125m": (12, 768, 12, 256, 6e-4),
  "350m": (24, 1024, 16, 256, 3e-4),
  "760m": (24, 1536, 16, 256, 2.5e-4),
  "1.3b": (24, 2048, 16, 512, 2e-4),
  "2.7b": (32, 2560, 32, 512, 1.6e-4),
  "6.7b": (32, 4096, 32, 1024, 1.2e-4),
  "13b": (40, 5120, 40, 1024, 1e-4),
  "175b": (96, 12_288, 96, 1536, 0.6e-4),
}


def model(size: str) -> ModelSpec:
  layers, width, heads, _, _ = SIZES[size]
  norm = NormSpec("layer", eps=1e-5, bias=True)
  dense = LayerSpec(
    AttentionSpec(heads, width // heads, qkv_bias=True, out_bias=True),
    MlpSpec(4 * width, "gelu_tanh", gated=False, bias=True),
    norm,
  )
  banded = replace(dense, attention=replace(dense.attention, window=BAND))
  return ModelSpec(
    vocab_size=50_257,
    embed_dim=width,
    max_length=LENGTH,
    segments=(Segment((dense, banded), layers // 2),),
    embedding=EmbeddingSpec(position=LearnedPositionSpec(LENGTH)),
    final_norm=norm,
    head=HeadSpec(tied=True),
    init=InitSpec(kind="normal", stddev=0.02),
  )


def config(size: str) -> Config:
  _, _, _, rows, learning_rate = SIZES[size]
  return Config(
    name=f"gpt3:{size}",
    model=model(size),
    data=DataConfig(source="shards", tokenizer="", row_length=LENGTH, batch_size=rows),
    optimizer=OptimizerConfig(
      name="adamw",
      learning_rate=learning_rate,
      warmup_steps=375_000_000 // (rows * LENGTH),
      final_fraction=0.1,
      beta1=0.9,
      beta2=0.95,
      weight_decay=0.1,
      clip_norm=1.0,
    ),
    train=TrainConfig(
      steps=300_000_000_000 // (rows * LENGTH), compute_dtype="bfloat16", remat="minimal"
    ),
    eval=EvalConfig(every=1000, batches=32),
  )
