"""Position encodings: rotary (with its length extensions), ALiBi, sinusoids.

Tables of fixed numbers are computed in float64 by numpy; only what depends on token positions
is traced.

Dims: B batch, T positions, N heads, H head size, D width. Inverse frequencies are one dim of
half the rotated dims, a number a pair.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from .spec import LinearScaling, Llama3Scaling, RotarySpec, YarnScaling


def rotary_frequencies(dims: int, *, theta: float) -> np.ndarray:
  """theta^(-2k / dims) for pair k (RoFormer, arXiv 2104.09864, equation 15).

  Args:
    dims: how many dims of a head are rotated, even.
    theta: base; the slowest pair turns once in about 2 pi theta positions.

  Returns:
    float64 [dims // 2], radians a position.
  """
  return theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)


def linear_scaled(inv_freq: np.ndarray, *, factor: float) -> np.ndarray:
  """Position interpolation (arXiv 2306.15595): positions divided by `factor`."""
  return inv_freq / factor


def llama3_scaled(
  inv_freq: np.ndarray,
  *,
  factor: float,
  low_freq_factor: float,
  high_freq_factor: float,
  original_length: int,
) -> np.ndarray:
  """Llama 3.1: divide by `factor` what turns rarely within the original context.

  A pair that turns more than `high_freq_factor` times in `original_length` positions is kept, one
  that turns less than `low_freq_factor` times is divided, those between blend linearly in turns.
  """
  turns = original_length * inv_freq / (2 * math.pi)
  keep = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
  return inv_freq * (keep + (1.0 - keep) / factor)


def yarn_scaled(
  inv_freq: np.ndarray,
  *,
  theta: float,
  factor: float,
  original_length: int,
  beta_fast: float,
  beta_slow: float,
  truncate: bool,
) -> np.ndarray:
  """YaRN (arXiv 2309.00071, section 3.2), in the form that released models use.

  As `llama3_scaled` with `beta_fast` and `beta_slow` turns as limits, except that the blend is
  linear in the pair's index, as in the authors' code, where the paper's equation 18 is linear in
  turns.

  Args:
    inv_freq: `rotary_frequencies(dims, theta=theta)`.
    truncate: round the limits outwards to whole indices (gpt-oss does not).
  """
  dims = 2 * len(inv_freq)
  # The (real) index of the pair that makes this many turns in the original context.
  index = lambda turns: (
    0.5 * dims * math.log(original_length / (2 * math.pi * turns)) / math.log(theta)
  )
  first, last = index(beta_fast), index(beta_slow)
  if truncate:
    first, last = math.floor(first), math.ceil(last)
  # dims - 1, not dims / 2 - 1: the authors' bound, kept because trained models depend on it.
  first, last = max(first, 0), min(last, dims - 1)
  divide = np.clip((np.arange(dims // 2) - first) / max(last - first, 1e-3), 0.0, 1.0)
  return inv_freq * (1.0 - divide + divide / factor)


def yarn_attention_factor(factor: float) -> float:
  """0.1 ln(factor) + 1, YaRN's factor on cosines and sines (its square is on the logits)."""
  return 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def rotary_table(spec: RotarySpec, head_dim: int) -> tuple[np.ndarray, float]:
  """What `apply_rotary` needs for this spec.

  Returns:
    (inv_freq float32 [dims // 2], attention_factor).
  """
  dims = head_dim if spec.dims is None else spec.dims
  inv_freq, attention_factor = rotary_frequencies(dims, theta=spec.theta), 1.0
  s = spec.scaling
  if isinstance(s, LinearScaling):
    inv_freq = linear_scaled(inv_freq, factor=s.factor)
  elif isinstance(s, Llama3Scaling):
    inv_freq = llama3_scaled(
      inv_freq,
      factor=s.factor,
      low_freq_factor=s.low_freq_factor,
      high_freq_factor=s.high_freq_factor,
      original_length=s.original_length,
    )
  elif isinstance(s, YarnScaling):
    inv_freq = yarn_scaled(
      inv_freq,
      theta=spec.theta,
      factor=s.factor,
      original_length=s.original_length,
      beta_fast=s.beta_fast,
      beta_slow=s.beta_slow,
      truncate=s.truncate,
    )
    attention_factor = s.attention_factor
    if attention_factor is None:
      attention_factor = yarn_attention_factor(s.factor)
  return inv_freq.astype(np.float32), attention_factor


def apply_rotary(
  x_BTNH: jax.Array,
  positions_BT: jax.Array,
  inv_freq: jax.Array | np.ndarray,
  *,
  interleaved: bool,
  attention_factor: float = 1.0,
) -> jax.Array:
  """Rotate each pair of dims of each head by position times frequency (arXiv 2104.09864).

  Args:
    x_BTNH: queries or keys.
    positions_BT: integers, [B, T] or [1, T].
    inv_freq: [P], radians a position; the first 2P dims of H are rotated, the rest pass through.
    interleaved: pairs are dims (0, 1), (2, 3), ... (GPT-J); otherwise (k, P + k) (GPT-NeoX,
      LLaMA).
    attention_factor: factor on cosines and sines.

  Returns:
    [B, T, N, H] in x.dtype; float32 inside.
  """
  half = inv_freq.shape[0]
  inv_freq = jnp.asarray(inv_freq, jnp.float32)
  angle = positions_BT[..., None].astype(jnp.float32) * jnp.expand_dims(inv_freq, (0, 1))
  cos = attention_factor * jnp.cos(angle)[:, :, None]
  sin = attention_factor * jnp.sin(angle)[:, :, None]
  x32 = x_BTNH[..., : 2 * half].astype(jnp.float32)
  if interleaved:
    pairs = x32.reshape(*x32.shape[:-1], half, 2)
    a, b = pairs[..., 0], pairs[..., 1]
  else:
    a, b = x32[..., :half], x32[..., half:]
  a, b = a * cos - b * sin, b * cos + a * sin
  if interleaved:
    turned = jnp.stack([a, b], axis=-1).reshape(x32.shape)
  else:
    turned = jnp.concatenate([a, b], axis=-1)
  turned = turned.astype(x_BTNH.dtype)
  if 2 * half == x_BTNH.shape[-1]:
    return turned
  return jnp.concatenate([turned, x_BTNH[..., 2 * half :]], axis=-1)


def alibi_slopes(num_heads: int) -> np.ndarray:
  """Slope m of each head; the logit of query i and key j gets -m (i - j) (arXiv 2108.12409).

  A power of two takes 2^(-8 (h + 1) / N). Otherwise the largest power of two P below takes its
  own slopes and the remaining heads every second slope of 2P, so slopes are not sorted.

  Returns:
    float32 [N].
  """
  powers = lambda n: 2.0 ** (-8.0 * np.arange(1, n + 1) / n)
  most = 2 ** (num_heads.bit_length() - 1)
  rest = powers(2 * most)[::2][: num_heads - most]
  return np.concatenate([powers(most), rest]).astype(np.float32)


def sinusoids(num_positions: int, dim: int, *, theta: float = 10_000.0) -> jax.Array:
  """Transformer-XL's encoding of relative distances (arXiv 1901.02860, section 3.3).

  Row r encodes a key r positions before the query: sin(r f_k) for k < dim / 2, then cos(r f_k),
  with f_k = theta^(-2k / dim).

  Args:
    num_positions: distances 0 .. num_positions - 1.
    dim: even.

  Returns:
    float32 [num_positions, dim].
  """
  inv_freq = jnp.asarray(rotary_frequencies(dim, theta=theta), jnp.float32)
  angle = jnp.arange(num_positions, dtype=jnp.float32)[:, None] * inv_freq[None, :]
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
