"""Eight experts of dense_1b's MLP in every layer, two a token: Mixtral's recipe at 7 billion.

Command: python -m experiments.run --config=moe_8x1b --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: training state of 110 GB; from one H200 or a v5e-16 up.
Data: 36e9 tokens (about 20 an active parameter).
Result: not yet run.
"""

import dataclasses

from experiments.config import Config
from layers.spec import LayerSpec, ModelSpec, MoeSpec, Segment

from . import dense_1b


def model() -> ModelSpec:
  dense = dense_1b.model()
  (layer,) = dense.segments[0].layers
  moe = MoeSpec(
    num_experts=8,
    expert=layer.mlp,
    experts_per_token=2,
    router="top_k",
    normalize=True,
    jitter=0.0,
    z_loss=1e-3,
  )
  sparse: LayerSpec = dataclasses.replace(layer, mlp=moe)
  return dataclasses.replace(dense, segments=(Segment((sparse,), dense.segments[0].repeats),))


def config() -> Config:
  dense = dense_1b.config()
  return dataclasses.replace(
    dense,
    name="moe_8x1b",
    model=model(),
    train=dataclasses.replace(dense.train, steps=34_000),
    optimizer=dataclasses.replace(dense.optimizer, learning_rate=3e-4),
  )
