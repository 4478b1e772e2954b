"""Token and position embeddings: what happens before the first block.

Dims: B batch, T positions, D model width, V vocabulary, W width of the token table.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from mesh.constrain import constrain

from .linear import dense, explicit_spec
from .noise import dropout_BTD
from .norms import Norm
from .params import declare, kernel_init
from .spec import EmbeddingSpec, InitSpec


def embed_tokens(ids_BT: jax.Array, table_VD: jax.Array, *, dtype: Any) -> jax.Array:
  """Rows of a table, as `dtype`; NaN for an id outside [0, V), so that it cannot go unnoticed.

  Serves learned positions too: `embed_tokens(positions_BT + offset, table)`.

  Args:
    ids_BT: integers of any shape.
    table_VD: [V, D].

  Returns:
    [B, T, D].
  """
  # Rows are cast, not the table: the gradient then sums the uses of a frequent token in float32.
  spec = explicit_spec(ids_BT)
  rows = table_VD.at[ids_BT].get(
    mode="fill",
    fill_value=float("nan"),
    wrap_negative_indices=False,
    out_sharding=None if spec is None else PartitionSpec(*spec, None),
  )
  return rows.astype(dtype)


class Embedding(nn.Module):
  """Tables of `spec` and their sum; `table` [V, W] may serve a tied head.

  A row is: token, times sqrt(D), projected to D, plus position, normalised, dropped out; each
  step only where `spec` asks for it.
  """

  spec: EmbeddingSpec
  vocab_size: int
  embed_dim: int
  init_spec: InitSpec  # not `init`: that is a method of every Linen module
  dtype: Any = jnp.float32

  def setup(self):
    spec, init, d = self.spec, self.init_spec, self.embed_dim
    width = d if spec.width is None else spec.width
    normal = nn.initializers.normal(init.embed_stddev)
    self.table = declare(self, "table", (self.vocab_size, width), ("vocab", "embed"), normal)
    if spec.width is not None:
      into = kernel_init(init, width)
      self.project_in = declare(self, "project_in", (width, d), (None, "embed"), into)
    if spec.position is not None:
      rows = spec.position.length + spec.position.offset
      self.position_table = declare(self, "position_table", (rows, d), (None, "embed"), normal)
    if spec.norm is not None:
      self.norm = Norm(spec.norm, d)

  def __call__(
    self,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    *,
    key_B: jax.Array | None = None,
    place_T: jax.Array | None = None,
  ) -> jax.Array:
    """Embed.

    Args:
      tokens_BT: token ids.
      positions_BT: position of each token; read only with a position table.
      key_B: one typed key a row for dropout, None for none.
      place_T: where in its row each position lies; None: in order.

    Returns:
      [B, T, D] in `dtype`.
    """
    spec = self.spec
    x_BTD = embed_tokens(tokens_BT, self.table, dtype=self.dtype)
    if spec.scale_by_sqrt_dim:
      # Gemma was trained with the factor itself rounded to the compute dtype.
      x_BTD = x_BTD * jnp.asarray(self.embed_dim**0.5, self.dtype)
    if spec.width is not None:
      x_BTD = dense(x_BTD, self.project_in)
    if spec.position is not None:
      rows_BT = positions_BT + spec.position.offset
      x_BTD = x_BTD + embed_tokens(rows_BT, self.position_table, dtype=self.dtype)
    x_BTD = constrain(x_BTD, "act_batch", "act_seq", "act_embed")
    if spec.norm is not None:
      x_BTD = self.norm(x_BTD)
    return dropout_BTD(x_BTD, spec.dropout, key_B, place_T)

  @nn.compact
  def to_table_width(self, x_BTD: jax.Array) -> jax.Array:
    """The last hidden state as a tied head needs it, [B, T, W]: OPT-350M's `project_out`."""
    spec, d = self.spec, self.embed_dim
    if spec.width is None:
      return x_BTD
    init = kernel_init(self.init_spec, d)
    return dense(x_BTD, declare(self, "project_out", (d, spec.width), ("embed", None), init))
