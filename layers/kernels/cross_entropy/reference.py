"""Cross-entropy, the specification: whole logits in float32, plain autodiff.

Letters: B batch, T positions, D model width, V vocabulary.
"""

import jax
import jax.numpy as jnp


def cross_entropy(
  x_BTD, w_DV, bias_V, targets_BT, weights_BT, *, scale, softcap, z_loss, tied, shards
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Total, negative log-likelihood and log Z; arguments as in the package."""
  del shards
  x_BTD, w_DV = x_BTD.astype(jnp.float32), w_DV.astype(jnp.float32)
  logits_BTV = jnp.matmul(x_BTD, w_DV.T if tied else w_DV, precision="highest")
  if bias_V is not None:
    logits_BTV = logits_BTV + bias_V.astype(jnp.float32)[None, None]
  logits_BTV = scale * logits_BTV
  if softcap is not None:
    logits_BTV = softcap * jnp.tanh(logits_BTV / softcap)
  log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  nll_BT = log_z_BT - jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
  return jnp.sum(weights_BT * (nll_BT + z_loss * log_z_BT**2)), nll_BT, log_z_BT
