"""Switch Transformers (arXiv 2101.03961) as decoders: both stacks of the paper as one, causal.

Command: python -m experiments.run --config=switch_decoder:base-8 --config.data.path=SHARDS \
    --config.data.tokenizer=TOKENIZER
Hardware: base-8: 591,017,088 parameters (194,655,360 active), on one chip; c-2048:
1,571,088,225,120 (1,507,578,720), training state with Adafactor 12.6 TB; from v5p-512 (256 chips)
up.
The paper's models are encoders and decoders that repair damaged text. Here layers of encoder and
decoder follow each other in one stack without cross-attention, trained on the next token: the count
is the published one less cross-attention, the second table of distances and the second final norm.
Experts, routers, capacities, losses and optimizer are theirs (bfloat16, float32 in routers); rows
of 2,048 tokens are the groups that compete for slots (theirs: 8,192 in base, 4,096 in large and
xxl, 2,048 in c).
Data: C4, 550,000 steps of 2^20 tokens.
Result: not yet run.
"""

from experiments.config import (
  Config,
  DataConfig,
  EvalConfig,
  MeshConfig,
  OptimizerConfig,
  TrainConfig,
)
from layers.spec import (
  AttentionSpec,
  BucketedSpec,
  HeadSpec,
  InitSpec,
  LayerSpec,
  MlpSpec,
  ModelSpec,
  MoeSpec,
  Segment,
)

LENGTH = 2048
# Layers, width, heads, hidden units, experts, then capacity factors in training and evaluation and
# the least capacity.
SIZES = {
  **{f"base-{n}": (24, 768, 12, 3072, n, 1.25, 2.0, 4) for n in (8, 16, 32, 64, 128, 256)},
  "large-128": (48, 1024, 16, 4096, 128, 1.25, 2.0, 4),
  "xxl-128": (48, 4096, 64, 10_240, 128, 1.25, 4.0, 2),
  "c-2048": (30, 2080, 30, 6144, 2048, 1.0, 2.0, 2),
}


def model(size: str) -> ModelSpec:
  layers, width, heads, hidden, experts, train, evaluation, least = SIZES[size]
  gated = size.startswith("xxl")
  mlp = MlpSpec(hidden, "gelu_tanh" if gated else "relu", gated=gated)
  moe = MoeSpec(
    experts, mlp, dispatch="capacity", capacity_factor=train, eval_capacity_factor=evaluation,
    min_capacity=least,
  )  # fmt: skip
  attention = AttentionSpec(heads, 64, position=BucketedSpec(), scale=1.0)
  dense, sparse = LayerSpec(attention, mlp), LayerSpec(attention, moe)
  group = (sparse,) if size == "c-2048" else (dense, sparse)
  tied = not size.startswith(("xxl", "c"))
  return ModelSpec(
    vocab_size=32_128,
    embed_dim=width,
    max_length=LENGTH,
    segments=(Segment(group, layers // len(group)),),
    head=HeadSpec(tied=tied, scale=width**-0.5 if tied else 1.0),
    init=InitSpec(kind="fan_in", scale=0.1, embed_stddev=1.0, depth_scaled=False),
  )


def config(size: str) -> Config:
  return Config(
    name=f"switch_decoder:{size}",
    model=model(size),
    # A width of 2080 divides over few devices, so only experts are cut over all of them.
    mesh=MeshConfig(expert=-1, rules="all,embed=fsdp") if size == "c-2048" else MeshConfig(),
    data=DataConfig(source="shards", tokenizer="", row_length=LENGTH, batch_size=2**20 // LENGTH),
    optimizer=OptimizerConfig(
      name="adafactor",
      learning_rate=1e-2,
      schedule="inverse_sqrt",
      warmup_steps=10_000,
      weight_decay=0.0,
    ),
    train=TrainConfig(steps=550_000, compute_dtype="bfloat16", remat="full"),
    eval=EvalConfig(every=1000, batches=32),
  )
