"""Linear attention as Triton kernels for GPUs, forward and backward.

A program owns a head and some of its values, so some rows of its state [U, H], and goes through the
chunks in order, or backward in reverse, with its part of the state or of its gradient in registers:
no value of a head needs another. Backward computes each chunk again from the state before it, which
the forward pass left, and differentiates `chunk.attend` by JAX, inside the kernel; gradients of
what the values share (queries, keys, decays) come out once for each part and are summed outside.
Nothing is padded in memory: what lies beyond an end is masked where it is read and written. Nothing
here has been timed.

Letters: B batch, N heads, T positions, H head size of queries and keys, U that of values, C tokens
of a chunk, P parts of the values.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..partition import vary_with, varying_shape
from .xla import Tokens, differentiable, one_chunk, runs_of

SMALLEST = 16  # side of a product of blocks

f32, i32 = jnp.float32, jnp.int32


class _Static(NamedTuple):
  scale: float
  chunk: int
  dtype: Any  # of the result


class _Blocks(NamedTuple):
  """Values that a program owns, channels of queries and keys with those that pad them, warps."""

  values: int
  channels: int
  warps: int


def supports(q_BTNH, k_BTNH, v_BTNU, chunk: int) -> str | None:
  """Why a GPU can't run these arguments, or None."""
  for x in (q_BTNH, k_BTNH, v_BTNU):
    if x.dtype not in (jnp.bfloat16, jnp.float16, f32):
      return f"arrays must be bfloat16, float16 or float32, not {x.dtype}"
  if q_BTNH.shape[-1] > 256:
    return f"head sizes of queries and keys go up to 256, not {q_BTNH.shape[-1]}"
  if chunk < SMALLEST:
    return f"chunks must hold {SMALLEST} tokens or more, not {chunk}"
  return None


def linear_attention(
  q_BTNH, k_BTNH, v_BTNU, decay, beta_BTN, run_BT, state_BNHU, *, scale, chunk, dtype
) -> tuple[jax.Array, jax.Array]:
  """Arguments as in the package, where None stands for a default; `run_BT` as in reference."""
  tokens = Tokens(q_BTNH, k_BTNH, v_BTNU, decay, beta_BTN)
  static = _Static(scale, _chunk(tokens, chunk), dtype)
  o_BTNU, state_BNUH = _attend(static, tokens, run_BT, state_BNHU.mT)
  return o_BTNU, state_BNUH.mT


def _chunk(tokens: Tokens, chunk: int) -> int:
  """At most what Triton 3.9 finds registers for on Hopper; not chosen by measuring."""
  wide = tokens.q.dtype == f32 or (tokens.decay is not None and tokens.decay.ndim == 4)
  return min(chunk, 16 if wide else 32)


def _blocks(static: _Static, tokens: Tokens) -> _Blocks:
  H, U = tokens.q.shape[-1], tokens.v.shape[-1]
  padded = lambda size: max(SMALLEST, pl.next_power_of_2(size))
  return _Blocks(min(padded(U), 32), padded(H), 8 if static.chunk > 16 else 4)


# ---- the kernels ----


class _Range(NamedTuple):
  """Places of a dim in a block."""

  place: Any  # a slice
  inside: jax.Array | None  # None: all are

  @classmethod
  def of(cls, block, size: int, length: int):
    inside = block * size + jnp.arange(size, dtype=i32) < length
    return cls(pl.ds(block * size, size), inside if length % size else None)


class _Head(NamedTuple):
  """What a program owns."""

  b: jax.Array
  n: jax.Array
  part: jax.Array
  values: _Range
  channels: _Range

  @classmethod
  def of(cls, blocks: _Blocks, tokens: Tokens):
    (_, _, N, H), U = tokens.q.shape, tokens.v.shape[-1]
    head, part = pl.program_id(0), pl.program_id(1)
    values = _Range.of(part, blocks.values, U)
    channels = _Range.of(jnp.zeros((), i32), blocks.channels, H)
    return cls(jax.lax.div(head, N), jax.lax.rem(head, N), part, values, channels)

  def load(self, tokens: Tokens, rows: _Range) -> Tokens:
    at = lambda ref, dim: _load(ref, (self.b, rows, self.n, dim))
    line = lambda ref: _load(ref, (self.b, rows, self.n))[None]
    decay, beta = tokens.decay, tokens.beta
    if decay is not None:
      decay = line(decay) if len(decay.shape) == 3 else at(decay, self.channels)
    return Tokens(
      at(tokens.q, self.channels), at(tokens.k, self.channels), at(tokens.v, self.values), decay,
      None if beta is None else line(beta),
    )  # fmt: skip

  def state(self, *before) -> tuple[Any, ...]:
    """Where this part of a state is in [B, N, ..., U, H]."""
    return self.b, self.n, *before, self.values, self.channels


def _at(ref, place) -> tuple[Any, jax.Array | None]:
  """The reference to a place with one or two ranges, and a mask of what is in there."""
  ranges = [x for x in place if isinstance(x, _Range)]
  masks = [x.inside for x in ranges]
  if len(ranges) == 2:
    down, across = masks
    masks = [None if down is None else down[:, None], None if across is None else across[None]]
  masks = [x for x in masks if x is not None]
  mask = None if not masks else masks[0] if len(masks) == 1 else masks[0] & masks[1]
  return ref.at[tuple(x.place if isinstance(x, _Range) else x for x in place)], mask


