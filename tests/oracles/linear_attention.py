"""Linear attention in numpy float64, token by token and, without the delta rule, pair by pair."""

import math

import numpy as np


def recurrent(
  q, k, v, *, decay=None, beta=None, normalize=False, scale=1.0, state=None, segments=None
):
  """(o, last state) of [B, T, N, .]; query head n reads key/value head n // (N / K).

  A document starts where a token that is no padding has another segment than the last such token.
  """
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  (B, T, N, H), U, group = q.shape, v.shape[-1], q.shape[2] // k.shape[2]
  o, last = np.zeros((B, T, N, U)), np.zeros((B, N, H, U + normalize))
  for b in range(B):
    for n in range(N):
      S = np.zeros(last.shape[2:]) if state is None else np.array(state[b, n], np.float64)
      segment = None
      for t in range(T):
        here = 1 if segments is None else segments[b, t]
        if here == 0:
          continue
        if segment not in (None, here):
          S = np.zeros_like(S)
        segment = here
        key, value = k[b, t, n // group], v[b, t, n // group]
        if normalize:
          value = np.append(value, 1.0)
        if decay is not None:
          g = np.asarray(decay[b, t, n], np.float64)
          S = np.exp(np.broadcast_to(g, (H,)))[:, None] * S
        if beta is not None:
          value = float(beta[b, t, n]) * (value - S.T @ key)
        S = S + np.outer(key, value)
        read = scale * S.T @ q[b, t, n]
        o[b, t, n] = read[:U] / max(read[U], 1e-6) if normalize else read
      last[b, n] = S
  return o, last


def convolution(x, w, *, segments=None, before=None):
  """(y, the inputs that come before the next token) of x [B, T, N, H], w [W, N, H], token by token.

  Padding is zeros, and none behind a row's last token is kept; `before` belongs to the first token.
  """
  x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
  (B, T, N, H), V = x.shape, len(w) - 1
  segments = np.ones((B, T), int) if segments is None else segments
  y, after = np.zeros(x.shape), np.zeros((B, V, N, H))
  for b in range(B):
    old = np.zeros((V, N, H)) if before is None else np.asarray(before[b], np.float64)
    history, segment = list(old), None
    for t in range(T):
      here = segments[b, t]
      if here and segment not in (None, here):
        history = [np.zeros((N, H))] * len(history)
      if here:
        segment = here
      history.append(x[b, t] if here else np.zeros((N, H)))
      y[b, t] = sum(w[i] * history[len(history) - 1 - V + i] for i in range(V + 1))
      if here:
        after[b] = np.array(history[len(history) - V :])
    if segment is None:
      after[b] = old
  return y, after


def quadratic(q, k, v, *, decay=None, normalize=False, scale=1.0):
  """o [T, U] of one head: weights of all pairs."""
  T = len(q)
  decay = np.zeros((T, q.shape[1])) if decay is None else decay
  weights = np.zeros((T, T))
  for i in range(T):
    for j in range(i + 1):
      left = [math.exp(decay[j + 1 : i + 1, h].sum()) for h in range(q.shape[1])]
      weights[i, j] = scale * sum(q[i, h] * k[j, h] * left[h] for h in range(q.shape[1]))
  return weights @ v / (weights.sum(1, keepdims=True) if normalize else 1.0)
