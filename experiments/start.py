"""What `run` does around training: which config, may it run here, and what to say at the end."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from layers.count import count_params
from mesh.multihost import is_primary
from mesh.pipeline import bubble_fraction

from . import bucket, cli, joining
from .closing import print_closing, print_sample
from .config import Config, ConfigError
from .data.load import Dataset, load, require_tokenizer
from .data.rows import Rows
from .data.tokenizer import CHAT_TEMPLATE
from .data.trigram import ngram_bits_per_byte
from .exits import restarted
from .overrides import check_resume
from .planning.memory import gigabytes, refuse_if_too_large, training_bytes
from .training.folder import claim, own_tokenizer, read_config, writing
from .training.loop import Outcome, Resume, train
from .training.manifest import saved_steps
from .training.setup import Setup, build, count_trained
from .training.timing import Profile

_BASELINE = "interpolated byte trigrams"
_ENDING_SECONDS = 60.0


class Request(NamedTuple):
  """What the command line asks for."""

  config: Config
  folder: Path
  resume: Resume
  weights: Any = None  # the `pretrained.Pretrained` that training starts from


def resolve(*, reason: str = "", allow: bool = False, check: bool = True) -> Request:
  """The config to run and its folder.

  A folder in which something was trained has the last word: its stored config is the base of the
  overrides, and they may change only what a resume may. One that has no checkpoint starts afresh.

  Args:
    check: False to look only (`--show`).

  Raises:
    ConfigError: the folder holds another run, or an override changes what may not change.
  """
  name, given = cli.config_flag()
  folder = cli.workdir(name)
  stored = read_config(folder)
  if stored is not None and given and stored.name != name:
    raise ConfigError(_other_run(folder, stored.name, name))
  saved = saved_steps(bucket.checkpoints(folder)) if stored is not None else ()
  begun = any(saved)  # step 0 is weights that were converted: data and recipe are still open
  if saved and not begun and cli.start_weights():
    raise ConfigError(f"{folder} begins with weights of its own; choose another --workdir")
  base = cli.named_config(name) if stored is None or (given and not begun) else stored
  config, weights = _with_weights(base, begun)
  if stored is None or not saved:
    return Request(config, folder, Resume(), weights)
  same = config if begun else dataclasses.replace(stored, model=config.model)
  changes = check_resume(stored, same, reason=reason, allow=allow) if check else []
  told = [change for change in changes if change.kind != "free"]
  return Request(config, folder, Resume(told, reason, allow))


def _other_run(folder: Path, stored: str, name: str) -> str:
  if saved_steps(bucket.checkpoints(folder)) == [0]:
    return (
      f"{folder} begins with weights that were converted as {stored!r}, which bring their model: "
      "leave out --config and set data and recipe by --config.SECTION.FIELD=VALUE, or start "
      f"--config={name} from the weights themselves, by --weights=PATH and another --workdir"
    )
  return f"{folder} holds a run of {stored!r}, not of {name!r}; choose another --workdir"


def _with_weights(base: Config, begun: bool) -> tuple[Config, Any]:
  """`base` with the command's overrides; before a run begins its model is that of the weights.

  Raises:
    ConfigError: the weights can't be opened; steps and epochs are both given.
  """
  name, weights = cli.start_weights() or base.train.weights, None
  if name and not begun:
    # The families of weights, which only a run that starts from some needs.
    from .pretrained import Pretrained

    weights = Pretrained(name)
    length = min(base.data.row_length, weights.spec.max_length)
    data = dataclasses.replace(base.data, tokenizer="", row_length=length)
    base = dataclasses.replace(base, model=weights.spec, data=data)
  base = dataclasses.replace(base, train=dataclasses.replace(base.train, weights=name))
  config = cli.override_config(base)
  if config.train.weights != name:
    raise ConfigError("train.weights is set by --weights, which reads the model as well")
  if cli.overridden("train.steps") and config.train.epochs is not None:
    if cli.overridden("train.epochs"):
      raise ConfigError("train.steps and train.epochs both say how long to train: give one")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=None))
  return config, weights


def run(
  request: Request,
  *,
  profile: Profile | None,
  place: joining.Place,
  deadline: float | None = None,
) -> int | None:
  """Train and print what a person wants to know; the signal that stopped it, or None.

  Args:
    place: this process among several.
    deadline: a `time.monotonic` at which to save and stop, as by SIGTERM.

  Raises:
    ConfigError: the model does not fit, the data is missing or unreadable, the folder unwritable
      or in use, the other processes are missing or run something else.
    HaltError: as `joining.join` and `train`.
  """
  config, folder = request.config, request.folder
  joining.join(place, config, folder)
  with contextlib.ExitStack() as stack:
    stopped_by = _run(request, profile, deadline, stack)
  joining.done()
  return stopped_by


def _run(
  request: Request, profile: Profile | None, deadline: float | None, stack: contextlib.ExitStack
) -> int | None:
  folder, weights = request.folder, request.weights
  if weights is not None:
    stack.enter_context(weights)
  config = request.config
  if config.data.path and weights is None:  # a forgotten --weights is no question of memory
    require_tokenizer(own_tokenizer(config, folder).data)
  setup = build(config)
  refuse_if_too_large(setup)
  dataset = _load(request)
  if config.train.epochs is not None:
    config = _with_steps(config, len(dataset.train))
    setup = build(config)
  twin = _twin_setup(config) if config.eval.twin else None
  if is_primary():
    stack.enter_context(claim(folder, patience=_patience()))
    _introduce(setup, dataset, folder)
    if weights is not None and dataset.tokenizer is not None:
      weights.keep(folder, dataset.tokenizer)
    if dataset.template:  # in place of the one that the weights came with
      (folder / CHAT_TEMPLATE).write_text(dataset.template, encoding="utf-8")
  first = None if weights is None else lambda: weights.state(setup)
  lines: dict[str, float] = {}
  resume = request.resume
  with contextlib.suppress(ConfigError):  # a stored config may have a name of its own
    resume = resume._replace(base=cli.named_config(config.name))
  generates = config.data.objective == "next_token"

  def baselines() -> dict[str, float]:
    plain = isinstance(dataset.train, Rows) and dataset.fingerprint["tokenizer"] == "byte"
    if config.eval.baselines and plain and generates:
      streams = (split.stream for split in (dataset.train, dataset.heldout))
      train_bytes, heldout_bytes = (stream.read(0, len(stream)) for stream in streams)
      lines[_BASELINE] = ngram_bits_per_byte(train_bytes, heldout_bytes)
    return lines

  with writing(folder):
    with _explained(setup):
      outcome = train(
        setup, dataset, folder, profile=profile, resume=resume, baselines=baselines,
        deadline=deadline, first=first,
      )  # fmt: skip
    if _stopped(outcome):
      return outcome.stopped_by
    if twin is not None:
      with _explained(twin):
        beside = _train_twin(twin, dataset, folder / twin.config.name, deadline)
      if beside is not None and _stopped(beside):
        return beside.stopped_by
      if beside is not None:
        lines[f"{config.eval.twin}, equal active FLOPs"] = beside.heldout.bits_per_byte
  if is_primary():
    print_closing(outcome, folder, lines)
  if config.eval.sample_prompt and dataset.tokenizer is not None and generates:
    print_sample(outcome, dataset.tokenizer, show=is_primary())  # all compute, one speaks
  return None


def _load(request: Request) -> Dataset:
  config, tokenizer = request.config, None
  if request.weights is not None:
    tokenizer = request.weights.tokenizer(config.data.tokenizer)
  data = own_tokenizer(config, request.folder).data
  return load(data, config.model.vocab_size, tokenizer)


def _with_steps(config: Config, rows: int) -> Config:
  """`config` with as many steps as its epochs of so many rows have."""
  assert config.train.epochs is not None
  steps = math.ceil(config.train.epochs * rows / config.data.batch_size)
  return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


@contextlib.contextmanager
def _explained(setup: Setup) -> Iterator[None]:
  """Says what filled the memory of a device where it ran out, and what would fit."""
  try:
    yield
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    # The planner's estimates, which training needs in this case only.
    from .planning.exhausted import explain

    raise ConfigError(explain(setup, e)) from e


def _stopped(outcome: Outcome) -> bool:
  if outcome.stopped_by is not None and is_primary():
    saved = f"saved at step {outcome.step}" if outcome.step else "before the first step"
    print(f"\nstopped, {saved}; the same command goes on from there")
  return outcome.stopped_by is not None


def _twin_setup(config: Config) -> Setup:
  """The sibling config's model under this run's data, optimizer and steps.

  Raises:
    ConfigError: there is no such config, or its model does not suit this mesh and data.
  """
  try:
    named = cli.named_config(config.eval.twin)
    model = dataclasses.replace(named.model, vocab_size=config.model.vocab_size)
    quiet = dataclasses.replace(config.eval, twin="", sample_prompt="")
    return build(dataclasses.replace(config, name=named.name, model=model, eval=quiet))
  except ConfigError as e:
    raise ConfigError(f"eval.twin={config.eval.twin}: {e} (--config.eval.twin= for none)") from e


def _train_twin(
  setup: Setup, dataset: Dataset, folder: Path, deadline: float | None
) -> Outcome | None:
  """Train the twin in a folder of its own; None if what it did there before is not comparable."""
  name = setup.config.name
  stored = read_config(folder)
  if stored is not None and saved_steps(bucket.checkpoints(folder)):
    try:
      check_resume(stored, setup.config)
    except ConfigError as e:
      if is_primary():
        print(f"\n{name} is left out, since it began otherwise: {e}")
      return None
  with contextlib.ExitStack() as stack:
    if is_primary():
      stack.enter_context(claim(folder, patience=_patience()))
      print(f"\nNow its twin {name}: the same steps, data and FLOPs a token, without experts.")
    return train(setup, dataset, folder, deadline=deadline)


def _patience() -> float:
  """Seconds to wait for a folder in use: what a supervisor starts again may still be ending."""
  return _ENDING_SECONDS if restarted() else 0.0


def _introduce(setup: Setup, dataset: Dataset, folder: Path) -> None:
  config, mesh, data = setup.config, setup.mesh, dataset.fingerprint
  counts = count_params(config.model)
  axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
  active = f", {counts.active:,} active" if counts.active != counts.total else ""
  count, kind = mesh.devices.size, mesh.devices.flat[0].device_kind
  unit = "bytes" if data["tokenizer"] == "byte" else "tokens"
  source = f"{config.data.path} " if config.data.path else f"{data['source']} "
  tokens = config.train.steps * config.data.batch_size * config.data.row_length
  trained = f", {count_trained(config):,} of adapters trained" if config.lora.rank else ""
  size = f"{counts.total:,} parameters{active}{trained}"
  print(f"{config.name}: {size}, {config.model.num_layers} layers")
  print(f"  devices  {count} x {kind}" + (f", mesh {axes}" if axes else ""))
  if (stages := mesh.shape["stage"]) > 1:
    parts, turns = config.train.microbatches, config.mesh.circular
    idle = bubble_fraction(stages, parts, turns)
    print(f"  pipeline {parts} microbatches through {stages} stages, {turns} x: {idle:.0%} idle")
  print(f"  memory   {gigabytes(training_bytes(setup))} of weights, gradients, optimizer state")
  if config.train.weights:
    print(f"  weights  {config.train.weights}")
  print(
    f"  data     {source}({data['tokens']:,} {unit}: "
    f"{len(dataset.train):,} rows to train on, {len(dataset.heldout):,} held out)"
  )
  if dataset.note:
    print(f"  examples {dataset.note}")
  print(
    f"  training {config.train.steps:,} steps of {config.data.batch_size} x "
    f"{config.data.row_length} tokens ({tokens:,}), {config.optimizer.name}"
  )
  print(f"  workdir  {bucket.home(folder)}\n")
