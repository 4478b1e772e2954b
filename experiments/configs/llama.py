"""LLaMA (arXiv 2302.13971): rotary positions, gated SiLU, RMSNorm, no biases.

Command: python -m experiments.run --config=llama:65b --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: 65b: 65,285,660,672 parameters, training state 1.04 TB; from v5p-32 (16 chips) up. Theirs
were 2,048 A100s of 80 GB.
Data: 1.0e12 tokens for 7b and 13b, 1.4e12 for 33b and 65b, in batches of 4M.
Result: not yet run.
"""

from experiments.config import Config, DataConfig, EvalConfig, OptimizerConfig, TrainConfig
from layers.spec import (
  AttentionSpec,
  HeadSpec,
  LayerSpec,
  MlpSpec,
  ModelSpec,
  NormSpec,
  RotarySpec,
  Segment,
)

# Layers, width, heads, hidden units, learning rate, tokens.
SIZES = {
  "7b": (32, 4096, 32, 11_008, 3e-4, 1.0e12),
  "13b": (40, 5120, 40, 13_824, 3e-4, 1.0e12),
  "33b": (60, 6656, 52, 17_920, 1.5e-4, 1.4e12),
  "65b": (80, 8192, 64, 22_016, 1.5e-4, 1.4e12),
}


def decoder(
  layers: int,
  width: int,
  heads: int,
  kv_heads: int,
  hidden: int,
  vocab: int,
  length: int,
  *,
  position: RotarySpec,
  eps: float = 1e-5,
  tied: bool = False,
  window: int | None = None,
) -> ModelSpec:
  """All of LLaMA 1 to 3, Mistral and SmolLM2."""
  norm = NormSpec(eps=eps)
  attention = AttentionSpec(heads, width // heads, kv_heads, window, position=position)
  layer = LayerSpec(attention, MlpSpec(hidden, "silu", gated=True), norm)
  return ModelSpec(
    vocab_size=vocab,
    embed_dim=width,
    max_length=length,
    segments=(Segment((layer,), layers),),
    final_norm=norm,
    head=HeadSpec(tied=tied),
  )


def recipe(
  name: str, model: ModelSpec, *, length: int, tokens: float, batch: int, learning_rate: float
) -> Config:
  """The published training, in rows of `length` and batches of so many tokens."""
  rows = batch // length
  return Config(
    name=name,
    model=model,
    data=DataConfig(source="shards", tokenizer="", row_length=length, batch_size=rows),
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
    train=TrainConfig(steps=int(tokens / (rows * length)), compute_dtype="bfloat16", remat="full"),
    eval=EvalConfig(every=1000, batches=32),
  )


def model(size: str) -> ModelSpec:
  layers, width, heads, hidden, _, _ = SIZES[size]
  eps = 1e-5 if size == "65b" else 1e-6
  return decoder(
    layers, width, heads, heads, hidden, 32_000, 2048, position=RotarySpec(theta=1e4), eps=eps
  )


def config(size: str) -> Config:
  *_, learning_rate, tokens = SIZES[size]
  return recipe(
    f"llama:{size}", model(size), length=2048, tokens=tokens, batch=2**22,
    learning_rate=learning_rate,
  )  # fmt: skip
