"""Log-likelihoods of tokens after others, in batches of few shapes.

B batch, T positions, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layers.spec import MoeSpec
from layers.transformer import TransformerLM
from mesh.multihost import host_batch_to_global
from mesh.rules import assign, spec_for

from ..config import ConfigError
from ..inference.sampling import dropless
from ..training.setup import Setup

_SHORTEST = 16
_LOGITS = 1 << 27  # of a batch and device at most: 512 MB in float32


class Row(NamedTuple):
  """Tokens of which the last `count` are scored, given those before; never the first."""

  tokens: Sequence[int]
  count: int


class Score(NamedTuple):
  log_likelihood: float  # nats, summed
  greedy: bool  # each scored token is the likeliest after those before it


class Scorer:
  """Scores rows with a model on its mesh; use it inside `use_mesh`.

  Experts take every token that chooses them, as they do in generation, so that a score does not
  depend on what else is in the batch.

  Args:
    vocab_size: ids from here up, the padding of the table, are never the likeliest.

  Raises:
    ConfigError: tokens of the model see later ones.
  """

  def __init__(self, setup: Setup, params: Any, vocab_size: int):
    spec = dropless(setup.config.model)
    routers = {layer.mlp.router for layer in spec.layers if isinstance(layer.mlp, MoeSpec)}
    if not spec.causal or "expert_choice" in routers:
      raise ConfigError(
        f"{setup.config.name} reads later tokens: what it says of a token is no likelihood given "
        "those before it, so it can't do tasks"
      )
    self._model = setup.model.clone(spec=spec)
    self._params, self._vocab_size, self._mesh = params, vocab_size, setup.mesh
    self._placed = spec_for(("act_batch", "act_seq"), setup.rules, setup.mesh)
    of_rows, of_positions = assign(("act_batch", "act_seq"), setup.rules, setup.mesh.shape)
    ways = lambda axes: math.prod(setup.mesh.shape[a] for a in axes)
    self._shards = ways(of_rows)
    self._cut = 2 * ways(of_positions)  # see `layers.context.zigzag`
    self._most = max(1, setup.config.data.batch_size // self._shards)
    self.context = spec.max_length

  def rows(self, width: int, count: int) -> int:
    """Of each batch of this width for `count` rows in all: as the config says, less where there are
    not so many or their logits would be too many."""
    room = _LOGITS // (width * self._model.spec.vocab_size)
    return self._shards * max(1, min(self._most, room, -(-count // self._shards)))

  def width(self, length: int) -> int:
    """To which rows of so many tokens are padded: few widths, so few compilations."""
    power = max(_SHORTEST, 1 << (length - 1).bit_length())
    width = power * 3 // 4 if power >= 512 and length <= power * 3 // 4 else power
    return math.lcm(width, self._cut)

  def score(
    self, rows: Sequence[Row], done: Callable[[int], None] = lambda count: None
  ) -> list[Score]:
    """A score for each row, which has at most `context` + 1 tokens.

    Args:
      done: told how many rows each batch scored.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens))  # memory: largest first
    scores: dict[int, Score] = {}
    while order:
      width = self.width(len(rows[order[0]].tokens) - 1)
      shape = (self.rows(width, len(rows)), width)
      here, order = order[: shape[0]], order[shape[0] :]
      scores |= zip(here, self._batch([rows[i] for i in here], shape), strict=True)
      done(len(here))
    return [scores[i] for i in range(len(rows))]

  def _batch(self, rows: list[Row], shape: tuple[int, int]) -> list[Score]:
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segments")}
    for b, row in enumerate(rows):
      n = len(row.tokens) - 1
      batch["tokens"][b, :n], batch["targets"][b, :n] = row.tokens[:-1], row.tokens[1:]
      batch["segments"][b, :n] = 1
    # Padding may reach beyond the context, where learned positions are not there to be read.
    positions_T = np.minimum(np.arange(shape[1], dtype=np.int32), self.context - 1)
    batch["positions"] = np.broadcast_to(positions_T, shape)
    placed = host_batch_to_global(batch, self._mesh, self._placed)
    found = _score(self._params, placed, model=self._model, vocab_size=self._vocab_size)
    log_p_BT, likeliest_BT = map(np.asarray, found)
    scored = [slice(len(row.tokens) - 1 - row.count, len(row.tokens) - 1) for row in rows]
    return [
      Score(float(log_p_BT[b, part].sum(dtype=np.float64)), bool(likeliest_BT[b, part].all()))
      for b, part in enumerate(scored)
    ]


@partial(jax.jit, static_argnames=("model", "vocab_size"))
def _score(
  params: Any, batch: dict[str, jax.Array], *, model: TransformerLM, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
  """Of each target its log-probability, and whether it is the likeliest."""
  logits_BTV = model.apply(
    {"params": params},
    batch["tokens"],
    positions_BT=batch["positions"],
    segments_BT=batch["segments"],
  ).logits_BTV
  ids_V = jnp.arange(logits_BTV.shape[-1])
  targets_BT = batch["targets"]
  at_target_BTV = jnp.expand_dims(ids_V, (0, 1)) == targets_BT[..., None]
  # A sum, not a gather: the vocabulary may lie on several devices.
  target_BT = jnp.sum(jnp.where(at_target_BTV, logits_BTV, 0), axis=-1)
  real_BTV = jnp.expand_dims(ids_V < vocab_size, (0, 1))
  best_BT = jnp.argmax(jnp.where(real_BTV, logits_BTV, -jnp.inf), axis=-1)
  return target_BT - jax.nn.logsumexp(logits_BTV, axis=-1), best_BT == targets_BT
