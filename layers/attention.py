"""Multi-head self-attention: project, normalise, rotate, attend, project back.

B batch, T query positions, S key positions, D model width, N query heads, K key/value heads,
H head size, U distance buckets, P distances.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from mesh.constrain import constrain, dim_axes

from .cache import KVCache, roll_cache, slot_positions, take_layer, update_cache
from .context import Method, row_attention
from .kernels.attention import Alibi, Bucketed, RelativeKeys, attention
from .kernels.attention.blocks import reach_of
from .kernels.decode_attention import decode_attention
from .linear import dense
from .masks import BlockLocal, Causal, Full, Local, Mask, PerHead, parse_mask
from .norms import Norm
from .params import declare, declare_projection, kernel_init
from .positions import alibi_slopes, apply_rotary, rotary_table, sinusoids
from .spec import (
  AlibiSpec,
  AttentionSpec,
  BucketedSpec,
  InitSpec,
  LatentAttentionSpec,
  RotarySpec,
  TransformerXLSpec,
)


class Rows(NamedTuple):
  """What every layer needs to know of the rows besides their values."""

  positions_BT: jax.Array  # int32, from 0 in each document
  segments_BT: jax.Array | None = None  # int32, 0 is padding; None: one document a row
  key_B: jax.Array | None = None  # one typed PRNG key a row; None: no jitter, no dropout
  table_UN: jax.Array | None = None  # shared distance-bucket table
  place_T: jax.Array | None = None  # int32, where in its row each position lies; None: in order
  tokens_BT: jax.Array | None = None  # int32 token ids, if a router reads them

  @property
  def valid_BT(self) -> jax.Array | None:  # noqa: N802 (an array, named as one)
    return None if self.segments_BT is None else self.segments_BT > 0


def causal_mask(
  window: int | None = None, chunk: int | None = None, also: Mask | PerHead | None = None
) -> Mask | PerHead:
  """The mask of a decoder layer: causal, and local, block-local or what else is asked."""
  mask = Causal()
  if window is not None:
    mask = mask & Local(window - 1)
  if chunk is not None:
    mask = mask & BlockLocal(chunk)
  if isinstance(also, PerHead):
    return PerHead(tuple(mask & other for other in also.masks))
  return mask if also is None else mask & also


def layer_mask(spec: AttentionSpec | LatentAttentionSpec) -> Mask | PerHead:
  """The mask of a layer."""
  if isinstance(spec, LatentAttentionSpec):
    return causal_mask()
  mask = parse_mask(spec.mask) if spec.mask else None
  return causal_mask(spec.window, spec.chunk, mask) if spec.causal else mask or Full()


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, spec: RotarySpec) -> jax.Array:
  """Queries or keys turned by their positions as `spec` says."""
  inv_freq, factor = rotary_table(spec, x_BTNH.shape[-1])
  return apply_rotary(
    x_BTNH, positions_BT, inv_freq, interleaved=spec.interleaved, attention_factor=factor
  )


def cached_keys(
  cache: KVCache, key_BTKH: jax.Array, value_BTKH: jax.Array, rows: Rows, before: int | None = None
) -> tuple[KVCache, KVCache, jax.Array | None]:
  """The cache with new positions in it, and keys and values to attend to with their positions.

  Args:
    before: how far back the mask sees; None: all the way.

  Returns:
    What to attend to is the cache itself where it holds all of that. Positions [B, S] are -1 of
    what is no key, and None where position s stands at index s.
  """
  start_B, (T, S) = rows.positions_BT[:, 0], (key_BTKH.shape[1], cache.slots)
  if before is None or T == 1:
    cache = update_cache(cache, key_BTKH, value_BTKH, start_B)
    return cache, cache, None if before is None else slot_positions(start_B, S)
  # New positions may take the places of those that the first of them still see.
  valid_BT = rows.valid_BT
  if valid_BT is None:
    valid_BT = jnp.ones_like(rows.positions_BT, bool)
  new = jnp.where(valid_BT, rows.positions_BT, -1)
  positions_BS = jnp.concatenate([slot_positions(start_B - 1, S), new], 1)
  place = lambda x: constrain(x, "cache_batch", None, "cache_heads", None)
  join = lambda old, new: jnp.concatenate([place(old.astype(new.dtype)), place(new)], 1)
  old_key_BSKH, old_value_BSKH, _ = take_layer(cache)
  seen = KVCache(join(old_key_BSKH, key_BTKH), join(old_value_BSKH, value_BTKH))
  return roll_cache(cache, key_BTKH, value_BTKH, start_B, valid_BT.sum(1)), seen, positions_BS


FEW_TOKENS = 16  # a row at most for `decode_attention`


def cache_attention(
  q_BTNH: jax.Array,
  cache: KVCache,
  *,
  q_positions_BT: jax.Array,
  kv_positions_BS: jax.Array | None,
  bias: Alibi | Bucketed | RelativeKeys | None = None,
  **options: Any,
) -> jax.Array:
  """Of new tokens over what `cached_keys` gives.

  By `decode_attention` where tokens are few and the bias allows it, whose time follows the keys
  that rows can see. Where values are empty, the keys serve as values. `options` are those that it
  shares with `attention`.
  """
  (B, T), S = q_positions_BT.shape, cache.slots
  if T > FEW_TOKENS or not (bias is None or isinstance(bias, Alibi)):
    ids = {"q_positions_BT": q_positions_BT, "kv_positions_BS": kv_positions_BS}
    if kv_positions_BS is None:
      ids["kv_positions_BS"] = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    else:
      ids["q_segments_BT"] = jnp.ones_like(q_positions_BT)
      ids["kv_segments_BS"] = (kv_positions_BS >= 0).astype(jnp.int32)
    k_BSKH, v_BSKH = (x.astype(q_BTNH.dtype) for x in take_layer(cache)[:2])
    v_BSKH = v_BSKH if v_BSKH.size else k_BSKH
    return attention(q_BTNH, k_BSKH, v_BSKH, bias=bias, **ids, **options)
  k, v, layer = cache
  whole = jnp.full_like(q_positions_BT[:, 0], S)
  return decode_attention(
    q_BTNH,
    k,
    v if v.size else None,
    layer=layer,
    q_positions_BT=q_positions_BT,
    kv_positions_BS=kv_positions_BS,
    lengths_B=q_positions_BT[:, 0] + T if kv_positions_BS is None else whole,
    alibi_slopes_N=None if bias is None else bias.slopes_N,
    cache_axes=dim_axes("cache_batch", "cache_seq", "cache_heads", shape=(B, S, q_BTNH.shape[2])),
    **options,
  )


class Attention(nn.Module):
  """Linen shell: projections and what the spec adds to them; `x -> (y, cache)`.

  Attributes:
    spec: heads, positions, masks, caps (`layers.spec.AttentionSpec`).
    embed_dim: model width D.
    init_spec: initialisers.
    gain: factor on the initial output projection (depth scaling).
    context_method: how positions spread over devices meet, see `layers.context`.
  """

  spec: AttentionSpec
  embed_dim: int
  init_spec: InitSpec = InitSpec()  # not `init`: every Linen module has that method
  gain: float = 1.0
  context_method: Method = "auto"

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, rows: Rows, cache: KVCache | None = None
  ) -> tuple[jax.Array, KVCache | None]:
    spec = self.spec
    q_BTNH = self._project(x_BTD, "query", spec.num_heads, "heads")
    k_BTKH = self._project(x_BTD, "key", spec.kv_heads, "kv_heads")
    v_BTKH = self._project(x_BTD, "value", spec.kv_heads, "kv_heads")
    if spec.qk_norm is not None:
      q_BTNH = Norm(spec.qk_norm, spec.head_dim, axis=None, name="query_norm")(q_BTNH)
      k_BTKH = Norm(spec.qk_norm, spec.head_dim, axis=None, name="key_norm")(k_BTKH)
    if isinstance(spec.position, RotarySpec):
      q_BTNH = rotate(q_BTNH, rows.positions_BT, spec.position)
      k_BTKH = rotate(k_BTKH, rows.positions_BT, spec.position)
    q_BTNH, k_BTKH = checkpoint_name(q_BTNH, "query"), checkpoint_name(k_BTKH, "key")
    v_BTKH = checkpoint_name(v_BTKH, "value")
    if cache is None:
      where = {"q_segments_BT": rows.segments_BT, "method": self.context_method}
      length = k_BTKH.shape[1]
      attend = lambda q_BTNH, **more: row_attention(q_BTNH, k_BTKH, v_BTKH, **where, **more)
    else:
      before, _ = reach_of(layer_mask(spec))
      cache, seen, kv_positions = cached_keys(cache, k_BTKH, v_BTKH, rows, before)
      length = seen.slots
      attend = partial(cache_attention, cache=seen, kv_positions_BS=kv_positions)
    q_BTNH, bias = self._bias(q_BTNH, rows, length)
    sink_N = None
    if spec.sink:
      sink_N = declare(self, "sink", (spec.num_heads,), ("heads",), nn.initializers.zeros)
    o_BTNH = attend(
      q_BTNH,
      mask=layer_mask(spec),
      q_positions_BT=rows.positions_BT,
      scale=spec.scale,
      softcap=spec.softcap,
      bias=bias,
      sink_N=sink_N,
      implementation=spec.implementation,
    )
    o_BTNH = constrain(o_BTNH, "act_batch", "act_seq", "act_heads", None)
    return self._output(checkpoint_name(o_BTNH, "attention_out")), cache

  def _project(self, x_BTD, name: str, heads: int, axis: str):
    D, H = self.embed_dim, self.spec.head_dim
    init = kernel_init(self.init_spec, D)
    w_DNH = declare_projection(self, name, (D, heads, H), ("embed", axis, "head_dim"), init)
    y_BTNH = dense(x_BTD, w_DNH)
    if self.spec.qkv_bias:
      shape, axes = (heads, H), (axis, "head_dim")
      b_NH = declare(self, f"{name}_bias", shape, axes, nn.initializers.zeros)
      y_BTNH = y_BTNH + jnp.expand_dims(b_NH, (0, 1)).astype(y_BTNH.dtype)
    kind = "act_heads" if axis == "heads" else "act_kv_heads"
    return constrain(y_BTNH, "act_batch", "act_seq", kind, None)

  def _output(self, o_BTNH):
    N, H, D = self.spec.num_heads, self.spec.head_dim, self.embed_dim
    init = kernel_init(self.init_spec, N * H, self.gain)
    axes = ("heads", "head_dim", "embed")
    w_NHD = declare_projection(self, "out", (N, H, D), axes, init, num_in=2)
    y_BTD = dense(o_BTNH, w_NHD, num_in=2)
    if self.spec.out_bias:
      b_D = declare(self, "out_bias", (D,), ("norm",), nn.initializers.zeros)
      y_BTD = y_BTD + jnp.expand_dims(b_D, (0, 1)).astype(y_BTD.dtype)
    return y_BTD

  def _bias(self, q_BTNH, rows: Rows, length: int):
    """The position-dependent term of the logits, and the queries it leaves for the content."""
    spec, N, H = self.spec, self.spec.num_heads, self.spec.head_dim
    zeros = nn.initializers.zeros
    if isinstance(spec.position, AlibiSpec):
      return q_BTNH, Alibi(jnp.asarray(alibi_slopes(N), jnp.float32))
    if isinstance(spec.position, BucketedSpec):
      p = spec.position
      table_UN = rows.table_UN if p.shared else bucket_table(self, p, N)
      if table_UN is None:
        raise ValueError("attention with a shared bucket table needs it: Rows(table_UN=...)")
      return q_BTNH, Bucketed(table_UN, p.max_distance, p.bidirectional)
    if isinstance(spec.position, TransformerXLSpec):
      D = self.embed_dim
      axes = ("embed", "heads", "head_dim")
      w_DNH = declare(self, "relative", (D, N, H), axes, kernel_init(self.init_spec, D))
      r_PD = jnp.asarray(sinusoids(length, D), q_BTNH.dtype)
      r_PNH = dense(r_PD, w_DNH)
      q_content = q_position = q_BTNH
      if spec.position.biases:
        u_NH = declare(self, "content_bias", (N, H), ("heads", "head_dim"), zeros)
        v_NH = declare(self, "position_bias", (N, H), ("heads", "head_dim"), zeros)
        q_content = q_BTNH + jnp.expand_dims(u_NH, (0, 1)).astype(q_BTNH.dtype)
        q_position = q_BTNH + jnp.expand_dims(v_NH, (0, 1)).astype(q_BTNH.dtype)
      return q_content, RelativeKeys(q_position, r_PNH)
    return q_BTNH, None


def bucket_table(module: nn.Module, spec: BucketedSpec, num_heads: int) -> jax.Array:
  """Declare T5's table [U, N] on `module`."""
  init = nn.initializers.normal(0.02)
  return declare(module, "bucket_table", (spec.num_buckets, num_heads), (None, "heads"), init)
