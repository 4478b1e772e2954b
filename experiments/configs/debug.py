"""A few hundred thousand parameters, 20 steps, seconds: to see that everything runs.

Command: python -m experiments.run --config=debug
Hardware: any.
Result: 20 steps in seconds; not meant to be good.
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
  LayerSpec,
  MlpSpec,
  ModelSpec,
  MoeSpec,
  RotarySpec,
  Segment,
)

_ATTENTION = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, position=RotarySpec())
_MLP = MlpSpec(hidden=128)
_MOE = MoeSpec(num_experts=4, expert=_MLP, dispatch="capacity")


def config() -> Config:
  return Config(
    name="debug",
    model=ModelSpec(
      vocab_size=320,
      embed_dim=64,
      max_length=256,
      segments=(Segment((LayerSpec(_ATTENTION, _MLP), LayerSpec(_ATTENTION, _MOE))),),
    ),
    data=DataConfig(source="pydoc", row_length=64, batch_size=8),
    optimizer=OptimizerConfig(name="adamw", learning_rate=3e-3, warmup_steps=5),
    train=TrainConfig(steps=20, log_every=1),
    checkpoint=CheckpointConfig(every=10),
    eval=EvalConfig(batches=4, sample_prompt="The ", sample_tokens=40),
  )
