"""Held-out loss of a model: nats a token and bits a byte."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from .step import Batch, EvalSums


class HeldOut(NamedTuple):
  loss: float  # nats a target token
  bits_per_byte: float | None  # of the UTF-8 text the targets stand for; None: for none
  tokens: int


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
