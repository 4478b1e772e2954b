"""Attention by cuDNN, through `jax.nn`: all keys, the causal ones, or a causal window.

Letters: B batch, T query positions, S key positions, N query heads, K key/value heads, H head size.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from .blocks import Order

HOPPER, AMPERE = (9, 0), (8, 0)


def supports(q_BTNH, k_BSKH, v_BSKH, mask, extras, order: Order) -> str | None:
  """Why cuDNN can't run these arguments, or None; `extras` by name, None where there is none."""
  if order == "any":
    return "the keys must be those of the queries' own row"
  if given := [name for name, value in extras.items() if value is not None]:
    return f"it has no {', '.join(given)}"
  if window(mask, q_BTNH.shape[1]) is None:
    return f"it shows all keys, the causal ones or a causal window of them, not {mask}"
  if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
    return f"arrays must be bfloat16 or float16, not {q_BTNH.dtype}"
  if not q_BTNH.dtype == k_BSKH.dtype == v_BSKH.dtype:
    return f"q, k and v need one dtype, not {q_BTNH.dtype}, {k_BSKH.dtype} and {v_BSKH.dtype}"
  if k_BSKH.shape != v_BSKH.shape:
    return f"keys and values need one head size, not {k_BSKH.shape[3]} and {v_BSKH.shape[3]}"
  capability = compute_capability()
  if capability is None or capability < AMPERE:
    return "there is no NVIDIA GPU of the Ampere generation or later"
  H, largest = q_BTNH.shape[3], 256 if capability >= HOPPER else 128
  if H % 8 or not 0 < H <= largest:
    return f"head sizes must be multiples of 8 up to {largest}, not {H}"
  return None


def compute_capability() -> tuple[int, ...] | None:
  """Of this process's NVIDIA GPUs, or None."""
  device = jax.local_devices()[0]
  if "cuda" not in device.client.platform_version:
    return None
  return tuple(map(int, device.compute_capability.split(".")))


def window(mask: Any, length: int) -> dict[str, Any] | None:
  """The mask of a row in the arguments of `jax.nn.dot_product_attention`; None: it can't say it."""
  before = after = None
  if mask is not None:
    if len(mask.distinct) > 1 or mask.distinct[0].interval is None:
      return None
    before, after = (
      None if side is None or side >= length - 1 else side for side in mask.distinct[0].interval
    )
  if after is None and before is None:
    return {"is_causal": False}
  if after != 0:
    return None
  # Both count the positions before the query's own.
  return {"is_causal": True, "local_window_size": None if before is None else (before, 0)}


def attention(
  q_BTNH, k_BSKH, v_BSKH, q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS, bias,
  sink_N, mask_N, *, mask, scale, softcap, order,
) -> tuple[jax.Array, None]:  # fmt: skip
  """Arguments as in the package, where None stands for a default; see there. No log-sum-exp."""
  # Such masks ask for distances alone, and those of positions are those of indices.
  del q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS, bias, sink_N, mask_N
  del softcap, order
  shown = window(mask, q_BTNH.shape[1])
  assert shown is not None, "supports() asks first"
  o_BTNH = jax.nn.dot_product_attention(
    q_BTNH, k_BSKH, v_BSKH, scale=scale, implementation="cudnn", **shown
  )
  return checkpoint_name(o_BTNH, "attention_out"), None
