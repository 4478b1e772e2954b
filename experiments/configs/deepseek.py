"""DeepSeek-V3 (arXiv 2412.19437): latent attention, 256 small experts a layer, eight a token.

The next-token model; the paper's second head, which predicts the token after, is not built.

Command: python -m experiments.run --config=deepseek:v3 --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: 671,026,404,352 parameters (37,552,282,624 active), training state 10.7 TB; from v5p-512
(256 chips) up.
Data: 14.8e12 tokens, not published. The batch grew from 3072 rows to 15,360 and the learning rate
fell as a cosine from two thirds on; here the batch is the last one and the fall linear.
Result: not yet run; on v5p-512 the compiled step takes 72.1 GB a chip of 102.
"""

import math

from experiments.config import (
  CheckpointConfig,
  Config,
  DataConfig,
  EvalConfig,
  MeshConfig,
  OptimizerConfig,
  TrainConfig,
)
from layers.spec import (
  HeadSpec,
  InitSpec,
  LatentAttentionSpec,
  LayerSpec,
  MlpSpec,
  ModelSpec,
  MoeSpec,
  RotarySpec,
  Segment,
  YarnScaling,
)

SIZES = ("v3",)

_STRETCH = 40.0  # of 4,096 positions to 163,840; a factor of the logits goes with it
_ATTENTION = LatentAttentionSpec(
  128,
  512,
  128,
  64,
  128,
  q_lora=1536,
  position=RotarySpec(interleaved=True, scaling=YarnScaling(_STRETCH, 4096, attention_factor=1.0)),
  scale=(128 + 64) ** -0.5 * (0.1 * math.log(_STRETCH) + 1) ** 2,
)
_MOE = MoeSpec(
  num_experts=256,
  expert=MlpSpec(2048),
  experts_per_token=8,
  router="top_k",
  scores="sigmoid",
  normalize=True,
  routed_scale=2.5,
  num_groups=8,
  keep_groups=4,
  bias_rate=1e-3,
  balance_loss=1e-4,
  jitter=0.0,
  shared=MlpSpec(2048),
  # Room for the worst case would be 64 times a device's own choices.
  exchange="bounded",
  buffer_factor=2.0,
)


def model(size: str) -> ModelSpec:
  del size  # there is one
  return ModelSpec(
    vocab_size=129_280,
    embed_dim=7168,
    max_length=163_840,
    segments=(
      Segment((LayerSpec(_ATTENTION, MlpSpec(18_432)),), 3),
      Segment((LayerSpec(_ATTENTION, _MOE),), 58),
    ),
    head=HeadSpec(tied=False),
    init=InitSpec(kind="normal", stddev=0.006, embed_stddev=0.006, depth_scaled=False),
  )


def config(size: str) -> Config:
  return Config(
    name=f"deepseek:{size}",
    model=model(size),
    mesh=MeshConfig(fsdp=-1, expert=64),
    data=DataConfig(source="shards", tokenizer="", row_length=4096, batch_size=15_360),
    optimizer=OptimizerConfig(
      name="adamw",
      learning_rate=2.2e-4,
      schedule="wsd",
      warmup_steps=2000,
      stable_fraction=2 / 3,
      final_fraction=0.1,
      beta1=0.9,
      beta2=0.95,
      weight_decay=0.1,
      clip_norm=1.0,
    ),
    # 235,000 steps of 15,360 x 4,096 tokens.
    train=TrainConfig(steps=235_000, microbatches=60, compute_dtype="bfloat16", remat="full"),
    checkpoint=CheckpointConfig(every=500, keep=3),
    eval=EvalConfig(every=2000, batches=32),
  )
