"""Sampling with a KV cache: prompts go in by pieces of one width, tokens come out in short compiled
runs. Three programs in all: empty caches, a piece of prompt, a run of tokens.

B batch, W width of a piece, N tokens of a run, V vocabulary.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layers.cache import KVCache, place_stack
from layers.spec import LayerSpec, ModelSpec, MoeSpec
from layers.transformer import Caches, TransformerLM, init_caches

from .draw import Draw, Numbers, Uses, draw_token, split

_CACHE_STEP = 64  # cache lengths are multiples of this: few lengths, few compilations
_WIDEST = 512  # longer prompts go in by several pieces


class Chunk(NamedTuple):
  """Tokens drawn, each with its log-probability: the log-softmax of the model's own logits,
  whatever it was drawn by. Rows repeat their last token once they have ended."""

  tokens_BN: np.ndarray
  logprobs_BN: np.ndarray


class _State(NamedTuple):
  token_B: jax.Array  # the newest token, not yet in the cache
  logprob_B: jax.Array
  position_B: jax.Array  # where it goes
  ended_B: jax.Array
  seen_BV: jax.Array | None  # tokens in the row, of use to the repetition penalty alone
  caches: Caches


class _Choice(NamedTuple):
  """How tokens are chosen, and what ends a row."""

  numbers: Numbers
  seed: np.ndarray
  first: np.ndarray  # index of the first row, of which draws depend
  ends_N: np.ndarray
  length: np.ndarray


def _draw(logits_BV, seen_BV, position_B, choice: _Choice, uses: Uses):
  """Tokens that go to `position_B`, their log-probabilities, and whether they end their rows.

  What a row draws depends on the seed, its index and the position, not on how many rows there are
  or in how long runs they are drawn.
  """
  key = jax.random.key(choice.seed)
  row_B = choice.first + jnp.arange(position_B.shape[0])
  key_of = lambda row, position: jax.random.fold_in(jax.random.fold_in(key, row), position)
  key_B = jax.vmap(key_of)(row_B, position_B)
  token_B = draw_token(logits_BV, key_B, uses, choice.numbers, seen_BV)
  chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
  logprob_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
  ended_B = jnp.any(token_B[:, None] == choice.ends_N[None], axis=1)
  return token_B, logprob_B, ended_B | (position_B + 1 >= choice.length)


def _remember(seen_BV, token_B):
  if seen_BV is None:
    return None
  return seen_BV | (jnp.arange(seen_BV.shape[1])[None] == token_B[:, None])


# Weights are an argument, though of no use, so that the caches lie on their devices.
@partial(jax.jit, static_argnames=("model", "batch", "length"), keep_unused=True)
def _empty(params, *, model, batch, length) -> Caches:
  caches = init_caches(model.spec, batch, length, model.dtype)
  return tuple(tuple(map(place_stack, segment)) for segment in caches)


@partial(jax.jit, static_argnames=("model", "uses"), donate_argnames=("state",))
def _prefill(params, state: _State, tokens_BW, from_B, to_B, choice, *, model, uses) -> _State:
  """The piece of each row that begins at `from_B`, of which what lies before `to_B` is real; rows
  that end in it draw their first token."""
  width = tokens_BW.shape[1]
  positions_BW = from_B[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
  real_BW = positions_BW < to_B[:, None]
  out = model.apply(
    {"params": params},
    tokens_BW,
    # Padding may reach beyond the context, where learned positions are not there to be read.
    positions_BT=jnp.minimum(positions_BW, model.spec.max_length - 1),
    segments_BT=real_BW.astype(jnp.int32),
    caches=state.caches,
    at_B=jnp.clip(to_B - 1 - from_B, 0, width - 1),
  )
  token_B, logprob_B, ended_B = _draw(out.logits_BTV[:, 0], state.seen_BV, to_B, choice, uses)
  here_B = (from_B < to_B) & (to_B <= from_B + width)
  token_B = jnp.where(here_B, token_B, state.token_B)
  logprob_B = jnp.where(here_B, logprob_B, state.logprob_B)
  seen_BV = _remember(state.seen_BV, jnp.where(here_B, token_B, -1))
  ended_B = jnp.where(here_B, ended_B, state.ended_B)
  return _State(token_B, logprob_B, to_B, ended_B, seen_BV, out.caches)


@partial(jax.jit, static_argnames=("model", "uses", "stride"), donate_argnames=("state",))
def _decode(params, state: _State, count, choice, *, model, uses, stride):
  """At most `count` <= `stride` tokens a row, fewer when all have ended; and how many."""

  def go_on(carry):
    n, state, _, _ = carry
    return (n < count) & ~jnp.all(state.ended_B)

  def one(carry):
    n, old, tokens_NB, logprobs_NB = carry
    out = model.apply(
      {"params": params},
      old.token_B[:, None],
      positions_BT=old.position_B[:, None],
      caches=old.caches,
    )
    goes_on_B = ~old.ended_B
    next_B = old.position_B + goes_on_B
    token_B, logprob_B, ended_B = _draw(out.logits_BTV[:, 0], old.seen_BV, next_B, choice, uses)
    token_B = jnp.where(goes_on_B, token_B, old.token_B)
    logprob_B = jnp.where(goes_on_B, logprob_B, old.logprob_B)
    seen_BV = _remember(old.seen_BV, token_B)
    state = _State(token_B, logprob_B, next_B, old.ended_B | ended_B, seen_BV, out.caches)
    put = lambda all_NB, new_B: jax.lax.dynamic_update_index_in_dim(all_NB, new_B, n, 0)
    return n + 1, state, put(tokens_NB, token_B), put(logprobs_NB, logprob_B)

  batch = state.token_B.shape[0]
  blank = lambda dtype: jnp.zeros((stride, batch), dtype)
  carry = (jnp.int32(0), state, blank(jnp.int32), blank(jnp.float32))
  n, state, tokens_NB, logprobs_NB = jax.lax.while_loop(go_on, one, carry)
  return state, n, tokens_NB.T, logprobs_NB.T


def dropless(spec: ModelSpec) -> ModelSpec:
  """The model with a slot for every choice of an expert, as it decodes: a token alone finds its
  slot, so a prompt must as well. (Where experts choose tokens there is no such thing.)"""

  def layer(old: LayerSpec) -> LayerSpec:
    mlp = old.mlp
    if not isinstance(mlp, MoeSpec) or mlp.router == "expert_choice":
      return old
    mlp = dataclasses.replace(mlp, group_size=None, priority="choice")
    if mlp.router == "no_token_left_behind":  # which slots are open is all that it knows
      mlp = dataclasses.replace(mlp, eval_capacity_factor=float(mlp.num_experts))
    else:
      mlp = dataclasses.replace(mlp, dispatch="dropless")
    return dataclasses.replace(old, mlp=mlp)

  segments = (dataclasses.replace(s, layers=tuple(map(layer, s.layers))) for s in spec.segments)
  return dataclasses.replace(spec, segments=tuple(segments))


class Decoder:
  """Rows of tokens with their caches: `feed` takes prompts and `step` goes on from them.

  A single row keeps what it holds: `feed` runs only what comes after the common beginning.

  Args:
    batch: rows.
    length: tokens of a row at most, prompt and drawn; then it has ended.
    draw: how tokens are chosen.
    seed: of the draws, below 2^32.
    ends: ids after which a row has ended.
    width: of the pieces in which prompts go in.
    stride: tokens of a run at most.

  Raises:
    ValueError: an encoder, or `draw` has a number that means nothing.
  """

  def __init__(
    self,
    model: TransformerLM,
    params: Any,
    *,
    batch: int,
    length: int,
    draw: Draw,
    seed: int = 0,
    ends: Sequence[int] = (),
    width: int = 64,
    stride: int = 16,
  ):
    self.model, self.params = model.clone(spec=dropless(model.spec)), params
    self.length, self.width, self.stride = length, width, stride
    self._uses, numbers = split(draw)
    ends_N = np.asarray(sorted(ends), np.int32)
    whole = lambda x: np.asarray(x, np.int32)
    self._choice = _Choice(numbers, np.asarray(seed, np.uint32), whole(0), ends_N, whole(length))
    self._slots = -(-(length + width) // _CACHE_STEP) * _CACHE_STEP
    self._held: list[int] = []  # the tokens of a single row, the last of them not yet in the cache
    self._state: _State | None = None
    self.batch = batch
    self.reused = 0  # tokens that the last `feed` did not run again

  def feed(self, rows: Sequence[Sequence[int]], first: int = 0) -> Chunk:
    """Run prompts, and draw the first token of each.

    Args:
      first: index of the first row among all that are drawn with the seed.

    Raises:
      ValueError: another number of rows, or one that is empty or too long.
    """
    if len(rows) != self.batch or not all(rows):
      raise ValueError(f"{self.batch} rows of at least one token are needed")
    if (longest := max(map(len, rows))) >= self.length:
      raise ValueError(f"{longest} tokens and one more do not fit a length of {self.length}")
    to_B = np.array([len(row) for row in rows], np.int32)
    self._choice = self._choice._replace(first=np.asarray(first, np.int32))
    caches, reused = self._reuse(list(rows[0]))
    self.reused, start_B = reused, np.full_like(to_B, reused)
    zeros = lambda dtype: np.zeros(self.batch, dtype)
    seen_BV = self._seen(rows) if self._uses.penalty else None
    state = _State(zeros(np.int32), zeros(np.float32), to_B, zeros(bool), seen_BV, caches)
    for first in range(0, int((to_B - start_B).max()), self.width):
      from_B = np.minimum(start_B + first, to_B)
      tokens_BW = np.zeros((self.batch, self.width), np.int32)
      for b, row in enumerate(rows):
        piece = row[from_B[b] : from_B[b] + self.width]
        tokens_BW[b, : len(piece)] = piece
      state = _prefill(self.params, state, tokens_BW, from_B, to_B, self._choice,
                       model=self.model, uses=self._uses)  # fmt: skip
    self._state, self._held = state, list(rows[0])
    return self._hand_over(np.array(state.token_B)[:, None], np.array(state.logprob_B)[:, None])

  def step(self, count: int | None = None) -> Chunk:
    """Go on by `count` tokens, at most and by default `stride`; fewer where all rows have ended."""
    if self._state is None:
      raise ValueError("no prompt was fed")
    count = min(count or self.stride, self.stride)
    state, self._state = self._state, None
    self._state, n, tokens_BN, logprobs_BN = _decode(
      self.params, state, np.int32(count), self._choice,
      model=self.model, uses=self._uses, stride=self.stride,
    )  # fmt: skip
    n = int(n)
    return self._hand_over(np.asarray(tokens_BN)[:, :n], np.asarray(logprobs_BN)[:, :n])

  def _hand_over(self, tokens_BN: np.ndarray, logprobs_BN: np.ndarray) -> Chunk:
    self._held += tokens_BN[0].tolist()
    return Chunk(tokens_BN, logprobs_BN)

  def _reuse(self, row: list[int]) -> tuple[Caches, int]:
    """Caches, and how many tokens of a single row they hold already; the state is given away."""
    state, self._state = self._state, None
    if state is not None and self.batch == 1:
      cached = self._held[:-1]
      common = common_length(cached, row[:-1])
      if common == len(cached) or self._can_go_back(state.caches):
        return state.caches, common
    del state  # not two sets of caches
    empty = _empty(self.params, model=self.model, batch=self.batch, length=self._slots)
    return empty, 0

  def _can_go_back(self, caches: Caches) -> bool:
    """Whether the caches hold every position, so that later ones can be written over."""
    return all(
      isinstance(cache, KVCache) and cache.slots == self._slots
      for segment in caches
      for cache in segment
    )

  def _seen(self, rows) -> np.ndarray:
    seen_BV = np.zeros((self.batch, self.model.spec.vocab_size), bool)
    for seen_V, row in zip(seen_BV, rows, strict=True):
      seen_V[list(row)] = True
    return seen_BV


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
  """Of the beginning that two lists share."""
  shorter = min(len(one), len(other))
  return next((i for i in range(shorter) if one[i] != other[i]), shorter)


def prompt_width(longest: int) -> int:
  """Of pieces for prompts of so many tokens: a power of two, so that there are few."""
  return min(max(16, 1 << (longest - 1).bit_length()), _WIDEST)


def generate(
  model: TransformerLM,
  params: Any,
  prompts: list[list[int]],
  *,
  num_tokens: int,
  draw: Draw,
  seed: int = 0,
  stride: int = 16,
) -> Iterator[np.ndarray]:
  """Continue each prompt; yields int32 arrays [B, up to `stride`] until `num_tokens` are out, the
  first of one token as soon as the prompts are read.

  Args:
    prompts: token ids, at least one each.
    draw: how tokens are chosen, and the number of real token ids.
    stride: tokens a compiled run makes before they are handed over.

  Raises:
    ValueError: no prompt, an empty one, or one that leaves no room for `num_tokens` in the context.
  """
  if not prompts or not all(prompts):
    raise ValueError("a prompt needs at least one token")
  longest, context = max(map(len, prompts)), model.spec.max_length
  if longest + num_tokens > context:
    raise ValueError(f"{longest} + {num_tokens} tokens do not fit the context of {context}")
  decoder = Decoder(
    model, params, batch=len(prompts), length=longest + num_tokens, draw=draw, seed=seed,
    width=prompt_width(longest), stride=stride,
  )  # fmt: skip
  yield decoder.feed(prompts).tokens_BN
  for start in range(1, num_tokens, stride):
    yield decoder.step(num_tokens - start).tokens_BN
