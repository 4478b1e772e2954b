"""The residual block: attention, then an MLP or experts.

B batch, T positions, D model width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from mesh.constrain import constrain

from .attention import Attention, Rows
from .cache import KVCache, LinearState
from .context import Method
from .latent_attention import LatentAttention
from .linear_attention import LinearAttention
from .mlp import Mlp
from .moe import MoeStats, SwitchMoE
from .noise import dropout_BTD, fold
from .norms import Norm
from .spec import InitSpec, LatentAttentionSpec, LayerSpec, LinearAttentionSpec, MoeSpec


class Block(nn.Module):
  """One decoder layer; `x -> (x, MoeStats or None, cache)`.

  Norms stand before each branch ("pre"), after each residual sum ("post"), or on both sides of
  each branch ("both", Gemma 2); a parallel block reads one norm for both branches.

  Attributes:
    spec: the layer (`layers.spec.LayerSpec`).
    embed_dim: model width D.
    init_spec: initialisers.
    gain: factor on the initial weights that write to the residual (depth scaling).
    context_method: how positions spread over devices meet, see `layers.context`.
  """

  spec: LayerSpec
  embed_dim: int
  init_spec: InitSpec = InitSpec()  # not `init`: every Linen module has that method
  gain: float = 1.0
  context_method: Method = "auto"

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    rows: Rows,
    cache: KVCache | LinearState | None = None,
    *,
    train: bool = False,
  ) -> tuple[jax.Array, MoeStats | None, KVCache | LinearState | None]:
    spec = self.spec
    norm = lambda name: Norm(spec.norm, self.embed_dim, name=name)
    place = lambda x: constrain(x, "act_batch", "act_norm_seq", "act_embed")
    gather = lambda x: constrain(x, "act_batch", "act_seq", "act_embed")
    x_BTD = place(x_BTD)

    if spec.parallel:
      h_BTD = gather(norm("norm")(x_BTD))
      a_BTD, cache = self._attend(h_BTD, rows, cache)
      m_BTD, stats = self._mlp(h_BTD, rows, train)
      return x_BTD + place(self._drop(a_BTD + m_BTD, rows, 0)), stats, cache

    before = spec.norm_placement in ("pre", "both")
    after = spec.norm_placement == "both"
    with jax.named_scope("attention"):
      h_BTD = gather(norm("attention_norm")(x_BTD) if before else x_BTD)
      a_BTD, cache = self._attend(h_BTD, rows, cache)
      a_BTD = norm("attention_post_norm")(place(a_BTD)) if after else place(a_BTD)
      x_BTD = x_BTD + self._drop(a_BTD, rows, 0)
      if spec.norm_placement == "post":
        x_BTD = norm("attention_norm")(x_BTD)
    with jax.named_scope("mlp"):
      h_BTD = gather(norm("mlp_norm")(x_BTD) if before else x_BTD)
      m_BTD, stats = self._mlp(h_BTD, rows, train)
      m_BTD = norm("mlp_post_norm")(place(m_BTD)) if after else place(m_BTD)
      x_BTD = x_BTD + self._drop(m_BTD, rows, 1)
      if spec.norm_placement == "post":
        x_BTD = norm("mlp_norm")(x_BTD)
    return x_BTD, stats, cache

  def _attend(self, h_BTD, rows: Rows, cache: Any):
    spec = self.spec.attention
    common = (self.embed_dim, self.init_spec, self.gain, self.context_method)
    if isinstance(spec, LatentAttentionSpec):
      attention = LatentAttention(spec, *common, name="attention")
    elif isinstance(spec, LinearAttentionSpec):
      attention = LinearAttention(spec, *common[:3], name="attention")
    else:
      attention = Attention(spec, *common, name="attention")
    a_BTD, cache = attention(h_BTD, rows, cache)
    return checkpoint_name(a_BTD, "attention_branch"), cache

  def _mlp(self, h_BTD, rows: Rows, train: bool):
    if not isinstance(self.spec.mlp, MoeSpec):
      mlp = Mlp(self.spec.mlp, self.embed_dim, self.init_spec, self.gain, name="mlp")
      return checkpoint_name(mlp(h_BTD), "mlp_branch"), None
    key_B = None if rows.key_B is None else fold(rows.key_B, 2)
    moe = SwitchMoE(self.spec.mlp, self.embed_dim, self.init_spec, self.gain, name="moe")
    m_BTD, stats = moe(
      h_BTD,
      valid_BT=rows.valid_BT,
      tokens_BT=rows.tokens_BT,
      key_B=key_B,
      place_T=rows.place_T,
      train=train,
    )
    return checkpoint_name(m_BTD, "mlp_branch"), stats

  def _drop(self, x_BTD, rows: Rows, branch: int):
    if rows.key_B is None or self.spec.dropout == 0:
      return x_BTD
    return dropout_BTD(x_BTD, self.spec.dropout, fold(rows.key_B, branch), rows.place_T)


def smallest_inputs(spec: LayerSpec, embed_dim: int) -> tuple[jax.Array, Rows]:
  """(x [1, 1, D], rows): one position, enough to declare a layer's weights."""
  position: Any = spec.attention.position
  shared = getattr(position, "shared", False)  # of a BucketedSpec
  table_UN = jnp.zeros((position.num_buckets, spec.attention.num_heads)) if shared else None
  one_11 = jnp.zeros((1, 1), jnp.int32)
  return jnp.zeros((1, 1, embed_dim)), Rows(one_11, table_UN=table_UN, tokens_BT=one_11)


@functools.lru_cache(maxsize=256)
def abstract_block(spec: LayerSpec, embed_dim: int) -> dict[str, Any]:
  """Parameters of a layer as boxed `ShapeDtypeStruct`s; models share them."""
  zeros = InitSpec("normal", stddev=0.0)  # the quickest to trace
  block = Block(spec, embed_dim, zeros, parent=None)
  draw = lambda: block.init(jax.random.key(0), *smallest_inputs(spec, embed_dim))
  return jax.eval_shape(draw)["params"]  # inputs and key as well: nothing is compiled
