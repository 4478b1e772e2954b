"""Mixture of experts with loops in numpy float64, from the papers' definitions."""

import math
from typing import NamedTuple

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


class Routed(NamedTuple):
  """One group without padding."""

  weight_SE: np.ndarray  # combine weights, 0 where not chosen
  chosen_SE: np.ndarray  # bool
  balance: float  # f without gradient: differentiate P only
  order_SX: np.ndarray | None = None  # experts as preferred, where a router has an order


def ranked(values):
  """Indices from the largest value down, ties to the lowest index."""
  return sorted(range(len(values)), key=lambda i: (-values[i], i))


def _dense(shape, entries):
  weight, chosen = np.zeros(shape), np.zeros(shape, bool)
  for s, e, w in entries:
    weight[s, e], chosen[s, e] = w, True
  return weight, chosen


def route_scores(
  logits_SE, k, *, normalize=False, sigmoid=False, scale=1.0, groups=1, keep=1, bias_E=None
):
  """Top k of scores plus bias among the best groups (arXiv 2412.19437, eq. 12-16, 18-20)."""
  logits_SE = np.asarray(logits_SE, np.float64)
  S, E = logits_SE.shape
  score_SE = 1 / (1 + np.exp(-logits_SE)) if sigmoid else softmax(logits_SE)
  bias_E = np.zeros(E) if bias_E is None else bias_E
  order, plain, entries = [], [], []
  for s in range(S):
    select = score_SE[s] + bias_E
    parts = np.split(np.arange(E), groups)
    best = ranked([sum(sorted(select[part])[-2:]) for part in parts])[:keep]
    allowed = [e for g in sorted(best) for e in parts[g]]
    order.append([allowed[i] for i in ranked(select[allowed])[:k]])
    plain.append(ranked(score_SE[s])[:k])
    weights = score_SE[s][order[-1]]
    weights = scale * weights / (weights.sum() if normalize else 1)
    entries += [(s, e, w) for e, w in zip(order[-1], weights, strict=True)]
  probs_SE = score_SE / score_SE.sum(-1, keepdims=True)
  balance = balance_loss(probs_SE, np.array(plain))
  return Routed(*_dense((S, E), entries), balance, np.array(order))


def gshard(logits_SE, second_S=None):
  """Two choices, the second at random (arXiv 2006.16668, algorithm 1, threshold 0.2)."""
  probs_SE = softmax(np.asarray(logits_SE, np.float64))
  order = np.array([ranked(p)[:2] for p in probs_SE])
  entries = []
  for s, (first, second) in enumerate(order):
    total = probs_SE[s, first] + probs_SE[s, second]
    entries.append((s, first, probs_SE[s, first] / total))
    if second_S is None or second_S[s] < min(1, probs_SE[s, second] / total / 0.2):
      entries.append((s, second, probs_SE[s, second] / total))
  return Routed(*_dense(probs_SE.shape, entries), balance_loss(probs_SE, order[:, :1]), order)


def expert_choice(logits_SE, slots):
  """Every expert takes its best tokens (arXiv 2202.09368, section 3.2)."""
  probs_SE = softmax(np.asarray(logits_SE, np.float64))
  columns = range(probs_SE.shape[1])
  entries = [(s, e, probs_SE[s, e]) for e in columns for s in ranked(probs_SE[:, e])[:slots]]
  return Routed(*_dense(probs_SE.shape, entries), 0.0)


def hashed(logits_SE, ids_S, table_V):
  """The table's expert, weighted by its probability (arXiv 2106.04426)."""
  probs_SE = softmax(np.asarray(logits_SE, np.float64))
  entries = [(s, table_V[i], probs_SE[s, table_V[i]]) for s, i in enumerate(ids_S)]
  return Routed(*_dense(probs_SE.shape, entries), 0.0)


def no_token_left_behind(logits_SE, slots, rounds):
  """Rounds of choices for the slots that are left (arXiv 2101.03961, appendix B)."""
  probs_SE = softmax(np.asarray(logits_SE, np.float64))
  S, E = probs_SE.shape
  order = np.array([ranked(p) for p in probs_SE])
  used, entries = [0] * E, []
  for r in range(rounds):
    for s in range(S):
      e = order[s, r]
      if all(s != placed for placed, *_ in entries) and used[e] < slots:
        used[e] += 1
        entries.append((s, e, probs_SE[s, e]))
  return Routed(*_dense((S, E), entries), balance_loss(probs_SE, order[:, :1]), order[:, :rounds])


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
