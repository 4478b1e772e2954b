"""The n-gram baseline against dictionaries, and its figures on the built-in text."""

import numpy as np
import pytest

from experiments.config import DataConfig
from experiments.data.load import load
from experiments.data.trigram import ngram_bits_per_byte
from tests.oracles.ngram import bits_per_byte


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_matches_dictionaries(order):
  rng = np.random.default_rng(order)
  ids = np.where(rng.random(900) < 0.05, 9, rng.geometric(0.3, 900) % 7).astype(np.int32)
  train, heldout = ids[:700], ids[700:]
  expected = bits_per_byte(train.tolist(), heldout.tolist(), order, eod=9)
  assert ngram_bits_per_byte(train, heldout, order=order, eod=9) == pytest.approx(expected, 1e-9)


def test_uniform_bytes_cost_about_eight_bits():
  ids = np.random.default_rng(0).integers(0, 256, 60_000, dtype=np.int32)
  assert ngram_bits_per_byte(ids[:50_000], ids[50_000:], order=1) == pytest.approx(8, abs=0.02)


def test_built_in_text():
  """Published character trigrams on English lie above 2 bits; here code and markup help."""
  dataset = load(DataConfig(), 257)
  train, heldout = (s.read(0, len(s)) for s in (dataset.train.stream, dataset.heldout.stream))
  assert 2.2 < ngram_bits_per_byte(train, heldout, order=3) < 2.5
  assert 1.7 < ngram_bits_per_byte(train, heldout, order=4) < 2.0
  scored = sum(dataset.heldout[r]["weights"].sum() for r in range(len(dataset.heldout)))
  starts = np.count_nonzero(heldout[:-1] == 256)
  assert scored == len(heldout) - 1 - starts  # what the function says it scores
