"""RMSNorm and LayerNorm from their definitions, a vector at a time, in float64."""

import math

import numpy as np


def rms_norm(x, gain, eps):
  x = np.asarray(x, np.float64)
  y = np.zeros_like(x)
  for row in np.ndindex(x.shape[:-1]):
    root = math.sqrt(sum(v * v for v in x[row]) / x.shape[-1] + eps)
    y[row] = [v / root * g for v, g in zip(x[row], gain, strict=True)]
  return y


def layer_norm(x, gain, bias, eps):
  x = np.asarray(x, np.float64)
  y = np.zeros_like(x)
  for row in np.ndindex(x.shape[:-1]):
    mean = sum(x[row]) / x.shape[-1]
    variance = sum((v - mean) ** 2 for v in x[row]) / x.shape[-1]
    for k, v in enumerate(x[row]):
      y[row][k] = (v - mean) / math.sqrt(variance + eps) * gain[k] + bias[k]
  return y
