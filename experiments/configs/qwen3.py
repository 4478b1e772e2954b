"""Qwen3 (arXiv 2505.09388): query and key norms, heads of 128; 30b-a3b with 128 small experts.

Command: python -m experiments.run --config=qwen3:8b --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: 32b: 32,762,123,264 parameters, training state 524 GB; from v5p-32 (16 chips) up. 30b-a3b:
30,532,122,624 (3,353,032,704 active), 489 GB; from v5p-16 up.
Data: the first stage, 30e12 tokens in rows of 4,096; 5e12 of better text and rows of 32,768 came
after it, for which the base of the rotation was raised to the 1e6 that is here from the start.
Rates and batches were not published and are ours. Loads were balanced over a whole batch, here over
each row.
Result: not yet run.
"""

from dataclasses import replace

from experiments.config import Config
from layers.spec import (
  AttentionSpec,
  HeadSpec,
  LayerSpec,
  MlpSpec,
  ModelSpec,
  MoeSpec,
  NormSpec,
  RotarySpec,
  Segment,
)

from .llama import recipe

# Layers, width, heads, heads of keys, hidden units (of one expert in 30b-a3b).
SIZES = {
  "0.6b": (28, 1024, 16, 8, 3072),
  "1.7b": (28, 2048, 16, 8, 6144),
  "4b": (36, 2560, 32, 8, 9728),
  "8b": (36, 4096, 32, 8, 12_288),
  "14b": (40, 5120, 40, 8, 17_408),
  "32b": (64, 5120, 64, 8, 25_600),
  "30b-a3b": (48, 2048, 32, 4, 768),
}
TIED = ("0.6b", "1.7b", "4b")
SPARSE = ("30b-a3b",)


def model(size: str) -> ModelSpec:
  layers, width, heads, kv_heads, hidden = SIZES[size]
  norm = NormSpec(eps=1e-6)
  attention = AttentionSpec(heads, 128, kv_heads, position=RotarySpec(theta=1e6), qk_norm=norm)
  mlp = MlpSpec(hidden, "silu", gated=True)
  if size in SPARSE:
    mlp = MoeSpec(128, mlp, 8, router="top_k", normalize=True, jitter=0.0, balance_loss=1e-3)
  return ModelSpec(
    vocab_size=151_936,
    embed_dim=width,
    max_length=32_768,
    segments=(Segment((LayerSpec(attention, mlp, norm),), layers),),
    final_norm=norm,
    head=HeadSpec(tied=size in TIED),
  )


def config(size: str) -> Config:
  made = recipe(
    f"qwen3:{size}", model(size), length=4096, tokens=30e12, batch=2**22, learning_rate=3e-4
  )
  return replace(made, train=replace(made.train, z_loss=1e-4))
