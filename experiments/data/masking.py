"""Masked-language modelling: which tokens of a row are to be told from the rest.

BERT's rule (arXiv 1810.04805, section 3.1): 15 % of the tokens are chosen; of these 80 % become the
mask token, 10 % any token, and 10 % stay. The loss is of the chosen ones alone. The draw depends on
(seed, split, index of the row in the order of reading) and on nothing else, so a row is masked anew
in every epoch, a resumed run goes on exactly, and processes need not agree on anything.

Dimension letters: T positions of a row.
"""

from typing import NamedTuple

import numpy as np

from ..config import ConfigError
from .tokenizer import Tokenizer

CHOSEN, MASKED, REPLACED = 0.15, 0.8, 0.1  # of all tokens; of those chosen
_SPLITS = {"train": 2, "heldout": 3}  # 0 and 1 draw synthetic rows


class Masking(NamedTuple):
  """The ids it takes to mask rows."""

  mask: int  # stands for a token that is hidden
  num_ids: int  # a token put in another's place is drawn from the ids below
  eod: int  # ends documents, never chosen; -1: no id does
  seed: int

  def __call__(self, split: str, index: int, row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The row with its tokens as `targets`, some hidden in `tokens`; `weights` 1 where chosen."""
    tokens_T = row["tokens"]
    rng = np.random.default_rng((self.seed, _SPLITS[split], index))
    u_T = rng.random(tokens_T.shape) / CHOSEN
    other_T = rng.integers(self.num_ids, size=tokens_T.shape, dtype=np.int32)
    chosen_T = (u_T < 1) & (row["segments"] > 0) & (tokens_T != self.eod)
    said_T = np.where(u_T < MASKED + REPLACED, other_T, tokens_T)
    said_T = np.where(u_T < MASKED, np.int32(self.mask), said_T)
    return {
      **row,
      "tokens": np.where(chosen_T, said_T, tokens_T),
      "targets": tokens_T,
      "weights": chosen_T.astype(np.float32),
    }


def make_masking(tokenizer: Tokenizer | None, vocab_size: int, seed: int) -> Masking:
  """The masking for a model of `vocab_size` ids; without a tokenizer, of synthetic tokens.

  Raises:
    ConfigError: the model has no id for the mask token.
  """
  if tokenizer is None:  # such tokens mean nothing, so any id may be the mask
    return Masking(vocab_size - 1, vocab_size, -1, seed)
  if vocab_size <= tokenizer.mask:
    padded = -(-(tokenizer.mask + 1) // 128) * 128
    raise ConfigError(
      f"model.vocab_size={vocab_size} leaves no id for a mask token beside the tokenizer's "
      f"{tokenizer.vocab_size}: set --config.model.vocab_size={padded}"
    )
  return Masking(tokenizer.mask, tokenizer.vocab_size, tokenizer.eod, seed)
