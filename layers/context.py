"""Attention over a row whose positions are spread over devices (context parallelism).

Inside a region that is manual over the mesh axis `context`. Rows are laid out in zigzag: cut into
2C chunks, device i of C holds chunks i and 2C - 1 - i. Keys and values meet queries in one of three
ways:

- ring: they pass round while each device attends to what it holds (ring attention, arXiv
  2310.01889), never more than two devices' share in memory. Under a causal mask every device has
  the same work in every step, half of all pairs: keys from a device before it matter by their first
  chunk only, to all its queries; keys from a device after it only to its second chunk.
- halo: of a local mask each chunk needs the ends of its neighbours; only these travel.
- all_gather: each device has keys and values of the whole row.

Letters: B batch, T positions of a device, N query heads, K key/value heads, H head size.
"""

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from mesh.collectives import manual_size, ring_shift
from mesh.constrain import uncut_axes

from .kernels.attention import RelativeKeys, attention, select_partial
from .kernels.attention.blocks import reach_of
from .kernels.partition import cut_further, vary_with
from .masks import PerHead

AXIS = "context"
Method = Literal["auto", "ring", "halo", "all_gather"]


def zigzag(length: int, devices: int) -> np.ndarray:
  """Position in the row of each place, device after device.

  Raises:
    ValueError: a length that does not divide into 2 * devices chunks.
  """
  if length % (2 * devices):
    raise ValueError(
      f"rows of {length} positions do not divide into {2 * devices} chunks over context={devices}"
    )
  chunks = np.arange(length).reshape(2 * devices, -1)
  order = [chunk for i in range(devices) for chunk in (i, 2 * devices - 1 - i)]
  return chunks[order].reshape(-1)


class _Static(NamedTuple):
  mask: Any
  scale: float
  softcap: float | None
  causal: bool
  kernel: Any  # module


def row_attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  *,
  method: Method = "auto",
  mask: Any,
  q_positions_BT: jax.Array | None,
  q_segments_BT: jax.Array | None = None,
  scale: float | None = None,
  softcap: float | None = None,
  bias: Any = None,
  sink_N: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """`attention` over the queries' own rows, wherever their keys are; arguments as there.

  Args:
    q_positions_BT, q_segments_BT: of this device's tokens, in the order `zigzag` gives if positions
      are spread over devices, where positions may not be None.
    method: how positions that are spread meet. "auto" is a halo where that is the least to travel,
      else a ring, unless the mask differs by head or the implementation has none.

  Raises:
    NotImplementedError: positions that are spread, with Transformer-XL's relative keys, a ring
      with an implementation that has none or a mask a head, or a halo of an unbounded mask.
  """
  scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
  static = {"mask": mask, "scale": scale, "softcap": softcap, "implementation": implementation}

  def attend(q_BTNH, k_BSKH, v_BSKH, bias, sink_N, ids):
    options = {"bias": bias, "sink_N": sink_N, **static}
    if manual_size(AXIS) > 1:
      return _spread(method, q_BTNH, k_BSKH, v_BSKH, ids, options)
    ids = {"q_positions_BT": ids[0], "q_segments_BT": ids[1]}
    return attention(q_BTNH, k_BSKH, v_BSKH, **ids, **options)

  arrays = (q_BTNH, k_BSKH, v_BSKH, bias, sink_N, (q_positions_BT, q_segments_BT))
  axes = None if isinstance(mask, PerHead) else uncut_axes("act_heads")
  return attend(*arrays) if axes is None else _by_heads(attend, axes[0], *arrays)


