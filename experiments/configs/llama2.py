"""Llama 2 (arXiv 2307.09288): LLaMA with rows of 4096 tokens, the largest with grouped queries.

Command: python -m experiments.run --config=llama2:70b --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: 70b: 68,976,648,192 parameters, training state 1.1 TB; from v5p-64 (32 chips) up.
Data: 2.0e12 tokens in batches of 4M.
Result: not yet run.
"""

from experiments.config import Config
from layers.spec import ModelSpec, RotarySpec

from .llama import decoder, recipe

# Layers, width, heads, heads of keys, hidden units, learning rate.
SIZES = {
  "7b": (32, 4096, 32, 32, 11_008, 3e-4),
  "13b": (40, 5120, 40, 40, 13_824, 3e-4),
  "70b": (80, 8192, 64, 8, 28_672, 1.5e-4),
}
LENGTH = 4096


def model(size: str) -> ModelSpec:
  return decoder(*SIZES[size][:5], 32_000, LENGTH, position=RotarySpec(theta=1e4))


def config(size: str) -> Config:
  return recipe(
    f"llama2:{size}", model(size), length=LENGTH, tokens=2e12, batch=2**22,
    learning_rate=SIZES[size][-1],
  )  # fmt: skip
