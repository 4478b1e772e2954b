"""Cross-entropy in chunks of tokens, gradients computed together with the loss.

The loss is a scalar, so its gradient is known but for one factor as soon as the logits of a chunk
are: the forward rule forms dx and dw there and the backward rule only multiplies. That is three
matmuls of [tokens, D, V] in place of four, and one chunk of logits alive at a time.

Letters: B batch, T positions, D model width, V vocabulary, C positions of T in one chunk, R shards
of B, S shards of T.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ..partition import vary_with
from ..select import current_platform

CHUNK_BYTES = 64 * 2**20  # float32 logits of a chunk, a device
# Each chunk reads w and adds to the float32 dw once: with fewer tokens an accelerator would wait
# for memory instead of multiplying.
MIN_TOKENS = {"cpu": 128}
MIN_TOKENS_ACCELERATOR = 1024

f32 = jnp.float32


class _Static(NamedTuple):
  scale: float
  softcap: float | None
  z_loss: float
  tied: bool
  shards: tuple[int, int]
  chunk: int


def cross_entropy(
  x_BTD, w_DV, bias_V, targets_BT, weights_BT, *, scale, softcap, z_loss, tied, shards
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Total, nll, log Z; arguments as in the package."""
  (B, T), V = targets_BT.shape, w_DV.shape[0 if tied else 1]
  chunk = shards[1] * chunk_length(B // shards[0], T // shards[1], V)
  static = _Static(scale, softcap, z_loss, tied, shards, chunk)
  return _cross_entropy(static, x_BTD, w_DV, bias_V, targets_BT, weights_BT)


def chunk_length(batch: int, length: int, vocab: int) -> int:
  """Positions of each row in a chunk, sizes those of a device; it divides `length` if it can."""
  least = MIN_TOKENS.get(current_platform(), MIN_TOKENS_ACCELERATOR)
  tokens = max(CHUNK_BYTES // (4 * vocab), least)
  chunks = -(-length // min(max(tokens // batch, 1), length))
  chunks = next((n for n in range(chunks, 2 * chunks) if length % n == 0), chunks)
  return -(-length // chunks)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(static, x_BTD, w_DV, bias_V, targets_BT, weights_BT):
  return _scan_chunks(static, x_BTD, w_DV, bias_V, targets_BT, weights_BT, gradients=False)[0]


def _forward(static, x_BTD, w_DV, bias_V, targets_BT, weights_BT):
  (total, nll_BT, log_z_BT), (dx_BTD, dw_DV, dbias_V) = _scan_chunks(
    static, x_BTD, w_DV, bias_V, targets_BT, weights_BT, gradients=True
  )
  dweights_BT = nll_BT + static.z_loss * log_z_BT**2
  residuals = checkpoint_name((dx_BTD, dw_DV, dbias_V, dweights_BT), "cross_entropy_gradients")
  # Empty arrays carry the dtypes of the parameters: residuals hold arrays only.
  dtypes = jax.tree.map(lambda p: jnp.empty((0,), p.dtype), (w_DV, bias_V))
  return (total, nll_BT, log_z_BT), (residuals, dtypes)


def _backward(static, saved, cotangents):
  del static
  (dx_BTD, dw_DV, dbias_V, dweights_BT), dtypes = saved
  factor = cotangents[0]  # of the total; the statistics carry no gradient
  dw_DV, dbias_V = jax.tree.map(lambda g, p: (factor * g).astype(p.dtype), (dw_DV, dbias_V), dtypes)
  dx_BTD = (factor * dx_BTD.astype(f32)).astype(dx_BTD.dtype)
  return dx_BTD, dw_DV, dbias_V, None, factor * dweights_BT


_cross_entropy.defvjp(_forward, _backward)


def _scan_chunks(static, x_BTD, w_DV, bias_V, targets_BT, weights_BT, *, gradients):
  """((total, nll, log_z), (dx, dw, dbias)); the gradients are None if not asked for."""
  w_DV = w_DV.astype(x_BTD.dtype)
  (B, T), C = targets_BT.shape, static.chunk
  chunks = -(-T // C)

  def split(a):
    """[chunks, B, C, ...], chunk i holding positions i, i + chunks, ...: if T is sharded, every
    device keeps its share of every chunk."""
    a = jnp.pad(a, [(0, 0), (0, chunks * C - T)] + [(0, 0)] * (a.ndim - 2))
    return jnp.moveaxis(a.reshape(B, C, chunks, *a.shape[2:]), 2, 0)

  def join(a):
    return jnp.moveaxis(a, 0, 2).reshape(B, chunks * C, *a.shape[3:])[:, :T]

  def step(sums, inputs):
    addends, outputs = _chunk(static, inputs, w_DV, bias_V, gradients)
    return jax.tree.map(jnp.add, sums, addends), outputs

  inputs = (x_BTD, targets_BT, weights_BT)
  if chunks == 1:
    sums, outputs = _chunk(static, inputs, w_DV, bias_V, gradients)
  else:
    zeros = lambda p: jnp.zeros((*static.shards, *p.shape), f32)
    sums = jax.tree.map(zeros, (w_DV, bias_V)) if gradients else (None, None)
    sums = vary_with(x_BTD, sums)
    sums, outputs = jax.lax.scan(step, sums, jax.tree.map(split, inputs))
    outputs = jax.tree.map(join, outputs)
  nll_BT, log_z_BT, dx_BTD = outputs
  total = jnp.sum(weights_BT * (nll_BT + static.z_loss * log_z_BT**2))
  dw_DV, dbias_V = jax.tree.map(lambda a: jnp.sum(a, axis=(0, 1)), sums)
  return (total, nll_BT, log_z_BT), (dx_BTD, dw_DV, dbias_V)


def _target_logits(logits_BCV, targets_BC, is_target_BCV):
  """The logit of each target, NaN for a target outside the vocabulary."""
  if current_platform() == "cpu":  # a pass over the logits costs more than a few reads
    return jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
  found_BC = jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0), axis=-1)
  return jnp.where(targets_BC < logits_BCV.shape[-1], found_BC, jnp.nan)


def _chunk(static, inputs, w_DV, bias_V, gradients):
  """((dw, dbias) of each shard, (nll, log_z, dx)) of one chunk."""
  x_BCD, targets_BC, weights_BC = inputs
  VD = "vd" if static.tied else "dv"
  logits_BCV = jnp.einsum(f"bcd,{VD}->bcv", x_BCD, w_DV, preferred_element_type=f32)
  if bias_V is not None:
    logits_BCV = logits_BCV + bias_V.astype(f32)[None, None]
  logits_BCV = static.scale * logits_BCV
  if static.softcap is not None:
    logits_BCV = static.softcap * jnp.tanh(logits_BCV / static.softcap)
  max_BC = jnp.max(logits_BCV, axis=-1)
  log_z_BC = max_BC + jnp.log(jnp.sum(jnp.exp(logits_BCV - max_BC[..., None]), axis=-1))
  ids_V = jnp.arange(logits_BCV.shape[-1], dtype=targets_BC.dtype)
  # A comparison, not a gather or scatter: it fuses with the exponentials, and over a vocabulary
  # that is sharded it sums numbers, not rows.
  is_target_BCV = ids_V[None, None] == targets_BC[..., None]
  nll_BC = log_z_BC - _target_logits(logits_BCV, targets_BC, is_target_BCV)
  if not gradients:
    return (None, None), (nll_BC, log_z_BC, None)

  g_BCV = jnp.exp(logits_BCV - log_z_BC[..., None])
  if static.z_loss:
    g_BCV = g_BCV * (1 + 2 * static.z_loss * log_z_BC)[..., None]
  # Subtracted before the cast: for a likely target p - 1 would drown in bfloat16's rounding of p.
  g_BCV = g_BCV - is_target_BCV
  g_BCV = g_BCV * (static.scale * weights_BC)[..., None]
  if static.softcap is not None:
    g_BCV = g_BCV * (1 - (logits_BCV / static.softcap) ** 2)

  def by_shard(a):
    """[R, B / R, S, C / S, ...]: sums over tokens stay on a device until the last chunk."""
    (R, S), (B, C) = static.shards, a.shape[:2]
    return a.reshape(R, B // R, S, C // S, *a.shape[2:])

  dbias_RSV = None if bias_V is None else jnp.sum(by_shard(g_BCV), axis=(1, 3))
  g_BCV = g_BCV.astype(x_BCD.dtype)
  dx_BCD = jnp.einsum(f"bcv,{VD}->bcd", g_BCV, w_DV, preferred_element_type=f32)
  dw_RSDV = jnp.einsum(
    f"rbscv,rbscd->rs{VD}", by_shard(g_BCV), by_shard(x_BCD), preferred_element_type=f32
  )
  return (dw_RSDV, dbias_RSV), (nll_BC, log_z_BC, dx_BCD.astype(x_BCD.dtype))
