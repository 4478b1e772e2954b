"""Linear attention as Pallas kernels for TPUs, forward and backward.

The grid goes through blocks of chunks, the last axis in order: forward from the first to the last,
backward in reverse. The state of a head, or its gradient, stays in fast memory meanwhile. Backward
computes each chunk again from the state before it, which the forward pass left, and differentiates
`chunk.attend` by JAX, inside the kernel.

Letters: B batch, N heads, T positions, H head size of queries and keys, U that of values, C tokens
of a chunk.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..partition import vary_with, varying_shape
from ..tpu import fast_memory
from .xla import Tokens, chunks_of, differentiable, one_chunk, runs_of, unchunked

# Tokens a step of the grid: many small steps would cost more than the products in them.
BLOCK = 512
SUBLANES = 16  # rows of a tile of bfloat16

f32 = jnp.float32


class _Static(NamedTuple):
  scale: float
  chunk: int
  dtype: Any  # of the result


def supports(q_BTNH, k_BTNH, v_BTNU, chunk: int) -> str | None:
  """Why a TPU can't run these arguments, or None."""
  for x in (q_BTNH, k_BTNH, v_BTNU):
    if x.dtype not in (jnp.bfloat16, jnp.float32):
      return f"arrays must be bfloat16 or float32, not {x.dtype}"
    if x.shape[-1] > 256:
      return f"head sizes go up to 256, not {x.shape[-1]}"
  if chunk < SUBLANES or chunk > BLOCK:
    return f"chunks must hold {SUBLANES} to {BLOCK} tokens, not {chunk}"
  if q_BTNH.shape[1] < SUBLANES:
    return f"rows must hold {SUBLANES} tokens or more, not {q_BTNH.shape[1]}"
  return None


def linear_attention(
  q_BTNH, k_BTNH, v_BTNU, decay, beta_BTN, run_BT, state_BNHU, *, scale, chunk, dtype
) -> tuple[jax.Array, jax.Array]:
  """Arguments as in the package, where None stands for a default; `run_BT` as in reference."""
  tokens = Tokens(q_BTNH, k_BTNH, v_BTNU, decay, beta_BTN)
  o_BTNU, state_BNUH = _attend(_Static(scale, chunk, dtype), tokens, run_BT, state_BNHU.mT)
  return o_BTNU, state_BNUH.mT


# ---- the kernels ----


def _at(refs, i) -> Any:
  """Chunk i of blocks [1, 1, chunks, ...] of tokens, or [1, chunks, ...] of documents."""
  return jax.tree.map(lambda ref: ref[(0,) * (len(ref.shape) - 3) + (i,)], refs)


def _forward_kernel(static, tokens, run, first_ref, o_ref, last_ref, *refs):
  states_ref, state_ref = refs if len(refs) == 2 else (None, *refs)

  @pl.when(pl.program_id(2) == 0)
  def _():
    state_ref[...] = first_ref[0, 0]

  def step(i, _):
    state = state_ref[...]
    if states_ref is not None:
      states_ref[0, 0, i] = state
    o, state_ref[...] = one_chunk(static, _at(tokens, i), _at(run, i), state)
    o_ref[0, 0, i] = o.astype(o_ref.dtype)

  jax.lax.fori_loop(0, o_ref.shape[2], step, None)

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    last_ref[0, 0] = state_ref[...]


def _backward_kernel(
  static, tokens, run, states_ref, do_ref, dlast_ref, dtokens, dfirst_ref, dstate_ref
):
  @pl.when(pl.program_id(2) == 0)
  def _():
    dstate_ref[...] = dlast_ref[0, 0]

  def step(n, _):
    i = do_ref.shape[2] - 1 - n
    one = lambda tokens, state: one_chunk(static, tokens, _at(run, i), state)
    _, pull = jax.vjp(one, _at(tokens, i), states_ref[0, 0, i])
    got, dstate_ref[...] = pull((do_ref[0, 0, i].astype(f32), dstate_ref[...]))
    for ref, d in zip(jax.tree.leaves(dtokens), jax.tree.leaves(got), strict=True):
      ref[0, 0, i] = d.astype(ref.dtype)

  jax.lax.fori_loop(0, do_ref.shape[2], step, None)

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    dfirst_ref[0, 0] = dstate_ref[...]


# ---- their calls ----


