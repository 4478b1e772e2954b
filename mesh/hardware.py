"""Facts about chips and the slices they are rented in. Bytes, bytes per second, operations per
second and watts, always per chip (a TPU7x chip shows up as two JAX devices).

Peaks are dense, without structured sparsity. A fact nobody published is None.
"""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

GIB = 2**30


@dataclass(frozen=True)
class Chip:
  """One accelerator chip.

  `interconnect` is bytes/s to its neighbours, both directions and all links together. `watts` is
  the board power limit (GPU) or the highest published measurement (TPU).
  """

  name: str
  bf16_flops: float | None = None
  int8_ops: float | None = None
  hbm_bytes: int | None = None
  hbm_bandwidth: float | None = None
  interconnect: float | None = None
  watts: float | None = None
  devices_per_chip: int = 1
  source: str = ""
  date: str = "2026-11-21"  # when the row was written

  @property
  def is_tpu(self) -> bool:
    return self.name in _TOPOLOGIES

  @property
  def flops_per_device(self) -> float | None:
    """Peak bf16 FLOP/s of one JAX device."""
    return None if self.bf16_flops is None else self.bf16_flops / self.devices_per_chip


_TPU = "Google Cloud TPU documentation"
_NVIDIA = "NVIDIA datasheet; memory: OpenXLA gpu target_config specs"

_TABLE = (
  # v4: 6 links of 50 GB/s a direction (arXiv 2304.01433, table 4); its pages name no figure.
  Chip("v4", 275e12, 275e12, 32 * GIB, 1200e9, 600e9, 192, source=_TPU),
  Chip("v5e", 197e12, 393e12, 16 * GIB, 819e9, 400e9, source=_TPU),
  Chip("v5p", 459e12, 918e12, 95 * GIB, 2765e9, 1200e9, source=_TPU),
  Chip("v6e", 918e12, 1836e12, 32 * GIB, 1638e9, 800e9, source=_TPU),
  Chip("tpu7x", 2307e12, None, 192 * GIB, 7380e9, 1200e9, devices_per_chip=2, source=_TPU),
  # V100 and T4 have no bfloat16: their peak is float16.
  Chip("v100", 125e12, None, 16_935_682_048, 898e9, 300e9, 300, source=_NVIDIA + " (float16)"),
  Chip("v100-32gb", 125e12, None, 32 * GIB, 898e9, 300e9, 300, source="NVIDIA datasheet (float16)"),
  Chip("t4", 65e12, 130e12, 16 * GIB, 320e9, 32e9, 70, source="NVIDIA datasheet (float16)"),
  Chip("l4", 121e12, 242.5e12, 24 * GIB, 300e9, 64e9, 72, source="NVIDIA datasheet, halved"),
  Chip("rtx3090", 71e12, 284e12, 24 * GIB, 936e9, 64e9, 350, source="NVIDIA GA102 whitepaper"),
  Chip("rtx4090", 165.2e12, 660.6e12, 24 * GIB, 1008e9, 64e9, 450, source="NVIDIA Ada whitepaper"),
  Chip("a100", 312e12, 624e12, 85_100_068_864, 2039e9, 600e9, 400, source=_NVIDIA),
  Chip("a100-40gb", 312e12, 624e12, 42_331_013_120, 1555e9, 600e9, 400, source=_NVIDIA),
  Chip("h100", 989e12, 1979e12, 84_942_979_072, 3350e9, 900e9, 700, source=_NVIDIA),
  Chip("h200", 989e12, 1979e12, 151_397_597_184, 4800e9, 900e9, 700, source=_NVIDIA),
  Chip("b200", 2250e12, 4500e12, 191_514_411_008, 7700e9, 1800e9, 1000, source=_NVIDIA),
  Chip("cpu"),
)
CHIPS: dict[str, Chip] = {chip.name: chip for chip in _TABLE}

# Whole device_kind strings. PCIe, NVL, laptop and MIG variants have other peaks and are not here.
_KINDS = {
  r"cpu": "cpu",
  r"TPU v4": "v4",
  r"TPU v5 lite|TPU v5e": "v5e",
  r"TPU v5|TPU v5p": "v5p",
  r"TPU v6 lite|TPU v6e": "v6e",
  r"TPU7x?": "tpu7x",
  r"Tesla V100-SXM\d-16GB": "v100",
  r"Tesla V100-SXM\d-32GB": "v100-32gb",
  r"(Tesla|NVIDIA) T4": "t4",
  r"NVIDIA L4": "l4",
  r"(NVIDIA )?GeForce RTX 3090": "rtx3090",
  r"NVIDIA GeForce RTX 4090": "rtx4090",
  r"(NVIDIA )?A100-SXM4-80GB": "a100",
  r"(NVIDIA )?A100-SXM4-40GB": "a100-40gb",
  r"NVIDIA H100 80GB HBM3": "h100",
  r"NVIDIA H200( 141GB HBM3e)?": "h200",
  r"NVIDIA B200": "b200",
}