def _load(ref, place):
  at, mask = _at(ref, place)
  return plgpu.load(at, mask=mask, other=None if mask is None else 0.0)


def _store(ref, place, value):
  at, mask = _at(ref, place)
  plgpu.store(at, value.astype(ref.dtype), mask=mask)


def _differentiable(static, run_ref, b, c):
  """The chunk c as a function of its tokens and the state."""
  run = None if run_ref is None else run_ref[b, c]
  return lambda tokens, state: one_chunk(static, tokens, run, state)


def _forward_kernel(static, blocks, tokens, run_ref, first_ref, o_ref, last_ref, states_ref=None):
  T, C = o_ref.shape[1], static.chunk
  head = _Head.of(blocks, tokens)

  def step(c, state):
    if states_ref is not None:
      _store(states_ref, head.state(c), state)
    rows = _Range.of(c, C, T)
    # Triton knows no custom_vjp. Differentiation resolves them; what it adds is dead code.
    one = _differentiable(static, run_ref, head.b, c)
    (o, state), _ = jax.vjp(one, head.load(tokens, rows), state)
    _store(o_ref, (head.b, rows, head.n, head.values), o)
    return state

  state = jax.lax.fori_loop(0, pl.cdiv(T, C), step, _load(first_ref, head.state()))
  _store(last_ref, head.state(), state)


def _backward_kernel(
  static, blocks, tokens, run_ref, states_ref, do_ref, dlast_ref, dtokens, dfirst_ref
):
  T, C = do_ref.shape[1], static.chunk
  head = _Head.of(blocks, tokens)
  chunks = pl.cdiv(T, C)

  def step(n, dstate):
    c = chunks - 1 - n
    rows = _Range.of(c, C, T)
    one = _differentiable(static, run_ref, head.b, c)
    state = _load(states_ref, head.state(c))
    _, pull = jax.vjp(one, head.load(tokens, rows), state)
    do = _load(do_ref, (head.b, rows, head.n, head.values))
    got, dstate = pull((do.astype(f32), dstate))
    _store(dtokens.v, (head.b, rows, head.n, head.values), got.v)
    for ref, d in zip(dtokens._replace(v=None), got._replace(v=None), strict=True):
      if ref is None:
        continue
      place = (head.part, head.b, rows, head.n)
      if len(ref.shape) == 4:  # one number a token
        _store(ref, place, jnp.sum(d, axis=0))
      else:
        _store(ref, (*place, head.channels), d)
    return dstate

  dstate = jax.lax.fori_loop(0, chunks, step, _load(dlast_ref, head.state()))
  _store(dfirst_ref, head.state(), dstate)


# ---- their calls ----


def _call(kernel, name, static, arrays, out_shape):
  tokens = arrays[0]
  blocks = _blocks(static, tokens)
  B, _, N, _ = tokens.q.shape
  call = pl.pallas_call(
    partial(kernel, static, blocks),
    name=name,
    out_shape=out_shape,
    grid=(B * N, pl.cdiv(tokens.v.shape[-1], blocks.values)),
    compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=1),
  )
  return call(*arrays)


def _forward(static, tokens, run_BT, state_BNUH, *, keep: bool):
  """(o, last state, the state before each chunk if asked)."""
  run = None if run_BT is None else runs_of(run_BT, static.chunk)
  arrays = (tokens, run, state_BNUH)
  arrays = vary_with(arrays, arrays)
  shape = lambda shape, dtype: varying_shape(shape, dtype, arrays[-1])
  B, N, U, H = state_BNUH.shape
  out_shape = [shape(tokens.v.shape, static.dtype), shape(state_BNUH.shape, f32)]
  if keep:
    out_shape.append(shape((B, N, pl.cdiv(tokens.q.shape[1], static.chunk), U, H), f32))
  o, state_BNUH, *states = _call(
    _forward_kernel, "linear_attention_forward", static, arrays, out_shape
  )
  return o, state_BNUH, states[0] if keep else None


def _backward(static, tokens, run_BT, states, do_BTNU, dstate_BNUH):
  """(gradients of the tokens, gradient of the first state)."""
  run = None if run_BT is None else runs_of(run_BT, static.chunk)
  arrays = (tokens, run, states, do_BTNU, dstate_BNUH)
  arrays = vary_with(arrays, arrays)
  shape = lambda shape, dtype: varying_shape(shape, dtype, arrays[-1])
  P = pl.cdiv(tokens.v.shape[-1], _blocks(static, tokens).values)
  parts = jax.tree.map(lambda x: shape((P, *x.shape), f32), tokens)
  parts = parts._replace(v=shape(tokens.v.shape, tokens.v.dtype))
  dtokens, dstate_BNUH = _call(
    _backward_kernel, "linear_attention_backward", static, arrays,
    (parts, shape(dstate_BNUH.shape, f32)),
  )  # fmt: skip
  total = lambda d, x: jnp.sum(d, axis=0).astype(x.dtype)
  summed = jax.tree.map(total, dtokens._replace(v=None), tokens._replace(v=None))
  return summed._replace(v=dtokens.v), dstate_BNUH


_attend = differentiable(_forward, _backward)
