"""A trained model, from its run directory or from weights made elsewhere, for programs that only
read it."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.progress import Progress

from layers.lora import merge

from . import bucket, cli, paths
from .config import Config, ConfigError, DataConfig, LoraConfig, MeshConfig
from .data.tokenizer import Tokenizer, begins_with, load_tokenizer
from .training.folder import own_tokenizer, read_config
from .training.setup import Setup, build, build_on, devices_here
from .weights.load import load
from .weights.open import Opened, check_tokenizer, locate, open_weights, read_tokenizer
from .weights.source import Source, read_json
from .weights.special import stops


class Trained(NamedTuple):
  setup: Setup
  step: int
  params: Any


def holds_run(path: Path) -> bool:
  """Whether it is a run directory, not a checkpoint from elsewhere."""
  if not (path / "config.json").is_file():
    return False
  return (path / "checkpoints").is_dir() or read_json(path / "config.json").get("type") == "Config"


def open_run(folder: Path, *, batch: bool) -> Setup:
  """The setup of a run, on the mesh that the devices here suggest, with the command's overrides.

  The stored mesh sizes are dropped, since this machine may be another, and so are adapters, which
  `restore` merges.

  Args:
    batch: whether batches of the config's size will be run.

  Raises:
    ConfigError: no run in the folder, or its model does not suit the devices.
  """
  stored = read_config(folder)
  if stored is None:
    raise ConfigError(f"{folder} holds no run (no config.json)")
  plain = LoraConfig()
  here = dataclasses.replace(stored, mesh=MeshConfig(rules=stored.mesh.rules), lora=plain)
  return build(own_tokenizer(cli.override_config(here), folder), batch=batch)


class Loaded(NamedTuple):
  """A model that can answer."""

  setup: Setup
  params: Any
  tokenizer: Tokenizer
  stops: frozenset[int]  # ids that end an answer
  begin: int | None = None  # id that begins every text
  source: Source | None = None  # whose files its chat template is in; its tensors are closed


def load_weights(name: str, *, batch: bool = False) -> Loaded:
  """The model of `--weights`, on the mesh that the devices here suggest, with the command's
  overrides; prints how far it is.

  Args:
    batch: whether batches of data will be run, to evaluate on.

  Raises:
    ConfigError: weights or tokenizer are missing, damaged, or do not suit each other.
  """
  with contextlib.ExitStack() as stack:
    opened = open_weights(locate(name), stack)
    setup, source = setup_of(opened, batch=batch), opened.source
    tokenizer = read_tokenizer(source, setup.config.data.tokenizer)
    check_tokenizer(tokenizer, opened)
    params = fill(opened, setup)
    ends = stops(source) | {tokenizer.eod}
    return Loaded(setup, params, tokenizer, ends, tokenizer.bos, source)


def load_run(trained: Trained, folder: Path) -> Loaded:
  """The model of a run with its tokenizer, and what the directory says of both.

  Raises:
    ConfigError: the tokenizer is gone, or a file beside it is damaged.
  """
  stored = read_config(folder)
  tokenizer = load_tokenizer(trained.setup.config.data.tokenizer)
  begin = begins_with(stored, tokenizer) if stored else None
  source = Source(folder, {}, {})
  ends = stops(source) | {tokenizer.eod}
  return Loaded(trained.setup, trained.params, tokenizer, ends, begin, source)


def setup_of(opened: Opened, *, batch: bool = False) -> Setup:
  """The setup of weights from elsewhere, as `load_weights` has it.

  Raises:
    ConfigError: the model does not suit the devices, or an override changes it.
  """
  spec, path = opened.spec, opened.source.path
  data = DataConfig(row_length=min(256, spec.max_length), tokenizer="")
  if batch:  # all of the text: nothing is trained on it
    long = min(1024, spec.max_length)
    rows = len(devices_here()) * (1 if jax.default_backend() == "cpu" else 8)
    data = dataclasses.replace(data, row_length=long, batch_size=rows, holdout=1.0)
  name = path.name if path.is_dir() else path.stem
  config = cli.override_config(Config(name=name, model=spec, data=data))
  if config.model != spec:
    raise ConfigError("--config.model: the model is the one that the weights were made for")
  return build(config, batch=batch)


def fill(opened: Opened, setup: Setup) -> Any:
  """The parameters; prints how far it is. Raises ConfigError as `load`."""
  source = opened.source
  with progress(f"loading {source.path.name}") as told:
    return load(source, opened.table, opened.spec, setup.abstract.params, progress=told)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
  """A bar on a terminal, which goes when the block ends; told what is done, of how much."""
  console = Console(stderr=True)
  with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
    task = bar.add_task(what)
    yield lambda done, count: bar.update(task, completed=done, total=count)


def restore(setup: Setup, folder: Path) -> Trained:
  """Parameters of the newest checkpoint, or the one that `--checkpoint` names; adapters are merged.

  Raises:
    ConfigError: no finished checkpoint in the folder, or one of another model.
  """
  if not paths.names(bucket.checkpoints(folder)):
    raise ConfigError(f"{folder} has no checkpoint yet")
  from .training.checkpoint import Checkpoints  # orbax takes a second, and --weights needs it not

  with Checkpoints(bucket.checkpoints(folder), read_only=True) as checkpoints:
    step = checkpoints.chosen(cli.checkpoint())
    if step is None:
      raise ConfigError(f"{folder} has no finished checkpoint yet")
    adapters = getattr(read_config(folder), "lora", LoraConfig())
    saved = setup
    if adapters.rank:
      config = dataclasses.replace(setup.config, lora=adapters)
      saved = build_on(config, setup.mesh, setup.mesh.devices.flat[0].platform, batch=False)
    params = checkpoints.restore_params(step, saved.abstract.params)
    return Trained(setup, step, merge(params, adapters.scale))
