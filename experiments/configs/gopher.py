"""Gopher (arXiv 2112.11446): GPT-2 with Transformer-XL's relative positions and RMSNorm.

Command: python -m experiments.run --config=gopher:280b --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: 280b: 279,710,317,824 parameters, training state 4.5 TB; from v5p-256 (128 chips) up.
Theirs were 4,096 TPU v3 chips. The small one trains on one chip.
The paper does not say which matrices have biases. Here those of the MLP, the last one of attention
and the logits have, and queries have Transformer-XL's two vectors: so all 50 models of Chinchilla's
paper (table A9) have the printed count, where without biases 24 are off. It is not the only such
reading; this one has queries, keys and values without, as Transformer-XL's code.
Data: 300e9 tokens of MassiveText, not published. Batches of 280b grew from 3M tokens to 6M; here
the batch is the last one. The published rule is Adam, without weight decay; the betas are ours.
Result: not yet run.
"""

from experiments.config import Config, DataConfig, EvalConfig, OptimizerConfig, TrainConfig
from layers.spec import (
  AttentionSpec,
  HeadSpec,
  LayerSpec,
  MlpSpec,
  ModelSpec,
  Segment,
  TransformerXLSpec,
)

LENGTH = 2048
# Layers, heads, head size, width, learning rate, tokens a batch in units of 2^18.
SIZES = {
  "44m": (8, 16, 32, 512, 6e-4, 1),
  "117m": (12, 12, 64, 768, 6e-4, 1),
  "417m": (12, 12, 128, 1536, 2e-4, 1),
  "1.4b": (24, 16, 128, 2048, 2e-4, 1),
  "7.1b": (32, 32, 128, 4096, 1.2e-4, 8),
  "280b": (80, 128, 128, 16_384, 4e-5, 24),
}


def decoder(layers: int, heads: int, head_dim: int, width: int) -> ModelSpec:
  """Gopher's and Chinchilla's."""
  attention = AttentionSpec(heads, head_dim, position=TransformerXLSpec(), out_bias=True)
  layer = LayerSpec(attention, MlpSpec(4 * width, "gelu_tanh", gated=False, bias=True))
  return ModelSpec(
    vocab_size=32_000,
    embed_dim=width,
    max_length=LENGTH,
    segments=(Segment((layer,), layers),),
    head=HeadSpec(tied=True, bias=True),
  )


def recipe(
  name: str, model: ModelSpec, *, tokens: float, rows: int, optimizer: OptimizerConfig
) -> Config:
  return Config(
    name=name,
    model=model,
    data=DataConfig(source="shards", tokenizer="", row_length=LENGTH, batch_size=rows),
    optimizer=optimizer,
    train=TrainConfig(steps=int(tokens / (rows * LENGTH)), compute_dtype="bfloat16", remat="full"),
    eval=EvalConfig(every=1000, batches=32),
  )


def model(size: str) -> ModelSpec:
  return decoder(*SIZES[size][:4])


def config(size: str) -> Config:
  *_, learning_rate, units = SIZES[size]
  optimizer = OptimizerConfig(
    name="adamw",
    learning_rate=learning_rate,
    warmup_steps=1500,
    final_fraction=0.1,
    weight_decay=0.0,
    clip_norm=0.25 if size in ("7.1b", "280b") else 1.0,
  )
  rows = units * 2**18 // LENGTH
  return recipe(f"gopher:{size}", model(size), tokens=300e9, rows=rows, optimizer=optimizer)
