"""The sections of an experiment. A config module returns a `Config`; flags override its fields.

Every field has a class that says what may change when a run is resumed from its work directory:
`free` at will, `intervention` with `--reason`, `identity` not at all (it would be another run).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from layers.spec import ModelSpec
from mesh.rules import parse_rules

from .exits import ConfigError, HaltError  # noqa: F401 - raised by those who read configs


def _field(change: str) -> Callable[[Any], Any]:
  return lambda default: dataclasses.field(default=default, metadata={"change": change})


free, intervention, identity = map(_field, ("free", "intervention", "identity"))


def _at_least(section: Any, name: str, **least: float) -> None:
  """Raise ConfigError for a field of `section` (called `name`) below its least value."""
  for field, bound in least.items():
    value = getattr(section, field)
    if value is not None and value < bound:
      raise ConfigError(f"{name}.{field}={value}: must be at least {bound}")


@dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes. All None: the best fit for the devices present, printed.

  If any is given, the others are 1; one may be -1, meaning the devices that remain.
  """

  data: int | None = free(None)  # whole replicas
  stage: int | None = free(None)  # pipeline stages
  fsdp: int | None = free(None)  # batch, and the width of every weight
  expert: int | None = free(None)  # batch, and different experts
  context: int | None = free(None)  # positions of a row
  tensor: int | None = free(None)  # heads, hidden units, vocabulary
  # The same axes across slices, over the slow network; the sizes above then hold within a slice:
  # data=4 with dcn_data=2 is an axis `data` of 8 on two slices. With all three at 1, several TPU
  # slices are split along `data`, which must be a multiple of their number. A slice is a TPU slice;
  # elsewhere a process, or an equal share of the devices of a single process.
  dcn_data: int = free(1)
  dcn_stage: int = free(1)
  dcn_fsdp: int = free(1)
  # fsdp, fsdp_tensor, fsdp_expert or all, then changes of what is cut over which mesh axes:
  # all,embed=fsdp+context,mlp= (nothing after = is a copy on each device).
  rules: str = free("all")
  axis_types: Literal["auto", "explicit"] = free("auto")  # explicit: shardings in array types
  # Keys of other positions: auto is a halo for a local mask, else a ring, else all_gather.
  context_method: Literal["auto", "ring", "halo", "all_gather"] = free("auto")
  circular: int = free(1)  # turns a microbatch makes through the stages, each over fewer layers

  def __post_init__(self):
    _at_least(self, "mesh", dcn_data=1, dcn_stage=1, dcn_fsdp=1, circular=1)
    try:
      parse_rules(self.rules)
    except ValueError as e:
      raise ConfigError(f"mesh.rules: {e}") from e


@dataclass(frozen=True)
class DataConfig:
  """Where tokens come from. Rows are `row_length` tokens of packed documents."""

  # pydoc: the language reference inside CPython. text: `path` is text or JSONL, plain or gzip.
  # shards: `path` is a folder written by experiments.data.prepare. synthetic: random tokens.
  # instructions: `path` is JSONL of instruction, input, output (`data/instructions.py`).
  source: Literal["pydoc", "text", "shards", "synthetic", "instructions"] = identity("pydoc")
  path: str = identity("")  # setting it turns source pydoc into text or shards
  text_field: str = identity("text")  # of a JSONL line
  # "byte", or a folder or file written by train_tokenizer; empty is that of --weights.
  tokenizer: str = identity("byte")
  objective: Literal["next_token", "masked"] = identity("next_token")  # masked: see `masking`
  row_length: int = identity(256)
  batch_size: int = intervention(16)  # rows a step, over all devices
  holdout: float = identity(0.05)  # last part of the text, kept for evaluation; 1 is all
  holdout_path: str = identity("")  # of instructions: a file of its own for that
  packing: bool = identity(True)  # of instructions: several examples a row; else one
  seed: int = identity(0)  # of the shuffle
  prefetch: int = free(4)  # batches read ahead
  # What stays damaged or unreadable after some tries: stop the run, or skip it, counted and noted.
  on_error: Literal["stop", "skip"] = intervention("stop")

  def __post_init__(self):
    if self.row_length < 2:
      raise ConfigError(f"data.row_length={self.row_length}: a row needs at least 2 tokens")
    _at_least(self, "data", batch_size=1, seed=0, prefetch=0)
    if not 0 < self.holdout <= 1:
      raise ConfigError(f"data.holdout={self.holdout}: must lie between 0 and 1")

  @property
  def target(self) -> str:
    """What a loss is the mean over."""
    return "token" if self.objective == "next_token" else "masked token"


