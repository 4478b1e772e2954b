"""Gradients of float64 functions by central differences."""

from collections.abc import Callable

import numpy as np


def numeric_gradient(f: Callable[[np.ndarray], float], x: np.ndarray) -> np.ndarray:
  """d f / d x, element by element; accurate to about 1e-9 for smooth f of order one."""
  x = np.asarray(x, np.float64)
  gradient = np.zeros_like(x)
  step = 1e-5
  for index in np.ndindex(x.shape):
    up, down = x.copy(), x.copy()
    up[index] += step
    down[index] -= step
    gradient[index] = (f(up) - f(down)) / (2 * step)
  return gradient
