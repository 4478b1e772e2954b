"""Lowering for CUDA where there is no GPU."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

# jax 0.12 announces that it will drop Triton one day.
lowers = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")


def described(devices: int = 1):
  device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")
  mesh = jax.sharding.AbstractMesh((devices,), ("x",), (AxisType.Auto,), abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


def lowered(f, *arguments):
  """The text of f, in the mesh of the context."""
  return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def array(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)
