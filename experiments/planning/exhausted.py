"""What to say where a device's memory ran out: what filled it, what would make it fit."""

from mesh.hardware import device_memory_bytes, find_chip

from ..training.setup import Setup
from .estimate import memory, memory_rows
from .fixes import fix_lines
from .memory import gigabytes

_ROWS = 6


def explain(setup: Setup, error: Exception) -> str:
  """The words of `plan` for a setup whose step could not be compiled or run.

  Args:
    error: the runtime's, of which the first line is kept.
  """
  device = setup.mesh.devices.flat[0]
  chip, available = find_chip(device), device_memory_bytes(device)
  count = setup.mesh.size
  lines = [
    f"{setup.config.name} ran out of memory on {count} x {device.device_kind}: "
    f"{str(error).splitlines()[0].removeprefix('RESOURCE_EXHAUSTED: ')}"
  ]
  needed = memory(setup)
  largest = sorted(memory_rows(needed), key=lambda row: -row[1])[:_ROWS]
  parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in largest if size)
  where = f" of {gigabytes(available)}" if available else ""
  lines.append(f"A step needs about {gigabytes(needed.total)} a device{where}: {parts}.")
  if chip is None or available is None or not (chip.flops_per_device and chip.interconnect):
    lines.append("Try --config.train.remat=full or more --config.train.microbatches.")
  else:
    lines += ["Changes that save memory, by estimate:"]
    lines += [f"  {line}" for line in fix_lines(setup, chip, available)]
  return "\n".join(lines)
