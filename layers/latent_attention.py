"""Multi-head latent attention (MLA): keys and values of all heads from one small latent a token.

B batch, T positions of queries, S of a cache, D model width, N heads, H unrotated part of a head,
P rotated part, W value size, Z latent behind keys and values, Y latent behind queries.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from mesh.constrain import constrain

from .attention import Rows, cache_attention, cached_keys, rotate
from .cache import KVCache
from .context import Method, row_attention
from .linear import dense
from .masks import Causal
from .norms import Norm
from .params import declare, declare_projection, kernel_init
from .spec import InitSpec, LatentAttentionSpec


def latent_attention(
  q_BTNH: jax.Array,
  q_BTNP: jax.Array,
  latent_BTZ: jax.Array,
  key_BTP: jax.Array,
  w_key_ZNH: jax.Array,
  w_value_ZNW: jax.Array,
  *,
  scale: float | None = None,
  q_positions_BT: jax.Array,
  segments_BT: jax.Array | None = None,
  context_method: Method = "auto",
  implementation: str | None = None,
) -> jax.Array:
  """Causal attention on latents (DeepSeek-V2, arXiv 2405.04434, equations 9 to 19), [B, T, N, W].

  Head n has the key [latent @ w_key, key_BTP] and the value latent @ w_value, written out for a
  whole row.

  Args:
    q_BTNH, q_BTNP: unrotated and rotated part of the queries.
    latent_BTZ: normalised latents of the keys and values.
    key_BTP: the rotated key that all heads share.
    scale: factor on q . k; None is (H + P) ** -0.5.
    q_positions_BT, segments_BT, implementation: as for `attention`.
    context_method: see `layers.context.row_attention`.
  """
  N, P = q_BTNP.shape[2:]
  key_BTNP = jnp.broadcast_to(key_BTP[:, :, None], (*key_BTP.shape[:2], N, P))
  key_BTNP = constrain(key_BTNP, "act_batch", "act_seq", "act_heads", None)
  k_BTNH = checkpoint_name(dense(latent_BTZ, w_key_ZNH), "key")
  return row_attention(
    jnp.concatenate([q_BTNH, q_BTNP], axis=-1),
    jnp.concatenate([k_BTNH, key_BTNP], axis=-1),
    checkpoint_name(dense(latent_BTZ, w_value_ZNW), "value"),
    method=context_method,
    q_positions_BT=q_positions_BT,
    q_segments_BT=segments_BT,
    mask=Causal(),
    scale=_scale(scale, q_BTNH, q_BTNP),
    implementation=implementation,
  )


def absorbed_attention(
  q_BTNH: jax.Array,
  q_BTNP: jax.Array,
  cache: KVCache,
  w_key_ZNH: jax.Array,
  w_value_ZNW: jax.Array,
  *,
  scale: float | None = None,
  q_positions_BT: jax.Array,
  implementation: str | None = None,
) -> jax.Array:
  """`latent_attention` over a cache of latents, in which position s stands at index s.

  Keys and values are not written out: w_key moves to the queries and w_value to the results, so
  that all heads read [latent, rotated key] as one key and value (section 2.1.2), more arithmetic a
  pair but nothing of size S * N. What the rotated part adds to results is dropped: cutting it off
  the values first would copy the cache.

  Args:
    cache: its keys hold the latents and the rotated key [B, S, 1, Z + P], also of the queries' own
      positions; its values are empty.
    others: as for `latent_attention`.
  """
  dtype, Z = q_BTNH.dtype, w_key_ZNH.shape[0]
  w_key_ZNH, w_value_ZNW = (
    constrain(w.astype(dtype), None, "act_heads", None) for w in (w_key_ZNH, w_value_ZNW)
  )
  q_BTNZ = jnp.einsum("btnh,znh->btnz", q_BTNH, w_key_ZNH, preferred_element_type=jnp.float32)
  o = cache_attention(
    jnp.concatenate([q_BTNZ.astype(dtype), q_BTNP], axis=-1),
    cache,
    q_positions_BT=q_positions_BT,
    kv_positions_BS=None,
    mask=Causal(),
    scale=_scale(scale, q_BTNH, q_BTNP),
    implementation=implementation,
  )
  o_BTNW = jnp.einsum("btnz,znw->btnw", o[..., :Z], w_value_ZNW, preferred_element_type=jnp.float32)
  return o_BTNW.astype(dtype)


def _scale(scale: float | None, q_BTNH: jax.Array, q_BTNP: jax.Array) -> float:
  return (q_BTNH.shape[-1] + q_BTNP.shape[-1]) ** -0.5 if scale is None else scale


class LatentAttention(nn.Module):
  """Linen shell of `latent_attention`; `x -> (y, cache)`, as `layers.attention.Attention`.

  A cache holds the latent and the rotated key: Z + P numbers a position, whatever N is.

  Attributes:
    spec: sizes, positions, scale (`layers.spec.LatentAttentionSpec`).
    embed_dim: model width D.
    init_spec: initialisers.
    gain: factor on the initial output projection (depth scaling).
    context_method: how positions spread over devices meet, see `layers.context`.
  """

  spec: LatentAttentionSpec
  embed_dim: int
  init_spec: InitSpec = InitSpec()  # not `init`: every Linen module has that method
  gain: float = 1.0
  context_method: Method = "auto"

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, rows: Rows, cache: KVCache | None = None
  ) -> tuple[jax.Array, KVCache | None]:
    spec, N, H, W = self.spec, self.spec.num_heads, self.spec.nope_dim, self.spec.value_dim
    y = x_BTD if spec.q_lora is None else self._latent(x_BTD, "query", spec.q_lora)
    q = dense(y, self._heads("query", y.shape[-1], H + spec.rope_dim, declare_projection))
    q = checkpoint_name(constrain(q, "act_batch", "act_seq", "act_heads", None), "query")
    q_BTNP = rotate(q[..., H:], rows.positions_BT, spec.position)
    latent_BTZ = self._latent(x_BTD, "latent", spec.kv_lora)
    key_BTP = checkpoint_name(dense(x_BTD, self._down("rotary_key", spec.rope_dim)), "latent")
    key_BTP = rotate(key_BTP[:, :, None], rows.positions_BT, spec.position)[:, :, 0]
    weights = self._heads("key", spec.kv_lora, H), self._heads("value", spec.kv_lora, W)
    options = {
      "scale": spec.scale,
      "q_positions_BT": rows.positions_BT,
      "implementation": spec.implementation,
    }
    q_BTNH = q[..., :H]
    if cache is None:
      where = {"segments_BT": rows.segments_BT, "context_method": self.context_method}
      o_BTNW = latent_attention(q_BTNH, q_BTNP, latent_BTZ, key_BTP, *weights, **where, **options)
    else:
      new = jnp.concatenate([latent_BTZ, key_BTP], axis=-1)[:, :, None]
      cache, seen, _ = cached_keys(cache, new, new[..., :0], rows)
      o_BTNW = absorbed_attention(q_BTNH, q_BTNP, seen, *weights, **options)
    o_BTNW = constrain(o_BTNW, "act_batch", "act_seq", "act_heads", None)
    init = kernel_init(self.init_spec, N * W, self.gain)
    axes = ("heads", "head_dim", "embed")
    w_NWD = declare_projection(self, "out", (N, W, self.embed_dim), axes, init, num_in=2)
    return dense(o_BTNW, w_NWD, num_in=2), cache

  def _latent(self, x_BTD, name: str, width: int):
    down = checkpoint_name(dense(x_BTD, self._down(f"{name}_down", width)), "latent")
    return Norm(self.spec.norm, width, axis=None, name=f"{name}_norm")(down)

  def _down(self, name: str, width: int):
    D = self.embed_dim
    init = kernel_init(self.init_spec, D)
    return declare_projection(self, name, (D, width), ("embed", None), init)

  def _heads(self, name: str, width: int, size: int, make=declare):
    # A latent is what these matrices read, as others read the model width: it is sharded alike.
    axes = ("embed", "heads", "head_dim")
    shape = (width, self.spec.num_heads, size)
    return make(self, name, shape, axes, kernel_init(self.init_spec, width))
