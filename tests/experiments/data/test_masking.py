"""Masked tokens: BERT's shares, only among real tokens, the same however rows are read."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from experiments.config import ConfigError, DataConfig
from experiments.data.load import load
from experiments.data.loader import make_loader
from experiments.data.masking import Masking
from experiments.data.rows import Rows
from experiments.data.tokenizer import ByteTokenizer

CONFIG = DataConfig(objective="masked", row_length=64, batch_size=4, holdout=0.001)
MASK, EOD = 257, 256


@pytest.fixture(scope="module")
def dataset():
  return load(CONFIG, 320)


@pytest.fixture
def batches(dataset):
  """The next batches of a new loader, joined: {name: [rows, T]}, and the loader."""
  made = []

  def read(count, split="train", *, data=dataset, config=CONFIG, state=None, **kwargs):
    made.append(make_loader(data, config, split, **kwargs))
    if state is not None:
      made[-1].restore(state)
    found = list(itertools.islice(made[-1], count))
    return {name: np.concatenate([b[name] for b in found]) for name in found[0]}, made[-1]

  yield read
  for loader in made:
    loader.close()


def assert_same(one, two):
  assert one.keys() == two.keys()
  for name, x in one.items():
    np.testing.assert_array_equal(x, two[name], err_msg=name)


def test_shares_are_those_of_the_definition():
  """15 % chosen; of these 80 % the mask, 10 % anything, 10 % themselves. Five standard deviations.

  Real tokens are all 7, so that of 1000 ids a random one is another but once in a thousand.
  """
  row = {
    "tokens": np.full(200, 7, np.int32),
    "segments": np.repeat([1, 2, 0], (120, 50, 30)).astype(np.int32),
    "positions": np.arange(200, dtype=np.int32),
  }
  row["tokens"][[119, 169]] = 5  # ends of documents
  masking = Masking(mask=3, num_ids=1000, eod=5, seed=0)
  rows = [masking("train", index, row) for index in range(2000)]
  stack = lambda name: np.stack([r[name] for r in rows])
  tokens, weights = stack("tokens"), stack("weights")
  real = (row["segments"] > 0) & (row["tokens"] != 5)
  chosen = weights > 0
  assert set(np.unique(weights)) == {0, 1} and weights.dtype == np.float32
  assert tokens.dtype == np.int32
  assert not chosen[:, ~real].any()
  before = np.tile(row["tokens"], (2000, 1))
  np.testing.assert_array_equal(tokens[~chosen], before[~chosen])
  np.testing.assert_array_equal(stack("targets"), before)

  def near(count, total, share):
    assert abs(count - total * share) < 5 * np.sqrt(total * share * (1 - share)), (count, total)

  total = chosen[:, real].size
  near(chosen.sum(), total, 0.15)
  near(chosen[:, :60].sum(), 2000 * 60, 0.15)  # wherever in the row
  said, n = tokens[chosen], chosen.sum()
  near((said == 3).sum(), n, 0.8)
  near((said == 7).sum(), n, 0.1)
  others = said[(said != 3) & (said != 7)]
  near(len(others), n, 0.1)
  assert others.min() < 20 and others.max() > 980 and abs(others.mean() - 500) < 20
  neighbours = (chosen[:, 1:118] & chosen[:, :117]).sum()
  near(neighbours, 2000 * 117, 0.15**2)  # one says nothing of the next


def test_a_row_is_masked_token_by_token_by_its_own_draw(dataset, batches):
  read, _ = batches(3)
  unmasked, _ = batches(3, data=dataset._replace(masking=None))
  for index, tokens in enumerate(unmasked["tokens"]):
    rng = np.random.default_rng((0, 2, index))
    draws, ids = rng.random(64), rng.integers(257, size=64, dtype=np.int32)
    for t, (u, token) in enumerate(zip(draws, tokens, strict=True)):
      chosen = u < 0.15 and token != EOD
      said = MASK if u < 0.12 else ids[t] if u < 0.135 else token
      assert read["weights"][index, t] == chosen
      assert read["tokens"][index, t] == (said if chosen else token)
      assert read["targets"][index, t] == token


def test_next_tokens_are_left_alone(dataset):
  plain = load(dataclasses.replace(CONFIG, objective="next_token"), 320)
  assert plain.masking is None
  assert plain.fingerprint == dataset.fingerprint


def test_a_resumed_run_goes_on_with_the_same_masks(batches):
  whole, _ = batches(10)
  first, loader = batches(6)
  rest, _ = batches(4, state=json.loads(json.dumps(loader.state())))
  assert_same(whole, {k: np.concatenate([first[k], rest[k]]) for k in whole})
  wider = dataclasses.replace(CONFIG, batch_size=8)
  rest, _ = batches(2, config=wider, state=loader.state())
  assert_same({name: x[24:] for name, x in whole.items()}, rest)


def test_processes_read_the_same_global_batches(batches):
  whole, _ = batches(3)
  halves = [batches(3, local_rows=np.array(part))[0] for part in ([0, 1], [2, 3])]
  join = lambda name: np.concatenate([h[name].reshape(3, 2, 64) for h in halves], 1).reshape(12, 64)
  assert_same(whole, {name: join(name) for name in whole})


def test_every_epoch_masks_anew_and_every_evaluation_the_same(dataset, batches):
  few = dataset._replace(train=Rows(dataset.train.stream.window(0, 8 * 64 + 1), 64))
  read, _ = batches(4, data=few)
  epochs = [{name: x[start : start + 8] for name, x in read.items()} for start in (0, 8)]
  rows = [np.lexsort(epoch["targets"].T) for epoch in epochs]
  one, two = (
    {name: x[order] for name, x in e.items()} for e, order in zip(epochs, rows, strict=True)
  )
  np.testing.assert_array_equal(one["targets"], two["targets"])
  assert (one["weights"] != two["weights"]).any(1).all()
  assert_same(batches(2, "heldout")[0], batches(2, "heldout")[0])


def test_splits_and_seeds_draw_apart(dataset):
  row = dataset.train[0]
  other = load(dataclasses.replace(CONFIG, seed=1), 320).masking
  draws = [m(split, 0, row) for m in (dataset.masking, other) for split in ("train", "heldout")]
  for one, two in itertools.combinations(draws, 2):
    assert (one["weights"] != two["weights"]).any()


def test_padding_of_the_held_out_rows_is_never_chosen(dataset, batches):
  read, _ = batches(2, "heldout")
  padding = read["segments"] == 0
  assert padding.any() and read["weights"].sum() > 0
  assert not read["weights"][padding].any()


def test_the_mask_token():
  """A tokenizer's own, else the first id beyond its vocabulary, for which the model needs room."""
  assert ByteTokenizer.mask == 257
  assert load(CONFIG, 258).masking[:3] == (257, 257, 256)
  with pytest.raises(
    ConfigError, match=r"vocab_size=257 leaves no id for a mask .* set .*vocab_size=384"
  ):
    load(CONFIG, 257)
  synthetic = load(dataclasses.replace(CONFIG, source="synthetic"), 50)
  assert synthetic.masking[:3] == (49, 50, -1)