def _by_heads(attend, axes: tuple[str, ...], q_BTNH, k_BSKH, v_BSKH, bias, sink_N, ids):
  """`attend` in a `shard_map` that gives each device its heads; the compiler can't split kernels.

  Key/value heads fewer than devices are repeated.
  """
  devices = math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in axes)
  N, K = q_BTNH.shape[2], k_BSKH.shape[2]
  if N % devices or (K % devices and devices % K):
    return attend(q_BTNH, k_BSKH, v_BSKH, bias, sink_N, ids)
  if devices > K:
    k_BSKH, v_BSKH = (jnp.repeat(x, devices // K, axis=2) for x in (k_BSKH, v_BSKH))
  heads = P(None, None, axes)
  # Of heads, in arrays [N], [U, N], [P, N, H] and [B, T, N, H].
  dim = (0, 0, 1, 1, 2)
  of_bias = jax.tree.map(lambda x: P(*[None] * dim[x.ndim], axes), bias)
  arrays = (q_BTNH, k_BSKH, v_BSKH, bias, sink_N)
  specs = (heads, heads, heads, of_bias, None if sink_N is None else P(axes))
  return cut_further(attend, axes, specs, heads, arrays, ids)


def _spread(method, q_BTNH, k_BTKH, v_BTKH, ids, options):
  mask, bias, implementation = options["mask"], options["bias"], options["implementation"]
  if isinstance(bias, RelativeKeys):
    raise NotImplementedError(
      "Transformer-XL's relative keys do not work on a mesh with context > 1"
    )
  if method == "auto":
    method = choose_method(q_BTNH.shape[1], manual_size(AXIS), mask, implementation)
  if method == "all_gather":
    whole = lambda x: lax.all_gather(x, AXIS, axis=1, tiled=True)
    k, v, (kv_positions, kv_segments) = jax.tree.map(whole, (k_BTKH, v_BTKH, ids))
    return attention(
      q_BTNH, k, v, q_positions_BT=ids[0], kv_positions_BS=kv_positions,
      q_segments_BT=ids[1], kv_segments_BS=kv_segments, **options,
    )  # fmt: skip
  if method == "halo":
    reach = reach_of(mask)
    if None in reach:
      raise NotImplementedError(
        f"a halo needs a mask that sees so far and no further, not {mask}: use a ring"
      )
    return _halo(q_BTNH, (k_BTKH, v_BTKH), ids, reach, options)
  if isinstance(mask, PerHead):
    raise NotImplementedError(
      "a mask a head does not pass round a ring: gather the keys (context_method=all_gather)"
    )
  kernel = select_partial(implementation, q_BTNH, k_BTKH, v_BTKH, mask, bias)
  causal = mask is not None and mask.reach[1] == 0
  static = _Static(mask, options["scale"], options["softcap"], causal, kernel)
  arguments = (q_BTNH, k_BTKH, v_BTKH, bias, options["sink_N"], ids)
  return _ring(static, *vary_with(arguments, arguments))


def choose_method(length: int, devices: int, mask: Any, implementation: str | None) -> Method:
  """What "auto" is for so many positions a device."""
  before, after = reach_of(mask)
  if before is not None and after is not None and 2 * (before + after) < (devices - 1) * length:
    return "halo"
  ring = not isinstance(mask, PerHead) and implementation in (None, "xla", "pallas_tpu")
  return "ring" if ring else "all_gather"


# ---- halo ----


def _halo(q_BTNH, kv, ids, reach, options):
  """Each of the two chunks with keys of its own and, at both sides, as many as the mask reaches.

  The chunks are two rows to `attention`. What would lie outside of the row is padding.
  """
  positions_BT, segments_BT = ids
  ids = positions_BT, jnp.ones_like(positions_BT) if segments_BT is None else segments_BT
  chunks = _halves((kv, ids))
  length = chunks[0][1][0].shape[1]
  parts = [chunks]
  for side, extent in zip((-1, 1), reach, strict=True):
    for hop in range(1, -(-extent // length) + 1):
      size = min(length, extent - (hop - 1) * length)  # of the nearer end of that chunk
      edge = slice(length - size, None) if side < 0 else slice(size)
      end = jax.tree.map(lambda x, edge=edge: x[:, edge], chunks)
      parts.insert(0 if side < 0 else len(parts), _from_chunk(side * hop, end))
  rows = lambda *two: jnp.concatenate(two, 0)
  joined = [jax.tree.map(rows, *part) for part in parts]
  (k, v), (kv_positions, kv_segments) = jax.tree.map(lambda *x: jnp.concatenate(x, 1), *joined)
  q, (q_positions, q_segments) = jax.tree.map(rows, *_halves((q_BTNH, ids)))
  o = attention(
    q, k, v, q_positions_BT=q_positions, kv_positions_BS=kv_positions, q_segments_BT=q_segments,
    kv_segments_BS=kv_segments, **options,
  )  # fmt: skip
  return jnp.concatenate(jnp.split(o, 2), 1)


def _from_chunk(distance: int, chunks: tuple[Any, Any]) -> tuple[Any, Any]:
  """For both chunks of a device the arrays of the chunk that lies so far from it; else zeros."""
  devices = manual_size(AXIS)
  at = lambda chunk: (chunk, 0) if chunk < devices else (2 * devices - 1 - chunk, 1)
  pairs = {(a, b): [] for a in (0, 1) for b in (0, 1)}  # (half it lies in, half it goes to)
  for chunk in range(2 * devices):
    if 0 <= chunk + distance < 2 * devices:
      (source, a), (to, b) = at(chunk + distance), at(chunk)
      pairs[a, b].append((source, to))

  def received(half):
    sent = [
      jax.tree.map(lambda x, p=pairs[a, half]: lax.ppermute(x, AXIS, p), chunks[a])
      for a in (0, 1)
      if pairs[a, half]
    ]
    return jax.tree.map(lambda *x: sum(x[1:], x[0]), *sent)

  return received(0), received(1)


# ---- ring ----


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(static, q, k, v, bias, sink_N, ids):
  return _ring_forward(static, q, k, v, bias, sink_N, ids)[0]


def _options(static) -> dict[str, Any]:
  return {"mask": static.mask, "scale": static.scale, "softcap": static.softcap}


def _halves(tree: Any) -> tuple[Any, Any]:
  """The first and the second chunk of arrays [B, T, ...]."""
  middle = jax.tree.leaves(tree)[0].shape[1] // 2
  return jax.tree.map(lambda x: x[:, :middle], tree), jax.tree.map(lambda x: x[:, middle:], tree)


def _before(step: jax.Array) -> jax.Array:
  """Whether the keys that arrive in this step come from a device before this one."""
  return step <= lax.axis_index(AXIS)


def _ring_forward(static, q, k, v, bias, sink_N, ids):
  size = manual_size(AXIS)
  options = _options(static)

  def part(q, q_ids, kv, sink_N=None, own_row=False):
    k, v, kv_ids = kv
    return static.kernel.forward(q, k, v, bias, sink_N, q_ids, kv_ids, own_row=own_row, **options)

  def from_before(kv):
    return part(q, ids, _halves(kv)[0])

  def from_after(kv):
    (first, _), (second, second_ids) = _halves((q, ids))
    o, lse = part(second, second_ids, kv)
    nothing = (jnp.zeros_like(first, o.dtype), jnp.full_like(first[..., 0], -jnp.inf, lse.dtype))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), nothing, (o, lse))

  def step(carry, r):
    kv, o, lse = carry
    kv = ring_shift(kv, AXIS)
    if static.causal:
      o_r, lse_r = lax.cond(_before(r), from_before, from_after, kv)
    else:
      o_r, lse_r = part(q, ids, kv)
    return (kv, *_merge(o, lse, o_r, lse_r)), None

  kv = (k, v, ids)
  # Indices order the keys of the own row as positions do; distances they give only without gaps.
  o, lse = part(q, ids, kv, sink_N, own_row=bias is None)
  (_, o, lse), _ = lax.scan(step, (kv, o, lse), jnp.arange(1, size))
  o = checkpoint_name(o.astype(q.dtype), "attention_out")
  lse = checkpoint_name(lse, "attention_lse")
  return o, (q, k, v, bias, sink_N, ids, o, lse)


def _merge(o, lse, o_r, lse_r):
  """Two normalised parts of one attention."""
  top = jnp.maximum(lse, lse_r)
  top = jnp.where(jnp.isneginf(top), 0, top)
  w, w_r = jnp.exp(lse - top), jnp.exp(lse_r - top)
  total = w + w_r
  safe = jnp.where(total > 0, total, 1)
  o = (o * w[..., None] + o_r * w_r[..., None]) / safe[..., None]
  return o, jnp.where(total > 0, top + jnp.log(safe), -jnp.inf)


def _ring_backward(static, residuals, do):
  q, k, v, bias, sink_N, ids, o, lse = residuals
  size = manual_size(AXIS)
  options = _options(static)
  f32 = partial(jax.tree.map, lambda x: x.astype(jnp.float32))

  def part(queries, kv, sink_N=None, own_row=False):
    (q, q_ids, o, lse, do), (k, v, kv_ids) = queries, kv
    dq, dk, dv, dbias, dsink_N = static.kernel.backward(
      q, k, v, bias, sink_N, q_ids, kv_ids, o, lse, do, own_row=own_row, **options
    )
    return f32((dq, (dk, dv), dbias, dsink_N))

  queries = (q, ids, o, lse, do)

  def from_before(kv):
    first, second = _halves(kv)
    dq, dkv, dbias, _ = part(queries, first)
    rest = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), second[:2])
    return dq, jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), dkv, rest), dbias

  def from_after(kv):
    first, second = _halves(queries)
    dq, dkv, dbias, _ = part(second, kv)
    return jnp.concatenate([jnp.zeros_like(first[0], jnp.float32), dq], 1), dkv, dbias

  def step(carry, r):
    kv, dkv, dq, dbias = carry
    kv, dkv = ring_shift((kv, dkv), AXIS)
    if static.causal:
      dq_r, dkv_r, dbias_r = lax.cond(_before(r), from_before, from_after, kv)
    else:
      dq_r, dkv_r, dbias_r, _ = part(queries, kv)
    add = partial(jax.tree.map, jnp.add)
    return (kv, add(dkv, dkv_r), dq + dq_r, add(dbias, dbias_r)), None

  kv = (k, v, ids)
  dq, dkv, dbias, dsink_N = part(queries, kv, sink_N, own_row=bias is None)
  (_, dkv, dq, dbias), _ = lax.scan(step, (kv, dkv, dq, dbias), jnp.arange(1, size))
  dk, dv = ring_shift(dkv, AXIS)  # the last step brings them home
  like = lambda d, x: d.astype(x.dtype)
  dextras = jax.tree.map(like, (dbias, dsink_N), (bias, sink_N))
  return *map(like, (dq, dk, dv), (q, k, v)), *dextras, None


_ring.defvjp(_ring_forward, _ring_backward)
