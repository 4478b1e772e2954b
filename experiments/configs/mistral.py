"""Mistral 7B (arXiv 2310.06825), version 0.1: LLaMA with a window of 4,096 keys in every layer.

Command: python -m experiments.run --config=mistral:7b --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: 7,241,732,096 parameters, training state 116 GB; from v5p-8 (4 chips) up.
Data and optimizer were not published; the recipe here is Llama 2's, in rows of 8,192. Later
versions have no window.
Result: not yet run.
"""

from experiments.config import Config
from layers.spec import ModelSpec, RotarySpec

from .llama import decoder, recipe

SIZES = ("7b",)


def model(size: str) -> ModelSpec:
  del size  # there is one
  return decoder(
    32, 4096, 32, 8, 14_336, 32_000, 32_768, position=RotarySpec(theta=1e4), window=4096
  )


def config(size: str) -> Config:
  return recipe(
    f"mistral:{size}", model(size), length=8192, tokens=2e12, batch=2**22, learning_rate=3e-4
  )
