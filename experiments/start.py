"""What `run` does around training: which config, may it run here, and what to say at the end."""

import dataclasses
import json
from pathlib import Path

from layers.count import count_params
from mesh.multihost import initialize, is_primary

from . import cli
from .closing import print_closing, print_sample
from .config import Config, ConfigError
from .data.load import Dataset, load
from .data.trigram import ngram_bits_per_byte
from .overrides import check_resume, from_json, to_json
from .planning.memory import gigabytes, refuse_if_too_large, training_bytes
from .training.loop import Outcome, train
from .training.setup import Setup, build

_BASELINE = "interpolated byte trigrams"


def resolve(*, reason: str, allow: bool) -> tuple[Config, Config, Path]:
  """The named config, the one to run, and its folder.

  A folder that holds a run has the last word: its stored config is the base of the overrides.

  Raises:
    ConfigError: the folder holds another run, or an override changes what may not change.
  """
  name, given = cli.config_flag()
  folder = cli.workdir(name)
  stored_path = folder / "config.json"
  if not stored_path.is_file():
    named, config = cli.requested_config()
    return named, config, folder
  stored = from_json(json.loads(stored_path.read_text()))
  if given and stored.name != name:
    raise ConfigError(
      f"{folder} holds a run of {stored.name!r}, not of {name!r}; choose another --workdir"
    )
  config = cli.override_config(stored)
  check_resume(stored, config, reason=reason, allow=allow)
  return stored, config, folder


def run(config: Config, folder: Path, *, profile: tuple[int, int] | None) -> int | None:
  """Train in `folder` and print what a person wants to know; the signal that stopped it, or None.

  Raises:
    ConfigError: the model does not fit, the data is missing or unreadable, the folder unwritable.
  """
  initialize()
  setup = build(config)
  refuse_if_too_large(setup)
  dataset = load(config.data, config.model.vocab_size)
  _store(config, folder)
  if is_primary():
    _introduce(setup, dataset, folder)
  lines: dict[str, float] = {}

  def baselines() -> dict[str, float]:
    if config.eval.baselines and dataset.fingerprint["tokenizer"] == "byte":
      streams = (split.stream for split in (dataset.train, dataset.heldout))
      train_bytes, heldout_bytes = (stream.read(0, len(stream)) for stream in streams)
      lines[_BASELINE] = ngram_bits_per_byte(train_bytes, heldout_bytes)
    return lines

  outcome = train(setup, dataset, folder, profile=profile, baselines=baselines)
  if outcome.heldout is None:
    if is_primary():
      print(f"\nstopped and saved at step {outcome.step}; the same command resumes")
    return outcome.stopped_by
  twin = _train_twin(config, dataset, folder) if config.eval.twin else None
  if twin is not None and twin.heldout is None:
    return twin.stopped_by
  if twin is not None:
    lines[f"{config.eval.twin}, equal active FLOPs"] = twin.heldout.bits_per_byte
  if is_primary():
    print_closing(outcome, folder, lines)
    if config.eval.sample_prompt:
      print_sample(outcome, dataset.tokenizer)
  return None


def _train_twin(config: Config, dataset: Dataset, folder: Path) -> Outcome:
  """The sibling config's model under this run's data, optimizer and steps, in a folder of its own."""
  named = cli.named_config(config.eval.twin)
  quiet = dataclasses.replace(config.eval, twin="", sample_prompt="")
  twin = dataclasses.replace(config, name=named.name, model=named.model, eval=quiet)
  twin_folder = folder / named.name
  _store(twin, twin_folder)
  if is_primary():
    print(f"\nNow its twin {named.name}: the same steps, data and FLOPs a token, without experts.")
  return train(build(twin), dataset, twin_folder)


def _store(config: Config, folder: Path) -> None:
  """Write the resolved config, atomically.

  Raises:
    ConfigError: the folder can't be written.
  """
  if not is_primary():
    return
  try:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "config.json.tmp"
    temporary.write_text(json.dumps(to_json(config), indent=1) + "\n")
    temporary.replace(folder / "config.json")
  except OSError as e:
    raise ConfigError(f"can't write to the work directory {folder}: {e.strerror}") from e


def _introduce(setup: Setup, dataset: Dataset, folder: Path) -> None:
  config, mesh, data = setup.config, setup.mesh, dataset.fingerprint
  counts = count_params(config.model)
  axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
  active = f", {counts.active:,} active" if counts.active != counts.total else ""
  device = mesh.devices.flat[0]
  print(f"{config.name}: {counts.total:,} parameters{active}; {config.model.num_layers} layers")
  print(f"  mesh     {axes or 'one device'} ({mesh.devices.size} x {device.device_kind})")
  print(f"  memory   {gigabytes(training_bytes(setup))} of weights, gradients, optimizer state")
  print(
    f"  data     {data['source']}, {data['tokens']:,} tokens of {data['tokenizer'][:12]}, "
    f"{len(dataset.train):,} rows to train on, {len(dataset.heldout):,} held out"
  )
  print(
    f"  batch    {config.data.batch_size} rows x {config.data.row_length} tokens, "
    f"{config.train.steps:,} steps, {config.optimizer.name}"
  )
  print(f"  workdir  {folder}")
