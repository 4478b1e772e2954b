"""The loss of a batch of tokens: cross-entropy with the head, on one device or on a mesh.

B batch, T positions, D model width, V vocabulary.
"""

import math
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from mesh.constrain import constrain
from mesh.region import Region, make_whole

from .kernels.cross_entropy import CrossEntropy, cross_entropy


def token_loss(
  x_BTD: jax.Array,
  w: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  *,
  region: Region | None,
  w_axes: tuple[str, str],
  bias_V: jax.Array | None = None,
  **options: Any,
) -> CrossEntropy:
  """`cross_entropy` of each device's own tokens, summed over devices.

  In a region the head is gathered once, in the dtype of x, and its gradient scattered in float32.
  Pipeline stages, which all hold the last hidden states, take a share of the positions each (not
  under Explicit axes: the losses would lie otherwise than the targets they belong to).

  Args:
    region: see `mesh.region`; None leaves placement to the compiler.
    w_axes: the logical axes of `w`.
    options: of `cross_entropy`.
  """
  if region is None:
    return cross_entropy(x_BTD, w, targets_BT, weights_BT, bias_V=bias_V, **options)
  sizes, positions = region.sizes, region.positions
  explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
  if "stage" in sizes and not explicit:
    shares = math.prod(sizes[a] for a in (*positions, "stage"))
    positions += ("stage",) * (targets_BT.shape[1] % shares == 0)
  tokens = region.rows + positions
  by_token = PartitionSpec(region.rows or None, positions or None)

  def local(x_BTD, w, bias_V, targets_BT, weights_BT):
    w = make_whole(region._replace(positions=positions), w, w_axes, x_BTD.dtype)
    loss = cross_entropy(x_BTD, w, targets_BT, weights_BT, bias_V=bias_V, **options)
    return jax.lax.psum(loss.total, tokens), loss.nll_BT, loss.log_z_BT

  x_BTD = constrain(x_BTD, "act_batch", "act_seq", "act_embed")
  bias_spec = None if bias_V is None else PartitionSpec()
  run = region.run(
    local,
    in_specs=(by_token, region.spec(w_axes), bias_spec, by_token, by_token),
    out_specs=(PartitionSpec(), by_token, by_token),
  )
  return CrossEntropy(*run(x_BTD, w, bias_V, targets_BT, weights_BT))