class _Specs(NamedTuple):
  """Blocks of the grid (batch, head, block of chunks), forward or in reverse."""

  chunks: int  # a block
  blocks: int
  reverse: bool

  def _block(self, c):
    return self.blocks - 1 - c if self.reverse else c

  def tokens(self, x):
    """Of [B, N, chunks, ., .]."""
    place = lambda b, n, c: (b, n, self._block(c), 0, 0)
    return pl.BlockSpec((1, 1, self.chunks, *x.shape[3:]), place)

  def run(self, x):
    """Of [B, chunks, 1, C]."""
    return pl.BlockSpec((1, self.chunks, *x.shape[2:]), lambda b, n, c: (b, self._block(c), 0, 0))

  def state(self, x):
    """Of [B, N, U, H]."""
    return pl.BlockSpec((1, 1, *x.shape[2:]), lambda b, n, c: (b, n, 0, 0))


def _split(static, tokens, run_BT, *more):
  """Everything in chunks that fill whole blocks, and how many make a block."""
  T = tokens.q.shape[1]
  blocks = -(-T // max(BLOCK, static.chunk))
  chunks = -(-T // (blocks * static.chunk))  # a block: as few blocks as there can be, even ones
  extra = blocks * chunks * static.chunk - T
  pad = lambda x, mode: jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2), mode=mode)
  split = lambda x: chunks_of(pad(x, "constant"), static.chunk)
  run = None if run_BT is None else runs_of(pad(run_BT, "edge"), static.chunk)
  return chunks, jax.tree.map(split, (tokens, *more)), run


def _call(kernel, name, static, specs, arrays, in_specs, out_shape, out_specs, *, products):
  """Runs a kernel; `products`: how often a chunk's C^2 (H + U) and 2 C H U are multiplied."""
  tokens, state = arrays[0], arrays[-1]
  B, N, chunks, C, H = tokens.q.shape
  U = tokens.v.shape[-1]
  call = pl.pallas_call(
    partial(kernel, static),
    name=name,
    out_shape=out_shape,
    grid=(B, N, specs.blocks),
    in_specs=in_specs,
    out_specs=out_specs,
    scratch_shapes=[pltpu.VMEM(state.shape[2:], f32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=fast_memory()
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * products * B * N * chunks * C * (C * (H + U) + 2 * H * U),
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((arrays, out_shape))),
      transcendentals=products * B * N * chunks * C * C,
    ),
  )
  return call(*arrays)


def _forward(static, tokens, run_BT, state_BNUH, *, keep: bool):
  """(o, last state, the state before each chunk if asked)."""
  arrays = (tokens, run_BT, state_BNUH)
  tokens, run_BT, state_BNUH = vary_with(arrays, arrays)
  like = tokens.v
  chunks, (tokens,), run = _split(static, tokens, run_BT)
  specs = _Specs(chunks, tokens.q.shape[2] // chunks, reverse=False)
  shape = lambda shape, dtype: varying_shape(shape, dtype, state_BNUH)
  out_shape = [shape(tokens.v.shape, static.dtype), shape(state_BNUH.shape, f32)]
  out_specs = [specs.tokens(tokens.v), specs.state(state_BNUH)]
  if keep:
    out_shape.append(shape((*tokens.q.shape[:3], *state_BNUH.shape[2:]), f32))
    out_specs.append(specs.tokens(out_shape[-1]))
  in_specs = (
    jax.tree.map(specs.tokens, tokens),
    jax.tree.map(specs.run, run),
    specs.state(state_BNUH),
  )
  o, state_BNUH, *states = _call(
    _forward_kernel, "linear_attention_forward", static, specs, (tokens, run, state_BNUH), in_specs,
    out_shape, out_specs, products=1,
  )  # fmt: skip
  return unchunked(o, like), state_BNUH, states[0] if keep else None


def _backward(static, tokens, run_BT, states, do_BTNU, dstate_BNUH):
  """(gradients of the tokens, gradient of the first state)."""
  arrays = (tokens, run_BT, states, do_BTNU, dstate_BNUH)
  tokens, run_BT, states, do_BTNU, dstate_BNUH = vary_with(arrays, arrays)
  like = tokens
  chunks, (tokens, do), run = _split(static, tokens, run_BT, do_BTNU)
  specs = _Specs(chunks, tokens.q.shape[2] // chunks, reverse=True)
  of_tokens, of_state = jax.tree.map(specs.tokens, tokens), specs.state(dstate_BNUH)
  in_specs = (
    of_tokens, jax.tree.map(specs.run, run), specs.tokens(states), specs.tokens(do), of_state,
  )  # fmt: skip
  out_shape = jax.tree.map(
    lambda x: varying_shape(x.shape, x.dtype, dstate_BNUH), (tokens, dstate_BNUH)
  )
  dtokens, dstate_BNUH = _call(
    _backward_kernel, "linear_attention_backward", static, specs,
    (tokens, run, states, do, dstate_BNUH), in_specs, out_shape, (of_tokens, of_state), products=3,
  )  # fmt: skip
  return jax.tree.map(unchunked, dtokens, like), dstate_BNUH


_attend = differentiable(_forward, _backward)
