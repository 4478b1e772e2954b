"""Packing against a plain-Python oracle, over one part, many parts and windows."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from experiments.config import ConfigError
from experiments.data.rows import ArrayPart, Rows, SyntheticRows, TokenStream, split_holdout
from tests.oracles.packing import pack

EOD = 256
DTYPES = dict.fromkeys(("tokens", "targets", "segments", "positions"), np.int32)
DTYPES["weights"] = np.float32


def stream_of(documents, num_parts=1):
  """The documents in order, in `num_parts` parts of about equal numbers of documents."""
  chunks = [c for c in np.array_split(np.arange(len(documents)), num_parts) if len(c)]
  return TokenStream(
    [
      ArrayPart.from_documents([np.asarray(documents[i], np.int32) for i in chunk], EOD)
      for chunk in chunks
    ]
  )


def check_rows(rows, expected):
  assert len(rows) == len(expected)
  for r, row in enumerate(expected):
    found = rows[r]
    assert found.keys() == row.keys()
    for name, values in row.items():
      assert found[name].dtype == DTYPES[name]
      np.testing.assert_array_equal(found[name], values, err_msg=f"row {r} {name}")


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(
  lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12),
  T=st.integers(2, 8),
  num_parts=st.integers(1, 4),
  pad=st.booleans(),
)
def test_rows_match_the_oracle(lengths, T, num_parts, pad):
  rng = np.random.default_rng(len(lengths))
  documents = [rng.integers(0, 256, n).tolist() for n in lengths]
  check_rows(Rows(stream_of(documents, num_parts), T, pad=pad), pack(documents, EOD, T, pad))


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(data=st.data(), num_parts=st.integers(1, 3))
def test_windows_read_what_a_list_would(data, num_parts):
  documents = [[10 * d + i for i in range(d % 4)] for d in range(7)]
  line, ends = [], []
  for ids in documents:
    line += [*ids, EOD]
    ends.append(len(line))
  bounds = st.lists(st.integers(0, len(line)), min_size=2, max_size=2, unique=True).map(sorted)
  low, high = data.draw(bounds)
  window = stream_of(documents, num_parts).window(low, high)
  inner = st.lists(st.integers(0, high - low), min_size=2, max_size=2, unique=True).map(sorted)
  start, stop = data.draw(inner)
  assert len(window) == high - low
  assert window.read(start, stop).tolist() == line[low:high][start:stop]
  wanted = [e - low for e in ends if start < e - low <= stop]
  assert window.ends(start, stop).tolist() == wanted


def test_document_longer_than_rows_restarts_positions_and_loses_no_target():
  rows = Rows(stream_of([range(11)]), 4, pad=False)
  assert len(rows) == 2  # 12 tokens with the end: 11 targets
  np.testing.assert_array_equal(rows[1]["positions"], [0, 1, 2, 3])
  np.testing.assert_array_equal(rows[1]["tokens"], [4, 5, 6, 7])
  np.testing.assert_array_equal(rows[1]["targets"], [5, 6, 7, 8])
  assert rows[1]["weights"].all()


def test_end_of_document_counts_and_next_document_start_does_not():
  (row,) = [Rows(stream_of([[1, 2], [3, 4]]), 5, pad=False)[0]]
  np.testing.assert_array_equal(row["targets"], [2, EOD, 3, 4, EOD])
  np.testing.assert_array_equal(row["weights"], [1, 1, 0, 1, 1])
  np.testing.assert_array_equal(row["segments"], [1, 1, 1, 2, 2])


def test_holdout_is_the_last_part_and_keeps_every_token():
  stream = stream_of([range(99), range(99)])
  train, heldout = split_holdout(stream, 0.25, row_length=10, batch_size=3)
  assert (len(train), len(heldout)) == (150, 50)
  joined = np.concatenate([train.read(0, 150), heldout.read(0, 50)])
  np.testing.assert_array_equal(joined, stream.read(0, 200))
  assert heldout.ends(0, 50).tolist() == [50]
  assert train.ends(0, 150).tolist() == [100]


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
def test_too_little_data_is_refused_with_what_is_enough(fraction):
  def split(tokens):
    stream = stream_of([np.zeros(tokens - 1, np.int32)])
    return split_holdout(stream, fraction, row_length=16, batch_size=4)

  with pytest.raises(ConfigError, match="has 30 tokens") as caught:
    split(30)
  need = int(str(caught.value).split("need ")[1].split()[0])
  train, heldout = split(need)
  assert len(Rows(train, 16)) >= 4
  assert len(Rows(heldout, 16)) >= 1
  with pytest.raises(ConfigError, match=f"need {need} "):
    split(need - 12)


def test_synthetic_rows_depend_on_seed_and_row_only():
  rows, again = (SyntheticRows(8, 6, 50, (3, 0)) for _ in range(2))
  for r in (5, 0):
    np.testing.assert_array_equal(rows[r]["tokens"], again[r]["tokens"])
    np.testing.assert_array_equal(rows[r]["tokens"][1:], rows[r]["targets"][:-1])
    assert {name: x.dtype for name, x in rows[r].items()} == DTYPES
  assert not np.array_equal(rows[0]["tokens"], rows[1]["tokens"])
  assert not np.array_equal(rows[0]["tokens"], SyntheticRows(8, 6, 50, (3, 1))[0]["tokens"])
  drawn = np.concatenate([SyntheticRows(99, 64, 5, (0, 0))[r]["tokens"] for r in range(9)])
  assert set(drawn.tolist()) == set(range(5))
