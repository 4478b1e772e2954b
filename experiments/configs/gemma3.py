"""Gemma 3, its text model (arXiv 2503.19786): five local layers to a global one, rows of 32,768.

Command: python -m experiments.run --config=gemma3:4b --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: 27b: 27,009,346,304 parameters, training state 432 GB; from v5p-16 (8 chips) up. The 270m
and 1b models train on one chip.
Local layers see 512 or 1024 tokens, so that attention over long rows costs little more than a sixth
of dense layers, and in decoding five caches of six stay as short as that. Pretraining rows are of
32,768 tokens; from 4b on global layers count positions in eighths, as the released models do, for
131,072. Data and optimizer were not published; the recipe here is ours.
Result: not yet run.
"""

from experiments.config import Config, DataConfig, EvalConfig, OptimizerConfig, TrainConfig
from layers.spec import (
  AttentionSpec,
  EmbeddingSpec,
  HeadSpec,
  LayerSpec,
  LinearScaling,
  MlpSpec,
  ModelSpec,
  NormSpec,
  RotarySpec,
  Segment,
)

# Layers, width, heads, heads of keys, head size, hidden units, vocabulary, window, what the logits
# are divided by the root of.
SIZES = {
  "270m": (18, 640, 4, 1, 256, 2048, 262_144, 512, 256),
  "1b": (26, 1152, 4, 1, 256, 6912, 262_144, 512, 256),
  "4b": (34, 2560, 8, 4, 256, 10_240, 262_208, 1024, 256),
  "12b": (48, 3840, 16, 8, 256, 15_360, 262_208, 1024, 256),
  "27b": (62, 5376, 32, 16, 128, 21_504, 262_208, 1024, 168),
}


def model(size: str) -> ModelSpec:
  layers, width, heads, kv_heads, head_dim, hidden, vocab, window, scale = SIZES[size]
  norm = NormSpec(unit_offset=True)
  far = RotarySpec(1e6, scaling=LinearScaling(8.0) if window == 1024 else None)

  def layer(position: RotarySpec, window: int | None) -> LayerSpec:
    attention = AttentionSpec(
      heads, head_dim, kv_heads, window, position=position, qk_norm=norm, scale=scale**-0.5
    )
    return LayerSpec(attention, MlpSpec(hidden, "gelu_tanh"), norm, "both")

  local = layer(RotarySpec(), window)
  groups, rest = divmod(layers, 6)
  return ModelSpec(
    vocab_size=vocab,
    embed_dim=width,
    max_length=32_768,
    segments=(
      Segment((local,) * 5 + (layer(far, None),), groups),
      *((Segment((local,), rest),) if rest else ()),
    ),
    embedding=EmbeddingSpec(scale_by_sqrt_dim=True),
    final_norm=norm,
    head=HeadSpec(tied=True),
  )


def config(size: str) -> Config:
  return Config(
    name=f"gemma3:{size}",
    model=model(size),
    data=DataConfig(source="shards", tokenizer="", row_length=32_768, batch_size=64),
    optimizer=OptimizerConfig(name="adamw", learning_rate=3e-4, warmup_steps=2000),
    train=TrainConfig(steps=100_000, compute_dtype="bfloat16", remat="full", z_loss=1e-4),
    eval=EvalConfig(every=1000, batches=8),
  )
