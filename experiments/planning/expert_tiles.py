"""How many rows dropless experts multiply for each row that holds a token.

Each expert's run of rows ends anywhere; products go over tiles or windows of a few heights, the
last of which sticks out. The figures are the kernels' own (layers/kernels/grouped_matmul), for runs
a fifth shorter or a third longer than the mean: even ones would end where windows do.
"""

import math
from functools import lru_cache
from itertools import pairwise

from layers.expert_parallel import choose_exchange
from layers.kernels.grouped_matmul.pallas_tpu import (
  CHIPS,
  OUTER_HEIGHTS,
  fitting,
  outer_tiles,
  product_heights,
  product_tiles,
)
from layers.kernels.grouped_matmul.visits import ALIGN, usual
from layers.kernels.grouped_matmul.xla import first_rows
from layers.kernels.select import LANES
from layers.spec import MoeSpec
from mesh.hardware import Chip

from ..training.setup import Setup

_FAST_MEMORY = {"v4": 16, "v5p": 64, "tpu7x": 64, "v5e": 128, "v6e": 128}  # MiB a core


def grouped_rows(setup: Setup, chip: Chip, moe: MoeSpec) -> tuple[float, float]:
  """(rows that products multiply, rows that the weights' gradient does) for a row with a token.

  Tokens are spread evenly over devices, and over experts as `runs` says.
  """
  given, rows, experts = device_rows(setup, moe)
  D, F = setup.config.model.embed_dim, moe.expert.hidden // setup.mesh.shape["tensor"]
  tiles = None
  if chip.is_tpu and D % LANES == F % LANES == 0:
    target = CHIPS[_FAST_MEMORY[chip.name]]
    # All products of a layer as the first of them.
    tiles = product_tiles(given, D, F, 2, target, weights=2 if moe.expert.gated else 1)
  if tiles is None:
    multiplied = tiled_rows(given, rows, experts) / rows
    return multiplied, multiplied
  heights = product_heights(given, experts, tiles.rows)
  other = outer_tiles(given, D, F, 2, 4, target).rows
  return (
    window_rows(rows, experts, tiles.rows, heights) / rows,
    window_rows(rows, experts, other, fitting(OUTER_HEIGHTS, other)) / rows,
  )


def device_rows(setup: Setup, moe: MoeSpec) -> tuple[int, int, int]:
  """(rows of the array, rows that hold a token, experts) of one product on one device."""
  sizes, config = setup.mesh.shape, setup.config
  devices, k = sizes["expert"], moe.experts_per_token
  spread = math.prod(sizes[axis] for axis in ("data", "fsdp", "expert", "context"))
  tokens = config.data.batch_size * config.data.row_length
  tokens = max(1, tokens // spread // config.train.microbatches)
  experts = max(1, moe.num_experts // devices)
  rows = tokens * k
  if devices == 1:
    return rows, rows, experts
  block = tokens * min(k, experts)
  exchange = moe.exchange
  if exchange == "auto":
    exchange = choose_exchange(devices, experts, k, ragged=True)
  if exchange == "ring":
    return block, max(1, rows // devices), experts
  if exchange == "bounded":
    block = min(block, math.ceil(moe.buffer_factor * rows / devices))
  return devices * block, rows, experts


def runs(rows: int, experts: int) -> list[tuple[int, int]]:
  """(first, end) of each expert's rows; a border lies up to a quarter of a run from its even place,
  by the golden ratio's sequence."""
  moved = [0.5 * (e * 0.618034 % 1 - 0.5) for e in range(experts)]
  ends = [0, *(round((e + moved[e]) * rows / experts) for e in range(1, experts)), rows]
  return list(pairwise(ends))


def tiled_rows(given: int, rows: int, experts: int) -> int:
  """A first tile for each expert and small ones for what is beyond it, as in `xla.make_plan`."""
  first = first_rows(given, experts)
  small = min(max(1 << max(first // 4, 1).bit_length(), 16), 128)
  beyond = (max(end - begin - first, 0) for begin, end in runs(rows, experts))
  return experts * first + sum(-(-left // small) * small for left in beyond)


@lru_cache(maxsize=256)
def window_rows(rows: int, experts: int, tile: int, heights: tuple[int, ...]) -> int:
  """Rows of all windows that cover each expert's run, tile by tile."""
  total = 0
  for begin, end in runs(rows, experts):
    while begin < end:
      first = begin // tile * tile
      low, high = begin - first, min(end - first, tile)
      total += _window(low, high, heights)
      begin = first + high
  return total


def _window(low: int, high: int, heights: tuple[int, ...]) -> int:
  """Rows of the windows over rows low..high of a tile, as in `visits.windows`."""
  start, height = low // ALIGN * ALIGN, usual(heights)
  full = max(high - start - heights[-1] + height - 1, 0) // height
  left = high - start - full * height
  return full * height + heights[sum(left > h for h in heights[:-1])]
