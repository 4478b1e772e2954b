"""Held-out loss of a model: nats a token and bits a byte."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from ..data.load import Dataset
from ..data.loader import make_loader
from .setup import Setup, batch_rows
from .step import Batch, EvalSums, make_eval_step
from .stop import Stop


class HeldOut(NamedTuple):
  loss: float  # nats a target token
  bits_per_byte: float | None  # of the UTF-8 text the targets stand for; None: for none
  tokens: int

  def row(self) -> dict[str, Any]:
    """For `metrics.jsonl`."""
    return {"heldout_loss": self.loss, "heldout_bits_per_byte": self.bits_per_byte}

  def describe(self, target: str) -> str:
    """In a line; `target` is what the loss is the mean over."""
    if self.bits_per_byte is None:
      return f"{self.loss:.3f} nats a {target}"
    return f"{self.bits_per_byte:.3f} bits a byte"


def evaluate(
  eval_step: Callable[[Any, Batch], EvalSums],
  params: Any,
  batches: Iterable[dict[str, np.ndarray]],
  place: Callable[[dict[str, np.ndarray]], Batch],
) -> HeldOut:
  """Sum over all batches, then divide once.

  Args:
    batches: host batches of this process.
    place: puts a host batch on the mesh.
  """
  sums: list[EvalSums] = []
  for batch in batches:
    sums.append(eval_step(params, place(batch)))
    if len(sums) > 2:
      jax.block_until_ready(sums[-3])  # bounds what is in flight
  nll, tokens, num_bytes = (sum(float(getattr(s, name)) for s in sums) for name in EvalSums._fields)
  bits = nll / math.log(2) / num_bytes if num_bytes else None
  return HeldOut(nll / max(tokens, 1), bits, int(tokens))


def make_held_out_step(setup: Setup, dataset: Dataset):
  """The jitted evaluation step; only next tokens of a text stand for bytes."""
  tokenizer = dataset.tokenizer if setup.config.data.objective == "next_token" else None
  lengths_V = np.zeros(0, np.int32) if tokenizer is None else tokenizer.byte_lengths_V
  return jax.jit(make_eval_step(setup.model, lengths_V))


def held_out(
  setup: Setup, dataset: Dataset, eval_step, params: Any, place, stop: Stop | None = None
) -> HeldOut | None:
  """Held-out loss over the evaluation split, or its first `eval.batches` batches.

  None when `stop` was set before the end: part of a split is not comparable.
  """
  stop = Stop() if stop is None else stop
  data = setup.config.data
  loader = make_loader(dataset, data, "heldout", local_rows=batch_rows(setup))
  with contextlib.closing(loader):
    batches = itertools.islice(loader, setup.config.eval.batches)
    whole = itertools.takewhile(lambda _: not stop.asked(), batches)
    result = evaluate(eval_step, params, whole, place)
  return result if stop.by is None else None