@dataclass(frozen=True)
class OptimizerConfig:
  """An optax chain: clip, the named rule, weight decay, schedule."""

  name: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = intervention("adamw")
  learning_rate: float = intervention(3e-4)  # peak
  schedule: Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"] = intervention("cosine")
  warmup_steps: int = intervention(100)
  warmup_fraction: float | None = intervention(None)  # of all steps, in place of warmup_steps
  decay_steps: int | None = intervention(None)  # end of the schedule; None is train.steps
  final_fraction: float = intervention(0.1)  # of the peak, at the end
  stable_fraction: float = intervention(0.8)  # wsd: share of the steps after warmup at the peak
  beta1: float = intervention(0.9)
  beta2: float = intervention(0.95)
  eps: float = intervention(1e-8)
  weight_decay: float = intervention(0.1)  # on matrices only
  clip_norm: float | None = intervention(1.0)  # global gradient norm
  momentum: float = intervention(0.95)  # muon, sgd
  # Of the first moment (adamw, lion; the momentum of muon, sgd) between steps; sums are float32.
  moment_dtype: Literal["float32", "bfloat16"] = intervention("float32")
  adam_learning_rate: float | None = intervention(None)  # muon: embeddings, head, norms; None: same


@dataclass(frozen=True)
class TrainConfig:
  steps: int = free(1000)
  epochs: float | None = free(None)  # passes over the data, in place of steps
  weights: str = identity("")  # what training starts from, as --weights says; empty is a draw
  microbatches: int = intervention(1)  # gradient accumulation: the batch in this many parts
  compute_dtype: Literal["auto", "float32", "bfloat16"] = intervention("auto")  # f32 on CPU
  remat: str | tuple[str, ...] = free("none")  # none, full, dots, minimal, offload, tensor names
  z_loss: float = intervention(0.0)  # times log(Z)^2 of the vocabulary softmax
  seed: int = identity(0)  # of weights, jitter, dropout
  log_every: int = free(10)
  # Steps between two that are computed twice and compared, with the copies of parameters that
  # devices hold; 0 is never. Of N steps one more is computed: see `training.verify`.
  verify_every: int = free(0)
  # Only kernels whose sums have one order, for bit-equal repetitions. CPU and TPU always do; on GPU
  # this costs some speed.
  deterministic: bool = free(False)
  # After so many seconds without a step the run ends, its stacks written down (`watchdog`). None is
  # 20 times the longest of the last steps, at least 300; 0 is never.
  hang_seconds: float | None = free(None)

  def __post_init__(self):
    _at_least(
      self,
      "train",
      steps=1,
      microbatches=1,
      z_loss=0,
      seed=0,
      log_every=1,
      verify_every=0,
      hang_seconds=0,
    )
    if self.epochs is not None and self.epochs <= 0:
      raise ConfigError(f"train.epochs={self.epochs}: must be above 0")
    if self.seed >= 1 << 32:  # JAX would keep the lower half only
      raise ConfigError(f"train.seed={self.seed}: must be below 2^32")


@dataclass(frozen=True)
class LoraConfig:
  """Low-rank adapters, trained in place of all weights (`layers/lora.py`)."""

  rank: int = identity(0)  # 0: none, every weight is trained
  alpha: float = identity(16.0)  # an adapter counts alpha / rank
  targets: tuple[str, ...] = identity(
    ("query", "value")
  )  # weights by last name; out, up, down, ...

  def __post_init__(self):
    _at_least(self, "lora", rank=0)
    if self.rank and not self.targets:
      raise ConfigError("lora.targets is empty: name the weights that get an adapter")

  @property
  def scale(self) -> float:
    return self.alpha / self.rank if self.rank else 1.0


