"""Kernels inside `shard_map`, whose types say over which axes a value varies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from layers.kernels.attention import Bucketed, attention
from layers.kernels.attention import xla as attention_xla
from layers.kernels.cross_entropy import cross_entropy
from layers.kernels.cross_entropy import xla as cross_entropy_xla
from layers.kernels.linear_attention import linear_attention


def normal(*shape):
  return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def attend(q, k, v, table, sink):
  return jnp.sum(attention(q, k, v, bias=Bucketed(table, max_distance=20), sink_N=sink) ** 2)


def attend_linearly(q, k, v, decay):
  decay = -jnp.abs(decay)[None, None]
  return jnp.sum(linear_attention(q, k, v, decay=decay, chunk=16)[0] ** 2)


def predict(x, w, targets, weights):
  return cross_entropy(x, w, targets, weights).total


CASES = {
  "attention": (
    attend,
    (normal(4, 40, 4, 8), normal(4, 40, 2, 8), normal(4, 40, 2, 4), normal(8, 4), normal(4)),
    (P("data"), P("data"), P("data"), P(), P()),
  ),
  "linear attention": (
    attend_linearly,
    (normal(4, 40, 4, 8), normal(4, 40, 2, 8) / 3, normal(4, 40, 2, 4), normal(4, 8)),
    (P("data"), P("data"), P("data"), P()),
  ),
  "cross_entropy": (
    predict,
    (normal(4, 8, 16), normal(16, 32), jnp.ones((4, 8), jnp.int32), jnp.ones((4, 8))),
    (P("data"), P(), P("data"), P("data")),
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_shared_parameters_get_the_gradient_of_all_devices(name, monkeypatch):
  """Batch split by hand, the rest automatic; loops of several blocks and chunks."""
  monkeypatch.setattr(attention_xla, "block_size", lambda: 16)
  monkeypatch.setattr(cross_entropy_xla, "chunk_length", lambda *shape: 4)
  loss, args, specs = CASES[name]
  argnums = tuple(i for i, a in enumerate(args) if a.dtype == jnp.float32)
  mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
  with jax.set_mesh(mesh):
    total = lambda *a: jax.lax.psum(loss(*a), "data")
    mapped = jax.shard_map(total, in_specs=specs, out_specs=P(), axis_names={"data"})
    grads = jax.jit(jax.grad(mapped, argnums))(*args)
  for got, want in zip(grads, jax.jit(jax.grad(loss, argnums))(*args), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
