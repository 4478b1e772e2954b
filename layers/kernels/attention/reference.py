"""Attention, the specification: whole logits in float32, plain autodiff.

Letters: B batch, T query positions, S key positions, N query heads, K key/value heads, G = N // K,
H head size.
"""

import jax
import jax.numpy as jnp

from .bias import term

f32 = jnp.float32


def attention(
  q_BTNH, k_BSKH, v_BSKH, q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS, bias,
  sink_N, mask_N, *, mask, scale, softcap, order,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
  """Arguments as in the package, where None stands for a default; see there."""
  (B, T, N, H), K, S = q_BTNH.shape, k_BSKH.shape[2], k_BSKH.shape[1]
  if kv_positions_BS is None:
    kv_positions_BS = q_positions_BT
  q_BTKGH = q_BTNH.astype(f32).reshape(B, T, K, N // K, H)
  logits = scale * jnp.einsum(
    "btkgh,bskh->bkgts", q_BTKGH, k_BSKH.astype(f32), precision="highest"
  ).reshape(B, N, T, S)
  if softcap is not None:
    logits = softcap * jnp.tanh(logits / softcap)
  if bias is not None:
    logits = logits + term(bias, q_positions_BT, kv_positions_BS, scale=scale)

  del order
  visible_BTS = jnp.ones((1, T, S), bool)
  if q_segments_BT is not None:
    visible_BTS &= (q_segments_BT[:, :, None] == kv_segments_BS[:, None, :]) & (q_segments_BT > 0)[
      :, :, None
    ]
  visible = jnp.broadcast_to(visible_BTS[:, None], logits.shape)
  if mask is not None:
    ids = (q_positions_BT[:, None, :, None], kv_positions_BS[:, None, None, :])
    each = [m.visible(*ids) for m in mask.distinct]
    which = 0 if mask_N is None else mask_N[None, :, None, None]
    visible &= jnp.select([which == n for n in range(len(each))], each)

  sink = jnp.full((N,), -jnp.inf) if sink_N is None else sink_N.astype(f32)
  sink = jnp.broadcast_to(sink[None, :, None, None], (B, N, T, 1))
  empty = ~jnp.any(visible, -1, keepdims=True)
  logits = jnp.where(visible, logits, jnp.where(empty, 0.0, -jnp.inf))  # no softmax of all -inf
  logits = jnp.concatenate([logits, sink], -1)
  lse = jnp.where(empty[..., 0], sink[..., 0], jax.nn.logsumexp(logits, axis=-1))
  p = jax.nn.softmax(logits, axis=-1)[..., :-1]
  p = jnp.where(empty, 0.0, p).reshape(B, K, N // K, T, S)
  o = jnp.einsum("bkgts,bskh->btkgh", p, v_BSKH.astype(f32), precision="highest")
  return o.reshape(B, T, N, -1).astype(q_BTNH.dtype), lse.swapaxes(1, 2)
