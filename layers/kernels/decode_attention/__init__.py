"""Attention of a few new tokens a row over a cache of keys and values.

Letters: B batch, T query tokens, N query heads, K key/value heads, H head size, U that of values,
S cached positions, P pages, R positions a page, J pages a row.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ..partition import auto_partitioned, cut_all, explicit_axes, free_axes, sharding_like
from ..select import GPU, TPU, anywhere, current_platform, kernel_on, select
from . import reference, xla
from .inputs import Inputs, Static

__all__ = ["decode_attention", "paged_decode_attention"]

f32, i32 = jnp.float32, jnp.int32


def decode_attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKU: jax.Array | None,
  *,
  q_positions_BT: jax.Array,
  lengths_B: jax.Array,
  kv_positions_BS: jax.Array | None = None,
  mask: Any = None,
  scale: float | None = None,
  softcap: float | None = None,
  sink_N: jax.Array | None = None,
  alibi_slopes_N: jax.Array | None = None,
  layer: jax.Array | None = None,
  cache_axes: tuple[tuple[str, ...], ...] | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """softmax(softcap(scale * q . k) - slope * distance) v over visible keys, [B, T, N, U], as q.

  Time follows what rows can see of their caches, not S. Forward only: no gradient is defined of the
  kernels, and none is needed to decode.

  Args:
    q_BTNH: the new tokens, whose own keys are in the cache already; a few (1 to 16) a row.
    k_BSKH, v_BSKU: query head n reads key/value head n // (N / K). Without values the keys are
      also the values.
    q_positions_BT: position of each query.
    lengths_B: how many entries of each row's cache hold keys. Entries from there on are ignored,
      whatever they hold, NaN too; a row of length 0 gives zeros.
    kv_positions_BS: position of each entry, as in a cache whose slot is the position modulo its
      size; -1 is an empty slot. None: entry s holds position s, and what no query can reach by the
      mask is not read.
    mask: of query and key positions, a value of `layers.masks`, for all heads or one for each. None
      shows every key.
    scale: factor on q . k; None is H ** -0.5.
    softcap: c gives c * tanh(logit / c), before ALiBi and mask (Gemma 2, arXiv 2408.00118).
    sink_N: a logit a head that takes part in the denominator only (gpt-oss, arXiv 2508.10925).
    alibi_slopes_N: arXiv 2108.12409.
    layer: k and v are stacks [L, B, S, K, .] of which this one is read, without a copy of it.
    cache_axes: the mesh axes, of those that no `shard_map` has cut, over which the cache's rows,
      positions and heads are spread (a single head that all query heads read: those of the
      queries). Each device then runs the kernel on its own rows and heads. None: the compiler
      spreads the work, for which only "xla" is fit; so it is where positions are spread, and "xla"
      then reads all of the cache, each device its own part, or an axis is Explicit.
    implementation: "pallas_tpu", "xla" (a loop over blocks), "pallas_gpu" (Triton, never timed so
      far) or "reference"; None is the TPU kernel where it can run, else "xla".

  Softmax is float32; probabilities are cast to the dtype of v.

  Raises:
    ValueError: shapes that do not fit, or an unknown implementation.
    NotImplementedError: a named implementation that cannot run here.
  """
  values = k_BSKH if v_BSKU is None else v_BSKU
  k, v = k_BSKH, values
  if layer is not None:
    k, v = jax.eval_shape(lambda *stacks: [x[0] for x in stacks], k, v)
  _check(q_BTNH, k, v, q_positions_BT, lengths_B, mask, sink_N, alibi_slopes_N, softcap)
  B, S, K, H = q_BTNH.shape[0], *k.shape[1:]
  if k.shape[0] != B:
    raise ValueError(f"{B} rows of queries and {k.shape[0]} of keys")
  if kv_positions_BS is not None and kv_positions_BS.shape != (B, S):
    raise ValueError(f"kv_positions_BS needs the shape {(B, S)}, got {kv_positions_BS.shape}")
  lengths_B = jnp.minimum(lengths_B, S)
  inputs = _inputs(q_positions_BT, lengths_B, kv_positions_BS, None, sink_N, alibi_slopes_N, mask)
  static = Static(mask, H**-0.5 if scale is None else scale, softcap)
  rows, positions, heads = cache_axes or ((), (), ())
  run = partial(_of_layer, static, implementation=implementation, seq_sharded=bool(positions))
  arrays = (q_BTNH, k_BSKH, v_BSKU, inputs, layer)
  if cache_axes is None or positions or explicit_axes():
    return run(*arrays)
  if K > 1 and K % math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in heads):
    heads = ()
  of_q = P(rows, None, heads)
  of_k = P(*[] if layer is None else [None], rows, None, heads if K > 1 else None)
  of_inputs: Any = (*[P(rows)] * 3, P(), *[P(heads)] * 3)
  specs = (of_q, of_k, of_k, Inputs(*of_inputs), P())
  return cut_all(run, specs, of_q, *arrays)


def _of_layer(static, q_BTNH, k, v, inputs, layer, **how):
  """k and v are stacks if there is a layer."""
  if layer is not None and (free_axes() or how["implementation"] == "reference"):
    at = partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
    k, v = jax.tree.map(at, (k, v))
  elif layer is not None:
    B = q_BTNH.shape[0]
    inputs = inputs._replace(row_B=layer * B + jnp.arange(B, dtype=i32))
    k, v = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (k, v))
  return _run(static, q_BTNH, k, v, inputs, **how)


def paged_decode_attention(
  q_BTNH: jax.Array,
  k_pages_PRKH: jax.Array,
  v_pages_PRKU: jax.Array,
  page_table_BJ: jax.Array,
  *,
  q_positions_BT: jax.Array,
  lengths_B: jax.Array,
  mask: Any = None,
  scale: float | None = None,
  softcap: float | None = None,
  sink_N: jax.Array | None = None,
  alibi_slopes_N: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """`decode_attention` over a cache whose pages of R positions lie anywhere.

  Args:
    k_pages_PRKH, v_pages_PRKU: the pages of all rows.
    page_table_BJ: int32; position s of row b stands in page `page_table_BJ[b, s // R]` at s % R.
      Entries past a row's length, or out of reach of the mask, are not used and may hold anything.
    others: see `decode_attention`.
  """
  _check(
    q_BTNH, k_pages_PRKH, v_pages_PRKU, q_positions_BT, lengths_B, mask, sink_N, alibi_slopes_N,
    softcap,
  )  # fmt: skip
  (B, _, _, H), R = q_BTNH.shape, k_pages_PRKH.shape[1]
  if page_table_BJ.ndim != 2 or page_table_BJ.shape[0] != B:
    raise ValueError(f"page_table_BJ needs the shape ({B}, J), got {page_table_BJ.shape}")
  lengths_B = jnp.minimum(lengths_B, page_table_BJ.shape[1] * R)
  inputs = _inputs(q_positions_BT, lengths_B, None, page_table_BJ, sink_N, alibi_slopes_N, mask)
  static = Static(mask, H**-0.5 if scale is None else scale, softcap)
  return _run(static, q_BTNH, k_pages_PRKH, v_pages_PRKU, inputs, implementation)


def _inputs(q_positions, lengths, kv_positions, page_table, sink, slopes, mask) -> Inputs:
  which = None if mask is None else mask.by_head
  to = lambda x, dtype: None if x is None else jnp.asarray(x, dtype)
  return Inputs(
    jnp.asarray(q_positions, i32), jnp.asarray(lengths, i32), to(kv_positions, i32),
    to(page_table, i32), to(sink, f32), to(slopes, f32), to(which, i32),
  )  # fmt: skip


def _run(static, q_BTNH, k, v, inputs, implementation, seq_sharded=False):
  arguments = (q_BTNH, k, k if v is None else v, inputs)
  candidates = {
    "pallas_tpu": kernel_on(TPU, lambda _: _module("pallas_tpu").supports(*arguments)),
    "xla": anywhere,
    "pallas_gpu": kernel_on(GPU, lambda _: _module("pallas_gpu").supports(*arguments)),
    "reference": anywhere,
  }
  chosen = select(implementation, current_platform(), candidates)
  attention = partial(_module(chosen).attention, static)
  if chosen == "xla":
    attention = partial(attention, seq_sharded=seq_sharded)
  # One array stays one: a loop that carries it twice would copy it.
  run = lambda q, k, v, inputs: attention(q, k, k if v is None else v, inputs)
  return auto_partitioned(run, sharding_like(q_BTNH), q_BTNH, k, v, inputs)


def _module(name: str) -> Any:
  """An implementation by its name."""
  if name == "pallas_tpu":
    # Pallas takes half a second to import and is of no use on a CPU.
    from . import pallas_tpu

    return pallas_tpu
  if name == "pallas_gpu":
    # The same.
    from . import pallas_gpu

    return pallas_gpu
  return {"xla": xla, "reference": reference}[name]


def _check(q_BTNH, k, v, q_positions_BT, lengths_B, mask, sink_N, slopes_N, softcap) -> None:
  if q_BTNH.ndim != 4 or k.ndim != 4 or v.ndim != 4:
    raise ValueError(
      "decode_attention needs q [B, T, N, H] and keys and values of four dims, "
      f"got {q_BTNH.shape}, {k.shape}, {v.shape}"
    )
  B, T, N, H = q_BTNH.shape
  if k.shape[3] != H or v.shape[:3] != k.shape[:3]:
    raise ValueError(
      "q and k need one head size, k and v the same shape but for theirs, "
      f"got {q_BTNH.shape}, {k.shape}, {v.shape}"
    )
  if N % k.shape[2]:
    raise ValueError(f"{N} query heads do not divide over {k.shape[2]} key/value heads")
  if mask is not None and mask.by_head is not None and len(mask.by_head) != N:
    raise ValueError(f"the mask is one of {len(mask.by_head)} heads, the queries have {N}")
  for name, array, shape in (
    ("q_positions_BT", q_positions_BT, (B, T)),
    ("lengths_B", lengths_B, (B,)),
    ("sink_N", sink_N, (N,)),
    ("alibi_slopes_N", slopes_N, (N,)),
  ):
    if array is not None and array.shape != shape:
      raise ValueError(f"{name} needs the shape {shape}, got {array.shape}")
  if softcap is not None and softcap <= 0:
    raise ValueError(f"softcap must be positive, got {softcap}")
