"""Linear attention: a state of fixed size in place of keys and values; decays, gates, delta rule.

Letters: B batch, T positions, N heads, K key/value heads, H head size of queries and keys, U that
of values.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ..partition import auto_partitioned, sharding_like
from ..select import GPU, TPU, anywhere, current_platform, kernel_on, select
from . import reference, xla

__all__ = ["linear_attention"]

SMALLEST_SUM = 1e-6


def linear_attention(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKU: jax.Array,
  *,
  decay: jax.Array | None = None,
  beta_BTN: jax.Array | None = None,
  normalize: bool = False,
  scale: float = 1.0,
  state_BNHU: jax.Array | None = None,
  segments_BT: jax.Array | None = None,
  chunk: int = 64,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """What each token reads from a state that the tokens before it and itself have written.

  For each head, token after token, with a = exp(decay):

    S <- diag(a) S
    v <- beta (v - S^T k)                     only with beta: the delta rule
    S <- S + k v^T
    o = scale q^T S                           with normalize: over q . sum of k

  These are linear attention with a feature map already applied to q and k (arXiv 2006.16236,
  normalize=True), RetNet (arXiv 2307.08621), lightning attention (arXiv 2401.04658) and Mamba-2
  (arXiv 2405.21060) with a decay a head, GLA (arXiv 2312.06635) with one a channel, DeltaNet (arXiv
  2406.06484), the gated delta rule (arXiv 2412.06464), and with a decay a channel Kimi delta
  attention (arXiv 2510.26692). Computed in chunks of tokens, exactly; memory is linear in T.

  Args:
    q_BTNH, k_BTKH, v_BTKU: query head n reads key/value head n // (N / K); it has a state of its
      own.
    decay: log-decays, finite and normally <= 0: [B, T, N], or [B, T, N, H] for each channel of the
      keys. Dims of size 1 are broadcast. None is none.
    beta_BTN: the delta rule's writing strengths, usually in 0..1.
    normalize: divide by q . z, z the sum of the (decayed) keys, or by 1e-6 if that is less; the
      features must not be negative. z is then the last column of the state, [B, N, H, U + 1].
    scale: factor on o.
    state_BNHU: float32, the state before the first token, which its document continues; None is 0.
    segments_BT: a document starts, with an empty state, where the segment is not that of the last
      token before. Segment 0 is padding: skipped wherever it stands, what it holds (NaN too) is
      ignored, o is 0 there. A state thus outlives padding on the right.
    chunk: tokens a chunk, a power of two.
    implementation: "pallas_tpu", "pallas_gpu" (shorter chunks where registers ask for them), "xla"
      (any platform) or "reference" (one token after the other, a state of each in the backward
      pass); None is the first that can run.

  Returns:
    (o [B, T, N, U] in the dtype of v, the last state in float32), both differentiable, in reverse
    mode only except in "reference". States, decays and sums are float32; bfloat16 products are of
    bfloat16 values. The result and the state before each chunk, which backward needs, are named
    "attention_out" and "attention_state" for `jax.checkpoint` policies.

  Raises:
    ValueError: shapes that do not fit, `normalize` together with `beta_BTN`, or an unknown
      implementation.
    NotImplementedError: a named implementation that cannot run here.
  """
  (B, T, N, H), U = _check(q_BTNH, k_BTKH, v_BTKU), v_BTKU.shape[-1]
  if normalize and beta_BTN is not None:
    raise ValueError("the delta rule has no sum to normalize by: give beta_BTN or normalize")
  if chunk < 1 or chunk & (chunk - 1):
    raise ValueError(f"chunk must be a power of two, got {chunk}")
  dtype = v_BTKU.dtype
  if normalize:
    v_BTKU = jnp.concatenate([v_BTKU, jnp.ones_like(v_BTKU[..., :1])], axis=-1)
  shape = (B, N, H, v_BTKU.shape[-1])
  if state_BNHU is not None and state_BNHU.shape != shape:
    raise ValueError(f"the state needs the shape {shape}, got {state_BNHU.shape}")
  if decay is not None:
    decay = _broadcast("decay", decay, (B, T, N, H)[: max(3, decay.ndim)])
  if beta_BTN is not None:
    beta_BTN = _broadcast("beta_BTN", beta_BTN, (B, T, N))
  if segments_BT is not None and segments_BT.shape != (B, T):
    raise ValueError(f"segments_BT needs the shape {(B, T)}, got {segments_BT.shape}")
  if state_BNHU is None:
    state_BNHU = jnp.zeros(shape, jnp.float32)
  module = _select(implementation, (q_BTNH, k_BTKH, v_BTKU, chunk))
  run = partial(
    module.linear_attention, scale=scale, chunk=chunk, dtype=jnp.float32 if normalize else dtype
  )
  o_BTNU, state_BNHU = auto_partitioned(
    partial(_documents, run), (sharding_like(q_BTNH), _state_sharding(q_BTNH)),
    (q_BTNH, k_BTKH, v_BTKU, decay, beta_BTN), segments_BT, state_BNHU.astype(jnp.float32),
  )  # fmt: skip
  if normalize:
    sums_BTN1 = jnp.maximum(o_BTNU[..., U:], SMALLEST_SUM)
    o_BTNU = (o_BTNU[..., :U] / sums_BTN1).astype(dtype)
  return o_BTNU, state_BNHU


def _documents(run, tokens, segments_BT, state_BNHU):
  """`run` with padding as zeros, documents counted, and keys and values of every query head."""
  run_BT = None
  if segments_BT is not None:
    run_BT = _runs(segments_BT)
    valid_BT = segments_BT > 0
    keep = lambda x: jnp.where(jnp.expand_dims(valid_BT, tuple(range(2, x.ndim))), x, 0)
    tokens = jax.tree.map(keep, tokens)
  q_BTNH, k_BTKH, v_BTKU, decay, beta_BTN = tokens
  group = q_BTNH.shape[2] // k_BTKH.shape[2]
  k_BTNH, v_BTNU = (jnp.repeat(x, group, axis=2) for x in (k_BTKH, v_BTKU))
  return run(q_BTNH, k_BTNH, v_BTNU, decay, beta_BTN, run_BT, state_BNHU)


def _runs(segments_BT: jax.Array) -> jax.Array:
  """[B, T], int32: how many times the document has changed since the first one."""
  T = segments_BT.shape[1]
  at_BT = jnp.where(segments_BT > 0, jnp.arange(T, dtype=jnp.int32)[None], -1)
  last_BT = jax.lax.cummax(at_BT, axis=1)  # the latest that is no padding
  before_BT = jnp.pad(last_BT[:, :-1], [(0, 0), (1, 0)], constant_values=-1)
  segment_BT = jnp.take_along_axis(segments_BT, jnp.maximum(before_BT, 0), axis=1)
  changes_BT = (segments_BT > 0) & (before_BT >= 0) & (segments_BT != segment_BT)
  return jnp.cumsum(changes_BT, axis=1, dtype=jnp.int32)


def _state_sharding(q_BTNH: jax.Array) -> NamedSharding:
  """Rows and heads as the queries', whole matrices."""
  sharding = sharding_like(q_BTNH)
  rows, _, heads, *_ = (*sharding.spec, None, None, None, None)
  return NamedSharding(sharding.mesh, PartitionSpec(rows, heads, None, None))


