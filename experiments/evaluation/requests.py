"""Requests of the harness as rows of tokens, cut as its model for `transformers` cuts them.

A text that stands alone begins with the tokenizer's first token, if it has one that it puts there.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..data.tokenizer import Tokenizer
from .scoring import Row


class Documents:
  """A tokenizer as rows of documents need it: each text begins with its token, if there is one that
  begins texts, and special tokens that a model leaves out are not counted."""

  def __init__(self, tokenizer: Tokenizer, begin: int | None, vocab_size: int):
    self._tokenizer = tokenizer
    self._begin = np.array([] if begin is None else [begin], np.int32)
    self.vocab_size = min(tokenizer.vocab_size, vocab_size)
    self.byte_lengths_V = tokenizer.byte_lengths_V[: self.vocab_size]

  def __getattr__(self, name: str):
    return getattr(self._tokenizer, name)

  def encode(self, text: str) -> np.ndarray:
    return np.concatenate([self._begin, self._tokenizer.encode(text)])


class Encoder(NamedTuple):
  """Text to ids."""

  encode: Callable[[str], Sequence[int]]  # without special tokens
  begin: int | None  # what the tokenizer puts before every text
  prefix: int  # what a text without context is given: its beginning or end token

  def text(self, text: str) -> list[int]:
    ids = [int(i) for i in self.encode(text)]
    return ids if self.begin is None else [self.begin, *ids]


def pair(encoder: Encoder, context: str, continuation: str) -> Row:
  """The tokens of a context and its continuation, which are scored.

  Blanks at the end of the context belong to the continuation, since tokens begin with them. Both
  are encoded as one text; the continuation is what goes on after as many tokens as the context has
  alone. If it has none of its own (its first letters join the last token) it is encoded alone.
  """
  blanks = len(context) - len(context.rstrip())
  context, continuation = (
    context[: len(context) - blanks],
    context[len(context) - blanks :] + (continuation),
  )
  if not context:
    ids = [int(i) for i in encoder.encode(continuation)]
    ids = ids if ids[:1] == [encoder.prefix] else [encoder.prefix, *ids]
    return Row(ids, len(ids) - 1)
  before, whole = encoder.text(context), encoder.text(context + continuation)
  if len(whole) <= len(before):
    whole = [*before, *map(int, encoder.encode(continuation))]
  return Row(whole, len(whole) - len(before))


def cut(row: Row, context: int) -> tuple[Row, int]:
  """The row without what is too long for the context, at its beginning; and how much that was."""
  over = max(0, len(row.tokens) - (context + 1))
  return Row(row.tokens[over:], row.count), over


def windows(ids: Sequence[int], prefix: int, context: int) -> list[Row]:
  """Rows that score each id once, after as many of those before it as the context holds.

  The first begins with `prefix`. The last reaches back as far as it can, and scores what is left.
  """
  line = [prefix, *ids]
  starts = range(0, len(ids), context)
  stops = [min(start + context, len(ids)) for start in starts]
  return [
    Row(line[max(0, stop - context) : stop + 1], stop - start)
    for start, stop in zip(starts, stops, strict=True)
  ]
