"""Attention over a cache, the specification: whole logits in float32.

Letters: B batch, T query tokens, N query heads, K key/value heads, H head size, U that of values,
S cached positions, P pages, R positions a page, J pages a row.
"""

import jax
import jax.numpy as jnp

from .inputs import Inputs, Static, needed_pages

f32 = jnp.float32


def attention(
  static: Static, q_BTNH: jax.Array, k: jax.Array, v: jax.Array, inputs: Inputs
) -> jax.Array:
  """k and v are [B, S, K, .], or pages [P, R, K, .] if `inputs` has their table."""
  (B, T, N, H), K = q_BTNH.shape, k.shape[2]
  if inputs.page_table_BJ is not None:
    none_B = jnp.zeros_like(inputs.lengths_B)
    table_BJ = needed_pages(inputs.page_table_BJ, k.shape[1], none_B, inputs.lengths_B)
    k, v = (x[table_BJ].reshape(B, -1, *x.shape[2:]) for x in (k, v))
  S = k.shape[1]
  kept_BS = jnp.arange(S)[None] < inputs.lengths_B[:, None]
  kv_positions_BS = jnp.arange(S)[None]
  if inputs.kv_positions_BS is not None:
    kv_positions_BS = inputs.kv_positions_BS
    kept_BS &= kv_positions_BS >= 0
  k, v = (jnp.where(kept_BS[:, :, None, None], x.astype(f32), 0) for x in (k, v))

  q_BTKGH = q_BTNH.astype(f32).reshape(B, T, K, N // K, H)
  logits = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k, precision="highest").reshape(B, N, T, S)
  logits = static.scale * logits
  if static.softcap is not None:
    logits = static.softcap * jnp.tanh(logits / static.softcap)
  ids = (inputs.q_positions_BT[:, None, :, None], kv_positions_BS[:, None, None, :])
  if inputs.slopes_N is not None:
    logits -= inputs.slopes_N[None, :, None, None] * (ids[0] - ids[1]).astype(f32)

  seen = jnp.broadcast_to(kept_BS[:, None, None], logits.shape)
  if static.mask is not None:
    each = [mask.visible(*ids) for mask in static.mask.distinct]
    which = 0 if inputs.mask_N is None else inputs.mask_N[None, :, None, None]
    seen &= jnp.select([which == n for n in range(len(each))], each)
  sink_N = jnp.full((N,), -jnp.inf) if inputs.sink_N is None else inputs.sink_N
  sink = jnp.broadcast_to(sink_N[None, :, None, None], (B, N, T, 1))
  empty = ~jnp.any(seen, -1, keepdims=True)
  logits = jnp.where(seen, logits, jnp.where(empty, 0.0, -jnp.inf))  # no softmax of all -inf
  p = jax.nn.softmax(jnp.concatenate([logits, sink], -1), axis=-1)[..., :-1]
  p = jnp.where(empty, 0.0, p).reshape(B, K, N // K, T, S)
  o = jnp.einsum("bkgts,bsku->btkgu", p, v, precision="highest")
  return o.reshape(B, T, N, -1).astype(q_BTNH.dtype)
