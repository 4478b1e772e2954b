"""Documents end to end, cut into rows of equal length (concat-and-chunk packing).

Every document ends with an end-of-document token, which its last token predicts. A row may hold
parts of several documents; `segments` keeps attention inside one, `positions` counts from its
start, and the one target that can't be known, the first token of the next document, has weight 0.

Dimension letters: T positions of a row.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ..config import ConfigError


class Part(Protocol):
  """A run of whole documents: in memory, or in a file."""

  @property
  def num_tokens(self) -> int: ...

  def tokens(self, start: int, stop: int) -> np.ndarray: ...  # int32

  def ends(self) -> np.ndarray: ...  # int64, sorted: one past each document's last token


class ArrayPart(NamedTuple):
  """Documents in memory."""

  ids: np.ndarray  # int32
  document_ends: np.ndarray  # int64

  @classmethod
  def from_documents(cls, documents: Iterable[np.ndarray], eod: int) -> "ArrayPart":
    """Appends `eod` to each document's ids and joins them."""
    parts = [np.append(ids, np.int32(eod)) for ids in documents]
    lengths = [len(part) for part in parts]
    return cls(np.concatenate(parts).astype(np.int32), np.cumsum(lengths, dtype=np.int64))

  @property
  def num_tokens(self) -> int:
    return len(self.ids)

  def tokens(self, start: int, stop: int) -> np.ndarray:
    return self.ids[start:stop]

  def ends(self) -> np.ndarray:
    return self.document_ends


class TokenStream:
  """Parts joined into one line of tokens, or a window of it. Offsets count from the window."""

  def __init__(self, parts: Sequence[Part], start: int = 0, stop: int | None = None):
    self._parts = list(parts)
    self._bounds = np.cumsum([0] + [part.num_tokens for part in parts], dtype=np.int64)
    self._start = start
    self._stop = int(self._bounds[-1]) if stop is None else stop

  def __len__(self) -> int:
    return self._stop - self._start

  def window(self, start: int, stop: int) -> "TokenStream":
    return TokenStream(self._parts, self._start + start, self._start + stop)

  def _pieces(self, start: int, stop: int):
    """Parts that overlap [start, stop): part, its offset in the line, first and last within it."""
    start, stop = start + self._start, stop + self._start
    first = int(np.searchsorted(self._bounds, start, side="right")) - 1
    last = int(np.searchsorted(self._bounds, stop, side="left"))
    for part, low, high in zip(
      self._parts[first:last],
      self._bounds[first:last],
      self._bounds[first + 1 : last + 1],
      strict=True,
    ):
      yield part, int(low), int(max(start, low) - low), int(min(stop, high) - low)

  def read(self, start: int, stop: int) -> np.ndarray:
    """int32 tokens [start, stop)."""
    found = [part.tokens(first, last) for part, _, first, last in self._pieces(start, stop)]
    return found[0] if len(found) == 1 else np.concatenate(found)

  def ends(self, start: int, stop: int) -> np.ndarray:
    """int64 offsets e, start < e <= stop, such that a document ends with token e - 1."""
    found = []
    for part, offset, first, last in self._pieces(start, stop):
      ends = part.ends()
      low, high = np.searchsorted(ends, [first, last], side="right")
      found.append(np.asarray(ends[low:high]) + (offset - self._start))
    return found[0] if len(found) == 1 else np.concatenate(found)


class Rows:
  """Random access to rows: row r reads tokens [r T, r T + T], the last one as a target only.

  A row is a dict of arrays [T]: `tokens`, `targets`, `segments` (from 1 in each row; 0 is
  padding), `positions` (from 0 at a document's start, or at the row's start for a document begun
  in an earlier row), all int32, and `weights` (float32: 1 where the target counts in the loss).
  With `pad`, the tokens that don't fill a row make a last one, padded; else they are left out.
  """

  def __init__(self, stream: TokenStream, row_length: int, *, pad: bool = False):
    self.stream = stream
    self.row_length = row_length
    targets = len(stream) - 1
    self._num_rows = max(0, -(-targets // row_length) if pad else targets // row_length)

  def __len__(self) -> int:
    return self._num_rows

  def __getitem__(self, row: int) -> dict[str, np.ndarray]:
    T = self.row_length
    start = row * T
    stop = min(start + T, len(self.stream) - 1)  # of the inputs
    ids = self.stream.read(start, stop + 1)
    ends = self.stream.ends(start, stop) - start  # document ends in 1..stop - start
    offsets = np.arange(stop - start)
    document = np.searchsorted(ends, offsets, side="right")  # how many ended up to here
    starts = np.append(np.int64(0), ends)
    weights = np.ones(stop - start, np.float32)
    weights[ends - 1] = 0  # input: end of a document; target: start of the next
    columns = {
      "tokens": ids[:-1],
      "targets": ids[1:],
      "segments": (document + 1).astype(np.int32),
      "positions": (offsets - starts[document]).astype(np.int32),
      "weights": weights,
    }
    if padding := T - (stop - start):
      columns = {name: np.pad(x_T, (0, padding)) for name, x_T in columns.items()}
    return columns


class SyntheticRows:
  """Random tokens, the same for the same seed, split and row on any machine."""

  def __init__(self, num_rows: int, row_length: int, vocab_size: int, seed: tuple[int, ...]):
    self._num_rows = num_rows
    self.row_length = row_length
    self._vocab_size = vocab_size
    self._seed = seed

  def __len__(self) -> int:
    return self._num_rows

  def __getitem__(self, row: int) -> dict[str, np.ndarray]:
    T = self.row_length
    ids = np.random.default_rng((*self._seed, row)).integers(
      self._vocab_size, size=T + 1, dtype=np.int32
    )
    return {
      "tokens": ids[:-1],
      "targets": ids[1:],
      "segments": np.ones(T, np.int32),
      "positions": np.arange(T, dtype=np.int32),
      "weights": np.ones(T, np.float32),
    }


def split_holdout(
  stream: TokenStream, fraction: float, *, row_length: int, batch_size: int
) -> tuple[TokenStream, TokenStream]:
  """The stream without its last `fraction` of tokens, and that part, which may begin mid-document.

  Raises ConfigError if the first can't fill one batch of rows, or the second one row; where the
  second is all there is, if it has nothing to predict.
  """
  if fraction == 1 and len(stream) > 1:
    return stream.window(0, 0), stream
  heldout = int(len(stream) * fraction)
  train = len(stream) - heldout
  need_train, need_heldout = batch_size * row_length + 1, row_length + 1
  if train < need_train or heldout < need_heldout:
    if fraction == 1:
      raise ConfigError(f"the data has {len(stream)} tokens: there is none to predict")
    need = max(math.ceil(need_train / (1 - fraction)), math.ceil(need_heldout / fraction))
    raise ConfigError(
      f"the data has {len(stream)} tokens, but a batch of {batch_size} rows of {row_length} and a "
      f"held-out row at data.holdout={fraction} need {need} (a token is a byte of text for "
      "the byte tokenizer): give more text, or lower data.batch_size or data.row_length"
    )
  return stream.window(0, train), stream.window(train, len(stream))
