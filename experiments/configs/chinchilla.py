"""Chinchilla (arXiv 2203.15556): Gopher's shape at a quarter of the size, on five times the tokens.

Command: python -m experiments.run --config=chinchilla:70b --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: 70,061,956,352 parameters, training state 1.1 TB; from v5p-64 (32
chips) up.
Data: 1.4e12 tokens of MassiveText, not published. Batches grew from 1.5M tokens to 3M; here the
batch is the last one. AdamW and the learning rate are the paper's; its weight decay and betas are
not published, clipping and warmup are Gopher's.
Result: not yet run.
"""

from experiments.config import Config, OptimizerConfig
from layers.spec import ModelSpec

from . import gopher

SIZES = ("70b",)


def model(size: str) -> ModelSpec:
  del size  # there is one
  return gopher.decoder(80, 64, 128, 8192)


def config(size: str) -> Config:
  optimizer = OptimizerConfig(
    name="adamw",
    learning_rate=1e-4,
    warmup_steps=1500,
    final_fraction=0.1,
    weight_decay=0.1,
    clip_norm=1.0,
  )
  return gopher.recipe(
    f"chinchilla:{size}", model(size), tokens=1.4e12, rows=3 * 2**20 // gopher.LENGTH,
    optimizer=optimizer,
  )  # fmt: skip
