"""One chunk of one head: what its tokens read, and the state they leave behind.

Every decay is the exponential of a sum over the tokens between writer and reader, formed as such.
It is never a quotient of two running products, which overflows where decays are strong, and nothing
of another document is part of the sum. With a decay a channel that takes log2(C) products in place
of one: pairs of a later token i and an earlier one j are sorted by the size s of the blocks that
part them (i in an odd block, j in the even one before it), and within a level both meet at the
border: i decays from there on, j up to there.

The same masks invert the unit triangular matrix of the delta rule, block by block. The shorter
series (I - A)(I + A^2)(I + A^4).. cancels numbers of 1e17 where 64 keys are equal.

Everything is two-dimensional and made of products and elementwise steps, so that it runs inside a
TPU kernel as it does outside, and so does its derivative.

Letters: C tokens of the chunk, H head size of queries and keys, U that of values.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

f32 = jnp.float32

Sum = int | Literal["until", "after"]


def attend(
  q_CH: jax.Array,
  k_CH: jax.Array,
  v_CU: jax.Array,
  decay: jax.Array | None,
  beta_1C: jax.Array | None,
  run_1C: jax.Array | None,
  state_UH: jax.Array,
  *,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """(o [C, U], the next state [U, H]), float32.

  C is a power of two. Products are of values in the dtype of q, sums float32.

  Args:
    decay: log-decays, [1, C] for the head or [C, H] a channel; None is none.
    beta_1C: writing strengths of the delta rule; None: values are written as they are.
    run_1C: float32, which document of the chunk a token is of: 0 continues the state's.
    state_UH: float32, transposed.
  """
  C, dtype = q_CH.shape[0], q_CH.dtype
  q_CH, k_CH, v_CU = (x.astype(f32) for x in (q_CH, k_CH, v_CU))
  row, column = _indices(C)
  seen, from_state, to_state, stays = row >= column, None, None, None
  if run_1C is not None:
    run_C1, last_11 = _column(run_1C), jnp.max(run_1C, axis=1, keepdims=True)
    seen &= run_C1 == run_1C
    from_state, to_state, stays = run_C1 == 0, run_C1 == last_11, last_11 == 0
  pairs, enter, leave, stay = _decays(decay, C, dtype)
  enter, leave = _weight(enter, from_state), _weight(leave, to_state)
  if beta_1C is not None:
    beta_C1 = _column(beta_1C)
    a_CC = jnp.where(seen & (row > column), beta_C1 * pairs(k_CH, k_CH), 0)
    held_CU = _dot(1, 1, dtype, k_CH * enter, state_UH)
    v_CU = _dot(1, 0, f32, _inverse(a_CC), beta_C1 * (v_CU - held_CU))
  o_CU = _dot(1, 1, dtype, q_CH * enter, state_UH)
  o_CU += _dot(1, 0, dtype, jnp.where(seen, pairs(q_CH, k_CH), 0), v_CU)
  state_UH = _weight(stay, stays) * state_UH + _dot(0, 0, dtype, v_CU, k_CH * leave)
  return scale * o_CU, state_UH


def _indices(C: int) -> tuple[jax.Array, jax.Array]:
  row, column = (jax.lax.broadcasted_iota(jnp.int32, (C, C), dim) for dim in (0, 1))
  return row, column


def _column(x_1C: jax.Array) -> jax.Array:
  row, column = _indices(x_1C.shape[1])
  return jnp.sum(jnp.where(row == column, x_1C, 0), axis=1, keepdims=True)


def _weight(log: jax.Array, where: jax.Array | None) -> jax.Array:
  return jnp.exp(log) if where is None else jnp.where(where, jnp.exp(log), 0)


def _decays(decay: jax.Array | None, C: int, dtype: Any) -> tuple[Any, ...]:
  """(decayed products of later rows with earlier ones, log-decay from the state to each token, from
  each token to the next state, and from state to state)."""
  if decay is None:
    zeros = jnp.zeros((C, 1), f32)
    return partial(_dot, 1, 1, dtype), zeros, zeros, jnp.zeros((1, 1), f32)
  row, column = _indices(C)
  if decay.shape == (1, C):
    over = lambda where: jnp.sum(jnp.where(where, decay, 0), axis=1, keepdims=True)
    between_CC = _sums("until", jnp.where(row > column, _column(decay), 0))
    factor_CC = jnp.exp(between_CC)
    pairs = lambda x, y: factor_CC * _dot(1, 1, dtype, x, y)
    return pairs, over(column <= row), over(column > row), jnp.sum(decay, axis=1, keepdims=True)

  factors = {level: jnp.exp(_sums(level, decay)) for level in range(C.bit_length() - 1)}

  def pairs(x, y):
    out = jnp.where(row == column, jnp.sum(x * y, axis=1, keepdims=True), 0)
    for level, factor in factors.items():
      out += jnp.where(_across(level, C), _dot(1, 1, dtype, x * factor, y * factor), 0)
    return out

  whole = jnp.sum(decay, axis=0, keepdims=True)
  return pairs, _sums("until", decay), _sums("after", decay), whole


def _across(level: int, C: int) -> jax.Array:
  """Where the row is in an odd block of 2^level and the column in the even block before it."""
  row, column = (x >> level for x in _indices(C))
  return (row & 1 == 1) & (column == row - 1)


def _summed(which: Sum, C: int) -> jax.Array:
  """For each token (row) the tokens (column) whose log-decays make up its own."""
  row, column = _indices(C)
  if which == "until":
    return column <= row
  if which == "after":
    return column > row
  # From the border before an odd block, up to that behind an even one.
  odd = (row >> which) & 1 == 1
  return (row >> which == column >> which) & ((odd & (column <= row)) | (~odd & (column > row)))


def _sums_of(which: Sum, x: jax.Array) -> jax.Array:
  return _product(1, 0, f32, _summed(which, x.shape[0]).astype(f32), x)


def _sums_bwd(which, _, d):
  return (_product(0, 0, f32, _summed(which, d.shape[0]).astype(f32), d),)


# Forward rules call plain functions: unlike Mosaic, Triton knows none that have rules themselves.
_sums = jax.custom_vjp(_sums_of, nondiff_argnums=(0,))
_sums.defvjp(lambda which, x: (_sums_of(which, x), None), _sums_bwd)


def _inverse_of(a_CC: jax.Array) -> jax.Array:
  """(I + a)^-1 for a strictly lower triangular; block forward substitution."""
  C = a_CC.shape[0]
  row, column = _indices(C)
  t_CC = jnp.where(row == column, 1.0, 0.0) - jnp.where(_across(0, C), a_CC, 0)
  for level in range(1, C.bit_length() - 1):
    below = jnp.where(_across(level, C), a_CC, 0)
    t_CC -= _product(1, 0, f32, t_CC, _product(1, 0, f32, below, t_CC))
  return t_CC


def _inverse_fwd(a_CC):
  t_CC = _inverse_of(a_CC)
  return t_CC, t_CC


def _inverse_bwd(t_CC, d):
  return (-_product(1, 1, f32, _product(0, 0, f32, t_CC, d), t_CC),)


_inverse = jax.custom_vjp(_inverse_of)
_inverse.defvjp(_inverse_fwd, _inverse_bwd)


def _product(of_a: int, of_b: int, dtype: Any, a: jax.Array, b: jax.Array) -> jax.Array:
  """Contracts dim `of_a` of a with `of_b` of b; values in `dtype`, sums in float32."""
  return jax.lax.dot_general(
    a.astype(dtype),
    b.astype(dtype),
    (((of_a,), (of_b,)), ((), ())),
    # By default a TPU rounds float32 operands to bfloat16.
    precision="highest" if dtype == f32 else None,
    preferred_element_type=f32,
  )


def _dot_bwd(of_a, of_b, dtype, saved, d):
  a, b = saved
  da = (1, 1 - of_b, dtype, d, b) if of_a else (1 - of_b, 1, dtype, b, d)
  db = (0, 1 - of_a, dtype, d, a) if of_b else (1 - of_a, 0, dtype, a, d)
  return _product(*da), _product(*db)


# Autodiff would multiply float32 gradients with bfloat16 values, and transpose results.
_dot = jax.custom_vjp(_product, nondiff_argnums=(0, 1, 2))
_dot.defvjp(lambda *args: (_product(*args), args[3:]), _dot_bwd)
