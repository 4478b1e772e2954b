"""Grouped products by numpy in float64, and kernels run in interpret mode to meet them."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

R, E = 328, 5
SIZES = {
  "uneven": (100, 30, 0, 150, 48),
  "even, past a tile": (65, 65, 65, 65, 68),
  "one expert": (0, 0, R, 0, 0),
  "empty ends": (0, 200, 0, 128, 0),
  "short": (3, 5, 0, 0, 129),
  "no rows": (0, 0, 0, 0, 0),
}
TOLERANCE = {"bfloat16": 2e-2, "float32": 2e-5}


def interpreted(module, monkeypatch):
  """Compiles functions with the kernels of `module` in interpret mode; results in float64."""
  call = partial(pl.pallas_call, interpret=True)
  monkeypatch.setattr(module, "pl", SimpleNamespace(**vars(pl) | {"pallas_call": call}))

  def wrap(f):
    f = jax.jit(f)
    return lambda *args: jax.tree.map(lambda a: np.asarray(a, np.float64), f(*args))

  return wrap


def rows_of(sizes):
  """(group, first row, end) of each group."""
  ends = np.cumsum(sizes)
  return [(e, end - n, end) for e, (n, end) in enumerate(zip(sizes, ends, strict=True))]


def make(name, dtype, sizes, d, f):
  """A random array; rows past the last group are NaN where the first dim is R."""
  shape = {"x": (R, d), "dy": (R, f), "w": (E, d, f), "up": (E, d, f)}[name]
  a = np.random.default_rng(list(name.encode())).normal(size=shape)
  if shape[0] == R:
    a[sum(sizes) :] = np.nan
  return jnp.asarray(a, dtype)


def products(x, w, sizes):
  x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
  y = np.zeros((len(x), w.shape[2]))
  for e, start, end in rows_of(sizes):
    y[start:end] = x[start:end] @ w[e]
  return y


def outer_products(x, dy, sizes):
  x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
  return np.stack([x[start:end].T @ dy[start:end] for _, start, end in rows_of(sizes)])


def close(got, want, dtype):
  scale = max(np.abs(want).max(), 1e-30)
  np.testing.assert_allclose(got / scale, want / scale, atol=TOLERANCE[dtype], rtol=0)
  # Not only close: where the expected value is a structural zero.
  np.testing.assert_array_equal(got[want == 0], 0)


def one(y):
  return (y,)
