"""Softmax attention with masks, segments, grouped heads, logit caps, biases and sinks.

Letters: B batch, T query positions, S key positions, N query heads, K key/value heads, H head size.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..partition import auto_partitioned, sharding_like, without_last
from ..select import GPU, TPU, Supports, anywhere, current_platform, kernel_on, select
from . import reference, xla
from .bias import Alibi, Bias, Bucketed, RelativeKeys, bucket, num_heads
from .blocks import Order

__all__ = ["Alibi", "Bias", "Bucketed", "RelativeKeys", "attention", "bucket", "select_partial"]


def attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  *,
  mask: Any = None,
  q_positions_BT: jax.Array | None = None,
  kv_positions_BS: jax.Array | None = None,
  q_segments_BT: jax.Array | None = None,
  kv_segments_BS: jax.Array | None = None,
  scale: float | None = None,
  softcap: float | None = None,
  bias: Bias | None = None,
  sink_N: jax.Array | None = None,
  return_lse: bool = False,
  implementation: str | None = None,
) -> Any:
  """softmax(softcap(scale * q . k) + bias) v over the visible keys, [B, T, N, H of v], as q.

  Args:
    q_BTNH, k_BSKH, v_BSKH: query head n reads key/value head n // (N / K). The head size of v may
      differ from that of q and k.
    mask: of query and key positions, a value of `layers.masks`, for all heads or one for each. None
      shows every key. Blocks in which nothing is visible cost nothing.
    q_positions_BT: position of each query; None is 0..T-1.
    kv_positions_BS: position of each key. None: the keys are the queries' own row, so T == S, and
      inside a segment (the whole row, if there are none) positions are consecutive. Key lengths
      and offsets of queries are said by segments and positions.
    q_segments_BT, kv_segments_BS: a key is visible only in the query's own segment; segment 0 is
      padding, sees nothing, is seen by nothing, and what it holds (NaN too) is ignored. The keys'
      are the queries' if `kv_positions_BS` is None.
    scale: factor on q . k; None is H ** -0.5.
    softcap: c gives c * tanh(logit / c), before bias and mask (Gemma 2, arXiv 2408.00118).
    bias: `Alibi`, `Bucketed` or `RelativeKeys`.
    sink_N: a logit a head that takes part in the denominator only (gpt-oss, arXiv 2508.10925).
    return_lse: the result is a pair: also the log-sum-exp of each query's logits (and sink),
      float32 [B, T, N], of no logits -inf. With it attentions over parts of the keys can be put
      together; gradients pass through both. Not by cuDNN.
    implementation: "pallas_tpu" or "pallas_gpu" (of the biases `Alibi` alone; the latter without
      `kv_positions_BS`), "cudnn" (GPU; all keys or a causal window, and nothing else of this list),
      "xla" (blockwise: memory linear in T and S; reverse-mode derivatives only when T * S exceeds
      one block, 256 x 256 on CPU, else 512 x 512) or "reference"; None is the first that can run,
      "cudnn" before "pallas_gpu". "mosaic_gpu" (what "pallas_gpu" does, on Hopper GPUs, in bfloat16
      or float16, head sizes up to 128) is run only by name: it has never run on a GPU.

  Logits and softmax are float32; probabilities are cast to the dtype of v. A query that sees no
  key gives exactly 0 and receives and passes on zero gradient. Outputs and log-sum-exps are named
  "attention_out" and "attention_lse" for `jax.checkpoint` policies.

  Raises:
    ValueError: shapes that do not fit, or an unknown implementation.
    NotImplementedError: a named implementation that cannot run here.
  """
  _check(q_BTNH, k_BSKH, v_BSKH, bias, sink_N, softcap, mask)
  B, T, _, H = q_BTNH.shape
  S = k_BSKH.shape[1]
  own_row = kv_positions_BS is None
  if own_row and T != S:
    raise ValueError(f"{T} queries and {S} keys are not one row: give kv_positions_BS")
  if own_row and kv_segments_BS is None:
    kv_segments_BS = q_segments_BT
  if (q_segments_BT is None) != (kv_segments_BS is None):
    raise ValueError("give segments for both queries and keys, or for neither")
  _check_ids(B, T, q_positions_BT=q_positions_BT, q_segments_BT=q_segments_BT)
  _check_ids(B, S, kv_positions_BS=kv_positions_BS, kv_segments_BS=kv_segments_BS)
  order: Order = "document" if own_row else "any"
  if own_row and q_positions_BT is None:
    order = "index"
  if q_positions_BT is None:
    q_positions_BT = jnp.arange(T, dtype=jnp.int32)[None]
  if q_segments_BT is not None and kv_segments_BS is not None:
    q_BTNH = jnp.where((q_segments_BT > 0)[..., None, None], q_BTNH, 0)
    k_BSKH = jnp.where((kv_segments_BS > 0)[..., None, None], k_BSKH, 0)
    v_BSKH = jnp.where((kv_segments_BS > 0)[..., None, None], v_BSKH, 0)

  extras = {"softcap": softcap, "bias": bias, "sinks": sink_N, "segments": q_segments_BT}
  extras["log-sum-exp"] = True if return_lse else None
  module = _select(implementation, (q_BTNH, k_BSKH, v_BSKH), mask, extras, order)
  scale = H**-0.5 if scale is None else scale
  q_sharding = sharding_like(q_BTNH)

  def run(*arrays):
    pair = module.attention(*arrays, mask=mask, scale=scale, softcap=softcap, order=order)
    return pair if return_lse else pair[0]

  mask_N = None
  if mask is not None and mask.by_head is not None:
    mask_N = jnp.array(mask.by_head, jnp.int32)
  return auto_partitioned(
    run,
    (q_sharding, without_last(q_sharding)) if return_lse else q_sharding,
    q_BTNH, k_BSKH, v_BSKH, q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS,
    bias, sink_N, mask_N,
  )  # fmt: skip


def select_partial(
  implementation: str | None, q_BTNH, k_BSKH, v_BSKH, mask: Any, bias: Bias | None
) -> Any:
  """The module whose `forward` and `backward` compute part of an attention here, see `xla`.

  Raises:
    NotImplementedError: a named implementation that has no such parts, or cannot run here.
  """
  if implementation not in (None, "xla", "pallas_tpu"):
    raise NotImplementedError(
      f"attention implementation {implementation!r} has no ring: use xla or pallas_tpu, or gather "
      "the keys (context_method=all_gather)"
    )
  arrays = (q_BTNH, k_BSKH, v_BSKH)
  candidates = {"pallas_tpu": _pallas("pallas_tpu", TPU, arrays, bias, mask, "any")}
  return _module(select(implementation, current_platform(), candidates | {"xla": anywhere}))


def _select(
  implementation: str | None, arrays: tuple, mask: Any, extras: dict[str, Any], order: Order
) -> Any:
  """The module that computes these arguments here."""

  def cudnn(platform: str) -> str | None:
    if platform not in GPU:
      return f"cuDNN is for GPUs, not for {platform}"
    return _module("cudnn").supports(*arrays, mask, extras, order)

  candidates = {
    "pallas_tpu": _pallas("pallas_tpu", TPU, arrays, extras["bias"], mask, order),
    "cudnn": cudnn,
    "pallas_gpu": _pallas("pallas_gpu", GPU, arrays, extras["bias"], mask, order),
    "xla": anywhere,
    "reference": anywhere,
    "mosaic_gpu": _pallas("mosaic_gpu", GPU, arrays, extras["bias"], mask, order),  # by name only
  }
  return _module(select(implementation, current_platform(), candidates))


def _pallas(name, platforms: tuple[str, ...], arrays, bias, mask, order: Order) -> Supports:
  return kernel_on(platforms, lambda _: _module(name).supports(*arrays, bias, mask, order))


def _module(name: str) -> Any:
  if name == "pallas_tpu":
    # Pallas takes half a second to import and is of no use on a CPU.
    from . import pallas_tpu

    return pallas_tpu
  if name == "mosaic_gpu":
    # The same.
    from . import mosaic_gpu

    return mosaic_gpu
  if name == "pallas_gpu":
    # The same.
    from . import pallas_gpu

    return pallas_gpu
  if name == "cudnn":
    # Of no use on a CPU either.
    from . import cudnn

    return cudnn
  return {"xla": xla, "reference": reference}[name]


def _check_ids(*shape: int, **ids: jax.Array | None) -> None:
  for name, array in ids.items():
    if array is not None and array.shape != shape:
      raise ValueError(f"{name} needs the shape {shape}, got {array.shape}")


def _check(q_BTNH, k_BSKH, v_BSKH, bias, sink_N, softcap, mask) -> None:
  if q_BTNH.ndim != 4 or k_BSKH.ndim != 4 or v_BSKH.ndim != 4:
    raise ValueError(
      "attention needs q [B, T, N, H], k and v [B, S, K, H], "
      f"got {q_BTNH.shape}, {k_BSKH.shape}, {v_BSKH.shape}"
    )
  B, _, N, H = q_BTNH.shape
  if k_BSKH.shape[0] != B or k_BSKH.shape[3] != H or v_BSKH.shape[:3] != k_BSKH.shape[:3]:
    raise ValueError(
      "q and k need one batch and head size, k and v one batch, length and number of heads, "
      f"got {q_BTNH.shape}, {k_BSKH.shape}, {v_BSKH.shape}"
    )
  if N % k_BSKH.shape[2]:
    raise ValueError(f"{N} query heads do not divide over {k_BSKH.shape[2]} key/value heads")
  if mask is not None and mask.by_head is not None and len(mask.by_head) != N:
    raise ValueError(f"the mask is one of {len(mask.by_head)} heads, the queries have {N}")
  if bias is not None and num_heads(bias) != N:
    raise ValueError(f"the bias has {num_heads(bias)} heads, the queries {N}")
  if isinstance(bias, RelativeKeys) and bias.q_BTNH.shape != q_BTNH.shape:
    raise ValueError(f"RelativeKeys needs queries of shape {q_BTNH.shape}, got {bias.q_BTNH.shape}")
  if sink_N is not None and sink_N.shape != (N,):
    raise ValueError(f"sink_N needs the shape ({N},), got {sink_N.shape}")
  if softcap is not None and softcap <= 0:
    raise ValueError(f"softcap must be positive, got {softcap}")
