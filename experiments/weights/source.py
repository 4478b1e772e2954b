"""Checkpoints from elsewhere, opened to read one tensor at a time: safetensors.

Nothing in them is executed: pickles (`.bin`, `.pt`, `.ckpt`) are refused.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from ..config import ConfigError

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = {"F64", "F32", "F16", "BF16"}


class Tensor(NamedTuple):
  """One that can be read."""

  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]


class Source(NamedTuple):
  """A checkpoint."""

  path: Path
  tensors: dict[str, Tensor]
  config: dict[str, Any]  # of config.json, or the metadata in its words
  gguf: Any = None  # the reader, whose tokenizer is inside


def open_source(path: Path, stack: contextlib.ExitStack) -> Source:
  """A folder with config.json and safetensors, or one such file; closed by `stack`.

  Raises:
    ConfigError: nothing there that can be read, or it is damaged.
  """
  if path.suffix in _PICKLES:
    _refuse_pickle(path)
  folder = path if path.is_dir() else path.parent
  files = _files(path)
  tensors: dict[str, Tensor] = {}
  for file in files:
    for name, tensor in _open(file, stack):
      if name in tensors:
        raise ConfigError(f"{file}: {name} is in another file of the checkpoint as well")
      tensors[name] = tensor
  config = read_json(folder / "config.json")
  return Source(path, tensors, config)


def read_json(path: Path) -> dict[str, Any]:
  """Raises ConfigError if it is missing or is no JSON object."""
  try:
    found = json.loads(path.read_text())
  except FileNotFoundError as e:
    raise ConfigError(f"{path} is missing: a checkpoint needs it") from e
  except (OSError, ValueError) as e:
    raise ConfigError(f"{path} can't be read: {e}") from e
  if not isinstance(found, dict):
    raise ConfigError(f"{path} is no JSON object")
  return found


def _files(path: Path) -> list[Path]:
  if path.is_file():
    return [path]
  if not path.is_dir():
    raise ConfigError(f"{path} does not exist")
  index = path / "model.safetensors.index.json"
  if not index.is_file():
    found = sorted(path.glob("*.safetensors"))
    if not found:
      pickles = [p for p in sorted(path.iterdir()) if p.suffix in _PICKLES]
      if pickles:
        _refuse_pickle(pickles[0])
      raise ConfigError(f"{path} holds no .safetensors file")
    return found
  names = read_json(index).get("weight_map")
  if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
    raise ConfigError(f"{index} has no weight_map of file names")
  files = []
  for name in sorted(set(names.values())):
    if Path(name).name != name:
      raise ConfigError(f"{index} names {name!r}, which is not a file beside it")
    files.append(path / name)
  return files


def _refuse_pickle(path: Path) -> None:
  raise ConfigError(
    f"{path} is a pickle, which can run any code when it is read, so it is not: save the model as "
    "safetensors where you trust it (transformers: model.save_pretrained(FOLDER))"
  )


def _open(path: Path, stack: contextlib.ExitStack) -> list[tuple[str, Tensor]]:
  try:
    file = stack.enter_context(safe_open(path, framework="np"))
    found = []
    for name in file.keys():  # noqa: SIM118 - it is no dict
      view = file.get_slice(name)
      if view.get_dtype() not in _DTYPES:
        raise ConfigError(
          f"{path}: {name} is {view.get_dtype()}; only F32, F16, BF16, F64 are read"
        )
      found.append((name, Tensor(tuple(view.get_shape()), lambda n=name: file.get_tensor(n))))
  except FileNotFoundError as e:
    raise ConfigError(f"{path} is missing") from e
  except (SafetensorError, OSError) as e:
    raise ConfigError(f"{path} is damaged: {e}") from e
  return found
