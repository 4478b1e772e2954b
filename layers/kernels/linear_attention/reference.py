"""Linear attention, the specification: one token after the other in float32, plain autodiff.

Letters: B batch, T positions, N heads, H head size of queries and keys, U that of values.
"""

import jax
import jax.numpy as jnp

f32 = jnp.float32


def linear_attention(
  q_BTNH, k_BTNH, v_BTNU, decay, beta_BTN, run_BT, state_BNHU, *, scale, chunk, dtype
) -> tuple[jax.Array, jax.Array]:
  """Arguments as in the package, where None stands for a default; see there.

  Args:
    run_BT: how many documents have started before each token's own; None: there is one.
  """
  del chunk
  if run_BT is None:
    run_BT = jnp.zeros(q_BTNH.shape[:2], jnp.int32)
  starts_BT = jnp.diff(run_BT, axis=1, prepend=0) > 0
  tokens = (q_BTNH, k_BTNH, v_BTNU, decay, beta_BTN, starts_BT)
  tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)

  def step(state_BNHU, token):
    q_BNH, k_BNH, v_BNU, decay, beta_BN, starts_B = token
    q_BNH, k_BNH, v_BNU = (x.astype(f32) for x in (q_BNH, k_BNH, v_BNU))
    state_BNHU = jnp.where(starts_B[:, None, None, None], 0, state_BNHU)
    if decay is not None:
      decay_BNH = decay[..., None] if decay.ndim == 2 else decay
      state_BNHU = jnp.exp(decay_BNH)[..., None] * state_BNHU
    if beta_BN is not None:
      held_BNU = jnp.einsum("bnhu,bnh->bnu", state_BNHU, k_BNH, precision="highest")
      v_BNU = beta_BN[..., None] * (v_BNU - held_BNU)
    state_BNHU = state_BNHU + k_BNH[..., :, None] * v_BNU[..., None, :]
    return state_BNHU, jnp.einsum("bnhu,bnh->bnu", state_BNHU, q_BNH, precision="highest")

  state_BNHU, o_TBNU = jax.lax.scan(step, state_BNHU, tokens)
  return (scale * jnp.moveaxis(o_TBNU, 0, 1)).astype(dtype), state_BNHU
