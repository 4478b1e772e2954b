"""From a DataConfig to rows: finds the text, its tokenizer and its held-out part."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..config import ConfigError, DataConfig
from . import files
from .rows import ArrayPart, Rows, SyntheticRows, TokenStream, split_holdout
from .shards import MANIFEST, open_shards
from .sources import pydoc_documents, text_documents
from .tokenizer import HOW_TO_MAKE, Tokenizer, check_vocab, load_tokenizer

_SYNTHETIC_ROWS = 1 << 16
_SYNTHETIC_HELDOUT = 64


class RowSource(Protocol):
  def __len__(self) -> int: ...

  def __getitem__(self, row: int) -> dict[str, np.ndarray]: ...


class Dataset(NamedTuple):
  """Two splits of rows. `train.stream` and `heldout.stream` are their tokens, unless synthetic."""

  train: RowSource
  heldout: RowSource
  tokenizer: Tokenizer | None  # None: synthetic tokens stand for no text
  fingerprint: dict[str, Any]  # of all that decides which tokens are in which row
  masking: Callable[..., dict[str, np.ndarray]] | None = None  # (split, index, row), see `masking`
  skipped: tuple[str, ...] = ()  # what data.on_error=skip left out, and why
  note: str = ""  # of the examples, if rows are made of such
  template: str = ""  # and how to ask as they do, as a chat template


def load(config: DataConfig, vocab_size: int, tokenizer: Tokenizer | None = None) -> Dataset:
  """Opens the data that `config` names, for a model of `vocab_size` ids.

  Text is read and tokenized here, in memory; text too long for that belongs into shards.

  Args:
    tokenizer: in place of the config's.

  Raises:
    ConfigError: data or tokenizer are missing (with the commands that make them), unreadable,
      too short, of another tokenizer, or need more ids than the model has.
  """
  dataset = _open(config, vocab_size, tokenizer)
  if config.objective == "next_token":
    return dataset
  # Of use to encoders only.
  from .masking import make_masking

  return dataset._replace(masking=make_masking(dataset.tokenizer, vocab_size, config.seed))


def require_tokenizer(config: DataConfig) -> None:
  """Raises ConfigError if `config` has text and names no tokenizer for it."""
  if config.source != "synthetic" and not config.tokenizer:
    raise ConfigError(
      "data.tokenizer names none: set --config.data.tokenizer=FOLDER, or start from --weights=..., "
      "which bring theirs"
    )


def _open(config: DataConfig, vocab_size: int, tokenizer: Tokenizer | None) -> Dataset:
  source = _resolve_source(config)
  if source == "synthetic":
    return _synthetic(config, vocab_size)
  if tokenizer is None:
    require_tokenizer(config)
  tokenizer = load_tokenizer(config.tokenizer) if tokenizer is None else tokenizer
  check_vocab(tokenizer, vocab_size)
  if source == "instructions":
    # Of use to fine-tuning only.
    from .instructions import load_instructions

    found = load_instructions(config, tokenizer)
    return Dataset(
      found.train, found.heldout, tokenizer, found.fingerprint, skipped=found.skipped,
      note=found.note, template=found.template,
    )  # fmt: skip
  skip, skipped = config.on_error == "skip", []
  if source == "shards":
    told = skipped.append if skip else None
    manifest, parts = open_shards(config.path, tokenizer, told)
    stream, digest = TokenStream(parts), manifest["digest"]
  else:
    pydoc = source == "pydoc"
    told = (lambda e: skipped.append(str(e))) if skip else None
    documents = pydoc_documents() if pydoc else text_documents(config.path, config.text_field, told)
    stream, digest = _tokenize(documents, tokenizer)
  train, heldout = split_holdout(
    stream, config.holdout, row_length=config.row_length, batch_size=config.batch_size
  )
  return Dataset(
    Rows(train, config.row_length),
    Rows(heldout, config.row_length, pad=True),
    tokenizer,
    _fingerprint(config, source, digest, len(stream), tokenizer.fingerprint),
    skipped=tuple(skipped),
  )


def _resolve_source(config: DataConfig) -> str:
  """`config.source`, or for a path with the default source, what is found there."""
  if config.source == "synthetic" or (config.source == "pydoc" and not config.path):
    return config.source
  commands = HOW_TO_MAKE.format(tokenizer="TOKENIZER", shards=config.path or "SHARDS")
  if config.source == "instructions":
    if not config.path:
      raise ConfigError(
        "data.source=instructions needs data.path: a JSONL file of instruction, input, output"
      )
    return config.source
  if not config.path:
    raise ConfigError(f"data.source={config.source} needs data.path; for shards {commands}")
  if config.source != "text" and files.exists(files.join(config.path, MANIFEST)):
    return "shards"
  if config.source != "shards" and files.matches(config.path):
    return "text"
  if files.is_folder(config.path):
    raise ConfigError(
      f"data.path={config.path} is a folder without {MANIFEST}: give its text files as a glob "
      f"({files.join(config.path, '*.jsonl')}), or run experiments.data.prepare to its end"
    )
  raise ConfigError(f"there are no shards and no text at data.path={config.path}: {commands}")


def _tokenize(documents: Iterable[str], tokenizer: Tokenizer) -> tuple[TokenStream, str]:
  ids = (tokenizer.encode(text) for text in documents)
  part = ArrayPart.from_documents(ids, tokenizer.eod)
  digest = hashlib.sha256(part.ids.astype("<i4").tobytes())
  digest.update(part.document_ends.astype("<i8").tobytes())
  return TokenStream([part]), digest.hexdigest()


def _synthetic(config: DataConfig, vocab_size: int) -> Dataset:
  def rows(num_rows: int, split: int) -> SyntheticRows:
    return SyntheticRows(num_rows, config.row_length, vocab_size, (config.seed, split))

  return Dataset(
    rows(_SYNTHETIC_ROWS, 0),
    rows(_SYNTHETIC_HELDOUT, 1),
    None,
    _fingerprint(
      config, "synthetic", "", _SYNTHETIC_ROWS * config.row_length, f"{vocab_size} random ids"
    ),
  )


def _fingerprint(
  config: DataConfig, source: str, digest: str, tokens: int, tokenizer: str
) -> dict[str, Any]:
  return {
    "source": source,
    "digest": digest,
    "tokens": tokens,
    "tokenizer": tokenizer,
    "row_length": config.row_length,
    "holdout": config.holdout,
    "seed": config.seed,
  }
