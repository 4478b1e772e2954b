"""Activations and the feed-forward layer from their definitions, in float64."""

import math

import numpy as np


def _sigmoid(v):
  return 1 / (1 + math.exp(-v))


ACTIVATIONS = {
  "relu": lambda v: max(v, 0.0),
  "relu2": lambda v: max(v, 0.0) ** 2,
  "gelu": lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))),
  "gelu_tanh": lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
  "quick_gelu": lambda v: v * _sigmoid(1.702 * v),
  "silu": lambda v: v * _sigmoid(v),
}


def activate(name, x):
  return np.vectorize(ACTIVATIONS[name], otypes=[np.float64])(np.asarray(x, np.float64))


def mlp(x, weights, activation, clamp=math.inf, up_offset=0.0):
  """`weights` maps up, down and optionally gate and *_bias to arrays, as the shell names them."""
  w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
  x = np.asarray(x, np.float64)
  up = np.clip(x @ w["up"] + w.get("up_bias", 0.0), -clamp, clamp)
  if "gate" in w:
    gate = np.minimum(x @ w["gate"] + w.get("gate_bias", 0.0), clamp)
    hidden = activate(activation, gate) * (up + up_offset)
  else:
    hidden = activate(activation, up)
  return hidden @ w["down"] + w.get("down_bias", 0.0)