def _select(implementation: str | None, arguments: tuple) -> Any:
  """The module that computes these arguments here."""

  candidates = {
    "pallas_tpu": kernel_on(TPU, lambda _: _module("pallas_tpu").supports(*arguments)),
    "pallas_gpu": kernel_on(GPU, lambda _: _module("pallas_gpu").supports(*arguments)),
    "xla": anywhere,
    "reference": anywhere,
  }
  return _module(select(implementation, current_platform(), candidates))


def _module(name: str) -> Any:
  if name == "pallas_tpu":
    # Pallas takes half a second to import and is of no use on a CPU.
    from . import pallas_tpu

    return pallas_tpu
  if name == "pallas_gpu":
    # The same.
    from . import pallas_gpu

    return pallas_gpu
  return {"xla": xla, "reference": reference}[name]


def _broadcast(name: str, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  fits = x.ndim == len(shape) and all(a in (1, b) for a, b in zip(x.shape, shape, strict=True))
  if not fits:
    raise ValueError(f"{name} needs the shape {shape}, got {x.shape}")
  return jnp.broadcast_to(x, shape).astype(jnp.float32)


def _check(q_BTNH, k_BTKH, v_BTKU) -> tuple[int, ...]:
  if q_BTNH.ndim != 4 or k_BTKH.ndim != 4 or v_BTKU.ndim != 4:
    raise ValueError(
      "linear attention needs q [B, T, N, H], k [B, T, K, H] and v [B, T, K, U], "
      f"got {q_BTNH.shape}, {k_BTKH.shape}, {v_BTKU.shape}"
    )
  if not q_BTNH.shape[:2] == k_BTKH.shape[:2] == v_BTKU.shape[:2]:
    raise ValueError(
      f"q, k and v are not of the same tokens: {q_BTNH.shape}, {k_BTKH.shape}, {v_BTKU.shape}"
    )
  if q_BTNH.shape[3] != k_BTKH.shape[3] or k_BTKH.shape[2] != v_BTKU.shape[2]:
    raise ValueError(
      "q and k need one head size, k and v one number of heads, "
      f"got {q_BTNH.shape}, {k_BTKH.shape}, {v_BTKU.shape}"
    )
  if q_BTNH.shape[2] % k_BTKH.shape[2]:
    raise ValueError(
      f"{q_BTNH.shape[2]} query heads do not divide over {k_BTKH.shape[2]} key/value heads"
    )
  return q_BTNH.shape
