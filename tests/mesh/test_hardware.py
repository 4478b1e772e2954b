"""Chip facts, names of slices, memory."""

import os
from types import SimpleNamespace

import jax
import pytest

from mesh.hardware import (
  CHIPS,
  GIB,
  device_memory_bytes,
  find_chip,
  host_memory_bytes,
  smallest_slices,
)

KINDS = {
  "TPU v4": "v4",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v5 lite": "v5e",
  "TPU v6 lite": "v6e",
  "TPU7x": "tpu7x",
  "Tesla V100-SXM2-16GB": "v100",
  "Tesla V100-SXM3-32GB": "v100-32gb",
  "Tesla T4": "t4",
  "NVIDIA L4": "l4",
  "NVIDIA GeForce RTX 3090": "rtx3090",
  "NVIDIA GeForce RTX 4090": "rtx4090",
  "NVIDIA A100-SXM4-80GB": "a100",
  "NVIDIA A100-SXM4-40GB": "a100-40gb",
  "NVIDIA H100 80GB HBM3": "h100",
  "NVIDIA H200": "h200",
  "NVIDIA B200": "b200",
}


def device(kind, platform="tpu"):
  return SimpleNamespace(device_kind=kind, platform=platform)


def test_every_chip_is_found_by_the_name_its_device_reports():
  assert {kind: find_chip(device(kind)).name for kind in KINDS} == KINDS
  assert set(KINDS.values()) | {"cpu"} == set(CHIPS)
  assert find_chip(jax.devices()[0]) is CHIPS["cpu"]


@pytest.mark.parametrize(
  "kind",
  ["TPU v9", "NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L40S",
   "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti"],
)  # fmt: skip
def test_a_chip_with_another_peak_is_unknown_rather_than_wrong(kind):
  assert find_chip(device(kind)) is None
  assert device_memory_bytes(device(kind)) is None


def test_peaks_are_dense_and_per_device():
  # NVIDIA prints 1,979 TFLOP/s for an H100: with sparsity.
  assert CHIPS["h100"].flops_per_device == 989e12
  assert CHIPS["v5p"].flops_per_device == 459e12
  assert CHIPS["tpu7x"].flops_per_device == 2307e12 / 2
  assert CHIPS["cpu"].flops_per_device is None
  for chip in CHIPS.values():
    if chip.name != "cpu":
      # int8 is 1, 2 or 4 times bfloat16 on every one of these; ridge points lie within reason.
      assert chip.int8_ops is None or 0.99 <= chip.int8_ops / chip.bf16_flops <= 4.01
      assert 70 < chip.bf16_flops / chip.hbm_bandwidth < 600
      assert chip.source and chip.date and chip.interconnect


# Dense bfloat16 (V100, T4: float16) TFLOP/s, HBM GB and GB/s, watts: the vendors' pages.
PUBLISHED = {
  "v4": (275, 34.4, 1200, 192),
  "v5e": (197, 17.2, 819, None),
  "v5p": (459, 102.0, 2765, None),
  "v6e": (918, 34.4, 1638, None),
  "tpu7x": (2307, 206.2, 7380, None),
  "v100": (125, 16.9, 898, 300),
  "v100-32gb": (125, 34.4, 898, 300),
  "t4": (65, 17.2, 320, 70),
  "l4": (121, 25.8, 300, 72),
  "rtx3090": (71, 25.8, 936, 350),
  "rtx4090": (165.2, 25.8, 1008, 450),
  "a100": (312, 85.1, 2039, 400),
  "a100-40gb": (312, 42.3, 1555, 400),
  "h100": (989, 84.9, 3350, 700),
  "h200": (989, 151.4, 4800, 700),
  "b200": (2250, 191.5, 7700, 1000),
}


def test_facts_are_the_published_ones():
  facts = {
    chip.name: (
      chip.bf16_flops / 1e12,
      round(chip.hbm_bytes / 1e9, 1),
      chip.hbm_bandwidth / 1e9,
      chip.watts,
    )
    for chip in CHIPS.values()
    if chip.name != "cpu"
  }
  assert facts == PUBLISHED


def test_memory_of_devices():
  per_device = device_memory_bytes(jax.devices()[0])
  assert per_device * jax.local_device_count() <= host_memory_bytes()
  assert 0 < host_memory_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  assert device_memory_bytes(device("TPU v5p")) == 95 * GIB == 102_005_473_280
  assert device_memory_bytes(device("TPU7x")) == 96 * GIB  # half a chip
  assert device_memory_bytes(device("NVIDIA H100 80GB HBM3", "gpu")) == 84_942_979_072


def test_smallest_slices_hold_what_is_asked_and_no_smaller_one_would():
  needed = 1_000 * GIB
  found = smallest_slices(needed, reserve=0.15)
  by_name = {s.name: s for s in found}
  # 1000 / (0.85 * 95 GiB) is 12.4 chips: 16, which the cloud calls v5p-32. H100: 14.9, two nodes.
  assert by_name["v5p-32"].topology == "2x2x4" and by_name["v5p-32"].chips == 16
  assert by_name["h100:2x8"].chips == 16
  assert len(found) == 9
  assert all(s.hbm_bytes * 0.85 >= needed for s in found)
  tight = {s.name for s in smallest_slices(16 * 95 * GIB, reserve=0.0)}
  assert "v5p-32" in tight
  assert "v5p-64" in {s.name for s in smallest_slices(16 * 95 * GIB + 1, reserve=0.0)}


def test_a_generation_that_is_too_small_is_left_out():
  names = {s.name for s in smallest_slices(400 * 2**40)}
  assert not any(name.startswith(("v4", "v5litepod", "v6e")) for name in names)
  assert "v5p-12288" in names
  with pytest.raises(ValueError, match="reserve=1"):
    smallest_slices(1, reserve=1)
