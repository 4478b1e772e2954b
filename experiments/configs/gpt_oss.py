"""gpt-oss (arXiv 2508.10925): attention sinks, every second layer local, four experts a token.

Command: python -m experiments.run --config=gpt_oss:20b --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: 120b: 116,829,156,672 parameters (5,711,982,912 active), training state 1.87 TB; from
v5p-64 (32 chips) up. 20b: 20,914,757,184 (4,187,440,704), 335 GB; from v5p-16 up.
Data and optimizer were not published; the recipe here is ours, in rows of 4,096, the length that
YaRN stretches 32 times. The released experts are rounded to four bits, which training here is not.
Result: not yet run; on v5p-16 the compiled step of 20b takes 100.5 GB a chip of 102, with
fsdp=8 and 8 microbatches.
"""

from dataclasses import replace

from experiments.config import Config
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
  YarnScaling,
)

from .llama import recipe

LENGTH = 4096
# Layers, experts.
SIZES = {"20b": (24, 32), "120b": (36, 128)}

_ATTENTION = AttentionSpec(
  64,
  64,
  num_kv_heads=8,
  position=RotarySpec(150_000.0, scaling=YarnScaling(32.0, LENGTH, truncate=False)),
  qkv_bias=True,
  out_bias=True,
  sink=True,
)


def model(size: str) -> ModelSpec:
  layers, experts = SIZES[size]
  norm = NormSpec(eps=1e-5)
  moe = MoeSpec(
    num_experts=experts,
    expert=MlpSpec(2880, "quick_gelu", gated=True, bias=True, clamp=7.0, up_offset=1.0),
    experts_per_token=4,
    router="top_k",
    normalize=True,
    router_bias=True,
    jitter=0.0,
    balance_loss=1e-3,
  )
  everything = LayerSpec(_ATTENTION, moe, norm)
  local = replace(everything, attention=replace(_ATTENTION, window=128))
  return ModelSpec(
    vocab_size=201_088,
    embed_dim=2880,
    max_length=131_072,
    segments=(Segment((local, everything), layers // 2),),
    final_norm=norm,
    head=HeadSpec(tied=False),
  )


def config(size: str) -> Config:
  made = recipe(
    f"gpt_oss:{size}", model(size), length=LENGTH, tokens=1e12, batch=2**22, learning_rate=3e-4
  )
  return replace(made, train=replace(made.train, z_loss=1e-4))
