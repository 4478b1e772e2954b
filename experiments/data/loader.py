"""Batches of rows: shuffled, split over processes, read ahead, resumable.

The order is a function of the seed alone. Step s takes rows s B to s B + B of it, each process
those that its devices hold, so any number of processes sees the same global batches, and a
position in the data is one number. It is kept with a fingerprint, as a bare position resumes on
other data without a word. Threads read ahead; worker processes would cost seconds before the
first batch.

Dimension letters: B batch, T positions.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import grain  # 0.2 to 0.4 s after jax and orbax: not worth importing late
import numpy as np

from ..config import ConfigError, DataConfig
from .faults import CarefulRows, RowFault
from .load import Dataset, RowSource

Batch = dict[str, np.ndarray]

# Grain's shuffle takes 32-bit indices and repeats rows beyond that without an error.
_MOST_ROWS = 1 << 32


class Loader(Iterator[Batch]):
  """Iterates over this process's part of every batch; see `make_loader`."""

  def __init__(
    self,
    rows: grain.MapDataset,
    config: DataConfig,
    fingerprint: dict[str, Any],
    local_rows: np.ndarray,
    careful: CarefulRows,
  ):
    self._rows = rows
    self._careful = careful
    self._avoided: list[tuple[int, int]] = []
    self._config = config
    self._fingerprint = fingerprint
    self._local_rows = local_rows
    self._open(0)

  def _open(self, position: int) -> None:
    self._position = position
    part = _LocalRows(self._rows[position:], self._config.batch_size, self._local_rows)
    batches = grain.MapDataset.source(part).batch(len(self._local_rows))
    ahead = self._config.prefetch
    options = grain.ReadOptions(num_threads=min(ahead, 16), prefetch_buffer_size=ahead)
    self._iterator = iter(batches.to_iter_dataset(options))

  def __next__(self) -> Batch:
    for first, end in self._avoided:
      if first <= self._position < end:
        self.close()
        self._open(end)
    batch = next(self._iterator)
    self._position += self._config.batch_size
    return batch

  def avoid(self, windows: Sequence[tuple[int, int]]) -> None:
    """Jump over these positions, [first, end) each, now and ever after."""
    self._avoided = sorted(windows)

  def faults(self) -> list[RowFault]:
    """Rows that this process could not read, at once or at all, since the last call."""
    return self._careful.faults()

  def skip(self, batches: int) -> None:
    """Passes over batches without reading them."""
    position = self._position + batches * self._config.batch_size
    self.close()
    self._open(position)

  def state(self) -> dict[str, Any]:
    """The position after the last batch returned, ready for JSON; the same in every process."""
    return {"position": self._position, "fingerprint": dict(self._fingerprint)}

  def restore(self, state: dict[str, Any]) -> None:
    """Continues after the batch that `state` was taken at; batch size and processes may differ.

    Raises ConfigError, naming the field, if the state is of other data, rows, tokenizer or seed.
    """
    saved = state["fingerprint"]
    for field in sorted(saved.keys() | self._fingerprint.keys()):
      before, now = saved.get(field), self._fingerprint.get(field)
      if before != now:
        raise ConfigError(
          f"the data is not what the checkpoint was trained on: {field} was {before!r} and is "
          f"{now!r}; restore the old setting or start in another work directory"
        )
    self.close()
    self._open(state["position"])

  def close(self) -> None:
    """Ends the reading threads."""
    self._iterator.close()


class _LocalRows:
  """Of every whole batch of `rows`, those that this process loads."""

  def __init__(self, rows: RowSource, batch_size: int, local_rows: np.ndarray):
    self._rows = rows
    self._batch_size = batch_size
    self._local_rows = local_rows

  def __len__(self) -> int:
    return len(self._rows) // self._batch_size * len(self._local_rows)

  def __getitem__(self, row: int) -> Batch:
    batch, place = divmod(row, len(self._local_rows))
    return self._rows[batch * self._batch_size + int(self._local_rows[place])]


class _WholeBatches:
  """Rows followed by as many empty ones (segment 0, weight 0) as fill the last batch."""

  def __init__(self, rows: RowSource, batch_size: int):
    self._rows = rows
    self._num_rows = -(-len(rows) // batch_size) * batch_size

  def __len__(self) -> int:
    return self._num_rows

  def __getitem__(self, row: int) -> Batch:
    if row < len(self._rows):
      return self._rows[row]
    return {name: np.zeros_like(x_T) for name, x_T in self._rows[0].items()}


def make_loader(
  dataset: Dataset,
  config: DataConfig,
  split: Literal["train", "heldout"],
  *,
  local_rows: np.ndarray | None = None,
  epochs: int | None = None,
) -> Loader:
  """Batches of one split: dicts of `tokens`, `targets`, `segments`, `positions`, `weights`.

  `train` is shuffled anew in each of `epochs` passes (None: for ever), a batch may span two of
  them, and rows that fill no batch at the very end are left out. `heldout` is read once in order,
  its last batch filled up with empty rows.

  Args:
    local_rows: the rows of each global batch that this process loads, as
      `mesh.multihost.local_rows` gives them; None is all. Arrays are [len(local_rows), T].

  Raises:
    ConfigError: the data has over 2^32 rows.
  """
  local_rows = np.arange(config.batch_size) if local_rows is None else local_rows
  if split == "train":
    if not len(dataset.train):
      raise ConfigError(f"data.holdout={config.holdout:g} leaves no row to train on")
    if len(dataset.train) > _MOST_ROWS:
      raise ConfigError(
        f"the data has {len(dataset.train)} rows, but at most {_MOST_ROWS} can be shuffled: raise "
        "data.row_length"
      )
    # Grain's epoch e uses seed + e, which would give seeds 0 and 1 all but the same orders.
    seed = int(np.random.SeedSequence(config.seed).generate_state(1)[0])
    careful = CarefulRows(dataset.train, config.row_length, config.on_error)
    rows = grain.MapDataset.source(careful).shuffle(seed=seed).repeat(epochs)
  else:
    careful = CarefulRows(dataset.heldout, config.row_length, config.on_error)
    rows = grain.MapDataset.source(_WholeBatches(careful, config.batch_size))
  if dataset.masking is not None:
    rows = rows.map_with_index(functools.partial(dataset.masking, split))
  fingerprint = {"split": split, **dataset.fingerprint}
  return Loader(rows, config, fingerprint, local_rows, careful)


def restore_loader(
  loader: Loader, position: dict[str, Any], *, allow_other: bool, note: Callable[[str], None]
) -> None:
  """Continue in the data where `position` says; in other data, if allowed, from its start."""
  if allow_other and position["fingerprint"] != loader.state()["fingerprint"]:
    note("the data is not what the checkpoint was trained on: reading it from its start")
  else:
    loader.restore(position)
