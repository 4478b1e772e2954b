"""What kernels for TPUs have in common."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from .select import current_platform


def dot(a: jax.Array, b: jax.Array, contract: tuple[tuple[int], tuple[int]]) -> jax.Array:
  """In float32; by default a TPU would round float32 operands to bfloat16."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jax.lax.dot_general(
    a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
  )


def fast_memory() -> int:
  """Bytes that a kernel may use of a core's fast memory; v4's if this is not a TPU."""
  capacity = 16 * 2**20
  if current_platform() == "tpu":
    capacity = pltpu.get_tpu_info().vmem_capacity_bytes
  return capacity * 7 // 8
