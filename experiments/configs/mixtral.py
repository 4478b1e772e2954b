"""Mixtral (arXiv 2401.04088): eight gated experts a layer, two a token, weights renormalised.

Command: python -m experiments.run --config=mixtral:8x7b --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: 8x7b: 46,702,792,704 parameters (12,879,925,248 active), training state 747 GB; from
v5p-32 (16 chips) up. 8x22b: 140,630,071,296 (39,161,468,928), 2.25 TB; from v5p-64 up.
Data and optimizer were not published; the recipe here is ours, with the published balance loss.
Result: not yet run; on v5p-128 the compiled steps take 92.7 and 62.7 GB a chip of 102.
"""

from experiments.config import (
  CheckpointConfig,
  Config,
  DataConfig,
  EvalConfig,
  OptimizerConfig,
  TrainConfig,
)
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

# Layers, width, heads (8 of keys), hidden units of an expert, vocabulary, positions.
SIZES = {
  "8x7b": (32, 4096, 32, 14_336, 32_000, 32_768),
  "8x22b": (56, 6144, 48, 16_384, 32_768, 65_536),
}

# No grouped product is repeated: 92.7 GB a chip of 102 with 8x7b, fsdp=64 and 4 rows a chip.
_REMAT = {
  "8x7b": ("attention_out", "attention_lse", "expert_up", "expert_gate"),
  "8x22b": "full",
}


def model(size: str) -> ModelSpec:
  layers, width, heads, hidden, vocab, length = SIZES[size]
  moe = MoeSpec(
    num_experts=8,
    expert=MlpSpec(hidden=hidden, activation="silu", gated=True),
    experts_per_token=2,
    router="top_k",
    normalize=True,
    jitter=0.0,
    balance_loss=0.02,
  )
  norm = NormSpec(eps=1e-5)
  attention = AttentionSpec(heads, 128, num_kv_heads=8, position=RotarySpec(theta=1e6))
  return ModelSpec(
    vocab_size=vocab,
    embed_dim=width,
    max_length=length,
    segments=(Segment((LayerSpec(attention, moe, norm),), layers),),
    final_norm=norm,
    head=HeadSpec(tied=False),
  )


def config(size: str) -> Config:
  return Config(
    name=f"mixtral:{size}",
    model=model(size),
    data=DataConfig(source="shards", tokenizer="", row_length=4096, batch_size=256),
    optimizer=OptimizerConfig(name="adamw", learning_rate=3e-4, warmup_steps=2000),
    train=TrainConfig(steps=100_000, compute_dtype="bfloat16", remat=_REMAT[size], z_loss=1e-4),
    checkpoint=CheckpointConfig(every=1000, keep=3),
    eval=EvalConfig(every=1000, batches=32),
  )
