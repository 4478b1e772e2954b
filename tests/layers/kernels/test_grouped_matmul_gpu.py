"""The GPU kernels for grouped products: values in interpret mode, lowering for CUDA."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType

from layers.kernels.grouped_matmul import pallas_gpu

R, D, F, E = 328, 128, 256, 5
SIZES = {
  "uneven": (100, 30, 0, 150, 48),
  "one expert": (0, 0, R, 0, 0),
  "empty ends": (0, 200, 0, 128, 0),
  "short": (3, 5, 0, 0, 129),
  "no rows": (0, 0, 0, 0, 0),
}
TOLERANCE = {"bfloat16": 2e-2, "float32": 2e-5}


@pytest.fixture
def interpreted(monkeypatch):
  """Compiles a function with its kernels in interpret mode; results in float64."""
  call = partial(pl.pallas_call, interpret=True)
  monkeypatch.setattr(pallas_gpu, "pl", SimpleNamespace(**vars(pl) | {"pallas_call": call}))

  def wrap(f):
    f = jax.jit(f)
    return lambda *args: jax.tree.map(lambda a: np.asarray(a, np.float64), f(*args))

  return wrap


def make(name, dtype, sizes):
  """A random array; rows past the last group are NaN where the first dim is R."""
  shape = {"x": (R, D), "dy": (R, F), "w": (E, D, F), "up": (E, D, F)}[name]
  a = np.random.default_rng(list(name.encode())).normal(size=shape)
  if shape[0] == R:
    a[sum(sizes) :] = np.nan
  return jnp.asarray(a, dtype)


def products(x, w, sizes):
  x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
  y, start = np.zeros((R, w.shape[2])), 0
  for e, n in enumerate(sizes):
    y[start : start + n] = x[start : start + n] @ w[e]
    start += n
  return y


def close(got, want, dtype):
  scale = max(np.abs(want).max(), 1e-30)
  np.testing.assert_allclose(got / scale, want / scale, atol=TOLERANCE[dtype], rtol=0)
  np.testing.assert_array_equal(got[want == 0], 0)  # exactly, where zero is structural


@pytest.mark.parametrize(("dtype", "transposed"), [("bfloat16", True), ("float32", False)])
def test_product(interpreted, dtype, transposed):
  run = interpreted(partial(pallas_gpu.product, transposed=transposed))
  for sizes in SIZES.values():
    x, w = make("x", dtype, sizes), make("w", dtype, sizes)
    got = run(x, jnp.swapaxes(w, 1, 2) if transposed else w, jnp.array(sizes, jnp.int32))
    close(got, products(x, w, sizes), dtype)


def test_outer(interpreted):
  run = interpreted(partial(pallas_gpu.outer, dtype=jnp.float32))
  for sizes in SIZES.values():
    x, dy = make("x", "bfloat16", sizes), make("dy", "bfloat16", sizes)
    got = run(x, dy, jnp.array(sizes, jnp.int32))
    x, dy, ends = np.asarray(x, float), np.asarray(dy, float), np.cumsum(sizes)
    want = np.stack([x[b - n : b].T @ dy[b - n : b] for n, b in zip(sizes, ends, strict=True)])
    close(got, want, "float32")


def test_gated_with_an_activation_that_is_not_zero_at_zero(interpreted):
  run = interpreted(partial(pallas_gpu.gated, activation=lambda gate, up: gate * up + 1))
  for sizes in SIZES.values():
    x, w, w_up = (make(name, "bfloat16", sizes) for name in ("x", "w", "up"))
    hidden, gate, up = run(x, w, w_up, jnp.array(sizes, jnp.int32))
    want_gate, want_up = products(x, w, sizes), products(x, w_up, sizes)
    close(gate, want_gate, "bfloat16")
    close(up, want_up, "bfloat16")
    chosen = np.arange(R)[:, None] < sum(sizes)
    close(hidden, np.where(chosen, want_gate * want_up + 1, 0), "bfloat16")


# jax 0.12 announces that it will drop Triton one day.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("shape", [(8192, 2048, 1024, 32), (16384, 4096, 5376, 64)], ids=str)
def test_lowers_for_cuda(shape):
  rows, d, f, experts = shape
  s = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
  w = s(experts, d, f)
  calls = [
    (partial(pallas_gpu.product, transposed=False), s(rows, d), w, sizes),
    (partial(pallas_gpu.product, transposed=True), s(rows, f), w, sizes),
    (partial(pallas_gpu.gated, activation=lambda a, b: a * b), s(rows, d), w, w, sizes),
    (partial(pallas_gpu.outer, dtype=jnp.float32), s(rows, d), s(rows, f), sizes),
  ]  # fmt: skip
  device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")
  mesh = jax.sharding.AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    for function, *args in calls:
      text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
      assert "triton" in text


def test_what_is_not_supported_says_why():
  s = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
  reason = pallas_gpu.supports
  bf16 = jnp.bfloat16
  assert reason(s(bf16, 64, 128), s(bf16, 2, 128, 256), "gpu") is None
  assert "not for tpu" in reason(s(bf16, 64, 128), s(bf16, 2, 128, 256), "tpu")
  assert "float16" in reason(s(jnp.float16, 64, 128), s(jnp.float16, 2, 128, 256), "gpu")
  assert "multiples of 128" in reason(s(bf16, 64, 128), s(bf16, 2, 128, 200), "gpu")
