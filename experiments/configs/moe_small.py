"""The step up from moe_tiny: 47 million parameters on the source of Python's standard library.

Its top level, about 4.7 MB of text that every CPython carries; give other text with
--config.data.path=GLOB.

Command: python -m experiments.run --config=moe_small
Hardware: one 24 GB GPU for an evening, or a laptop overnight (about 5e15 model FLOPs).
Result: not yet run.
"""

import os
import sysconfig

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
  LayerSpec,
  MlpSpec,
  ModelSpec,
  MoeSpec,
  RotarySpec,
  Segment,
)

_ATTENTION = AttentionSpec(num_heads=6, head_dim=64, position=RotarySpec())
_EXPERT = MlpSpec(hidden=1024)
_DENSE = LayerSpec(_ATTENTION, _EXPERT)
_SPARSE = LayerSpec(_ATTENTION, MoeSpec(num_experts=8, expert=_EXPERT, dispatch="capacity"))


def config() -> Config:
  return Config(
    name="moe_small",
    model=ModelSpec(
      vocab_size=320,
      embed_dim=384,
      max_length=2048,
      segments=(Segment((_DENSE, _SPARSE), repeats=4),),
    ),
    data=DataConfig(
      source="text",
      path=os.path.join(sysconfig.get_path("stdlib"), "*.py"),
      row_length=512,
      batch_size=64,
    ),
    optimizer=OptimizerConfig(
      name="muon",
      learning_rate=0.01,
      adam_learning_rate=0.003,
      schedule="wsd",
      warmup_steps=100,
      stable_fraction=0.6,
      final_fraction=0.0,
    ),
    train=TrainConfig(steps=2000, log_every=10, remat="minimal"),
    checkpoint=CheckpointConfig(every=200),
    eval=EvalConfig(every=200, batches=16, sample_prompt="def ", baselines=True),
  )
