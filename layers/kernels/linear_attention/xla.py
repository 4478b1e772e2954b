"""Linear attention on any platform: a scan over chunks, in each of them a few matrix products.

The forward pass leaves the state before each chunk for the backward pass, which goes through the
chunks in reverse and computes each again: memory for one state a chunk and none a token.

Letters: B batch, T positions, N heads, H head size of queries and keys, U that of values, C tokens
of a chunk. What is in chunks leads with their number.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from .chunk import attend

f32 = jnp.float32


class Tokens(NamedTuple):
  """[B, T, N, ...] each, or in chunks."""

  q: jax.Array
  k: jax.Array
  v: jax.Array
  decay: jax.Array | None
  beta: jax.Array | None


class _Static(NamedTuple):
  scale: float
  chunk: int
  dtype: Any  # of the result


def linear_attention(
  q_BTNH, k_BTNH, v_BTNU, decay, beta_BTN, run_BT, state_BNHU, *, scale, chunk, dtype
) -> tuple[jax.Array, jax.Array]:
  """Arguments as in the package, where None stands for a default; `run_BT` as in reference."""
  tokens = Tokens(q_BTNH, k_BTNH, v_BTNU, decay, beta_BTN)
  static = _Static(scale, min(chunk, 1 << (q_BTNH.shape[1] - 1).bit_length()), dtype)
  o_BTNU, state_BNUH = _chunked(static, tokens, run_BT, state_BNHU.mT)
  return o_BTNU, state_BNUH.mT


def chunks_of(x: jax.Array, chunk: int) -> jax.Array:
  """[B, T, N, ...] padded with zeros to [B, N, T / C, C, ...]; [B, T, N] to [B, N, T / C, 1, C]."""
  B, T, N = x.shape[:3]
  x = jnp.pad(x, [(0, 0), (0, -T % chunk)] + [(0, 0)] * (x.ndim - 2))
  x = jnp.moveaxis(x, 2, 1).reshape(B, N, -1, chunk, *x.shape[3:])
  return x[..., None, :] if x.ndim == 4 else x


def runs_of(run_BT: jax.Array, chunk: int) -> jax.Array:
  """[B, T / C, 1, C] in float32: 0 is the document that the chunk before ends with."""
  B, T = run_BT.shape
  run_BT = jnp.pad(run_BT, [(0, 0), (0, -T % chunk)], mode="edge")
  run = run_BT.reshape(B, -1, 1, chunk)
  before = jnp.pad(run[:, :-1, :, -1:], [(0, 0), (1, 0), (0, 0), (0, 0)])
  return (run - before).astype(f32)


def unchunked(x: jax.Array, like: jax.Array) -> jax.Array:
  """Inverse of `chunks_of` for an array of the shape of `like`, but for the last dim."""
  B, T, N = like.shape[:3]
  if like.ndim == 3:
    return jnp.moveaxis(x.reshape(B, N, -1), 1, 2)[:, :T]
  return jnp.moveaxis(x.reshape(B, N, -1, x.shape[-1]), 1, 2)[:, :T]


def one_chunk(static, tokens: Tokens, run, state):
  """`attend` for the chunks of one head: (o, next state)."""
  return attend(*tokens, run, state, scale=static.scale)


def _all_heads(function):
  """Of arguments [B, N, ...] (the second, the documents, [B, ...])."""
  return jax.vmap(jax.vmap(function, (0, None, 0, 0)), (0, 0, 0, 0))


def _split(static, tokens, run_BT):
  ahead = lambda x: jnp.moveaxis(chunks_of(x, static.chunk), 2, 0)
  run = None if run_BT is None else jnp.moveaxis(runs_of(run_BT, static.chunk), 1, 0)
  return jax.tree.map(ahead, tokens), run


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(static, tokens, run_BT, state_BNUH):
  o, state_BNUH, _ = _forward(static, tokens, run_BT, state_BNUH)
  return o, state_BNUH


def _forward(static, tokens, run_BT, state_BNUH):
  """(o, last state, the state before each chunk)."""
  each = _all_heads(lambda tokens, run, state, _: one_chunk(static, tokens, run, state))

  def step(state, inputs):
    tokens, run = inputs
    o, after = each(tokens, run, state, None)
    return after, (o.astype(static.dtype), state)

  state_BNUH, (o, states) = jax.lax.scan(step, state_BNUH, _split(static, tokens, run_BT))
  o_BTNU = checkpoint_name(unchunked(jnp.moveaxis(o, 0, 2), tokens.v), "attention_out")
  return o_BTNU, state_BNUH, checkpoint_name(states, "attention_state")


def _chunked_fwd(static, tokens, run_BT, state_BNUH):
  o_BTNU, state_BNUH, states = _forward(static, tokens, run_BT, state_BNUH)
  return (o_BTNU, state_BNUH), (tokens, run_BT, states)


def _chunked_bwd(static, saved, d):
  tokens, run_BT, states = saved
  do_BTNU, dstate_BNUH = d

  def one(tokens, run, state, d):
    _, pull = jax.vjp(lambda tokens, state: one_chunk(static, tokens, run, state), tokens, state)
    return pull(d)

  each = _all_heads(one)

  def step(dstate, inputs):
    (tokens, run), state, do = inputs
    dtokens, dstate = each(tokens, run, state, (do.astype(f32), dstate))
    return dstate, dtokens

  do = jnp.moveaxis(chunks_of(do_BTNU, static.chunk), 2, 0)
  inputs = (_split(static, tokens, run_BT), states, do)
  dstate_BNUH, dtokens = jax.lax.scan(step, dstate_BNUH, inputs, reverse=True)
  back = lambda d, x: unchunked(jnp.moveaxis(d, 0, 2), x)
  return jax.tree.map(back, dtokens, tokens), None, dstate_BNUH


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def differentiable(forward: Callable, backward: Callable) -> Callable:
  """attend(static, tokens, run_BT, state_BNUH) -> (o, last state) of two kernels.

  Args:
    forward: of the same and `keep`, also gives the state before each chunk if that is set.
    backward: (static, tokens, run_BT, those states, do, dlast) -> (dtokens, dstate).
  """

  @partial(jax.custom_vjp, nondiff_argnums=(0,))
  def attend(static, tokens, run_BT, state_BNUH):
    return forward(static, tokens, run_BT, state_BNUH, keep=False)[:2]

  def keeping(static, tokens, run_BT, state_BNUH):
    o, state_BNUH, states = forward(static, tokens, run_BT, state_BNUH, keep=True)
    o, states = checkpoint_name(o, "attention_out"), checkpoint_name(states, "attention_state")
    return (o, state_BNUH), (tokens, run_BT, states)

  def back(static, saved, d):
    dtokens, dstate_BNUH = backward(static, *saved, *d)
    return dtokens, None, dstate_BNUH

  attend.defvjp(keeping, back)
  return attend
