"""Sampling with a KV cache: one prefill, then tokens in short compiled runs.

B batch, T prompt positions, V vocabulary.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layers.transformer import Caches, TransformerLM, init_caches


class _Decoding(NamedTuple):
  token_B: jax.Array  # the newest token, not yet in the cache
  position_B: jax.Array  # where it goes
  caches: Caches
  key: jax.Array


def sample_token(
  logits_BV: jax.Array, key: jax.Array, *, temperature: float, top_k: int, vocab_size: int
) -> jax.Array:
  """One token a row. Temperature 0 is greedy; `top_k` 0 keeps all; ids from `vocab_size` up, the
  padding of the table, are never drawn."""
  V = logits_BV.shape[-1]
  logits_BV = jnp.where(jnp.expand_dims(jnp.arange(V) < vocab_size, 0), logits_BV, -jnp.inf)
  if temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  if 0 < top_k < V:
    lowest_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV < lowest_B1, -jnp.inf, logits_BV)
  return jax.random.categorical(key, logits_BV / temperature, axis=-1).astype(jnp.int32)


@partial(jax.jit, static_argnames=("model", "length", "draw"))
def _prefill(params, tokens_BT, lengths_B, key, *, model, length, draw) -> _Decoding:
  B, T = tokens_BT.shape
  valid_BT = jnp.expand_dims(jnp.arange(T), 0) < jnp.expand_dims(lengths_B, 1)
  out = model.apply(
    {"params": params},
    tokens_BT,
    segments_BT=valid_BT.astype(jnp.int32),
    caches=init_caches(model.spec, B, length, model.dtype),
    at_B=lengths_B - 1,
  )
  key, first = jax.random.split(key)
  return _Decoding(draw(out.logits_BTV[:, 0], first), lengths_B, out.caches, key)


@partial(jax.jit, static_argnames=("model", "count", "draw"), donate_argnums=(1,))
def _decode(params, state: _Decoding, *, model, count, draw) -> tuple[_Decoding, jax.Array]:
  def one(state: _Decoding, _):
    out = model.apply(
      {"params": params},
      state.token_B[:, None],
      positions_BT=state.position_B[:, None],
      caches=state.caches,
    )
    key, now = jax.random.split(state.key)
    token_B = draw(out.logits_BTV[:, 0], now)
    return _Decoding(token_B, state.position_B + 1, out.caches, key), state.token_B

  state, tokens_NB = jax.lax.scan(one, state, length=count)
  return state, tokens_NB.T


class Draw(NamedTuple):
  """How to choose a token; hashable, so that it is part of the compiled program."""

  vocab_size: int  # ids from here up are the padding of the table
  temperature: float = 0.8
  top_k: int = 0

  def __call__(self, logits_BV: jax.Array, key: jax.Array) -> jax.Array:
    return sample_token(logits_BV, key, **self._asdict())


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
  """Continue each prompt; yields int32 arrays [B, up to `stride`] until `num_tokens` are out.

  Args:
    prompts: token ids, at least one each.
    draw: temperature, top-k and the number of real token ids.
    stride: tokens a compiled run makes before they are handed over.

  Raises:
    ValueError: no prompt, an empty one, or one that leaves no room for `num_tokens` in the context.
  """
  if not prompts or not all(prompts):
    raise ValueError("a prompt needs at least one token")
  longest, context = max(map(len, prompts)), model.spec.max_length
  if longest + num_tokens > context:
    raise ValueError(f"{longest} + {num_tokens} tokens do not fit the context of {context}")
  lengths_B = np.array([len(p) for p in prompts], np.int32)
  width = max(16, 1 << int(lengths_B.max() - 1).bit_length())  # few shapes, few compilations
  # Learned positions end at the context: beyond it padding would read what is not there.
  width = max(min(width, model.spec.max_length), int(lengths_B.max()))
  tokens_BT = np.zeros((len(prompts), width), np.int32)
  for row, prompt in zip(tokens_BT, prompts, strict=True):
    row[: len(prompt)] = prompt
  length = width + -(-num_tokens // stride) * stride
  key = jax.random.key(seed)
  state = _prefill(params, tokens_BT, lengths_B, key, model=model, length=length, draw=draw)
  for start in range(0, num_tokens, stride):
    state, tokens_BN = _decode(params, state, model=model, count=stride, draw=draw)
    yield np.asarray(tokens_BN)[:, : num_tokens - start]
