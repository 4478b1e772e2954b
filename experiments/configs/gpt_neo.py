"""GPT-Neo (EleutherAI): global and local layers in turn, a window of 256.

Command: python -m experiments.run --config=gpt_neo:1.3b --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: 2.7b: 2,651,307,520 parameters, training state 42 GB: one v5p chip, or v5e-8.
Data: the Pile. The 125M model's learning rate was not published; GPT-3's here. The cosine ended at
300,000 of 400,000 steps.
Result: not yet run.
"""

from dataclasses import replace

from experiments.config import Config, DataConfig, EvalConfig, OptimizerConfig, TrainConfig
from layers.spec import (
  AttentionSpec,
  EmbeddingSpec,
  HeadSpec,
  LayerSpec,
  LearnedPositionSpec,
  MlpSpec,
  ModelSpec,
  NormSpec,
  Segment,
)

LENGTH = 2048
# Layers, width, heads, learning rate.
SIZES = {
  "125m": (12, 768, 12, 6e-4),
  "1.3b": (24, 2048, 16, 2e-4),
  "2.7b": (32, 2560, 20, 1.6e-4),
}


def model(size: str) -> ModelSpec:
  layers, width, heads, _ = SIZES[size]
  norm = NormSpec("layer", eps=1e-5, bias=True)
  everything = LayerSpec(
    AttentionSpec(heads, width // heads, out_bias=True, scale=1.0),
    MlpSpec(4 * width, "gelu_tanh", gated=False, bias=True),
    norm,
  )
  local = replace(everything, attention=replace(everything.attention, window=256))
  return ModelSpec(
    vocab_size=50_257,
    embed_dim=width,
    max_length=LENGTH,
    segments=(Segment((everything, local), layers // 2),),
    embedding=EmbeddingSpec(position=LearnedPositionSpec(LENGTH)),
    final_norm=norm,
    head=HeadSpec(tied=True),
  )


def config(size: str) -> Config:
  _, _, _, learning_rate = SIZES[size]
  return Config(
    name=f"gpt_neo:{size}",
    model=model(size),
    data=DataConfig(source="shards", tokenizer="", row_length=LENGTH, batch_size=512),
    optimizer=OptimizerConfig(
      name="adamw",
      learning_rate=learning_rate,
      warmup_steps=3000,
      decay_steps=300_000,
      final_fraction=0.1,
      beta1=0.9,
      beta2=0.95,
      weight_decay=0.0,
      clip_norm=1.0,
    ),
    train=TrainConfig(steps=400_000, compute_dtype="bfloat16", remat="minimal"),
    eval=EvalConfig(every=1000, batches=32),
  )
