"""AdamW and learning-rate schedules in numpy float64, from their papers' definitions."""

import math

import numpy as np


def adamw(w, gradients, *, rates, beta1, beta2, eps, decay, keep=lambda m: m):
  """Weights after each gradient: Loshchilov & Hutter, arXiv 1711.05101, algorithm 2.

  As in PyTorch, the decay is multiplied by the whole learning rate of the step. `keep` is what
  becomes of the first moment between steps.
  """
  w = np.asarray(w, np.float64)
  m, v = np.zeros_like(w), np.zeros_like(w)
  history = []
  for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
    g = np.asarray(g, np.float64)
    m = beta1 * keep(m) + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    w = w - rate * (m_hat / (np.sqrt(v_hat) + eps) + decay * w)
    history.append(w)
  return history


def to_bfloat16(x):
  """The nearest number of 8 significant bits, ties to the even one, in float64."""
  fraction, exponent = np.frexp(np.asarray(x, np.float64))
  return np.ldexp(np.rint(fraction * 256) / 256, exponent)


def learning_rate(kind, step, *, peak, warmup, end, final, stable):
  """The rate of update `step`, counted from 0; `final` and `stable` are fractions."""
  if step < warmup:
    return peak * (step + 1) / (warmup + 1)
  if kind == "constant":
    return peak
  if kind == "inverse_sqrt":
    return peak * math.sqrt(max(warmup, 1)) / math.sqrt(max(step, warmup, 1))
  progress = min((step - warmup) / (end - warmup), 1.0)
  if kind == "cosine":
    return peak * (final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2)
  if kind == "linear":
    return peak * (1 - (1 - final) * progress)
  if kind == "wsd":
    if progress <= stable:
      return peak
    return peak * (1 - (1 - final) * (progress - stable) / (1 - stable))
  raise ValueError(kind)
