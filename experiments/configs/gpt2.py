"""GPT-2 (Radford et al. 2019): the decoder that most others start from, four sizes.

Command: python -m experiments.run --config=gpt2:124m --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: 1.5b: 1,557,611,200 parameters, training state 25 GB; one v5p chip, or v5e-8. The small
ones train on one chip of any kind.
Data: 40 GB of web text, not published. Batches of 512 rows and the smaller start of what writes to
the residual are the paper's; learning rates (GPT-3's of these sizes), warmup and 100e9 tokens are
ours. Theirs are called small, medium, large and XL.
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
  PositionSpec,
  Segment,
)

LENGTH = 1024
BATCH = 512
# Layers, width, heads, learning rate.
SIZES = {
  "124m": (12, 768, 12, 6e-4),
  "355m": (24, 1024, 16, 3e-4),
  "774m": (36, 1280, 20, 2.5e-4),
  "1.5b": (48, 1600, 25, 2e-4),
}


def decoder(
  layers: int,
  width: int,
  heads: int,
  *,
  vocab: int = 50_257,
  length: int,
  position: PositionSpec | None = None,
  stddev: float = 0.02,
) -> ModelSpec:
  """GPT-2's shape; positions are learned, or else those of the attention."""
  norm = NormSpec("layer", eps=1e-5, bias=True)
  layer = LayerSpec(
    AttentionSpec(heads, width // heads, position=position, qkv_bias=True, out_bias=True),
    MlpSpec(4 * width, "gelu_tanh", gated=False, bias=True),
    norm,
  )
  return ModelSpec(
    vocab_size=vocab,
    embed_dim=width,
    max_length=length,
    segments=(Segment((layer,), layers),),
    embedding=EmbeddingSpec(position=None if position else LearnedPositionSpec(length)),
    final_norm=norm,
    head=HeadSpec(tied=True),
    init=InitSpec(kind="normal", stddev=stddev, embed_stddev=stddev),
  )


def model(size: str) -> ModelSpec:
  layers, width, heads, _ = SIZES[size]
  return decoder(layers, width, heads, length=LENGTH)


def config(size: str) -> Config:
  *_, learning_rate = SIZES[size]
  return Config(
    name=f"gpt2:{size}",
    model=model(size),
    data=DataConfig(source="shards", tokenizer="", row_length=LENGTH, batch_size=BATCH),
    optimizer=OptimizerConfig(
      name="adamw",
      learning_rate=learning_rate,
      warmup_steps=2000,
      final_fraction=0.1,
      beta1=0.9,
      beta2=0.95,
      weight_decay=0.1,
      clip_norm=1.0,
    ),
    train=TrainConfig(
      steps=100_000_000_000 // (BATCH * LENGTH), compute_dtype="bfloat16", remat="minimal"
    ),
    eval=EvalConfig(every=1000, batches=32),
  )