def find_chip(device: Any) -> Chip | None:
  """The chip behind a JAX device (its `device_kind`), or None when the table does not know it."""
  for pattern, name in _KINDS.items():
    if re.fullmatch(pattern, device.device_kind):
      return CHIPS[name]
  return None


def host_memory_bytes() -> int:
  """RAM this process may use: the machine's, or its container's limit if that is lower."""
  total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  limit = Path("/sys/fs/cgroup/memory.max")  # cgroup v2; "max" when there is no limit
  text = limit.read_text().strip() if limit.exists() else "max"
  return total if text == "max" else min(total, int(text))


def device_memory_bytes(device: Any) -> int | None:
  """Memory of one device: what its runtime reports, else the chip table, else None.

  CPU devices share the host's RAM equally. A described device (no hardware) has the table's value.
  """
  if device.platform == "cpu":
    return host_memory_bytes() // jax.local_device_count("cpu")
  if isinstance(device, jax.Device) and device in device.client.local_devices():
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
      return stats["bytes_limit"]
  chip = find_chip(device)
  if chip is None or chip.hbm_bytes is None:
    return None
  return chip.hbm_bytes // chip.devices_per_chip


class Slice(NamedTuple):
  """Something to rent: its cloud name, its shape, its chips and their memory together."""

  name: str
  topology: str
  chips: int
  hbm_bytes: int


# Cloud names of v4, v5p and TPU7x count TensorCores, two a chip; v5e and v6e count chips.
_CLOUD_UNITS = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1, "tpu7x": 2}
_CLOUD_PREFIX = {"v5e": "v5litepod"}
_FLAT = ["1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"]
_CUBES = [
  "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
  "16x16x16",
]  # fmt: skip
_TOPOLOGIES = {
  "v4": _CUBES[:-1],
  "v5e": _FLAT,
  "v5p": [*_CUBES, "16x16x24"],
  "v6e": _FLAT,
  "tpu7x": [*_CUBES, "16x16x24", "16x16x32"],
}
GPU_NODES = ("a100", "h100", "h200", "b200")  # sold as nodes of 8


def _shape(text: str) -> tuple[int, ...]:
  return tuple(int(size) for size in text.split("x"))


def cloud_slices(chip: str) -> list[Slice]:
  """The standard slices of one TPU generation, smallest first (Google Cloud TPU documentation)."""
  slices = []
  for topology in _TOPOLOGIES[chip]:
    chips = math.prod(_shape(topology))
    name = f"{_CLOUD_PREFIX.get(chip, chip)}-{chips * _CLOUD_UNITS[chip]}"
    slices.append(Slice(name, topology, chips, chips * (CHIPS[chip].hbm_bytes or 0)))
  return slices


def smallest_slices(bytes_needed: int, reserve: float = 0.15) -> list[Slice]:
  """For each kind of chip, the smallest standard slice that holds `bytes_needed` in its HBM.

  Args:
    bytes_needed: over all chips together.
    reserve: part of each chip's memory left to the runtime, buffers and fragmentation.

  Returns:
    One slice a kind, TPU generations then GPUs (as nodes of 8); a TPU generation whose largest
    slice is too small is left out.
  """
  if not 0 <= reserve < 1:
    raise ValueError(f"reserve={reserve} must lie in [0, 1)")
  found = []
  for chip in _TOPOLOGIES:
    fits = [s for s in cloud_slices(chip) if s.hbm_bytes * (1 - reserve) >= bytes_needed]
    found += fits[:1]
  for chip in GPU_NODES:
    node = 8 * (CHIPS[chip].hbm_bytes or 0)
    nodes = max(1, -int(-bytes_needed // (node * (1 - reserve))))
    topology = "8" if nodes == 1 else f"{nodes}x8"
    found.append(Slice(f"{chip}:{topology}", topology, 8 * nodes, nodes * node))
  return found
