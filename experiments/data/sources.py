"""Documents, as strings: the language reference inside CPython, plain text, JSONL; gzip or not."""

import contextlib
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pydoc_data.topics import topics
from typing import IO, Any

from ..config import ConfigError
from . import files


def pydoc_documents() -> Iterator[str]:
  """The topics of Python's language reference (about 0.47 MB in 3.11), in the order of keys.

  The text comes with the interpreter, so it differs a little between Python versions.
  """
  for name in sorted(topics):
    yield topics[name]


# Told of a file or line that is passed over for what is wrong with it.
Skipped = Callable[[ConfigError], None]


def text_documents(
  pattern: str, text_field: str = "text", skipped: Skipped | None = None
) -> Iterator[str]:
  """Documents of every file that a path or a glob names, files in sorted order.

  Args:
    skipped: told of damaged lines and files, which are left out (a file, from there on).

  Raises ConfigError as `file_documents` does, and if no file matches.
  """
  for path in files.find(pattern):
    try:
      yield from file_documents(path, text_field, skipped)
    except ConfigError as e:
      if skipped is None:
        raise
      skipped(e)


def file_documents(
  path: str, text_field: str = "text", skipped: Skipped | None = None
) -> Iterator[str]:
  """Documents of one file. `.jsonl` is one a line (blank lines hold none), else one a file.

  A name that ends in `.gz` is decompressed. Nothing is normalised: the UTF-8 bytes of the text
  are those of the file.

  Raises:
    ConfigError: the file is missing, unreadable, empty, damaged gzip, not UTF-8 or holds NUL
      bytes (file and offset), or a line is not JSON or lacks the text field (file and line).
  """
  with files.open_read(path) as raw, _decompressed(path, raw) as stream:
    if path.removesuffix(".gz").endswith(".jsonl"):
      documents = _jsonl(path, stream, text_field, skipped)
    else:
      documents = iter([_decode(stream.read(), path)])
    empty = True
    for text in documents:
      empty = empty and not text
      yield text
  if empty:
    raise ConfigError(f"{path} is empty: there is no text to learn from")


@contextlib.contextmanager
def _decompressed(path: str, raw: IO[bytes]) -> Iterator[IO[bytes]]:
  if not path.endswith(".gz"):
    yield raw
    return
  try:
    with gzip.open(raw) as stream:
      yield stream
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise ConfigError(f"{path} is not whole gzip: {error}") from error


def _decode(data: bytes, where: str) -> str:
  zero = data.find(b"\0")
  if zero >= 0:
    raise ConfigError(f"{where} is binary, not text: NUL at byte {zero}")
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    raise ConfigError(f"{where} is not UTF-8 text: byte {error.start} can't be decoded") from error


def _jsonl(path: str, stream: IO[bytes], text_field: str, skipped: Skipped | None) -> Iterator[str]:
  for where, line in _lines(path, stream):
    try:
      text = _record(where, line, text_field)
    except ConfigError as e:
      if skipped is None:
        raise
      skipped(e)
      continue
    yield text


def _lines(path: str, stream: IO[bytes]) -> Iterator[tuple[str, bytes]]:
  """Those that are not blank, each with the words that say where it is."""
  for number, line in enumerate(stream, start=1):
    if line.strip():
      yield f"{path} line {number}", line.rstrip()


def records(path: str, skipped: Skipped | None = None) -> Iterator[tuple[str, Any]]:
  """(where it is, value) of every line of a JSONL file, or of every item of a `.json` list.

  Raises:
    ConfigError: as `file_documents`.
  """
  with files.open_read(path) as raw, _decompressed(path, raw) as stream:
    if path.removesuffix(".gz").endswith(".json"):
      items = _parse(path, stream.read())
      if not isinstance(items, list):
        raise ConfigError(f"{path} is no list, but {type(items).__name__}: JSONL ends in .jsonl")
      yield from ((f"{path} item {i}", item) for i, item in enumerate(items, start=1))
      return
    for where, line in _lines(path, stream):
      try:
        value = _parse(where, line)
      except ConfigError as e:
        if skipped is None:
          raise
        skipped(e)
        continue
      yield where, value


def _parse(where: str, data: bytes) -> Any:
  try:
    return json.loads(_decode(data, where))
  except json.JSONDecodeError as error:
    raise ConfigError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error


def _record(where: str, line: bytes, text_field: str) -> str:
  record = _parse(where, line)
  if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
    present = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
    raise ConfigError(
      f"{where} has no text in field {text_field!r} (it has {present}): name it by text_field"
    )
  text = record[text_field]
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair; UTF-8 can't
    raise ConfigError(f"{where} holds a lone surrogate, which is no character") from error
  return text
