"""What kernels for TPUs need to know of the chip."""

from jax.experimental.pallas import tpu as pltpu

from .select import current_platform


def fast_memory() -> int:
  """Bytes that a kernel may use of a core's fast memory; v4's if this is not a TPU."""
  capacity = 16 * 2**20
  if current_platform() == "tpu":
    capacity = pltpu.get_tpu_info().vmem_capacity_bytes
  return capacity * 7 // 8
