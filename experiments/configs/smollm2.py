"""SmolLM2 (arXiv 2502.02737): small LLaMA shapes with a tied head, trained for very long.

Command: python -m experiments.run --config=smollm2:135m --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: 1.7b: 1,711,376,384 parameters, training state 27 GB: one v5p chip, or v5e-8; the others
train on one chip of any kind.
Data: 2e12, 4e12 and 11e12 tokens of FineWeb-Edu, DCLM, code and mathematics, in rows of 2,048 but
for a last part of 8,192. Schedule and rates are the paper's; batches of 1M tokens for the two small
ones and the weight decay are those of SmolLM 1.
Result: not yet run.
"""

from dataclasses import replace

from experiments.config import Config
from layers.spec import InitSpec, ModelSpec, RotarySpec

from .llama import decoder, recipe

# Layers, width, heads, heads of keys, hidden units, base of the rotation, then tokens, tokens a
# batch, learning rate, share of steps in which it falls.
SIZES = {
  "135m": (30, 576, 9, 3, 1536, 1e5, 2e12, 2**20, 3e-3, 0.2),
  "360m": (32, 960, 15, 5, 2560, 1e5, 4e12, 2**20, 3e-3, 0.2),
  "1.7b": (24, 2048, 32, 32, 8192, 1.3e5, 11e12, 2**21, 5e-4, 0.1),
}


def model(size: str) -> ModelSpec:
  layers, width, heads, kv_heads, hidden, theta, *_ = SIZES[size]
  spec = decoder(
    layers, width, heads, kv_heads, hidden, 49_152, 8192, position=RotarySpec(theta), tied=True
  )
  return replace(spec, init=InitSpec(kind="normal", stddev=width**-0.5, embed_stddev=width**-0.5))


def config(size: str) -> Config:
  *_, tokens, batch, learning_rate, falling = SIZES[size]
  made = recipe(
    f"smollm2:{size}", model(size), length=2048, tokens=tokens, batch=batch,
    learning_rate=learning_rate,
  )  # fmt: skip
  optimizer = replace(
    made.optimizer,
    schedule="wsd",
    stable_fraction=1 - falling,
    final_fraction=0.0,
    weight_decay=0.01,
  )
  return replace(made, optimizer=optimizer, train=replace(made.train, remat="minimal"))
