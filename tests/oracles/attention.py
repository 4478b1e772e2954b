"""Attention one query at a time, in numpy float64, from the definitions."""

import math

import numpy as np


def attention(q, k, v, *, visible, scale, softcap=None, bias=None, sink=None):
  """q [B, T, N, H]; k, v [B, S, K, H]; `visible(b, i, j)` and `bias(b, n, i, j)` take indices."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  B, T, N, _ = q.shape
  S, K = k.shape[1:3]
  out = np.zeros((B, T, N, v.shape[-1]))
  for b in range(B):
    for n in range(N):
      kv_head = n // (N // K)
      for i in range(T):
        keys = [j for j in range(S) if visible(b, i, j)]
        if not keys:
          continue
        logits = []
        for j in keys:
          x = scale * float(q[b, i, n] @ k[b, j, kv_head])
          if softcap is not None:
            x = softcap * math.tanh(x / softcap)
          logits.append(x + (bias(b, n, i, j) if bias is not None else 0.0))
        weights = [math.exp(x) for x in logits]
        total = sum(weights) + (math.exp(sink[n]) if sink is not None else 0.0)
        out[b, i, n] = sum(w * v[b, j, kv_head] for w, j in zip(weights, keys, strict=True)) / total
  return out


def t5_bucket(distance, num_buckets, max_distance, bidirectional):
  """arXiv 1910.10683 in float64; `distance` is query minus key position."""
  offset = 0
  if bidirectional:
    num_buckets //= 2
    if distance < 0:
      offset, distance = num_buckets, -distance
  distance = max(distance, 0)
  exact = num_buckets // 2
  if distance < exact:
    return offset + distance
  position = math.log(distance / exact) / math.log(max_distance / exact)
  # 1e-9: float64 logarithms of exact powers may fall just short of an integer.
  return offset + min(num_buckets - 1, exact + int(position * (num_buckets - exact) + 1e-9))
