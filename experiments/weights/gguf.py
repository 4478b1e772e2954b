"""GGUF files: tensors with any quantization that the `gguf` package knows, metadata."""

import math
import re
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..config import ConfigError
from .gguf_config import config_of
from .gguf_header import Header, read_header
from .source import Source, Tensor, mapped

_PLAIN = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_AT_ONCE = 1 << 22  # elements dequantized at once
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
# Their converter adds 1 to these, where families keep w - 1.
_NORMS_PLUS_ONE = ("gemma2", "gemma3")


def open_gguf(path: Path) -> Source:
  """Names, shapes and metadata; a tensor is dequantized, to float32, when it is read.

  Of a model in several files any may be given.

  Raises:
    ConfigError: the package is missing, a file is missing or damaged, a type is not read, or the
      metadata are not understood.
  """
  header = read_header(path)
  files = _parts(path, header)
  metadata = header.metadata if files[0] == path else read_header(files[0]).metadata
  tensors: dict[str, Tensor] = {}
  for file in files:
    for name, tensor in _tensors(file, header if file == path else read_header(file)).items():
      if name in tensors:
        raise ConfigError(f"{file}: {name} is in another file of the model as well")
      tensors[name] = tensor
  kind = metadata.get("general.architecture")
  if kind in _NORMS_PLUS_ONE:
    for name in [n for n in tensors if n.endswith("norm.weight")]:
      tensors[name] = Tensor(tensors[name].shape, partial(_less_one, tensors[name]))
  return Source(path, tensors, config_of(path, metadata, tensors), metadata)


def metadata(source: Source, name: str) -> Any:
  """What the file says under this name; None if nothing."""
  return source.gguf.get(name)


def _parts(path: Path, header: Header) -> list[Path]:
  """All files of a model that was split."""
  count = header.metadata.get("split.count", 1)
  if count in (0, 1):
    return [path]
  named = _PART.fullmatch(path.name)
  if not named or int(named[3]) != count:
    raise ConfigError(
      f"{path} is one of {count} files of a model, but not named like -00001-of-{count:05}.gguf"
    )
  files = [path.with_name(f"{named[1]}-{i + 1:05}-of-{named[3]}.gguf") for i in range(count)]
  if missing := [file for file in files if not file.is_file()]:
    raise ConfigError(f"{missing[0]} is missing: {path.name} needs all {count} files")
  return files


def _tensors(path: Path, header: Header) -> dict[str, Tensor]:
  try:
    import gguf  # an extra
  except ImportError as e:
    raise ConfigError(f"{path} needs the gguf package: pip install 'meshyard[gguf]'") from e
  found = {}
  for name, shape, number, offset in header.tensors:
    try:
      kind = gguf.GGMLQuantizationType(number)
      elements, size = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as e:
      raise ConfigError(
        f"{path}: {name} is of type {number}, which gguf {version('gguf')} does not know"
      ) from e
    if kind.name not in _PLAIN:
      _check_kind(path, name, kind, size)
    count = math.prod(shape)  # without overflow, as Python counts
    if not count or shape[-1] % elements:
      raise ConfigError(
        f"{path} is damaged: {name} is {list(shape)} of {kind.name}, in blocks of {elements}"
      )
    length = count // elements * size
    if offset + length > header.size:
      raise ConfigError(
        f"{path} is damaged: {name} should end at byte {offset + length:,} of the tensors, "
        f"which have {max(0, header.size):,}"
      )
    data = partial(mapped, path, np.uint8, header.start + offset, (length,))
    found[name] = Tensor(shape, partial(_read, data, shape, kind))
  return found


def _check_kind(path: Path, name: str, kind: Any, size: int) -> None:
  """That the package can dequantize it."""
  import gguf  # the same

  try:
    gguf.dequantize(np.zeros((1, size), np.uint8), kind)
  except NotImplementedError as e:
    raise ConfigError(
      f"{path}: {name} is {kind.name}, which gguf {version('gguf')} does not dequantize; take a "
      "file in Q8_0, Q4_K, F16 or the like"
    ) from e


def _read(data: Callable[[], np.ndarray], shape: tuple[int, ...], kind: Any) -> np.ndarray:
  if kind.name in _PLAIN:
    return data().view(_PLAIN[kind.name]).reshape(shape)
  import gguf  # the same

  rows = data().reshape(math.prod(shape[:-1]), -1)
  made = np.empty((len(rows), shape[-1]), np.float32)
  step = max(1, _AT_ONCE // shape[-1])  # gguf itself holds everything twice
  for i in range(0, len(rows), step):
    made[i : i + step] = gguf.dequantize(rows[i : i + step], kind)
  return made.reshape(shape)


def _less_one(tensor: Tensor) -> np.ndarray:
  return tensor.read().astype(np.float32) - 1
