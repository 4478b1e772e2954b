"""OPT (arXiv 2205.01068): GPT-3's sizes with ReLU, trained in the open.

Command: python -m experiments.run --config=opt:175b --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: 175b: 174,604,468,224 parameters, training state 2.8 TB; from v5p-128 (64 chips) up.
Theirs were 992 A100s of 80 GB for 34 days. The small one trains on one chip.
Data: 180e9 tokens, seen 1.7 times. Dropout is 0.1 except on embeddings. 175b: the paper's learning
rate; its logbook tells of a dozen changes by hand, of clipping too (1.0 to 0.3).
Result: not yet run.
"""

from dataclasses import replace

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

LENGTH = 2048
# Layers, width, heads, tokens a batch in millions, learning rate.
SIZES = {
  "125m": (12, 768, 12, 0.5, 6e-4),
  "350m": (24, 1024, 16, 0.5, 3e-4),
  "1.3b": (24, 2048, 32, 1, 2e-4),
  "2.7b": (32, 2560, 32, 1, 1.6e-4),
  "6.7b": (32, 4096, 32, 2, 1.2e-4),
  "13b": (40, 5120, 40, 4, 1e-4),
  "30b": (48, 7168, 56, 4, 1e-4),
  "66b": (64, 9216, 72, 2, 0.8e-4),
  "175b": (96, 12_288, 96, 2, 1.2e-4),
}


def model(size: str) -> ModelSpec:
  layers, width, heads, _, _ = SIZES[size]
  norm = NormSpec("layer", eps=1e-5, bias=True)
  layer = LayerSpec(
    AttentionSpec(heads, width // heads, qkv_bias=True, out_bias=True),
    MlpSpec(4 * width, "relu", gated=False, bias=True),
    norm,
    dropout=0.1,
  )
  spec = ModelSpec(
    vocab_size=50_272,
    embed_dim=width,
    max_length=LENGTH,
    segments=(Segment((layer,), layers),),
    embedding=EmbeddingSpec(position=LearnedPositionSpec(LENGTH, offset=2)),
    final_norm=norm,
    head=HeadSpec(tied=True),
    init=InitSpec(kind="normal", stddev=0.006),
  )
  if size != "350m":
    return spec
  # The odd one: norms after the sums, a narrow table, no final norm.
  return replace(
    spec,
    segments=(Segment((replace(layer, norm_placement="post"),), layers),),
    embedding=replace(spec.embedding, width=512),
    final_norm=None,
  )


def config(size: str) -> Config:
  _, _, _, millions, learning_rate = SIZES[size]
  rows = int(millions * 2**20) // LENGTH
  return Config(
    name=f"opt:{size}",
    model=model(size),
    data=DataConfig(source="shards", tokenizer="", row_length=LENGTH, batch_size=rows),
    optimizer=OptimizerConfig(
      name="adamw",
      learning_rate=learning_rate,
      schedule="linear",
      warmup_steps=2000 if size == "175b" else 375_000_000 // (rows * LENGTH),
      final_fraction=0.1,
      beta1=0.9,
      beta2=0.95,
      weight_decay=0.1,
      clip_norm=1.0,
    ),
    train=TrainConfig(
      steps=300_000_000_000 // (rows * LENGTH), compute_dtype="bfloat16", remat="full"
    ),
    eval=EvalConfig(every=1000, batches=32),
  )
