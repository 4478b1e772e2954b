"""Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca): LLaMA 7B taught to follow instructions.

Command: python -m experiments.run --config=alpaca --config.data.path=FILE --weights=LLAMA
Hardware: 7b: 6,738,415,616 parameters, training state 108 GB: from v5p-16 up; theirs were 4 A100s
of 80 GB. With --weights of a small model, or --config.lora.rank=8, less.
Data: theirs, 52,002 examples written by text-davinci-003, may not be used commercially and is not
here. Batches of 128 examples of at most 512 tokens, 3 epochs: 1,219 steps. As they are short, 32
packed rows hold about as many; --config.data.packing=false --config.data.batch_size=128 is theirs
to the letter. They held nothing out; here the best of the checkpoints is kept by it.
Result: not yet run.
"""

from experiments.config import (
  CheckpointConfig,
  Config,
  DataConfig,
  EvalConfig,
  OptimizerConfig,
  TrainConfig,
)

from . import llama


def config() -> Config:
  return Config(
    name="alpaca",
    model=llama.model("7b"),
    data=DataConfig(
      source="instructions", tokenizer="", row_length=512, batch_size=32, holdout=0.02
    ),
    optimizer=OptimizerConfig(
      name="adamw",
      learning_rate=2e-5,
      schedule="cosine",
      warmup_fraction=0.03,
      final_fraction=0.0,
      beta1=0.9,
      beta2=0.999,
      eps=1e-8,
      weight_decay=0.0,
      clip_norm=1.0,
    ),
    train=TrainConfig(steps=1219, epochs=3.0, remat="full"),
    checkpoint=CheckpointConfig(every=200, keep_best=1),
    eval=EvalConfig(every=50),
  )