@dataclass(frozen=True)
class CheckpointConfig:
  every: int = free(500)  # steps; the last step is always saved
  keep: int = free(2)  # the newest; at least 2 leave one when the newest is found damaged
  keep_every: int = free(0)  # also each step that is a multiple of this; 0 is none
  keep_best: int = free(0)  # also so many of the least held-out loss, saved when that is found
  # A folder on each host, in its memory (/dev/shm/meshyard) or on a disk of its own, for copies of
  # the state from which a run that died goes on (`training/near.py`); empty is none.
  near: str = free("")
  near_every: int = free(0)  # steps between them; 0 is a tenth of `every`

  def __post_init__(self):
    _at_least(self, "checkpoint", every=1, keep=1, keep_every=0, keep_best=0, near_every=0)
    if self.near_every and not self.near:
      raise ConfigError(
        f"checkpoint.near_every={self.near_every} needs a folder on each host: set "
        "checkpoint.near=/dev/shm/meshyard, or checkpoint.near_every=0 for no near copies"
      )
    if "://" in self.near:
      raise ConfigError(f"checkpoint.near={self.near}: must be a folder on the host itself")

  @property
  def near_steps(self) -> int:
    """Steps between near copies; 0: there are none."""
    return (self.near_every or max(1, self.every // 10)) if self.near else 0


@dataclass(frozen=True)
class EvalConfig:
  every: int = free(0)  # steps between held-out evaluations; 0 is only at the end
  batches: int | None = free(None)  # None is the whole held-out split
  sample_prompt: str = free("")  # continued at the end; empty is none
  sample_tokens: int = free(200)
  temperature: float = free(0.8)
  baselines: bool = free(False)  # a byte trigram model on the same split (byte tokens only)
  twin: str = free("")  # a config trained after this one and shown beside it

  def __post_init__(self):
    _at_least(self, "eval", every=0, batches=1, sample_tokens=1, temperature=0)


@dataclass(frozen=True)
class GuardConfig:
  """What is done about loss spikes and exploding gradients (`training/guard.py`)."""

  mode: Literal["off", "observe", "act"] = free("act")  # observe: says what it would do
  window: int = free(128)  # steps that levels and spreads are taken from
  deviations: float = free(6.0)  # robust ones above the level, from which a step is an anomaly
  rewind_steps: int = free(100)  # from the anomaly back to the checkpoint
  skip_batches: tuple[int, ...] = free((200, 500))  # left out at each rewind; then it stops
  nonfinite_steps: int = free(10)  # in a row, then it stops; each is skipped

  def __post_init__(self):
    _at_least(self, "guard", window=32, deviations=4, rewind_steps=1, nonfinite_steps=1)
    if any(batches < 1 for batches in self.skip_batches):
      raise ConfigError(f"guard.skip_batches={self.skip_batches}: each must be at least 1")


@dataclass(frozen=True)
class Config:
  name: str
  model: ModelSpec
  mesh: MeshConfig = MeshConfig()
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  train: TrainConfig = TrainConfig()
  lora: LoraConfig = LoraConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  guard: GuardConfig = GuardConfig()
  eval: EvalConfig = EvalConfig()

  def __post_init__(self):
    if self.data.row_length > self.model.max_length:
      raise ConfigError(
        f"data.row_length={self.data.row_length} exceeds model.max_length={self.model.max_length}"
      )
    if self.data.objective == "next_token" and not self.model.causal:
      raise ConfigError("attention.causal=false shows the next token: set data.objective=masked")
    if self.data.batch_size % self.train.microbatches:
      raise ConfigError(
        f"data.batch_size={self.data.batch_size} is not a multiple of "
        f"train.microbatches={self.train.microbatches}"
      )
