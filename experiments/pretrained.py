"""Training that starts from weights made elsewhere: `run --weights`.

Their model and tokenizer become the run's. The run directory keeps the tokenizer with
its special tokens and chat template, and in `weights.json` which files the weights were, so that a
resumed run needs them no more.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from layers.spec import ModelSpec
from mesh.multihost import is_primary

from .data import files
from .data.tokenizer import ByteTokenizer, Tokenizer
from .training.setup import Setup
from .training.state import TrainState, given, init_state
from .weights import hub
from .weights.load import load
from .weights.open import check_tokenizer, locate, open_weights, read_tokenizer
from .weights.special import stops
from .weights.tokenizer_files import of_weights

_FILE = "weights.json"


class Pretrained(contextlib.AbstractContextManager):
  """A checkpoint, open until the block ends.

  Raises:
    ConfigError: as `open_weights`.
  """

  def __init__(self, name: str):
    self.name = name
    self._stack = contextlib.ExitStack()
    self._opened = open_weights(locate(name), self._stack)
    self._named = ""  # the tokenizer, if it is not its own

  def __exit__(self, *_: Any) -> None:
    self._stack.close()

  @property
  def spec(self) -> ModelSpec:
    return self._opened.spec

  def tokenizer(self, name: str) -> Tokenizer:
    """Its own, or the one called `name`.

    Raises:
      ConfigError: it is missing, unusable or of another model.
    """
    found = read_tokenizer(self._opened.source, name)
    check_tokenizer(found, self._opened)
    self._named = name
    return found

  def keep(self, folder: Path, tokenizer: Tokenizer) -> None:
    """Leave in the run directory what a resumed run needs; says how far it is."""
    source = self._opened.source
    if not isinstance(tokenizer, ByteTokenizer):  # which is built in
      kept = of_weights(source, tokenizer, self._named, self.spec.max_length)
      ends = tuple(sorted(stops(source) | {tokenizer.eod}))
      for name, data in hub.beside_a_run(kept, hub.ids_of(source, ends)).items():
        (folder / name).write_bytes(data)
    path = source.path
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    listed = {}
    with _bar() as bar:
      task = bar.add_task("SHA-256 of the files", total=len(found))
      for file in found:
        listed[file.name] = {"bytes": file.stat().st_size, "sha256": files.sha256(str(file))}
        bar.update(task, advance=1)
    body = {"name": self.name, "path": str(path.absolute()), "files": listed}
    temporary = folder / f"{_FILE}.tmp"
    temporary.write_text(json.dumps(body, indent=1) + "\n")
    temporary.replace(folder / _FILE)

  def state(self, setup: Setup) -> TrainState:
    """The state before the first step, on the mesh.

    Raises:
      ConfigError: tensors that are missing, left over, or not of the model's shapes.
    """
    source, table, spec = self._opened
    with _bar() as bar:
      task = bar.add_task(f"loading {source.path.name}")
      told = lambda done, count: bar.update(task, completed=done, total=count)
      params = load(source, table, spec, given(setup.abstract.params), progress=told)
    seed = setup.config.train.seed
    return init_state(setup.model, setup.optimizer, setup.abstract, seed, params)


def _bar() -> Progress:
  console = Console(stderr=True)
  return Progress(
    console=console, transient=True, disable=not (console.is_terminal and is_primary())
  )
