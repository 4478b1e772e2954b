"""Collectives inside a shard_map, against numpy on the whole arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mesh import collectives
from mesh.collectives import (
  from_experts,
  gather_weight,
  manual_size,
  ring_shift,
  to_experts,
  vary,
  varying,
)
from mesh.topology import make_mesh

pytestmark = pytest.mark.xdist_group("devices")
W = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(8, 16)).astype(np.float32)


def sharded(function, in_specs, out_specs, **sizes):
  mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
  run = jax.jit(jax.shard_map(function, in_specs=in_specs, out_specs=out_specs))

  def call(*args):
    with jax.set_mesh(mesh):
      return jax.tree.map(np.asarray, run(*args))

  return call


@pytest.fixture
def in_two_stages(monkeypatch):
  """As on TPUs: an axis of eight in groups."""
  monkeypatch.setitem(collectives._TWO_STAGES, "cpu", 8)


@pytest.mark.parametrize(
  "sizes", [{"fsdp": 8}, {"fsdp": 4}, {"fsdp": 2, "expert": 4}, {"data": 2, "fsdp": 4}],
  ids=lambda s: "x".join(map(str, s.values())),
)  # fmt: skip
def test_a_gathered_weight_and_its_gradient(sizes, in_two_stages):
  """Rows over all axes, the weight over those but `data`: y = x w, dw = x^T dy."""
  rows = tuple(sizes)
  dims = ((0, tuple(a for a in sizes if a != "data")),)

  def loss(w, x):
    y = x @ gather_weight(w, dims, jnp.float32, rows)
    return jax.lax.psum(jnp.sum(y**2), rows), y

  def both(w, x):
    (_, y), dw = jax.value_and_grad(loss, has_aux=True)(w, x)
    return y, dw

  weight, row = P(dims[0][1]), P(rows)
  y, dw = sharded(both, (weight, row), (row, weight), **sizes)(W, X)
  np.testing.assert_allclose(y, X @ W, rtol=1e-5)
  np.testing.assert_allclose(dw, X.T @ (2 * X @ W), rtol=1e-4, atol=1e-4)


def test_what_travels_is_rounded_and_its_gradient_is_not():
  def both(w, x):
    gathered, pull = jax.vjp(
      lambda w: gather_weight(w, ((0, ("fsdp",)),), jnp.bfloat16, ("fsdp",)), w
    )
    return gathered[None], pull(vary(x, varying(gathered)))[0]

  cotangent = np.full((16, 6), 1 + 2**-12, np.float32)  # bfloat16 would lose the fraction
  gathered, dw = sharded(both, (P("fsdp"), P()), (P("fsdp"), P("fsdp")), fsdp=8)(W, cotangent)
  rounded = np.asarray(jnp.asarray(W, jnp.bfloat16).astype(jnp.float32))
  assert gathered.dtype == np.float32
  np.testing.assert_array_equal(gathered, np.broadcast_to(rounded, (8, 16, 6)))
  np.testing.assert_array_equal(dw, 8 * cotangent)


def test_rows_to_experts_and_back():
  """[E, G, X]: experts of all groups to all groups of an expert."""
  rows = np.arange(8 * 4 * 3).reshape(8, 4, 3)

  def there_and_back(rows_EGX):
    there = to_experts(rows_EGX)
    assert there.shape == (2, 4, 3)
    return there, from_experts(there)

  specs = P(None, "expert")
  there, back = sharded(there_and_back, specs, (P("expert"), specs), expert=4)(rows)
  np.testing.assert_array_equal(there, rows)  # the same array, sharded over E instead of G
  np.testing.assert_array_equal(back, rows)


def test_ring_and_sizes():
  def shift(x):
    assert manual_size("context") == 4 and manual_size("fsdp") == 1
    return ring_shift(x, "context")

  shifted = sharded(shift, P("context"), P("context"), context=4)(np.arange(8))
  np.testing.assert_array_equal(shifted, np.roll(np.arange(8), 2))
  assert manual_size("context") == 1


def test_stages_split_a_large_axis(in_two_stages):
  """Two groups in turn hold the same devices as the axis, each device once in each stage."""
  seen = []
  sharded(lambda x: seen.append(collectives._stages(("fsdp",))) or x, P("fsdp"), P("fsdp"), fsdp=8)(
    np.arange(8)
  )
  (_, across), (_, within) = seen[0]
  for _, groups in seen[0]:
    assert sorted(i for group in groups for i in group) == list(range(8))
  assert {len(group) for group in across} == {4} and {len(group) for group in within} == {2}
  assert all(len(set(a) & set(w)) == 1 for a in across for w in within)
