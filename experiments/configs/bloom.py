"""BLOOM (arXiv 2211.05100): ALiBi, a norm on the embedding, 46 languages in 250,880 rows.

Command: python -m experiments.run --config=bloom:176b --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: 176b: 176,247,271,424 parameters, training state 2.8 TB; from v5p-128 (64 chips) up.
Theirs were 384 A100s of 80 GB for 118 days. The small one trains on one chip.
Data: ROOTS: 366e9 tokens for 176b, 341e9 for the others, under a cosine of 200e6 rows. Batches of
176b grew from 192 rows by 16 at a time over the first 20e9 tokens; here the batch is the last one.
The others ran in float16.
Result: not yet run.
"""

from dataclasses import replace

from experiments.config import Config, DataConfig, EvalConfig, OptimizerConfig, TrainConfig
from layers.spec import AlibiSpec, EmbeddingSpec, ModelSpec

from . import gpt2

LENGTH = 2048
# Layers, width, heads, rows a batch, learning rate, tokens.
SIZES = {
  "560m": (24, 1024, 16, 256, 3e-4, 341e9),
  "1.1b": (24, 1536, 16, 256, 2.5e-4, 341e9),
  "1.7b": (24, 2048, 16, 512, 2e-4, 341e9),
  "3b": (30, 2560, 32, 512, 1.6e-4, 341e9),
  "7.1b": (30, 4096, 32, 512, 1.2e-4, 341e9),
  "176b": (70, 14_336, 112, 2048, 6e-5, 366e9),
}


def model(size: str) -> ModelSpec:
  layers, width, heads, *_ = SIZES[size]
  # All sizes started from (3 x 14,336)^-0.5.
  spec = gpt2.decoder(
    layers, width, heads, vocab=250_880, length=LENGTH, position=AlibiSpec(), stddev=0.0048
  )
  return replace(spec, embedding=EmbeddingSpec(norm=spec.final_norm))


def config(size: str) -> Config:
  *_, rows, learning_rate, tokens = SIZES[size]
  return Config(
    name=f"bloom:{size}",
    model=model(size),
    data=DataConfig(source="shards", tokenizer="", row_length=LENGTH, batch_size=rows),
    optimizer=OptimizerConfig(
      name="adamw",
      learning_rate=learning_rate,
      warmup_steps=183_105 // rows,
      decay_steps=200_000_000 // rows,
      final_fraction=0.1,
      beta1=0.9,
      beta2=0.95,
      weight_decay=0.1,
      clip_norm=1.0,
    ),
    train=TrainConfig(steps=int(tokens / (rows * LENGTH)), compute_dtype="bfloat16", remat="full"),
    eval=EvalConfig(every=1000, batches=32),
  )
