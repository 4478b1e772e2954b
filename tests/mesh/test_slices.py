"""Names of machines, and of those that do not exist."""

import pytest

from mesh.hardware import CHIPS, cloud_slices
from mesh.slices import parse_topology


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("v5p-128", ("v5p", (4, 4, 4), 64)),
    ("v5p:4x4x4", ("v5p", (4, 4, 4), 64)),
    ("v5p-12288", ("v5p", (16, 16, 24), 6144)),
    ("v4-8", ("v4", (2, 2, 1), 4)),
    ("v5litepod-16", ("v5e", (4, 4), 16)),
    ("v5e-16", ("v5e", (4, 4), 16)),
    ("V6E-256", ("v6e", (16, 16), 256)),
    ("tpu7x-128", ("tpu7x", (4, 4, 4), 64)),
    ("v5p:8x8x12", ("v5p", (8, 8, 12), 768)),
    ("v4:12x16x16", ("v4", (12, 16, 16), 3072)),
    ("v6e:4x2", ("v6e", (4, 2), 8)),
    ("h100:8", ("h100", (8,), 8)),
    ("h200:4x8", ("h200", (4, 8), 32)),
    ("a100-40gb:8", ("a100-40gb", (8,), 8)),
  ],
)
def test_cloud_names_mean_what_the_cloud_means(text, expected):
  assert parse_topology(text) == expected


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("v5p-100", r"the nearest are v5p-64 \(2x4x4\) and v5p-128 \(4x4x4\)"),
    ("v5litepod-3", r"the nearest are v5litepod-4 \(2x2\) and v5litepod-8 \(2x4\)"),
    ("v5p:4x4", "the nearest are v5p:2x2x2 and v5p:2x2x4; larger ones have sides of 4, 8, 12"),
    ("v5p:3x5x7", "v5p has no such slice, the nearest are v5p:4x4x4 and v5p:4x4x8"),
    ("v5p:2x2x3", "the nearest are v5p:2x2x2 and v5p:2x2x4"),
    ("v5p:16x16x28", "6,144 chips at most"),
    ("v4:16x16x20", "4,096 chips at most"),
    ("v5p:0x4x4", "v5p has no such slice"),
    ("v5e:4x4x4", "v5e has no such slice, the nearest are v5e:4x8 and v5e:8x8$"),
    ("v6e:3x3", "the nearest are v6e:2x4 and v6e:4x4$"),
    ("v9-8", "chip 'v9' is none of v4, v5e, .*, b200$"),
    ("cpu:8", "chip 'cpu' is none of"),
    ("h100-8", "write h100:8"),
    ("h100:0", "no chips: write h100:8"),
    ("a100:9x7", "nodes of 8: a100:8x8, or a100:63 in all"),
    ("h100:2x2x2", "nodes of 8: h100:1x8, or h100:8 in all"),
    ("v5p", "not of the form v5p:4x4x4, v5p-128, h100:8 or h100:4x8 .*; chips: v4, v5e"),
    ("v5p:4x", "not of the form"),
  ],
)
def test_a_wrong_topology_says_what_is_wrong(text, message):
  with pytest.raises(ValueError, match=message):
    parse_topology(text)


def test_every_standard_slice_reads_back():
  for chip in ("v4", "v5e", "v5p", "v6e", "tpu7x"):
    sizes = []
    for s in cloud_slices(chip):
      by_name, by_shape = parse_topology(s.name), parse_topology(f"{chip}:{s.topology}")
      assert by_name == by_shape and by_name.num_chips == s.chips
      assert s.hbm_bytes == s.chips * CHIPS[chip].hbm_bytes
      sizes.append(s.chips)
    assert sizes == sorted(set(sizes))
