"""A trained model, from its run directory or from weights made elsewhere, for programs that only
read it."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress

from layers.lora import merge

from . import bucket, cli, paths
from .config import Config, ConfigError, DataConfig, LoraConfig, MeshConfig
from .data.tokenizer import Tokenizer, check_vocab
from .training.checkpoint import Checkpoints
from .training.folder import own_tokenizer, read_config
from .training.setup import Setup, build, build_on
from .weights.load import load
from .weights.open import locate, open_weights, read_tokenizer, stops


class Trained(NamedTuple):
  setup: Setup
  step: int
  params: Any


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


class Foreign(NamedTuple):
  """A model from elsewhere."""

  setup: Setup
  params: Any
  tokenizer: Tokenizer
  stops: frozenset[int]  # ids that end an answer


def load_weights(name: str) -> Foreign:
  """The model of `--weights`, on the mesh that the devices here suggest, with the command's
  overrides; prints how far it is.

  Raises:
    ConfigError: weights or tokenizer are missing, damaged, or do not suit each other.
  """
  with contextlib.ExitStack() as stack:
    opened = open_weights(locate(name), stack)
    spec, source = opened.spec, opened.source
    data = DataConfig(row_length=min(256, spec.max_length), tokenizer="")
    config = cli.override_config(Config(name=source.path.stem, model=spec, data=data))
    if config.model != spec:
      raise ConfigError("--config.model: the model is the one that the weights were made for")
    tokenizer = read_tokenizer(source, config.data.tokenizer)
    check_vocab(tokenizer, spec.vocab_size)
    setup = build(config, batch=False)
    with Progress(console=Console(stderr=True), transient=True) as bar:
      task = bar.add_task(f"loading {source.path.name}")
      told = lambda done, count: bar.update(task, completed=done, total=count)
      params = load(source, opened.table, spec, setup.abstract.params, progress=told)
    return Foreign(setup, params, tokenizer, stops(source) | {tokenizer.eod})


def restore(setup: Setup, folder: Path) -> Trained:
  """Parameters of the newest checkpoint, or the one that `--checkpoint` names; adapters are merged.

  Raises:
    ConfigError: no finished checkpoint in the folder, or one of another model.
  """
  if not paths.names(bucket.checkpoints(folder)):
    raise ConfigError(f"{folder} has no checkpoint yet")
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
