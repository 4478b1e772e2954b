"""Mixture of experts with loops in numpy float64, from the papers' definitions."""

import math

import numpy as np


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def route(logits_SE, k, normalize=False):
  """Top-k by probability, ties to the lowest index; Switch is k=1 (arXiv 2101.03961, eq. 1-2)."""
  probs = softmax(np.asarray(logits_SE, np.float64))
  order = np.argsort(-probs, axis=-1, kind="stable")[:, :k]
  weights = np.take_along_axis(probs, order, axis=-1)
  if normalize:
    weights = weights / weights.sum(-1, keepdims=True)
  return probs, order, weights


def balance_loss(probs_SE, order_SX, valid_S=None):
  """E * sum f_e P_e over valid tokens (eq. 4-6), f as a share of all choices."""
  S, E = probs_SE.shape
  valid = np.ones(S, bool) if valid_S is None else valid_S
  f, P = np.zeros(E), np.zeros(E)
  for s in range(S):
    if valid[s]:
      P += probs_SE[s] / valid.sum()
      for e in order_SX[s]:
        f[e] += 1 / (valid.sum() * order_SX.shape[1])
  return E * float(f @ P)


def z_loss(logits_SE):
  """Mean squared logsumexp (arXiv 2202.08906, eq. 5)."""
  return float(np.mean(np.log(np.exp(logits_SE).sum(-1)) ** 2))


def place(order_SX, num_experts, capacity, valid_S=None):
  """Kept (token, choice) pairs: all first choices in token order, then all second choices."""
  S, X = order_SX.shape
  used, kept = np.zeros(num_experts, int), np.zeros((S, X), bool)
  for x in range(X):
    for s in range(S):
      e = order_SX[s, x]
      if (valid_S is None or valid_S[s]) and used[e] < capacity:
        used[e] += 1
        kept[s, x] = True
  return kept


def gated_mlp(x_D, up_DF, gate_DF, down_FD):
  gate = x_D @ gate_DF
  return (gate / (1 + np.exp(-gate)) * (x_D @ up_DF)) @ down_FD


def moe(x_SD, router_DE, up_EDF, gate_EDF, down_EFD, *, k, capacity, normalize=False, valid_S=None):
  """Loop over tokens and their kept choices."""
  x_SD = np.asarray(x_SD, np.float64)
  _, order, weights = route(x_SD @ router_DE, k, normalize)
  kept = place(order, router_DE.shape[1], capacity, valid_S)
  y = np.zeros_like(x_SD)
  for s, x in np.ndindex(order.shape):
    if kept[s, x]:
      e = order[s, x]
      y[s] += weights[s, x] * gated_mlp(x_SD[s], up_EDF[e], gate_EDF[e], down_EFD[e])
  return y, kept


def capacity(tokens, experts, k, factor, minimum):
  return min(tokens, max(math.ceil(factor * k * tokens / experts), minimum))
