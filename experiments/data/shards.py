"""Token shards: the files that `experiments.data.prepare` writes and training maps into memory.

    FFFFF-KKKKK.tokens   token ids, raw little-endian uint16 or uint32
    FFFFF-KKKKK.index    int64: for each document, the offset one past its last token
    FFFFF.unit.json      the shards of one group of input files, once they are whole
    plan.json            input files and settings
    manifest.json        all shards in order, totals and a digest; written last

Local files are memory-mapped. Shards behind a URL are read by ranged requests, one a row, so
copying or mounting the bucket is faster where it fits.
"""

import array
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..config import ConfigError
from . import files
from .tokenizer import Tokenizer

MANIFEST = "manifest.json"
PLAN = "plan.json"
FORMAT = 1


class Shard(NamedTuple):
  """What is known of a finished shard."""

  name: str
  documents: int
  tokens: int
  bytes: int  # of UTF-8 text
  sha256: str  # of .tokens
  index_sha256: str


def token_dtype(vocab_size: int) -> str:
  return "<u2" if vocab_size <= 1 << 16 else "<u4"


def write_shard(folder: str, name: str, documents, dtype: str, max_tokens: int) -> Shard | None:
  """Writes documents, pairs (ids with end-of-document, bytes of text), until it has `max_tokens`.

  Takes from the iterator no more than it writes; None if there was nothing left. A shard becomes
  visible whole or not at all.
  """
  ends, text_bytes, tokens = array.array("q"), 0, 0
  digest = hashlib.sha256()
  first = next(documents, None)
  if first is None:
    return None
  with files.open_atomic(files.join(folder, f"{name}.tokens")) as stream:
    document = first
    while document is not None:
      ids, num_bytes = document
      data = ids.astype(dtype).tobytes()
      stream.write(data)
      digest.update(data)
      tokens += len(ids)
      text_bytes += num_bytes
      ends.append(tokens)
      document = next(documents, None) if tokens < max_tokens else None
  index = np.asarray(ends, "<i8").tobytes()
  files.write_atomic(files.join(folder, f"{name}.index"), index)
  index_sha256 = hashlib.sha256(index).hexdigest()
  return Shard(name, len(ends), tokens, text_bytes, digest.hexdigest(), index_sha256)


def is_intact(folder: str, shard: Shard) -> bool:
  """Whether both files of a shard are there, byte for byte."""
  wanted = {".tokens": shard.sha256, ".index": shard.index_sha256}
  return all(
    files.exists(path := files.join(folder, shard.name + suffix)) and files.sha256(path) == digest
    for suffix, digest in wanted.items()
  )


def write_json(path: str, value: Any) -> None:
  files.write_atomic(path, json.dumps(value, indent=1).encode() + b"\n")


def read_json(path: str) -> Any:
  try:
    return json.loads(files.read_bytes(path))
  except ValueError as error:
    raise ConfigError(
      f"{path} is damaged ({error}): delete its folder and prepare again"
    ) from error


def write_manifest(
  folder: str, shards: Sequence[Shard], tokenizer: dict[str, Any], dtype: str
) -> dict[str, Any]:
  """Lists the shards in manifest.json. The digest covers tokens, document ends and tokenizer."""
  content = [tokenizer["fingerprint"], dtype]
  for shard in shards:
    content += [shard.sha256, shard.index_sha256]
  manifest = {
    "format": FORMAT,
    "tokenizer": tokenizer,
    "dtype": dtype,
    "documents": sum(shard.documents for shard in shards),
    "tokens": sum(shard.tokens for shard in shards),
    "bytes": sum(shard.bytes for shard in shards),
    "digest": hashlib.sha256("\n".join(content).encode()).hexdigest(),
    "shards": [shard._asdict() for shard in shards],
  }
  write_json(files.join(folder, MANIFEST), manifest)
  return manifest


class ShardPart(NamedTuple):
  """A shard as part of a TokenStream; its files are opened when first read."""

  stem: str
  num_tokens: int
  documents: int
  dtype: str
  vocab_size: int

  def tokens(self, start: int, stop: int) -> np.ndarray:
    ids = _read(f"{self.stem}.tokens", self.dtype, start, stop)
    if len(ids) != stop - start or ids.max(initial=0) >= self.vocab_size:
      raise ConfigError(
        f"{self.stem}.tokens is damaged between tokens {start} and {stop}: run "
        "experiments.data.prepare again, which repairs it"
      )
    return ids.astype(np.int32)

  def ends(self) -> np.ndarray:
    return _index(f"{self.stem}.index", self.documents)


def open_shards(
  folder: str, tokenizer: Tokenizer, damaged: Callable[[str], None] | None = None
) -> tuple[dict[str, Any], list[ShardPart]]:
  """The manifest of `folder` and its shards, whose sizes are checked if they are local.

  Args:
    damaged: told of shards of another size, which are then met when their rows are read.

  Raises ConfigError if the shards are of another tokenizer, missing, or cut short.
  """
  manifest = read_json(files.join(folder, MANIFEST))
  if manifest["format"] != FORMAT:
    raise ConfigError(f"{folder} is of shard format {manifest['format']}, not {FORMAT}")
  made_with = manifest["tokenizer"]
  if made_with["fingerprint"] != tokenizer.fingerprint:
    raise ConfigError(
      f"{folder} was prepared with another tokenizer than data.tokenizer names: set "
      f"--config.data.tokenizer={made_with['path']} (fingerprint {made_with['fingerprint'][:12]})"
    )
  parts = []
  for record in manifest["shards"]:
    shard = Shard(**record)
    stem = files.join(folder, shard.name)
    parts.append(
      ShardPart(stem, shard.tokens, shard.documents, manifest["dtype"], tokenizer.vocab_size)
    )
    if files.is_local(folder):
      token_size = np.dtype(manifest["dtype"]).itemsize
      try:
        _check_size(f"{stem}.tokens", shard.tokens * token_size)
        _check_size(f"{stem}.index", shard.documents * 8)
      except ConfigError as e:
        if damaged is None:
          raise
        damaged(str(e))
  return manifest, parts


def _check_size(path: str, size: int) -> None:
  found = files.version(path)[0]
  if found != size:
    raise ConfigError(
      f"{path} has {found} bytes, not {size}: run experiments.data.prepare again, which repairs it"
    )


# Thousands of shards would exhaust file descriptors, of which each map holds one.
@functools.lru_cache(maxsize=256)
def _map(path: str, dtype: str) -> np.ndarray:
  return np.memmap(path, dtype, mode="r")


@functools.lru_cache(maxsize=256)
def _fetch(path: str, dtype: str) -> np.ndarray:
  return np.frombuffer(files.read_bytes(path), dtype)


def _read(path: str, dtype: str, start: int, stop: int) -> np.ndarray:
  if files.is_local(path):
    try:
      return _map(path, dtype)[start:stop]
    except (OSError, ValueError) as e:  # ValueError: an empty file, or not whole tokens
      raise ConfigError(f"{path} can't be read: {e}") from e
  size = np.dtype(dtype).itemsize
  return np.frombuffer(files.read_range(path, start * size, stop * size), dtype)


def _index(path: str, documents: int) -> np.ndarray:
  try:
    ends = _map(path, "<i8") if files.is_local(path) else _fetch(path, "<i8")
  except (OSError, ValueError) as e:
    raise ConfigError(f"{path} can't be read: {e}") from e
  if len(ends) != documents:
    raise ConfigError(f"{path} is damaged: run experiments.data.prepare again, which repairs it")
  return ends
