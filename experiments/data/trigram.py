"""An interpolated n-gram model over bytes: the loss that any language model must beat.

Witten-Bell smoothing (Witten and Bell 1991): with c(h) the count of context h, d(h) the number of
different symbols seen after it and h' the context without its oldest symbol,

  P(w | h) = (c(h w) + d(h) P(w | h')) / (c(h) + d(h)),   uniform below the empty context.
"""

import numpy as np


def ngram_bits_per_byte(
  train: np.ndarray, heldout: np.ndarray, *, order: int = 3, eod: int = 256
) -> float:
  """Bits a byte that a model of `order` symbols (`order` - 1 of context) needs for `heldout`.

  Both are byte tokens in their order, with `eod` (the largest id) after each document: `train`
  must come right before `heldout`, as it gives the first contexts. Scored are the targets that
  count in training: all but the first token and each document's first; ends of documents cost
  bits and are no bytes. `order` may be up to 7.
  """
  ids = np.concatenate([train[-order + 1 :] if order > 1 else train[:0], heldout]).astype(np.int64)
  targets = np.arange(len(ids) - len(heldout) + 1, len(ids))
  targets = targets[ids[targets - 1] != eod]
  probability = np.full(len(targets), 1.0 / (eod + 1))
  for length in range(order):
    probability = _interpolate(train.astype(np.int64), ids, targets, length, eod + 1, probability)
  return float(-np.log2(probability).sum() / np.count_nonzero(ids[targets] != eod))


def _interpolate(
  train: np.ndarray,
  ids: np.ndarray,
  targets: np.ndarray,
  length: int,
  base: int,
  shorter: np.ndarray,
) -> np.ndarray:
  """P(target | its last `length` symbols), given that for one symbol less."""
  grams, gram_counts = np.unique(_codes(train, length + 1, base), return_counts=True)
  contexts, first = np.unique(grams // base, return_index=True)
  context_counts = np.add.reduceat(gram_counts, first)
  distinct = np.diff(np.append(first, len(grams)))
  wanted = _codes(ids, length + 1, base)[targets - length]
  gram_count = _look_up(grams, gram_counts, wanted)
  context_count = _look_up(contexts, context_counts, wanted // base)
  kinds = _look_up(contexts, distinct, wanted // base)
  seen = np.maximum(context_count + kinds, 1)
  return np.where(kinds > 0, (gram_count + kinds * shorter) / seen, shorter)


def _codes(ids: np.ndarray, length: int, base: int) -> np.ndarray:
  """Every run of `length` symbols as one integer; the last symbol is its last digit."""
  codes = np.zeros(len(ids) - length + 1, np.int64)
  for offset in range(length):
    codes = codes * base + ids[offset : offset + len(codes)]
  return codes


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
  found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
  return np.where(keys[found] == wanted, values[found], 0)
