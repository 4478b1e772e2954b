"""The experts' MLPs: over equal blocks of rows an expert, or over rows in groups of any size.

E experts, R rows, D model width, F expert width.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mesh.collectives import manual_size
from mesh.constrain import constrain

from .kernels.grouped_matmul import grouped_matmul, grouped_mlp
from .linear import dense, product_sharding
from .mlp import gated_activation
from .spec import Activation


class ExpertWeights(NamedTuple):
  """Stacked expert MLP weights; `gate` and biases may be None."""

  up_EDF: jax.Array
  down_EFD: jax.Array
  gate_EDF: jax.Array | None = None
  up_bias_EF: jax.Array | None = None
  gate_bias_EF: jax.Array | None = None
  down_bias_ED: jax.Array | None = None


class ExpertMath(NamedTuple):
  """What an expert computes, see `layers.mlp.gated_activation`."""

  activation: Activation = "silu"
  clamp: float | None = None
  up_offset: float = 0.0
  dropout: float = 0.0  # on hidden units (Switch, section 2.4: expert dropout)
  implementation: str | None = None  # of the grouped products

  def hidden(self, up: jax.Array, gate: jax.Array | None) -> jax.Array:
    return gated_activation(
      up, gate, activation=self.activation, clamp=self.clamp, up_offset=self.up_offset
    )


def expert_mlp(
  rows_ERD: jax.Array,
  weights: ExpertWeights,
  math: ExpertMath,
  weight_ER: jax.Array | None = None,
  seed_ER: jax.Array | None = None,
) -> jax.Array:
  """Each expert's MLP on its own block of rows; the same mathematics as `layers.mlp.mlp`.

  Args:
    weight_ER: float32 factor on each row's result; None is 1. It multiplies the hidden units, so
      that no gradient needs the result itself.
    seed_ER: uint32 of each row for the dropout; None is none.

  Returns:
    [E, R, D] in the dtype of the rows.
  """
  up_ERF = _blocks(rows_ERD, weights.up_EDF, weights.up_bias_EF)
  up_ERF = checkpoint_name(up_ERF, "expert_up")
  gate_ERF = None
  if weights.gate_EDF is not None:
    gate_ERF = _blocks(rows_ERD, weights.gate_EDF, weights.gate_bias_EF)
    gate_ERF = checkpoint_name(gate_ERF, "expert_gate")
  hidden_ERF = _drop(math.hidden(up_ERF, gate_ERF), math.dropout, seed_ER)
  hidden_ERF = _weighted(hidden_ERF, weight_ER)
  hidden_ERF = constrain(hidden_ERF, "act_expert", "act_batch", "act_mlp")
  out_ERD = _blocks(hidden_ERF, weights.down_EFD, None)
  bias_ED = _once(weights.down_bias_ED)
  if bias_ED is None:
    return out_ERD
  return out_ERD + _weighted(bias_ED[:, None].astype(out_ERD.dtype), weight_ER)


def _blocks(x_ERD, w_EDF, b_EF):
  spec = product_sharding(x_ERD, w_EDF, 1, 1)
  if spec is None:
    y_ERF = jax.vmap(dense)(x_ERD, w_EDF)
  else:
    w_EDF = w_EDF.astype(x_ERD.dtype)
    y_ERF = jnp.einsum(
      "erd,edf->erf", x_ERD, w_EDF, preferred_element_type=jnp.float32, out_sharding=spec
    ).astype(x_ERD.dtype)
  return y_ERF if b_EF is None else y_ERF + b_EF[:, None].astype(x_ERD.dtype)


def grouped_expert_mlp(
  rows_RD: jax.Array,
  size_E: jax.Array,
  weights: ExpertWeights,
  math: ExpertMath,
  weight_R: jax.Array | None = None,
  seed_R: jax.Array | None = None,
) -> jax.Array:
  """Each expert's MLP on its own run of rows: `size_E[0]` rows of expert 0, then of expert 1, ...

  Args:
    rows_RD: rows beyond the last run give zeros.
    size_E: int32.
    weight_R, seed_R: as in `expert_mlp`.

  Returns:
    [R, D] in the dtype of the rows.
  """
  implementation = math.implementation
  biased = weights.up_bias_EF is not None or weights.down_bias_ED is not None
  dropped = math.dropout > 0 and seed_R is not None
  if weights.gate_EDF is not None and not biased and not dropped:
    return grouped_mlp(
      rows_RD, weights.gate_EDF, weights.up_EDF, weights.down_EFD, size_E, _gate_first(math),
      weight_R=weight_R, implementation=implementation,
    )  # fmt: skip
  product = functools.partial(grouped_matmul, implementation=implementation)
  owner_RE = _owner(size_E, rows_RD) if biased else None
  up_RF = _biased(product(rows_RD, weights.up_EDF, size_E), weights.up_bias_EF, owner_RE)
  up_RF = checkpoint_name(up_RF, "expert_up")
  gate_RF = None
  if weights.gate_EDF is not None:
    gate_RF = product(rows_RD, weights.gate_EDF, size_E)
    gate_RF = checkpoint_name(_biased(gate_RF, weights.gate_bias_EF, owner_RE), "expert_gate")
  hidden_RF = _drop(math.hidden(up_RF, gate_RF), math.dropout, seed_R)
  out_RD = product(_weighted(hidden_RF, weight_R), weights.down_EFD, size_E)
  bias_ED = _once(weights.down_bias_ED)
  if bias_ED is None or owner_RE is None:
    return out_RD
  return out_RD + _weighted(dense(owner_RE, bias_ED), weight_R)


@functools.lru_cache(maxsize=64)
def _gate_first(math: ExpertMath) -> Callable[[jax.Array, jax.Array], jax.Array]:
  return lambda gate, up: math.hidden(up, gate)


def _owner(size_E: jax.Array, rows_RD: jax.Array) -> jax.Array:
  """[R, E]: 1 where a row is of an expert's run, else 0, in the dtype of the rows.

  Times biases it gives each row its own, and their gradient is a product: that of a gather would
  be a scatter of all rows, a tenth of gpt-oss-20b's step by the TPU compiler's cycles.
  """
  end_1E = jnp.expand_dims(jnp.cumsum(size_E), 0)
  row_R1 = jnp.expand_dims(jnp.arange(rows_RD.shape[0], dtype=jnp.int32), 1)
  return ((row_R1 >= end_1E - size_E[None]) & (row_R1 < end_1E)).astype(rows_RD.dtype)


def _biased(y_RF, b_EF, owner_RE):
  return y_RF if b_EF is None else y_RF + dense(owner_RE, b_EF)


def _weighted(y_RF, weight_R):
  """Rows times their weights, rounded once."""
  return y_RF if weight_R is None else (y_RF * weight_R[..., None]).astype(y_RF.dtype)


def _once(b_ED: jax.Array | None) -> jax.Array | None:
  """Devices along a manual `tensor` axis each hold part of the sum: one of them adds the bias."""
  if b_ED is None or manual_size("tensor") == 1:
    return b_ED
  return jnp.where(jax.lax.axis_index("tensor") == 0, b_ED, 0)


def _drop(hidden: jax.Array, rate: float, seed: jax.Array | None) -> jax.Array:
  """Dropout with one seed a row: it does not matter where a row is computed."""
  if rate == 0.0 or seed is None:
    return hidden
  ways, F = manual_size("tensor"), hidden.shape[-1]

  def keep(seed):
    return jax.random.bernoulli(jax.random.key(seed), 1.0 - rate, (F * ways,))

  keep_RF = jax.vmap(keep)(seed.reshape(-1))
  if ways > 1:
    keep_RF = jax.lax.dynamic_slice_in_dim(keep_RF, jax.lax.axis_index("tensor") * F, F, axis=1)
  return jnp.where(keep_RF.reshape(hidden.shape), hidden / (1.0 - rate), 0)
