"""BigBird (arXiv 2007.14062, its RoBERTa models): encoders of 4,096 tokens, sparse attention.

Command: python -m experiments.run --config=bigbird:base --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: base: 127,519,158 parameters, training state 2 GB; large: 359,174,326, 5.7 GB.
A query sees its block of 64, the two beside it, the first and the last block, and three at random,
here drawn for four layers in turn; the released models draw for each layer and head. They add an
embedding of the token's type, of which masked language modelling uses one row: in the position
table here, 2 x width parameters fewer, and no pooler. Attention probabilities are not dropped out.
The released models started from RoBERTa's weights; batch, learning rate, dropout and the number of
steps here are ours.
Result: not yet run.
"""

from experiments.config import Config, DataConfig, EvalConfig, OptimizerConfig, TrainConfig
from layers.spec import (
  AttentionSpec,
  EmbeddingSpec,
  HeadSpec,
  InitSpec,
  LayerSpec,
  LearnedPositionSpec,
  MlpSpec,
  ModelSpec,
  NormSpec,
  Segment,
)

LENGTH = 4096
BLOCK = 64
DROPOUT = 0.1
# Layers, width, heads.
SIZES = {
  "base": (12, 768, 12),
  "large": (24, 1024, 16),
}


def model(size: str) -> ModelSpec:
  layers, width, heads = SIZES[size]
  norm = NormSpec("layer", eps=1e-12, bias=True)

  def layer(seed: int) -> LayerSpec:
    attention = AttentionSpec(
      heads,
      width // heads,
      mask=f"BigBird({LENGTH // BLOCK}, {BLOCK}, 3, {seed})",
      causal=False,
      qkv_bias=True,
      out_bias=True,
    )
    mlp = MlpSpec(4 * width, "gelu_tanh", gated=False, bias=True)
    return LayerSpec(attention, mlp, norm, "post", dropout=DROPOUT)

  return ModelSpec(
    vocab_size=50_358,
    embed_dim=width,
    max_length=LENGTH,
    segments=(Segment(tuple(map(layer, range(4))), layers // 4),),
    embedding=EmbeddingSpec(position=LearnedPositionSpec(LENGTH), norm=norm, dropout=DROPOUT),
    final_norm=norm,
    head=HeadSpec(tied=True, bias=True, transform="gelu_tanh"),
    init=InitSpec(kind="normal", stddev=0.02, depth_scaled=False),
  )


def config(size: str) -> Config:
  return Config(
    name=f"bigbird:{size}",
    model=model(size),
    data=DataConfig(
      source="shards", tokenizer="", objective="masked", row_length=LENGTH, batch_size=256
    ),
    optimizer=OptimizerConfig(
      name="adamw",
      learning_rate=1e-4,
      schedule="linear",
      warmup_steps=10_000,
      final_fraction=0.0,
      beta1=0.9,
      beta2=0.999,
      eps=1e-6,
      weight_decay=0.01,
      clip_norm=1.0,
    ),
    train=TrainConfig(steps=500_000, compute_dtype="bfloat16", remat="minimal"),
    eval=EvalConfig(every=1000, batches=32),
  )
