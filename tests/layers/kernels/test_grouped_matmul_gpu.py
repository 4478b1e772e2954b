"""The GPU kernels for grouped products: values in interpret mode, lowering for CUDA."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from layers.kernels.grouped_matmul import pallas_gpu
from tests.oracles import grouped
from tests.oracles.grouped import SIZES, R, close, interpreted, one, outer_products, products

D, F = 128, 256


@pytest.fixture
def run(monkeypatch):
  return interpreted(pallas_gpu, monkeypatch)


make = partial(grouped.make, d=D, f=F)


@pytest.mark.parametrize(("dtype", "transposed"), [("bfloat16", True), ("float32", False)])
def test_product(run, dtype, transposed):
  run = run(partial(pallas_gpu.row_products, finish=one, transposed=transposed))
  for sizes in SIZES.values():
    x, w = make("x", dtype, sizes), make("w", dtype, sizes)
    (got,) = run(x, (jnp.swapaxes(w, 1, 2) if transposed else w,), jnp.array(sizes, jnp.int32))
    close(got, products(x, w, sizes), dtype)


def test_outer(run):
  run = run(partial(pallas_gpu.outer, dtype=jnp.float32))
  for sizes in SIZES.values():
    x, dy = make("x", "bfloat16", sizes), make("dy", "bfloat16", sizes)
    got = run(x, dy, jnp.array(sizes, jnp.int32))
    close(got, outer_products(x, dy, sizes), "float32")


def test_gated_with_an_activation_that_is_not_zero_at_zero(run):
  finish = lambda gate, up: (gate * up + 1, gate, up)
  run = run(partial(pallas_gpu.row_products, finish=finish))
  for sizes in SIZES.values():
    x, w, w_up = (make(name, "bfloat16", sizes) for name in ("x", "w", "up"))
    hidden, gate, up = run(x, (w, w_up), jnp.array(sizes, jnp.int32))
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
  gated = lambda gate, up: (gate * up, gate, up)
  calls = [
    (partial(pallas_gpu.row_products, finish=one), s(rows, d), (w,), sizes),
    (partial(pallas_gpu.row_products, finish=one, transposed=True), s(rows, f), (w,), sizes),
    (partial(pallas_gpu.row_products, finish=gated), s(rows, d), (w, w), sizes),
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
