"""Attention on any platform: one dense block if it is small, otherwise block by block.

Blockwise: a scan over blocks of queries and, inside, loops over those blocks of keys that the mask
leaves (`blocks`), first where it cuts and then where it does not, with a running maximum and sum
(FlashAttention, arXiv 2205.14135; backward with delta = rowsum(dO * O) as in arXiv 2307.08691).
Neither direction holds more than one block of logits.

Letters: B batch (1 in positions that all rows share), T query positions, S key positions,
N query heads, K key/value heads, G = N // K, H head size. In blockwise parts T and S count within
a block and arrays lead with the number of blocks (`_blocks`).
"""

import functools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ..partition import free_axes, vary_with
from ..select import current_platform
from .bias import join_rows, split_rows, term
from .blocks import (
  FULL,
  PARTIAL,
  Order,
  block_kinds,
  by_position,
  for_all,
  kinds_at_run_time,
  masks_of,
  ranges,
  shown,
  visits,
)

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite: differences of it are not NaN

f32 = jnp.float32


class Heads(NamedTuple):
  """What each query head has of its own."""

  sink_N: jax.Array | None = None
  mask_N: jax.Array | None = None  # int32, which of the distinct masks


class _Static(NamedTuple):
  mask: Any
  scale: float
  softcap: float | None
  own_row: bool  # keys are the queries' row: distances follow from indices
  order: Order
  length: int  # T
  num_keys: int  # S
  q_block: int
  kv_block: int

  @property
  def masks(self) -> tuple[Any, ...]:
    return masks_of(self.mask)

  def at_run_time(self, segments: jax.Array | None) -> bool:
    """Whether the program finds out which blocks to visit, by positions and segments.

    Not where the compiler spreads arrays: rows on different devices would have to agree.
    """
    told = segments is not None or any(by_position(mask, self.order) for mask in self.masks)
    return told and not free_axes()


