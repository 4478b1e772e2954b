"""The GPU kernel for attention over a cache: lowering for CUDA. Values are in
test_decode_attention."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from layers.kernels.decode_attention import pallas_gpu
from layers.kernels.decode_attention.inputs import Inputs, Static
from layers.masks import BigBird, Causal, Dilated, Global, Local, PerHead

B, S, R = 4, 2048, 16

MASKS = {
  "none": None,
  "window": Causal() & Local(700),
  "a mask a head": PerHead((Causal(), Causal() & (Dilated(3, 99) | Global(4))) * 8),
  "bigbird": BigBird(32) & Causal(),
}
SHAPES = {  # N, K, T, H, U
  "64": (16, 4, 2, 64, 64),
  "128": (16, 4, 1, 128, 128),
  "256": (16, 16, 1, 256, 256),
  "narrow values": (24, 2, 3, 128, 64),
}


def arguments(N, K, T, H, U, dtype=jnp.bfloat16):
  """(q, k, v, inputs) of each kind of cache, as shapes."""
  s = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
  ids, q = partial(s, dtype=jnp.int32), s(B, T, N, H)
  heads = (s(N, dtype=jnp.float32), s(N, dtype=jnp.float32), ids(N))
  inputs = Inputs(ids(B, T), ids(B), None, None, *heads)
  whole, pages = ((s(*a, K, H), s(*a, K, U)) for a in ((B, S), (B * S // R, R)))
  return (
    (q, *whole, inputs),
    (q, *whole, inputs._replace(kv_positions_BS=ids(B, S))),
    (q, *pages, inputs._replace(page_table_BJ=ids(B, S // R))),
  )


# jax 0.12 announces that it will drop Triton one day.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize(
  ("shape", "mask"),
  [(shape, "window") for shape in SHAPES] + [("128", mask) for mask in MASKS if mask != "window"],
)
def test_lowers_for_cuda(shape, mask):
  device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")
  mesh = jax.sharding.AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
  f = partial(pallas_gpu.attention, Static(MASKS[mask], 0.1, 20.0))
  with jax.sharding.use_abstract_mesh(mesh):
    for each in arguments(*SHAPES[shape]):
      assert pallas_gpu.supports(*each) is None
      text = jax.jit(f).trace(*each).lower(lowering_platforms=("cuda",)).as_text()
      assert "triton" in text


def test_what_is_not_supported_says_why():
  (q, k, v, inputs), _, (_, pages, _, paged) = arguments(16, 4, 1, 128, 128)
  s = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
  reason = pallas_gpu.supports
  assert "float64" in reason(s(*q.shape, dtype=jnp.float64), k, v, inputs)
  odd = s(B, S, 4, 96)
  assert "powers of 2 from 16 to 256, not 96" in reason(s(B, 1, 16, 96), odd, odd, inputs)
  assert "128, not 160" in reason(s(B, 40, 16, 128), k, v, inputs)
  few = s(B, 24, 4, 128)
  assert "multiple of 16 positions, not 24" in reason(q, few, few, paged)
  assert reason(q, pages, pages, paged) is None
