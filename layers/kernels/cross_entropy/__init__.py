"""Next-token cross-entropy from hidden states, without the [tokens, vocabulary] logits.

Letters: B batch, T positions, D model width, V vocabulary.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..partition import auto_partitioned, replicated_like, sharding_like
from ..select import anywhere, current_platform, select
from . import reference, xla

__all__ = ["CrossEntropy", "cross_entropy"]


class CrossEntropy(NamedTuple):
  """`total` is the loss; the other two are statistics and carry no gradient. All float32."""

  total: jax.Array  # scalar: sum of weights * (nll + z_loss * log_z^2)
  nll_BT: jax.Array  # negative log-likelihood of each target, nats
  log_z_BT: jax.Array  # log of the softmax denominator


def cross_entropy(
  x_BTD: jax.Array,
  w_DV: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  *,
  bias_V: jax.Array | None = None,
  scale: float = 1.0,
  softcap: float | None = None,
  z_loss: float = 0.0,
  tied: bool = False,
  shards: tuple[int, int] = (1, 1),
  implementation: str | None = None,
) -> CrossEntropy:
  """Cross-entropy of `softcap(scale * (x @ w + bias))` against integer targets, in nats.

  Args:
    x_BTD: hidden states.
    w_DV: output projection, cast to the dtype of x; with `tied` the token table [V, D] itself,
      used without a transpose. Its gradient is not rounded to the dtype of x.
    targets_BT: token ids. Where the weight is zero any integer will do; elsewhere an id outside
      the vocabulary makes the total NaN rather than pass unseen.
    weights_BT: weight of each token, float: 0 for padding, 1 / valid tokens for a mean.
    bias_V: added to x @ w.
    scale: factor on the logits.
    softcap: c gives c * tanh(logit / c) (Gemma 2, arXiv 2408.00118).
    z_loss: factor of log(Z)^2 (PaLM, arXiv 2204.02311, section 5).
    shards: on a mesh, how many ways B and T are sharded. It changes no result: chunks are sized
      for a device, and each sums its own part of dw, so that parts meet once and not every chunk.
    implementation: "xla" (chunks of tokens; the gradient is computed with the loss, in the same
      pass) or "reference" (whole logits); None is "xla".

  Logits, softmax and sums are float32; probabilities are cast to the dtype of x for the gradient
  matmuls, which accumulate in float32. `total` is differentiable once, in reverse mode, by x, w,
  bias and weights.

  Raises:
    ValueError: shapes that do not fit, or an unknown implementation.
  """
  _check(x_BTD, w_DV, targets_BT, weights_BT, bias_V, tied, softcap, shards)
  chosen = select(implementation, current_platform(), {"xla": anywhere, "reference": anywhere})
  run = {"xla": xla, "reference": reference}[chosen].cross_entropy
  run = partial(run, scale=scale, softcap=softcap, z_loss=z_loss, tied=tied, shards=shards)
  vocab = w_DV.shape[0 if tied else 1]
  weights_BT = weights_BT.astype(jnp.float32)
  # An id past the end reads NaN downstream; ids of unweighted tokens must not.
  outside_BT = (targets_BT < 0) | (targets_BT >= vocab)
  replaced_BT = jnp.where(weights_BT == 0, 0, vocab).astype(targets_BT.dtype)
  targets_BT = jnp.where(outside_BT, replaced_BT, targets_BT)
  like_BT = sharding_like(targets_BT)
  total, nll_BT, log_z_BT = auto_partitioned(
    run,
    (replicated_like(targets_BT), like_BT, like_BT),
    x_BTD, w_DV, bias_V, targets_BT, weights_BT,
  )  # fmt: skip
  return CrossEntropy(total, jax.lax.stop_gradient(nll_BT), jax.lax.stop_gradient(log_z_BT))


def _check(x_BTD, w_DV, targets_BT, weights_BT, bias_V, tied, softcap, shards) -> None:
  if x_BTD.ndim != 3 or w_DV.ndim != 2 or w_DV.shape[1 if tied else 0] != x_BTD.shape[2]:
    layout = "[V, D]" if tied else "[D, V]"
    raise ValueError(
      f"cross_entropy needs x [B, T, D] and w {layout} of one width D, "
      f"got {x_BTD.shape} and {w_DV.shape}"
    )
  if targets_BT.shape != x_BTD.shape[:2] or weights_BT.shape != x_BTD.shape[:2]:
    raise ValueError(
      f"targets and weights need the shape [B, T] = {x_BTD.shape[:2]}, "
      f"got {targets_BT.shape} and {weights_BT.shape}"
    )
  vocab = w_DV.shape[0 if tied else 1]
  if bias_V is not None and bias_V.shape != (vocab,):
    raise ValueError(f"the bias needs the shape [V] = ({vocab},), got {bias_V.shape}")
  if softcap is not None and softcap <= 0:
    raise ValueError(f"softcap must be positive, got {softcap}")
  if any(size % count for size, count in zip(targets_BT.shape, shards, strict=True)):
    raise ValueError(f"[B, T] = {targets_BT.shape} does not divide over shards={shards}")
