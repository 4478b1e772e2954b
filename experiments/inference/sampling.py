"""Sampling with a KV cache: one prefill, then tokens in short compiled runs.

B batch, T prompt positions, V vocabulary.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layers.spec import ModelSpec, MoeSpec
from layers.transformer import Caches, TransformerLM, init_caches

_CACHE_STEP = 64  # cache lengths are multiples of this: few lengths, few compilations


class Draw(NamedTuple):
  """How to choose a token."""

  vocab_size: int  # ids from here up are the padding of the table
  temperature: float = 0.8  # 0 is greedy
  top_k: int = 0  # 0 is all


class _Decoding(NamedTuple):
  token_B: jax.Array  # the newest token, not yet in the cache
  position_B: jax.Array  # where it goes
  caches: Caches
  key: jax.Array


def sample_token(
  logits_BV: jax.Array,
  key: jax.Array,
  *,
  temperature: jax.Array | float,
  top_k: int,
  vocab_size: int,
) -> jax.Array:
  """One token a row, int32 [B]. Temperature 0 is greedy; `top_k` 0 keeps all; ids from `vocab_size`
  up, the padding of the table, are never drawn."""
  V = logits_BV.shape[-1]
  logits_BV = jnp.where(jnp.expand_dims(jnp.arange(V) < vocab_size, 0), logits_BV, -jnp.inf)
  if 0 < top_k < V:
    lowest_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV < lowest_B1, -jnp.inf, logits_BV)
  drawn_B = jax.random.categorical(key, logits_BV / jnp.maximum(temperature, 1e-6), axis=-1)
  greedy_B = jnp.argmax(logits_BV, axis=-1)
  return jnp.where(temperature == 0, greedy_B, drawn_B).astype(jnp.int32)


@partial(jax.jit, static_argnames=("model", "length", "top_k", "vocab_size"))
def _prefill(
  params, tokens_BT, lengths_B, key, temperature, *, model, length, top_k, vocab_size
) -> _Decoding:
  B, T = tokens_BT.shape
  # Padding may reach beyond the context, where learned positions are not there to be read.
  positions_T = jnp.minimum(jnp.arange(T, dtype=jnp.int32), model.spec.max_length - 1)
  valid_BT = jnp.expand_dims(jnp.arange(T), 0) < jnp.expand_dims(lengths_B, 1)
  out = model.apply(
    {"params": params},
    tokens_BT,
    positions_BT=jnp.broadcast_to(positions_T, (B, T)),
    segments_BT=valid_BT.astype(jnp.int32),
    caches=init_caches(model.spec, B, length, model.dtype),
    at_B=lengths_B - 1,
  )
  key, now = jax.random.split(key)
  token_B = sample_token(
    out.logits_BTV[:, 0], now, temperature=temperature, top_k=top_k, vocab_size=vocab_size
  )
  return _Decoding(token_B, lengths_B, out.caches, key)


@partial(jax.jit, static_argnames=("model", "count", "top_k", "vocab_size"), donate_argnums=(1,))
def _decode(
  params, state: _Decoding, temperature, *, model, count, top_k, vocab_size
) -> tuple[_Decoding, jax.Array]:
  def one(state: _Decoding, _):
    out = model.apply(
      {"params": params},
      state.token_B[:, None],
      positions_BT=state.position_B[:, None],
      caches=state.caches,
    )
    key, now = jax.random.split(state.key)
    token_B = sample_token(
      out.logits_BTV[:, 0], now, temperature=temperature, top_k=top_k, vocab_size=vocab_size
    )
    return _Decoding(token_B, state.position_B + 1, out.caches, key), state.token_B

  state, tokens_NB = jax.lax.scan(one, state, length=count)
  return state, tokens_NB.T


def _prompt_width(spec: ModelSpec, longest: int) -> int:
  """To which length prompts are padded: few lengths, so few compilations; a power of two, or a
  multiple of the routing groups that are shorter."""
  width = max(16, 1 << (longest - 1).bit_length())
  groups = {layer.mlp.group_size for layer in spec.layers if isinstance(layer.mlp, MoeSpec)}
  while short := [group for group in groups if group and group < width and width % group]:
    width = -(-width // math.lcm(*short)) * math.lcm(*short)
  return width


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
  width = _prompt_width(model.spec, longest)
  tokens_BT = np.zeros((len(prompts), width), np.int32)
  for row, prompt in zip(tokens_BT, prompts, strict=True):
    row[: len(prompt)] = prompt
  length = -(-(width + num_tokens + stride) // _CACHE_STEP) * _CACHE_STEP
  which = {"model": model, "top_k": draw.top_k, "vocab_size": draw.vocab_size}
  heat = np.float32(draw.temperature)
  key = jax.random.key(seed)
  state = _prefill(params, tokens_BT, lengths_B, key, heat, length=length, **which)
  for start in range(0, num_tokens, stride):
    state, tokens_BN = _decode(params, state, heat, count=stride, **which)
    yield np.asarray(tokens_BN)[:, : num_tokens - start]
