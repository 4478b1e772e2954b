"""How requests become rows: the cuts of the harness's documentation, by hand."""

import pytest

from experiments.evaluation.requests import Encoder, Row, cut, pair, windows


def words(text):
  """Ids of letters from 1; `xy` is one token; a blank belongs to the letter after it."""
  ids, at = [], 0
  while at < len(text):
    step = 2 if text[at] == " " and at + 1 < len(text) else 1
    step = 2 if text[at : at + 2] == "xy" else step
    ids.append({"xy": 100}.get(text[at : at + step], sum(map(ord, text[at : at + step]))))
    at += step
  return ids


PLAIN, BEGUN = Encoder(words, None, 0), Encoder(words, 7, 7)
A, B, BLANK = ord("a"), ord("b"), ord(" ")


def test_windows_are_those_of_the_harness():
  """Its example: ten tokens, a context of four."""
  found = windows(range(10), -1, 4)
  inputs = [list(row.tokens[:-1]) for row in found]
  predicted = [list(row.tokens[len(row.tokens) - row.count :]) for row in found]
  assert inputs == [[-1, 0, 1, 2], [3, 4, 5, 6], [5, 6, 7, 8]]
  assert predicted == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
  assert windows([], -1, 4) == []
  assert windows([5], -1, 4) == [Row([-1, 5], 1)]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9])
def test_windows_predict_each_token_once(length):
  found = windows(range(length), -1, 4)
  predicted = [i for row in found for i in row.tokens[len(row.tokens) - row.count :]]
  assert predicted == list(range(length))
  assert all(len(row.tokens) <= 5 for row in found)


@pytest.mark.parametrize(("context", "continuation", "row"), [
  ("a", " b", Row([A, BLANK + B], 1)),
  ("a ", "b", Row([A, BLANK + B], 1)),  # the blank belongs to what follows
  ("a  ", "b", Row([A, 2 * BLANK, B], 2)),
  ("", "ab", Row([0, A, B], 2)),
  ("  ", "b", Row([0, 2 * BLANK, B], 2)),
  ("ax", "y", Row([A, ord("x"), ord("y")], 1)),  # as one text the context would be all of it
  ("a", "xyb", Row([A, 100, B], 2)),
])  # fmt: skip
def test_pairs(context, continuation, row):
  found = pair(PLAIN, context, continuation)
  assert (list(found.tokens), found.count) == (list(row.tokens), row.count)


def test_pairs_of_tokenizers_that_begin_texts():
  assert pair(BEGUN, "a", "b") == Row([7, A, B], 1)
  assert pair(BEGUN, "", "b") == Row([7, B], 1)
  spelled = BEGUN._replace(encode=lambda text: [7, B])  # the beginning is there already
  assert pair(spelled, "", "<s>b") == Row([7, B], 1)


def test_what_is_too_long_loses_its_beginning():
  row = Row([1, 2, 3, 4, 5, 6], 2)
  assert cut(row, 5) == (row, 0)
  assert cut(row, 3) == (Row([3, 4, 5, 6], 2), 2)