def attention(
  q_BTNH, k_BSKH, v_BSKH, q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS, bias,
  sink_N, mask_N, *, mask, scale, softcap, order,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
  """Arguments as in the package, where None stands for a default; see there."""
  T, S = q_BTNH.shape[1], k_BSKH.shape[1]
  own_row = kv_positions_BS is None
  if own_row:
    kv_positions_BS = q_positions_BT
  static = _static(q_BTNH, k_BSKH, mask, scale, softcap, own_row, order)
  q_ids, kv_ids = (q_positions_BT, q_segments_BT), (kv_positions_BS, kv_segments_BS)
  arguments = (q_BTNH, k_BSKH, v_BSKH, bias, Heads(sink_N, mask_N), q_ids, kv_ids)
  if block_size() ** 2 >= T * S:
    return _dense(static, *arguments)
  o_BTNH, lse_BTN = _blockwise(static, *arguments)
  return o_BTNH, _as_infinity(lse_BTN)


def forward(
  q_BTNH, k_BSKH, v_BSKH, bias, sink_N, q_ids, kv_ids, *, mask, scale, softcap, own_row=False
) -> tuple[jax.Array, jax.Array]:
  """Part of an attention over more keys than these: o in float32 and log-sum-exp [B, T, N].

  Every implementation with a `forward` and a `backward` can pass round a ring.

  Args:
    q_ids, kv_ids: (positions, segments or None).
    own_row: the keys are the queries' own row, in the order of positions.
  """
  static = _static(q_BTNH, k_BSKH, mask, scale, softcap, own_row)
  o_BTNH, lse_BTN = _forward_blocks(
    static, q_BTNH, k_BSKH, v_BSKH, bias, Heads(sink_N), q_ids, kv_ids, dtype=f32
  )
  return o_BTNH, _as_infinity(lse_BTN)


def backward(
  q_BTNH, k_BSKH, v_BSKH, bias, sink_N, q_ids, kv_ids, o_BTNH, lse_BTN, do_BTNH, *,
  mask, scale, softcap, own_row=False,
) -> tuple[Any, ...]:  # fmt: skip
  """What these keys contribute to the gradients by q, k, v, bias and sinks.

  `o_BTNH` and `lse_BTN` are those over all keys.
  """
  static = _static(q_BTNH, k_BSKH, mask, scale, softcap, own_row)
  lse_BTN = jnp.where(jnp.isneginf(lse_BTN), -MASKED, lse_BTN)
  residuals = (q_BTNH, k_BSKH, v_BSKH, bias, Heads(sink_N), q_ids, kv_ids, o_BTNH, lse_BTN)
  *gradients, dheads = _backward(static, residuals, (do_BTNH, jnp.zeros_like(lse_BTN)))[:5]
  return *gradients, dheads.sink_N


def _as_infinity(lse: jax.Array) -> jax.Array:
  """-inf where a query saw no key, which is -MASKED inside."""
  return jnp.where(lse > -MASKED / 2, -jnp.inf, lse)


def _static(q_BTNH, k_BSKH, mask, scale, softcap, own_row, order: Order = "gaps") -> "_Static":
  block, T, S = block_size(), q_BTNH.shape[1], k_BSKH.shape[1]
  if not own_row:
    order = "any"
  return _Static(
    mask, scale, softcap, own_row, order, T, S, _even_block(T, block), _even_block(S, block)
  )


def block_size() -> int:
  """Queries, and keys, a block; up to its square of logits a head are one dense block."""
  return 256 if current_platform() == "cpu" else 512  # CPU: a block of all heads stays in cache


def _even_block(length: int, block: int) -> int:
  """At most `block`: the smallest multiple of 8 that needs as few blocks."""
  blocks = -(-length // block)
  return min(block, -(-length // (8 * blocks)) * 8)


def _logits(static, products_BKGTS, rows_BTNH, shared, q_positions_BT, kv_positions_BS, offset):
  """From q . k to logits: scale, cap, bias."""
  logits = static.scale * products_BKGTS
  if static.softcap is not None:
    logits = static.softcap * jnp.tanh(logits / static.softcap)
  bias = join_rows(rows_BTNH, shared)
  if bias is None:
    return logits
  bias_BNTS = term(bias, q_positions_BT, kv_positions_BS, scale=static.scale, offset=offset)
  _, K, G, T, S = logits.shape
  return logits + bias_BNTS.reshape(bias_BNTS.shape[0], K, G, T, S)


def _logits_by_row(static, products, rows, shared, q_positions, kv_positions, offset):
  """`_logits` with a copy of `shared` for each row of the batch.

  Its gradient then stays with the row. Summed over a batch that is sharded, it would cost an
  exchange between devices in every block.
  """

  def one(products, rows, shared, q_positions, kv_positions):
    arrays = (products, rows, q_positions, kv_positions)
    products, rows, q_positions, kv_positions = jax.tree.map(lambda x: x[None], arrays)
    return _logits(static, products, rows, shared, q_positions, kv_positions, offset)[0]

  positions = (
    jnp.broadcast_to(p, (products.shape[0], p.shape[1])) for p in (q_positions, kv_positions)
  )
  return jax.vmap(one)(products, rows, shared, *positions)


def _visible(static, q_ids, kv_ids, heads, *, cut=True, kv_valid_S=None):
  """What may be seen, [B or 1, K or 1, G or 1, T, S], or None: everything.

  Without `cut` the mask shows all of these pairs; planned at run time they are of one segment too.
  """
  (q_positions_BT, q_segments_BT), (kv_positions_BS, kv_segments_BS) = q_ids, kv_ids
  parts = []
  if q_segments_BT is not None and (cut or not static.at_run_time(q_segments_BT)):
    parts.append(q_segments_BT[:, :, None] == kv_segments_BS[:, None, :])
    parts.append((q_segments_BT > 0)[:, :, None])
  if kv_valid_S is not None:
    parts.append(kv_valid_S[None, None])
  parts = [part[:, None, None] for part in parts]
  if cut and static.mask is not None:
    parts.append(_masked(static, q_positions_BT, kv_positions_BS, heads))
  return functools.reduce(jnp.logical_and, parts) if parts else None


def _masked(static, q_positions_BT, kv_positions_BS, heads):
  """What the mask shows, [B or 1, K or 1, G or 1, T, S]."""
  ids = (q_positions_BT[:, None, None, :, None], kv_positions_BS[:, None, None, None, :])
  return shown(static.masks, heads.mask_N, *ids)


def _dot(spec, x, y):
  return jnp.einsum(spec, x.astype(y.dtype), y, preferred_element_type=f32)


_scores = partial(_dot, "bkgth,bksh->bkgts")  # queries with keys, or dO with values
_mix = partial(_dot, "bkgts,bksh->bkgth")  # values by probabilities, or keys by dS
_unmix = partial(_dot, "bkgts,bkgth->bksh")  # back to the keys, summed over queries and group


def _grouped(heads: Heads, K: int) -> Heads:
  """As [1, K, G, 1, 1], sinks in float32."""
  sink_N, mask_N = jax.tree.map(lambda x_N: x_N.reshape(1, K, -1, 1, 1), heads)
  return Heads(None if sink_N is None else sink_N.astype(f32), mask_N)


def _dense(static, q_BTNH, k_BSKH, v_BSKH, bias, heads, q_ids, kv_ids):
  """All logits at once, plain autodiff."""
  (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
  heads = _grouped(heads, K)
  q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
  offset = 0 if static.own_row else None
  logits = _logits(static, _scores(q_BKGTH, k_BKSH), *split_rows(bias), q_ids[0], kv_ids[0], offset)
  visible = _visible(static, q_ids, kv_ids, heads)
  if visible is not None:
    logits = jnp.where(visible, logits, MASKED)
  max_BKGT1 = jnp.max(logits, axis=-1, keepdims=True)
  if heads.sink_N is not None:
    max_BKGT1 = jnp.maximum(max_BKGT1, heads.sink_N)
  max_BKGT1 = jax.lax.stop_gradient(max_BKGT1)
  p = jnp.exp(logits - max_BKGT1)
  sum_BKGT1 = jnp.sum(p, axis=-1, keepdims=True)
  if heads.sink_N is not None:
    sum_BKGT1 = sum_BKGT1 + jnp.exp(heads.sink_N - max_BKGT1)
  o_BKGTH = _mix(p, v_BKSH) / sum_BKGT1
  lse_BKGT1 = max_BKGT1 + jnp.log(sum_BKGT1)
  if visible is not None:
    seen = jnp.any(visible, axis=-1, keepdims=True)
    o_BKGTH = jnp.where(seen, o_BKGTH, 0)
    lse_BKGT1 = jnp.where(seen, lse_BKGT1, -jnp.inf if heads.sink_N is None else heads.sink_N)
  flat = lambda x: x.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)
  o_BTNH = checkpoint_name(flat(o_BKGTH.astype(q_BTNH.dtype)), "attention_out")
  return o_BTNH, flat(lse_BKGT1)[..., 0]


def _blocks(x, block, heads=None):
  """[B, T, ...] padded with zeros to [T / block, B, block, ...].

  With `heads` = K the array is [B, T, K * G, H] and becomes [T / block, B, K, G, block, H].
  """
  B, T = x.shape[:2]
  count = -(-T // block)
  x = jnp.pad(x, [(0, 0), (0, count * block - T)] + [(0, 0)] * (x.ndim - 2))
  x = jnp.moveaxis(x.reshape(B, count, block, *x.shape[2:]), 1, 0)
  if heads is None:
    return x
  x = x.reshape(count, B, block, heads, x.shape[3] // heads, x.shape[4])
  return x.transpose(0, 1, 3, 4, 2, 5)


def _unblocks(x, length):
  """Inverse of `_blocks` for [blocks, B, K, G, block, H] -> [B, length, K * G, H]."""
  count, B, K, G, block, H = x.shape
  return x.transpose(1, 0, 4, 2, 3, 5).reshape(B, count * block, K * G, H)[:, :length]


class _Keys(NamedTuple):
  """Keys in blocks, and which of them queries can reach."""

  k: jax.Array  # [blocks, B, K, S, H]
  v: jax.Array
  ids: tuple  # positions, segments: [blocks, B, S]
  length: int  # before padding

  def tile(self, static, i, j, q_ids, heads, cut):
    """(k, v, positions, visible, offset) of key block j for query block i."""
    k, v, ids = jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, j, keepdims=False), (self.k, self.v, self.ids)
    )
    valid_S = None
    if cut and self.length % static.kv_block:
      valid_S = j * static.kv_block + jnp.arange(static.kv_block) < self.length
    visible = _visible(static, q_ids, ids, heads, cut=cut, kv_valid_S=valid_S)
    offset = i * static.q_block - j * static.kv_block if static.own_row else None
    return k, v, ids[0], visible, offset


class _Visits(NamedTuple):
  """For each block of queries the blocks of keys `column_V[start .. stop]`."""

  kind: int
  start_I: jax.Array
  stop_I: jax.Array
  column_V: jax.Array


def _plan(static, q_ids, kv_ids) -> list[_Visits]:
  """Of partial and of full blocks, as far as there are or may be any."""
  of = lambda mask: block_kinds(
    mask, static.length, static.num_keys, static.q_block, static.kv_block, static.order
  )
  if not static.at_run_time(q_ids[1]):
    lists = [(kind, visits(of(static.mask) == kind)) for kind in (PARTIAL, FULL)]
    return [
      _Visits(kind, *map(jnp.asarray, (start[:-1], start[1:], column_V)))
      for kind, (start, column_V) in lists
      if column_V.size
    ]
  known = [of(mask) for mask in static.masks]
  blocks = ranges(q_ids, static.q_block), ranges(kv_ids, static.kv_block)
  sizes = (static.num_keys, static.kv_block)
  kinds = for_all(kinds_at_run_time(static.masks, known, static.order, *blocks, *sizes))
  full = (kinds == FULL).all(0)
  partial_ = (kinds > 0).any(0) & ~full
  found = [_compact(PARTIAL, partial_)]
  if any((k == FULL).any() for k in known) or any(
    by_position(m, static.order) for m in static.masks
  ):
    found.append(_compact(FULL, full))
  return found


def _compact(kind, chosen_IJ) -> _Visits:
  num_rows, num_columns = chosen_IJ.shape
  column_V = jnp.argsort(~chosen_IJ, axis=-1, stable=True).reshape(-1)
  start_I = jnp.arange(num_rows, dtype=jnp.int32) * num_columns
  return _Visits(kind, start_I, start_I + chosen_IJ.sum(-1, dtype=jnp.int32), column_V)


def _visit_each(plan, i, step, carry):
  """`step(j, carry, cut)` over the key blocks that query block i may see."""
  for kind, start_I, stop_I, column_V in plan:
    one = lambda n, carry, kind=kind, column_V=column_V: step(column_V[n], carry, kind == PARTIAL)
    carry = jax.lax.fori_loop(start_I[i], stop_I[i], one, carry)
  return carry


def _keys(static, k_BSKH, v_BSKH, kv_ids):
  k, v = (_blocks(x, static.kv_block, x.shape[2])[:, :, :, 0] for x in (k_BSKH, v_BSKH))
  return _Keys(k, v, jax.tree.map(partial(_blocks, block=static.kv_block), kv_ids), k_BSKH.shape[1])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(static, q_BTNH, k_BSKH, v_BSKH, bias, heads, q_ids, kv_ids):
  return _forward_blocks(static, q_BTNH, k_BSKH, v_BSKH, bias, heads, q_ids, kv_ids)


def _forward(static, q_BTNH, k_BSKH, v_BSKH, bias, heads, q_ids, kv_ids):
  o_BTNH, lse = _forward_blocks(static, q_BTNH, k_BSKH, v_BSKH, bias, heads, q_ids, kv_ids)
  o_BTNH = checkpoint_name(o_BTNH, "attention_out")
  lse = checkpoint_name(lse, "attention_lse")
  return (o_BTNH, lse), (q_BTNH, k_BSKH, v_BSKH, bias, heads, q_ids, kv_ids, o_BTNH, lse)


def _forward_blocks(static, q_BTNH, k_BSKH, v_BSKH, bias, heads, q_ids, kv_ids, dtype=None):
  """(o in `dtype` or that of q, log-sum-exp [B, T, N])."""
  K = k_BSKH.shape[2]
  keys, heads = _keys(static, k_BSKH, v_BSKH, kv_ids), _grouped(heads, K)
  plan = _plan(static, q_ids, kv_ids)
  rows, shared = split_rows(bias)

  def query_block(_, inputs):
    i, q, rows, q_ids = inputs

    def step(j, carry, cut):
      m_before, total, acc = carry
      k, v, kv_positions, visible, offset = keys.tile(static, i, j, q_ids, heads, cut)
      s = _logits(static, _scores(q, k), rows, shared, q_ids[0], kv_positions, offset)
      if visible is not None:
        s = jnp.where(visible, s, MASKED)
      m = jnp.maximum(m_before, jnp.max(s, axis=-1, keepdims=True))
      p = jnp.exp(s - m)
      if visible is not None:  # where a row has seen nothing yet, m is MASKED and p would be 1
        p = jnp.where(visible, p, 0)
      decay = jnp.exp(m_before - m)
      total = total * decay + jnp.sum(p, axis=-1, keepdims=True)
      return m, total, acc * decay + _mix(p, v)

    shape = (*q.shape[:-1], 1)
    if heads.sink_N is None:
      m, total = jnp.full(shape, MASKED, f32), jnp.zeros(shape, f32)
    else:
      m, total = jnp.broadcast_to(heads.sink_N, shape), jnp.ones(shape, f32)
    acc = jnp.zeros((*q.shape[:-1], v_BSKH.shape[-1]), f32)
    start = vary_with(q, (m, total, acc))
    m, total, acc = _visit_each(plan, i, step, start)
    seen = total > 0
    total = jnp.where(seen, total, 1)
    # Rows that see nothing get a huge log-sum-exp: exp(logit - lse) is 0 in the backward pass.
    lse = jnp.where(seen, m + jnp.log(total), -MASKED)
    return None, ((acc / total).astype(dtype or q.dtype), lse)

  inputs = _query_inputs(static, K, q_BTNH, rows, q_ids)
  _, (o, lse) = jax.lax.scan(query_block, None, inputs)
  return _unblocks(o, q_BTNH.shape[1]), _unblocks(lse, q_BTNH.shape[1])[..., 0]


def _add_at(blocks, j, x):
  x = x + jax.lax.dynamic_index_in_dim(blocks, j, keepdims=False)
  return jax.lax.dynamic_update_index_in_dim(blocks, x, j, axis=0)


def _query_inputs(static, K, q_BTNH, rows_BTNH, q_ids):
  q = _blocks(q_BTNH, static.q_block, K)
  rows, q_ids = jax.tree.map(partial(_blocks, block=static.q_block), (rows_BTNH, q_ids))
  return jnp.arange(q.shape[0]), q, rows, q_ids


def _backward(static, residuals, given):
  q_BTNH, k_BSKH, v_BSKH, bias, heads, q_ids, kv_ids, o_BTNH, lse_BTN = residuals
  do_BTNH, dlse_BTN = given
  (B, T, N, _), S, K = q_BTNH.shape, k_BSKH.shape[1], k_BSKH.shape[2]
  keys, each_head = _keys(static, k_BSKH, v_BSKH, kv_ids), _grouped(heads, K)
  plan = _plan(static, q_ids, kv_ids)
  rows, shared = split_rows(bias)
  as_f32 = partial(jax.tree.map, lambda x: x.astype(f32))
  zeros = lambda tree: vary_with(q_BTNH, jax.tree.map(lambda x: jnp.zeros(x.shape, f32), tree))
  # A copy for each row of the batch, and float32, which its gradient is summed in over blocks.
  shared = jax.tree.map(lambda x: jnp.broadcast_to(x.astype(f32), (B, *x.shape)), shared)
  delta_BTN = jnp.sum(do_BTNH.astype(f32) * o_BTNH.astype(f32), axis=-1) - dlse_BTN

  def query_block(sums, inputs):
    (i, q, rows, q_ids), do, lse, delta = inputs
    rows = as_f32(rows)

    def step(j, carry, cut):
      dq, drows, (dk_blocks, dv_blocks, dshared) = carry
      k, v, kv_positions, visible, offset = keys.tile(static, i, j, q_ids, each_head, cut)
      positions = (q_ids[0], kv_positions)
      logits = lambda s, rows, shared: _logits_by_row(static, s, rows, shared, *positions, offset)
      s, pull = jax.vjp(logits, _scores(q, k), rows, shared)
      p = jnp.exp(s - lse)
      if visible is not None:
        p = jnp.where(visible, p, 0)
      ds, drows_j, dshared_j = pull(p * (_scores(do, v) - delta))
      add = partial(jax.tree.map, jnp.add)
      sums = (
        _add_at(dk_blocks, j, _unmix(ds, q)),
        _add_at(dv_blocks, j, _unmix(p, do)),
        add(dshared, dshared_j),
      )
      return dq + _mix(ds, k), add(drows, drows_j), sums

    dq, drows, sums = _visit_each(plan, i, step, (zeros(q), zeros(rows), sums))
    return sums, (dq.astype(q.dtype), drows)

  by_query = (do_BTNH, delta_BTN[..., None], lse_BTN[..., None])
  do, delta, lse = (_blocks(x, static.q_block, K) for x in by_query)
  inputs = (_query_inputs(static, K, q_BTNH, rows, q_ids), do, lse, delta)
  sums = zeros((keys.k, keys.v, shared))
  (dk, dv, dshared), (dq, drows) = jax.lax.scan(query_block, sums, inputs)

  drows = jax.tree.map(lambda d: jnp.moveaxis(d, 0, 1).reshape(B, -1, *d.shape[3:])[:, :T], drows)
  dbias = join_rows(drows, jax.tree.map(lambda d: jnp.sum(d, axis=0), dshared))
  dbias = jax.tree.map(lambda d, x: d.astype(x.dtype), dbias, bias)
  dsink_N = None
  if (sink := each_head.sink_N) is not None:
    weight = jnp.exp(sink[None] - lse)
    dsink_N = -jnp.sum(weight * delta, axis=(0, 1, 4, 5)).reshape(N).astype(heads.sink_N.dtype)
  dk, dv = (_unblocks(d[:, :, :, None], S).astype(x.dtype) for d, x in ((dk, k_BSKH), (dv, v_BSKH)))
  return _unblocks(dq, T), dk, dv, dbias, Heads(dsink_N), None, None


_blockwise.defvjp(_forward, _backward)
