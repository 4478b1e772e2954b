"""Multi-head latent attention (MLA): keys and values of all heads from one small latent a token.

B batch, T query positions, S key positions, D model width, N heads, H unrotated part of a head,
P rotated part, W value size, Z latent behind keys and values, Y latent behind queries.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from mesh.constrain import constrain

from .attention import Rows, cache_attention, cached_keys, rotate
from .cache import KVCache, take_layer
from .context import Method, row_attention
from .linear import dense
from .masks import Causal
from .norms import Norm
from .params import declare, kernel_init
from .spec import InitSpec, LatentAttentionSpec


def latent_attention(
  q_BTNH: jax.Array,
  q_BTNP: jax.Array,
  latent_BSZ: jax.Array,
  key_BSP: jax.Array,
  w_key_ZNH: jax.Array,
  w_value_ZNW: jax.Array,
  *,
  scale: float | None = None,
  q_positions_BT: jax.Array,
  cached: bool = False,
  segments_BT: jax.Array | None = None,
  context_method: Method = "auto",
  implementation: str | None = None,
) -> jax.Array:
  """Causal attention on latents (DeepSeek-V2, arXiv 2405.04434, equations 9 to 19), [B, T, N, W].

  Head n has the key [latent @ w_key, key_BSP] and the value latent @ w_value. They are written
  out for a whole row. With `cached` (position s at index s) they are not: w_key moves to the
  queries and w_value to the results, so that all heads read the latents themselves as one key and
  value (section 2.1.2), more arithmetic a pair but nothing of size S * N.

  Args:
    q_BTNH, q_BTNP: unrotated and rotated part of the queries.
    latent_BSZ: normalised latents of the keys and values.
    key_BSP: the rotated key that all heads share.
    scale: factor on q . k; None is (H + P) ** -0.5.
    q_positions_BT, segments_BT, implementation: as for `attention`; segments only without a cache.
    cached: latents and keys are those of a cache, which also holds the queries' own.
    context_method: see `layers.context.row_attention`.
  """
  (N, H), P, dtype = q_BTNH.shape[2:], q_BTNP.shape[-1], q_BTNH.dtype
  if cached:
    w_key_ZNH, w_value_ZNW = (
      constrain(w.astype(dtype), None, "act_heads", None) for w in (w_key_ZNH, w_value_ZNW)
    )
    q_BTNZ = jnp.einsum("btnh,znh->btnz", q_BTNH, w_key_ZNH, preferred_element_type=jnp.float32)
    q = jnp.concatenate([q_BTNZ.astype(dtype), q_BTNP], axis=-1)
    k, v = jnp.concatenate([latent_BSZ, key_BSP], axis=-1)[:, :, None], latent_BSZ[:, :, None]
  else:
    key_BSNP = jnp.broadcast_to(key_BSP[:, :, None], (*key_BSP.shape[:2], N, P))
    key_BSNP = constrain(key_BSNP, "act_batch", "act_seq", "act_heads", None)
    k_BSNH = checkpoint_name(dense(latent_BSZ, w_key_ZNH), "key")
    q = jnp.concatenate([q_BTNH, q_BTNP], axis=-1)
    k = jnp.concatenate([k_BSNH, key_BSNP], axis=-1)
    v = checkpoint_name(dense(latent_BSZ, w_value_ZNW), "value")
  scale = (H + P) ** -0.5 if scale is None else scale
  options = {"mask": Causal(), "scale": scale, "implementation": implementation}
  if not cached:
    ids = {"q_positions_BT": q_positions_BT, "q_segments_BT": segments_BT}
    return row_attention(q, k, v, method=context_method, **ids, **options)
  o = cache_attention(
    q, KVCache(k, v), q_positions_BT=q_positions_BT, kv_positions_BS=None, **options
  )
  o_BTNW = jnp.einsum("btnz,znw->btnw", o, w_value_ZNW, preferred_element_type=jnp.float32)
  return o_BTNW.astype(dtype)


class LatentAttention(nn.Module):
  """Linen shell of `latent_attention`; `x -> (y, cache)`, as `layers.attention.Attention`.

  A cache holds the rotated key and the latent: P + Z numbers a position, whatever N is.

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
    q = dense(y, self._heads("query", y.shape[-1], H + spec.rope_dim))
    q = checkpoint_name(constrain(q, "act_batch", "act_seq", "act_heads", None), "query")
    q_BTNP = rotate(q[..., H:], rows.positions_BT, spec.position)
    latent_BTZ = self._latent(x_BTD, "latent", spec.kv_lora)
    key_BTP = checkpoint_name(dense(x_BTD, self._down("rotary_key", spec.rope_dim)), "latent")
    key_BTP = rotate(key_BTP[:, :, None], rows.positions_BT, spec.position)[:, :, 0]
    cached = cache is not None
    if cached:
      new = key_BTP[:, :, None], latent_BTZ[:, :, None]
      cache, seen, _ = cached_keys(cache, *new, rows)
      key_BTP, latent_BTZ = (x.astype(x_BTD.dtype)[:, :, 0] for x in take_layer(seen)[:2])
    o_BTNW = latent_attention(
      q[..., :H],
      q_BTNP,
      latent_BTZ,
      key_BTP,
      self._heads("key", spec.kv_lora, H),
      self._heads("value", spec.kv_lora, W),
      scale=spec.scale,
      q_positions_BT=rows.positions_BT,
      cached=cached,
      segments_BT=None if cached else rows.segments_BT,
      context_method=self.context_method,
      implementation=spec.implementation,
    )
    o_BTNW = constrain(o_BTNW, "act_batch", "act_seq", "act_heads", None)
    init = kernel_init(self.init_spec, N * W, self.gain)
    axes = ("heads", "head_dim", "embed")
    w_NWD = declare(self, "out", (N, W, self.embed_dim), axes, init)
    return dense(o_BTNW, w_NWD, num_in=2), cache

  def _latent(self, x_BTD, name: str, width: int):
    down = checkpoint_name(dense(x_BTD, self._down(f"{name}_down", width)), "latent")
    return Norm(self.spec.norm, width, axis=None, name=f"{name}_norm")(down)

  def _down(self, name: str, width: int):
    D = self.embed_dim
    return declare(self, name, (D, width), ("embed", None), kernel_init(self.init_spec, D))

  def _heads(self, name: str, width: int, size: int):
    # A latent is what these matrices read, as others read the model width: it is sharded alike.
    axes = ("embed", "heads", "head_dim")
    shape = (width, self.spec.num_heads, size)
    return declare(self, name, shape, axes, kernel_init(self.init_spec, width))
