"""GLaM 64B/64E (arXiv 2112.06905): every second layer of 64 experts, two a token, 1.2e12 weights.

Command: python -m experiments.run --config=glam:64b-64e --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: 1,161,756,418,048 parameters (96,604,528,640 active), training state with Adafactor 9.3
TB; from v5p-256 (128 chips) up. Theirs were 1,024 TPU v4 chips.
Data: 600e9 tokens, not published. The paper does not say which layers are gated: dense ones gated,
experts not, and one table are the only reading that gives its 1.2T and 96.6B. A table of distances
in each layer is ours to guess. Theirs dropped tokens beyond a capacity; here none is dropped.
Result: not yet run.
"""

from experiments.config import Config, DataConfig, EvalConfig, OptimizerConfig, TrainConfig
from layers.spec import (
  AttentionSpec,
  BucketedSpec,
  HeadSpec,
  InitSpec,
  LayerSpec,
  MlpSpec,
  ModelSpec,
  MoeSpec,
  Segment,
)

LENGTH = 1024
WIDTH = 8192
HIDDEN = 32_768
SIZES = ("64b-64e",)


def model(size: str) -> ModelSpec:
  del size  # there is one
  attention = AttentionSpec(128, 128, position=BucketedSpec(shared=False), scale=1.0)
  moe = MoeSpec(
    num_experts=64,
    expert=MlpSpec(HIDDEN, "gelu", gated=False),
    experts_per_token=2,
    router="top_k",
    normalize=True,
    jitter=0.0,
    balance_loss=0.01,
  )
  layers = LayerSpec(attention, MlpSpec(HIDDEN, "gelu", gated=True)), LayerSpec(attention, moe)
  return ModelSpec(
    vocab_size=256_000,
    embed_dim=WIDTH,
    max_length=LENGTH,
    segments=(Segment(layers, 32),),
    head=HeadSpec(tied=True, scale=WIDTH**-0.5),
    init=InitSpec(kind="fan_in", embed_stddev=1.0),
  )


def config(size: str) -> Config:
  return Config(
    name=f"glam:{size}",
    model=model(size),
    data=DataConfig(source="shards", tokenizer="", row_length=LENGTH, batch_size=2**20 // LENGTH),
    optimizer=OptimizerConfig(
      name="adafactor",
      learning_rate=1e-2,
      schedule="inverse_sqrt",
      warmup_steps=10_000,
      weight_decay=0.0,
    ),
    train=TrainConfig(steps=600_000_000_000 // 2**20, compute_dtype="bfloat16", remat="full"),
    eval=EvalConfig(every=1000, batches=32),
  )
