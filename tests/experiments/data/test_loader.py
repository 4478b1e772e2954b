"""Order, resumption and splitting over processes, on the numbers that a step would see."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from experiments.config import ConfigError, DataConfig
from experiments.data.load import Dataset
from experiments.data.loader import make_loader
from experiments.data.rows import ArrayPart, Rows, TokenStream

CONFIG = DataConfig(row_length=8, batch_size=4)
FINGERPRINT = {"source": "test", "digest": "d1", "row_length": 8, "seed": 0}


@pytest.fixture(scope="module")
def dataset():
  """30 training rows whose first token is the row's number, and 6 held-out rows, one cut short."""
  train = np.repeat(np.arange(31, dtype=np.int32), 8)[: 30 * 8 + 1]
  heldout = np.arange(5 * 8 + 4, dtype=np.int32)

  def rows(ids, pad):
    ends = np.asarray([len(ids)], np.int64)
    return Rows(TokenStream([ArrayPart(ids, ends)]), 8, pad=pad)

  return Dataset(rows(train, False), rows(heldout, True), None, FINGERPRINT)


@pytest.fixture
def make(dataset):
  """make_loader, closed at the end."""
  made = []

  def make(split="train", config=CONFIG, data=dataset, **kwargs):
    made.append(make_loader(data, config, split, **kwargs))
    return made[-1]

  yield make
  for loader in made:
    loader.close()


def numbers(loader, batches):
  """The row numbers of the next batches."""
  return [b["tokens"][:, 0].tolist() for b in itertools.islice(loader, batches)]


def flat(batches):
  return [row for batch in batches for row in batch]


def test_same_seed_same_order_other_seed_another(make):
  first = numbers(make(), 20)
  assert numbers(make(), 20) == first
  orders = [numbers(make(config=dataclasses.replace(CONFIG, seed=s)), 20) for s in range(4)]
  for one, two in itertools.combinations([flat(order) for order in orders], 2):
    assert one != two
    assert one[30:60] != two[:30]  # nor is the second epoch of one seed the first of another
    assert one[:30] != two[30:60]


def test_each_epoch_has_every_row_once_in_another_order(make):
  order = flat(numbers(make(), 30))  # 120 rows: four epochs
  epochs = [order[i : i + 30] for i in range(0, 120, 30)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(30))
  assert len({tuple(epoch) for epoch in epochs}) == 4


def test_epochs_end(make):
  assert len(list(make(epochs=2))) == 15
  assert len(list(make(epochs=1))) == 7  # 30 rows: the last two fill no batch


@pytest.mark.parametrize("prefetch", [0, 3])
def test_batches_are_rows_stacked(make, dataset, prefetch):
  batch = next(make(config=dataclasses.replace(CONFIG, prefetch=prefetch)))
  assert batch.keys() == dataset.train[0].keys()
  for i, r in enumerate(batch["tokens"][:, 0].tolist()):
    for name, x_T in dataset.train[r].items():
      assert batch[name].dtype == x_T.dtype
      np.testing.assert_array_equal(batch[name][i], x_T)


@pytest.mark.parametrize("stop", [0, 1, 7, 8, 19])
def test_restored_state_continues_exactly(make, stop):
  whole = numbers(make(), 30)
  loader = make()
  assert numbers(loader, stop) == whole[:stop]
  state = json.loads(json.dumps(loader.state()))
  assert state == loader.state()
  fresh = make()
  numbers(fresh, 3)  # restoring discards what the iterator had read ahead
  fresh.restore(state)
  assert numbers(fresh, 30 - stop) == whole[stop:]
  assert fresh.state()["position"] == 120


def test_any_number_of_processes_sees_the_same_global_batches(make):
  whole = numbers(make(), 12)
  for count in (2, 4):
    loaders = [make(local_rows=part) for part in np.split(np.arange(4), count)]
    parts = [numbers(loader, 12) for loader in loaders]
    assert [flat(step) for step in zip(*parts, strict=True)] == whole
    assert all(loader.state() == loaders[0].state() for loader in loaders)


def test_state_carries_over_to_other_processes_and_batch_sizes(make):
  order = flat(numbers(make(), 12))
  loader = make()
  numbers(loader, 5)  # 20 rows
  other = make(config=dataclasses.replace(CONFIG, batch_size=6), local_rows=np.arange(3, 6))
  other.restore(loader.state())
  assert numbers(other, 4) == [order[i + 3 : i + 6] for i in range(20, 44, 6)]


def test_skip_passes_over_batches(make):
  whole = numbers(make(), 12)
  loader = make()
  assert numbers(loader, 2) == whole[:2]
  loader.skip(5)
  assert loader.state()["position"] == 28
  assert numbers(loader, 5) == whole[7:]


@pytest.mark.parametrize(
  ("field", "value"), [("seed", 1), ("digest", "d2"), ("row_length", 16), ("source", "text")]
)
def test_state_of_other_data_is_refused_by_field(make, dataset, field, value):
  other = dataset._replace(fingerprint={**FINGERPRINT, field: value})
  state = make(data=other).state()
  loader = make()
  with pytest.raises(ConfigError, match=f"{field} was {value!r} and is {FINGERPRINT[field]!r}"):
    loader.restore(state)
  assert numbers(loader, 2) == numbers(make(), 2)  # a refusal leaves the loader as it was


def test_state_of_the_other_split_or_with_other_fields_is_refused(make, dataset):
  with pytest.raises(ConfigError, match="split was 'heldout' and is 'train'"):
    make().restore(make("heldout").state())
  more = dataset._replace(fingerprint={**FINGERPRINT, "mixture": "a"})
  with pytest.raises(ConfigError, match="mixture was 'a' and is None"):
    make().restore(make(data=more).state())


@pytest.mark.parametrize("count", [1, 2])
def test_heldout_is_read_once_in_order_and_padded(make, dataset, count):
  loaders = [make("heldout", local_rows=part) for part in np.split(np.arange(4), count)]
  steps = list(zip(*loaders, strict=True))
  assert len(steps) == 2  # 6 rows in batches of 4
  rows = {
    name: np.concatenate([part[name] for step in steps for part in step]) for name in steps[0][0]
  }
  assert rows["tokens"].shape == (8, 8)
  for r in range(6):
    for name, x_T in dataset.heldout[r].items():
      np.testing.assert_array_equal(rows[name][r], x_T)
  assert not rows["segments"][6:].any()
  assert not rows["weights"][6:].any()
  assert rows["weights"].sum() == 5 * 8 + 3  # every token after the first is a target once


def test_rows_of_a_process_need_not_be_neighbours(make):
  whole = numbers(make(), 3)
  assert numbers(make(local_rows=np.array([0, 3])), 3) == [[step[0], step[3]] for step in whole]


def test_more_rows_than_the_shuffle_can_index_are_refused(make, dataset):
  class Many:
    def __len__(self):
      return (1 << 32) + 1

    def __getitem__(self, row):
      return dataset.train[row % 30]

  with pytest.raises(ConfigError, match="4294967297 rows, but at most 4294967296"):
    make(data=dataset._replace(train=Many()))


@pytest.mark.parametrize("field", ["seed", "prefetch"])
def test_negative_settings_are_refused(field):
  with pytest.raises(ConfigError, match=f"data.{field}=-1"):
    DataConfig(**{field: -1})
