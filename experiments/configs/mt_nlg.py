"""Megatron-Turing NLG 530B (arXiv 2201.11990): GPT-2's shape at 105 layers of width 20,480.

Command: python -m experiments.run --config=mt_nlg:530b --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: 529,600,819,200 parameters, training state 8.5 TB; from v5p-256 (128 chips) up. Theirs
were up to 3,360 A100s of 80 GB. The vocabulary has 50,257 tokens in 51,200 rows.
Data: 270e9 tokens of the Pile and web text, under a cosine of 340e9. Batches grew from 32 rows by
32 at a time to 1,920 over the first 12e9 tokens; here the batch is the last one.
Result: not yet run.
"""

from experiments.config import Config, DataConfig, EvalConfig, OptimizerConfig, TrainConfig
from layers.spec import ModelSpec

from . import gpt2

LENGTH = 2048
ROWS = 1920
SIZES = ("530b",)


def model(size: str) -> ModelSpec:
  del size  # there is one
  return gpt2.decoder(105, 20_480, 128, vocab=51_200, length=LENGTH, stddev=4e-3)


def config(size: str) -> Config:
  batch = ROWS * LENGTH
  return Config(
    name=f"mt_nlg:{size}",
    model=model(size),
    data=DataConfig(source="shards", tokenizer="", row_length=LENGTH, batch_size=ROWS),
    optimizer=OptimizerConfig(
      name="adamw",
      learning_rate=5e-5,
      warmup_steps=1_000_000_000 // batch,
      decay_steps=340_000_000_000 // batch,
      final_fraction=0.1,
      beta1=0.9,
      beta2=0.95,
      weight_decay=0.1,
      clip_norm=1.0,
    ),
    train=TrainConfig(steps=270_000_000_000 // batch, compute_dtype="bfloat16", remat="full"),
    eval=EvalConfig(every=1000, batches=32),
  )
