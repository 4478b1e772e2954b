"""Checkpoints from elsewhere, opened to read one tensor at a time: safetensors.

Nothing in them is executed: pickles (`.bin`, `.pt`, `.ckpt`) are refused.
"""

import contextlib
import json
import struct
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from ..config import ConfigError
from .quantized import Stored, Tensor, plain

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = {
  "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16,
  "F8_E4M3": jnp.float8_e4m3fn, "U8": np.uint8,
}  # fmt: skip
_MAX_JSON = 1 << 28  # bytes; the largest index has 2^23


class Source(NamedTuple):
  """A checkpoint."""

  path: Path
  tensors: dict[str, Tensor]
  config: dict[str, Any]  # of config.json, or the metadata in its words
  gguf: Any = None  # the reader, whose tokenizer is inside


def open_source(path: Path, stack: contextlib.ExitStack) -> Source:
  """A folder with config.json and safetensors, or one such file; quantized tensors as what they
  stand for.

  Raises:
    ConfigError: nothing there that can be read, or it is damaged.
  """
  if path.suffix in _PICKLES:
    _refuse_pickle(path)
  folder = path if path.is_dir() else path.parent
  files = _files(path)
  config = read_json(folder / "config.json")
  stored: dict[str, Stored] = {}
  for file in files:
    for name, found in _open(file):
      if name in stored:
        raise ConfigError(f"{file}: {name} is in another file of the checkpoint as well")
      stored[name] = found
  return Source(path, plain(stored, config), config)


def read_json(path: Path) -> dict[str, Any]:
  """Raises ConfigError if it is missing or is no JSON object."""
  try:
    if (size := path.stat().st_size) > _MAX_JSON:
      raise ConfigError(f"{path} has {size:,} bytes, too many for what it should be")
    found = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as e:
    raise ConfigError(f"{path} is missing: a checkpoint needs it") from e
  except RecursionError as e:
    raise ConfigError(f"{path} can't be read: it nests too deep") from e
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
      others = [p for p in sorted(path.iterdir()) if p.suffix == ".gguf"]
      hint = f", but {others[0].name}: give that file" if others else ""
      raise ConfigError(f"{path} holds no .safetensors file{hint}")
    return found
  names = read_json(index).get("weight_map")
  if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
    raise ConfigError(f"{index} has no weight_map of file names")
  files = []
  for name in sorted(set(names.values())):
    if Path(name).name != name or not name.endswith(".safetensors"):
      raise ConfigError(f"{index} names {name!r}, which is not a file beside it")
    files.append(path / name)
  return files


def _refuse_pickle(path: Path) -> None:
  raise ConfigError(
    f"{path} is a pickle, which can run any code when it is read, so it is not: save the model as "
    "safetensors where you trust it (transformers: model.save_pretrained(FOLDER))"
  )


def _open(path: Path) -> list[tuple[str, Stored]]:
  try:
    with safe_open(path, framework="np") as file:  # checks that all of the header fits the file
      names = set(file.keys())
    with path.open("rb") as file:
      size = struct.unpack("<Q", file.read(8))[0]
      header = json.loads(file.read(size))
  except FileNotFoundError as e:
    raise ConfigError(f"{path} is missing") from e
  except (SafetensorError, OSError, ValueError) as e:
    raise ConfigError(f"{path} is damaged or no safetensors file: {e}") from e
  found = []
  for name in names:
    dtype, shape = header[name]["dtype"], tuple(header[name]["shape"])
    if dtype not in _DTYPES:
      raise ConfigError(f"{path}: {name} is {dtype}; only F32, F16, BF16, F64 are read")
    read = partial(mapped, path, _DTYPES[dtype], 8 + size + header[name]["data_offsets"][0], shape)
    found.append((name, Stored(path, dtype, Tensor(shape, read))))
  return found


def mapped(path: Path, dtype: Any, offset: int, shape: tuple[int, ...]) -> np.ndarray:
  """A part of a file, which takes memory only until nobody looks at it."""
  if 0 in shape:
    return np.empty(shape, dtype)
  return np.memmap(path, dtype, mode="r", offset=offset, shape=shape)
