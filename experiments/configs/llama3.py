"""Llama 3, 3.1 and 3.2 (arXiv 2407.21783): a vocabulary of 128,256, grouped queries everywhere.

Command: python -m experiments.run --config=llama3:8b --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: 405b: 405,853,388,800 parameters, training state 6.5 TB; from v5p-256 (128 chips) up. 8b:
128 GB; from v5e-16 up.
Data: 15e12 tokens; batches and rates of the sizes below 405b were not published, those here are
ours; batches of 405b grew from 4M tokens to 8M and 16M, here they are the last. 1b, 3b and 405b are
the releases whose rotary positions are scaled to 131,072; they were trained at 8,192, and so does
this.
Result: not yet run.
"""

from experiments.config import Config
from layers.spec import Llama3Scaling, ModelSpec, RotarySpec

from .llama import decoder, recipe

# Layers, width, heads, hidden units, factor of the scaled positions, learning rate.
SIZES = {
  "1b": (16, 2048, 32, 8192, 32.0, 4e-4),
  "3b": (28, 3072, 24, 8192, 32.0, 3e-4),
  "8b": (32, 4096, 32, 14_336, None, 3e-4),
  "70b": (80, 8192, 64, 28_672, None, 1.5e-4),
  "405b": (126, 16_384, 128, 53_248, 8.0, 8e-5),
}
LENGTH = 8192


def model(size: str) -> ModelSpec:
  layers, width, heads, hidden, factor, _ = SIZES[size]
  scaling = None if factor is None else Llama3Scaling(factor=factor)
  return decoder(
    layers, width, heads, 8, hidden, 128_256, LENGTH if factor is None else 131_072,
    position=RotarySpec(theta=5e5, scaling=scaling), tied=size in ("1b", "3b"),
  )  # fmt: skip


def config(size: str) -> Config:
  return recipe(
    f"llama3:{size}", model(size), length=LENGTH, tokens=15e12,
    batch=2**24 if size == "405b" else 2**22, learning_rate=SIZES[size][-1],
  )  # fmt: skip
