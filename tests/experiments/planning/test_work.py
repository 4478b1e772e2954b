"""Counts of work in programs compiled for v5p, against shapes and known trip counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.planning.program import compile_with_text
from experiments.planning.work import totals, work
from layers.kernels.grouped_matmul import grouped_matmul
from mesh.topology import describe_devices


def step(x_RD, w_LDD, w_EDF, sizes_E):
  """Three layers in a loop, a product a head, and a grouped product."""
  with jax.named_scope("loop"):
    x_RD, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_RD, w_LDD)
  with jax.named_scope("heads"):
    heads = x_RD.reshape(8, -1, 256)[..., :128]
    logits = jnp.einsum("nth,nsh->nts", heads, heads)
  return grouped_matmul(x_RD, w_EDF, sizes_E).sum() + logits.sum()


def test_products_of_loops_heads_and_kernels():
  pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu, Linux x86-64 only")
  one = NamedSharding(Mesh(np.array(describe_devices("v5p:2x2x1")[:1]), ("d",)), PartitionSpec())
  array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=one)
  R, D, F, E, L = 512, 256, 384, 4, 3
  cached = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)  # nothing here can read it back
  with jax.sharding.use_abstract_mesh(one.mesh.abstract_mesh):
    args = array(R, D), array(L, D, D), array(E, D, F), array(E, dtype=jnp.int32)
    _, text = compile_with_text(jax.jit(jax.grad(step, (0, 1, 2))).lower(*args))
  jax.config.update("jax_enable_compilation_cache", cached)
  found = work(text)
  products = [op for op in found if op.kind == "product"]
  by_scope = totals(products, ("loop", "heads"))
  assert by_scope["loop"] == 3 * L * 2 * R * D * D  # forward and two gradients of each layer
  # Backward alone is left of the logits, whose sum has a constant gradient: two products at most.
  assert by_scope["heads"] in {n * 2 * 8 * (R // 8) ** 2 * 128 for n in (1, 2)}
  assert by_scope["other"] == 0
  kernels = [op.total for op in found if op.kind == "kernel"]
  assert kernels == [2 * R * D * F] * 2  # both gradients; the forward product is dead
  loop = sum(op.total for op in found if op.kind == "cycles" and "dot_general" in op.name)
  assert loop > 3 * L * 2 * R * D * D / 2**18  # of a chip's peak
