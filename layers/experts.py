"""The experts' MLPs over rows already sorted by expert.

E experts, R rows an expert (all groups' slots), D model width, F expert width.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mesh.constrain import constrain

from .linear import dense, product_sharding
from .mlp import gated_activation
from .spec import Activation


def expert_mlp(
  rows_ERD: jax.Array,
  w_up_EDF: jax.Array,
  w_down_EFD: jax.Array,
  *,
  w_gate_EDF: jax.Array | None = None,
  b_up_EF: jax.Array | None = None,
  b_gate_EF: jax.Array | None = None,
  b_down_ED: jax.Array | None = None,
  activation: Activation = "silu",
  clamp: float | None = None,
  up_offset: float = 0.0,
) -> jax.Array:
  """Each expert's MLP on its own rows; the same mathematics as `layers.mlp.mlp`."""
  up_ERF = _grouped(rows_ERD, w_up_EDF, b_up_EF)
  gate_ERF = None if w_gate_EDF is None else _grouped(rows_ERD, w_gate_EDF, b_gate_EF)
  up_ERF = checkpoint_name(up_ERF, "expert_up")
  if gate_ERF is not None:
    gate_ERF = checkpoint_name(gate_ERF, "expert_gate")
  hidden_ERF = gated_activation(
    up_ERF, gate_ERF, activation=activation, clamp=clamp, up_offset=up_offset
  )
  hidden_ERF = constrain(hidden_ERF, "act_expert", "act_batch", "act_mlp")
  return checkpoint_name(_grouped(hidden_ERF, w_down_EFD, b_down_ED), "expert_down")


def _grouped(x_ERD, w_EDF, b_EF):
  spec = product_sharding(x_ERD, w_EDF, 1, 1)
  if spec is None:
    y_ERF = jax.vmap(dense)(x_ERD, w_EDF)
  else:
    w_EDF = w_EDF.astype(x_ERD.dtype)
    y_ERF = jnp.einsum(
      "erd,edf->erf", x_ERD, w_EDF, preferred_element_type=jnp.float32, out_sharding=spec
    ).astype(x_ERD.dtype)
  return y_ERF if b_EF is None else y_ERF + b_EF[:, None].astype(x_ERD.dtype)
