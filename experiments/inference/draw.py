"""Choosing a token from logits: greedy, temperature, top-k, top-p, min-p, repetition penalty.

As `transformers` defines them, in its order: penalty, temperature, top-k, top-p, min-p. Whether one
is in use is static; its number is not, so that another number is no other program.

B batch, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Draw(NamedTuple):
  """How to choose a token."""

  vocab_size: int  # ids from here up are the padding of the table
  temperature: float = 0.8  # 0 is greedy
  top_k: int = 0  # 0 is all
  top_p: float = 1.0  # 1 is all
  min_p: float = 0.0  # 0 is all
  repetition_penalty: float = 1.0  # 1 is none


class Uses(NamedTuple):
  """What of a `Draw` decides which program runs."""

  vocab_size: int
  random: bool
  top_k: bool
  top_p: bool
  min_p: bool
  penalty: bool


class Numbers(NamedTuple):
  """What of a `Draw` a program is given; float32 but for `top_k`, int32."""

  temperature: jax.Array | np.ndarray
  top_k: jax.Array | np.ndarray
  top_p: jax.Array | np.ndarray
  min_p: jax.Array | np.ndarray
  penalty: jax.Array | np.ndarray


def split(draw: Draw) -> tuple[Uses, Numbers]:
  """The static part and the numbers.

  Raises:
    ValueError: a number that means nothing.
  """
  problem = problem_with(draw)
  if problem:
    raise ValueError(problem)
  random = draw.temperature > 0
  top_k = random and 0 < draw.top_k < draw.vocab_size
  uses = Uses(
    draw.vocab_size,
    random,
    top_k,
    random and draw.top_p < 1,
    random and draw.min_p > 0,
    draw.repetition_penalty != 1,
  )
  real = (draw.temperature, draw.top_p, draw.min_p, draw.repetition_penalty)
  temperature, top_p, min_p, penalty = (np.asarray(x, np.float32) for x in real)
  return uses, Numbers(
    temperature, np.asarray(draw.top_k if top_k else 0, np.int32), top_p, min_p, penalty
  )


def problem_with(draw: Draw) -> str:
  """What is wrong with the numbers, beginning with the field's name; empty if nothing."""
  infinite = float("inf")
  limits = (
    ("temperature", 0 <= draw.temperature < infinite, "0 for greedy, or a positive number"),
    ("top_k", draw.top_k >= 0, "a number of tokens, 0 for all"),
    ("top_p", 0 < draw.top_p <= 1, "a probability above 0, 1 for all"),
    ("min_p", 0 <= draw.min_p <= 1, "a share from 0, for all, to 1"),
    ("repetition_penalty", 0 < draw.repetition_penalty < infinite, "a positive number, 1 for none"),
  )  # comparisons with NaN are false
  return next(
    (f"{name}={getattr(draw, name)}: give {what}" for name, fits, what in limits if not fits), ""
  )


def draw_token(
  logits_BV: jax.Array,
  key_B: jax.Array,
  uses: Uses,
  numbers: Numbers,
  seen_BV: jax.Array | None = None,
) -> jax.Array:
  """One token a row, int32 [B].

  Args:
    key_B: a typed key a row.
    seen_BV: which tokens stand in the row already, for the penalty.
  """
  scores_BV = scores(logits_BV, uses, numbers, seen_BV)
  if uses.random:
    V = scores_BV.shape[-1]
    scores_BV += jax.vmap(lambda key: jax.random.gumbel(key, (V,), jnp.float32))(key_B)
  return jnp.argmax(scores_BV, axis=-1).astype(jnp.int32)


def scores(
  logits_BV: jax.Array, uses: Uses, numbers: Numbers, seen_BV: jax.Array | None = None
) -> jax.Array:
  """Logits of the distribution that is drawn from, float32; -inf of what is never drawn.

  Top-k keeps what is as likely as the k-th. Top-p keeps a token if all that are likelier have less
  than `top_p` together. (Of equally likely tokens both keep all; `transformers` does for top-k, and
  for top-p leaves it to the sort.)
  """
  x_BV = logits_BV.astype(jnp.float32)
  if uses.penalty:
    x_BV = penalized(x_BV, seen_BV, numbers.penalty)
  V = x_BV.shape[-1]
  if uses.vocab_size < V:
    x_BV = jnp.where(jnp.expand_dims(jnp.arange(V) < uses.vocab_size, 0), x_BV, -jnp.inf)
  if not uses.random:
    return x_BV
  x_BV /= numbers.temperature
  if uses.top_k:
    at_least = lambda kept_BV: kept_BV.sum(axis=-1) >= numbers.top_k
    x_BV = _keep(x_BV, at_least)
  if uses.top_p:
    p_BV = jax.nn.softmax(x_BV, axis=-1)
    x_BV = _keep(x_BV, lambda kept_BV: jnp.where(kept_BV, p_BV, 0).sum(axis=-1) >= numbers.top_p)
  if uses.min_p:
    lowest_B1 = x_BV.max(axis=-1, keepdims=True) + jnp.log(numbers.min_p)
    x_BV = jnp.where(x_BV < lowest_B1, -jnp.inf, x_BV)
  return x_BV


def penalized(x_BV: jax.Array, seen_BV: jax.Array | None, penalty: jax.Array) -> jax.Array:
  """Tokens that stand in the row already, less likely (CTRL, arXiv 1909.05858, section 4.1)."""
  return jnp.where(seen_BV, jnp.where(x_BV < 0, x_BV * penalty, x_BV / penalty), x_BV)


def _keep(x_BV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """Only the fewest largest that are `enough`, with all that equal the smallest of them.

  The bits of the smallest are found one after the other, by 32 sums: a sort of the vocabulary takes
  several times as long.

  Args:
    enough: of the elements that are kept, [B, V] bool, to [B] bool; true of more if true of some.
  """
  bits_BV = jax.lax.bitcast_convert_type(x_BV, jnp.uint32)
  top = jnp.uint32(1 << 31)
  order_BV = jnp.where(bits_BV >= top, ~bits_BV, bits_BV | top)  # in the order of the floats

  def bit(i, least_B):
    more_B = least_B | (top >> i)
    return jnp.where(enough(order_BV >= jnp.expand_dims(more_B, 1)), more_B, least_B)

  least_B = jax.lax.fori_loop(0, 32, bit, jnp.zeros_like(order_BV[:, 0]), unroll=False)
  return jnp.where(order_BV >= jnp.expand_dims(least_B, 1), x_BV, -jnp.inf)
