"""Compiler estimates of the grouped matrix products for TPUs, beside jax's megablox. No TPU needed.

python benchmarks/grouped_matmul.py [--chips=v5e,v5p] [--shapes=0,1,2]

Prints a markdown table. A body behind a data-dependent branch is discounted by the estimate, and a
grid of traced size is not known to it. So each body is compiled without its branches in a grid of
known size, its cycles for one step are taken, and the steps of the real group sizes are counted:
ours one body for each height of window, megablox's with and without what its first and last steps
do more. The cycles of the fusions that compute the group metadata are added to both.
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

if __name__ == "__main__" and sys.argv[1:2] == ["--one"]:
  folder = tempfile.TemporaryDirectory()  # before libtpu loads
  os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_static_llo_profile_to={folder.name}"
os.environ |= {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax
import jax.experimental.pallas.ops.tpu.megablox.gmm
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.planning.program import compile_with_text
from layers.kernels.grouped_matmul import pallas_tpu
from layers.kernels.grouped_matmul.visits import Visits, usual, visits, windows

megablox = sys.modules["jax.experimental.pallas.ops.tpu.megablox.gmm"]

SHAPES = ((8192, 2048, 1024, 32), (16384, 4096, 14336, 8), (16384, 4096, 5376, 64))
OPS = ("forward", "d-rows", "d-weights")
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v4": "v4:2x2x1", "v6e": "v6e:2x2"}
FLOP_PER_CYCLE = {"v5e": 2**17, "v5p": 2**18, "v4": 2**18, "v6e": 2**19}  # of a device
CORES = {"v5e": 1, "v5p": 2, "v4": 2, "v6e": 1}
# Of the grid over visits: from two, cycles of a step and of the beginning. The estimate of a loop
# in a kernel takes long, so gradients of weights take fewer.
STEPS = {"forward": (4, 12), "d-rows": (4, 12), "d-weights": (2, 6)}
DRAWS = 5
MEGABLOX_ROWS = (128, 256, 512)
# Inner and outer tile of the two products, then of the weight gradient; as near as divides.
MEGABLOX_PRODUCT = ((2048, 1024), (1024, 1024), (2048, 512), (4096, 512))
MEGABLOX_OUTER = ((1024, 1024), (512, 1024), (2048, 512))


class Case(NamedTuple):
  chip: str
  op: str
  R: int
  D: int
  F: int
  E: int

  @property
  def widths(self) -> tuple[int, int]:
    """Contracted and resulting width of the two products; of the gradient D and F."""
    return (self.F, self.D) if self.op == "d-rows" else (self.D, self.F)

  @property
  def bound(self) -> float:
    return 2 * self.R * self.D * self.F / FLOP_PER_CYCLE[self.chip]


def group_sizes(case: Case) -> dict[str, list[np.ndarray]]:
  """Draws of each distribution."""
  rng = np.random.default_rng(0)
  one = np.zeros(case.E, int)
  one[case.E // 2] = case.R
  return {
    "even": [np.full(case.E, case.R // case.E)],
    "multinomial": [rng.multinomial(case.R, [1 / case.E] * case.E) for _ in range(DRAWS)],
    "one expert": [one],
  }


def device(case: Case) -> NamedSharding:
  devices = topologies.get_topology_desc(
    topology_name=TOPOLOGIES[case.chip],
    platform="tpu",
    **({"chip_config_name": "megacore"} if case.chip == "v4" else {}),
  ).devices
  return NamedSharding(Mesh(np.array(devices[:1]), ("d",)), PartitionSpec())


def compiled(case: Case, f, *shapes) -> str:
  one = device(case)
  args = [jax.ShapeDtypeStruct(shape, dtype, sharding=one) for shape, dtype in shapes]
  with jax.sharding.use_abstract_mesh(one.mesh.abstract_mesh):
    return compile_with_text(jax.jit(f).lower(*args))[1]


def fusion_cycles(text: str) -> int:
  found = map(int, re.findall(r'window_config":\{.*?"estimated_cycles":"(\d+)"', text))
  return sum(cycles for cycles in found if cycles < 2**62)  # 2**63: no estimate


def kernel_cycles(text: str) -> int:
  calls = [line for line in text.splitlines() if "tpu_custom_call" in line]
  (found,) = re.findall(r'bundle_analysis_data":\{"estimated_cycles":"(\d+)"', "".join(calls))
  return int(found)


@contextlib.contextmanager
def replaced(module, **names):
  old = {name: getattr(module, name) for name in names}
  vars(module).update(names)
  yield
  vars(module).update(old)


def step_and_start(case: Case, measured) -> tuple[float, float]:
  """Cycles of one step and of the beginning, from `measured(steps)`."""
  few, many = STEPS[case.op]
  short, long = measured(few), measured(many)
  step = (long - short) / (many - few)
  return step, short - few * step


def operands(case: Case, rows: int, inner: int, width: int) -> list:
  """Shapes for products [rows, inner] x [inner, width], or a gradient [inner, width]."""
  E, bf16 = case.E, jnp.bfloat16
  return {
    "forward": [((rows, inner), bf16), ((E, inner, width), bf16)],
    "d-rows": [((rows, inner), bf16), ((E, width, inner), bf16)],
    "d-weights": [((rows, inner), bf16), ((rows, width), bf16)],
  }[case.op]


# ---- ours ----


def our_tiles(case: Case) -> tuple:
  """Tiles, heights of windows, and (contracted or first, last) width of a block."""
  with jax.sharding.use_abstract_mesh(device(case).mesh.abstract_mesh):
    chip = pallas_tpu.chip()
  if case.op == "d-weights":
    tiles = pallas_tpu.outer_tiles(case.R, case.D, case.F, 2, 2, chip)
    heights = pallas_tpu.fitting(pallas_tpu.OUTER_HEIGHTS, tiles.rows)
    return tiles, heights, (tiles.d, tiles.f)
  tiles = pallas_tpu.product_tiles(case.R, *case.widths, 2, chip)
  heights = pallas_tpu.product_heights(case.R, case.E, tiles.rows)
  return tiles, heights, (case.widths[0], tiles.columns)


def our_windows(sizes: np.ndarray, tile: int, heights) -> np.ndarray:
  """How many windows of each height there are."""
  counts = np.zeros(len(heights), int)
  ends = np.cumsum(sizes)
  for start, end in zip(ends - sizes, ends, strict=True):
    for at in range(start // tile * tile, end, tile):
      low, high = max(start - at, 0), min(end - at, tile)
      if high > low:
        plan = windows(np.int32(low), np.int32(high), heights)
        counts[heights.index(usual(heights))] += int(plan.full)
        counts[int(plan.last)] += 1
  return counts


def our_body(case: Case, kind: int, steps: int) -> int:
  """Cycles of `steps` visits with one window each of heights[kind], one block a core."""
  tiles, _, (inner, width) = our_tiles(case)
  if case.op == "d-weights":
    call = lambda x, dy, sizes: pallas_tpu.outer(x, dy, sizes, dtype=jnp.bfloat16)
  else:
    call = lambda x, w, sizes: pallas_tpu.row_products(
      x, (w,), sizes, lambda y: (y,), transposed=case.op == "d-rows"
    )
  with replaced(
    pallas_tpu,
    outer_tiles=lambda *args: tiles,
    product_tiles=lambda *args, **keywords: tiles,
    visits=lambda sizes, *args, **keywords: Visits(steps, sizes, sizes, sizes),
    _each_window=lambda heights, low, high, one: one(heights[kind], low),
    pl=SimpleNamespace(**vars(pl) | {"when": lambda condition: lambda f: None}),
  ):
    shapes = operands(case, case.R, inner, width * CORES[case.chip])
    return kernel_cycles(compiled(case, call, *shapes, ((case.E + 1,), jnp.int32)))


def our_metadata(case: Case) -> int:
  tiles, _, _ = our_tiles(case)
  f = partial(visits, rows=case.R, tile=tiles.rows, each_group=case.op == "d-weights")
  return fusion_cycles(compiled(case, f, ((case.E,), jnp.int32)))


def ours(case: Case) -> dict[str, float]:
  """Cycles without the group metadata, for each distribution."""
  tiles, heights, block = our_tiles(case)
  plans = {
    name: [our_windows(sizes, tiles.rows, heights) for sizes in draws]
    for name, draws in group_sizes(case).items()
  }
  used = np.sum([plan for draws in plans.values() for plan in draws], axis=0)
  widths = case.widths if case.op == "d-weights" else (block[0], case.widths[1])
  blocks = -(-widths[0] // block[0]) * -(-widths[1] // block[1])
  times = -(-blocks // CORES[case.chip])
  step, start = np.zeros(len(heights)), 0
  for kind in np.flatnonzero(used):
    step[kind], begun = step_and_start(case, partial(our_body, case, kind))
    start = max(start, begun)
  print(case, tiles, dict(zip(heights, step, strict=True)), start, times, file=sys.stderr)
  return {
    name: start + times * float(np.mean([plan @ step for plan in draws]))
    for name, draws in plans.items()
  }


# ---- megablox ----


def divisor(width: int, most: int) -> int:
  return max(n for n in range(128, min(most, width) + 1, 128) if width % n == 0)


def megablox_body(case: Case, tiling, edges: bool, steps: int) -> int:
  """Cycles of `steps` visits of one block a core, with or without what first and last steps do."""
  seen = itertools.count()

  def when(condition):
    # Of tgmm the body itself stands under the second one.
    body = case.op == "d-weights" and next(seen) == 1
    return lambda f: f() if edges or body else None

  with replaced(
    megablox,
    make_group_metadata=lambda *, group_sizes, **keywords: ((group_sizes,) * 3, steps),
    pl=SimpleNamespace(**vars(pl) | {"when": when}),
    lax=SimpleNamespace(
      **vars(jax.lax) | {"cond": lambda condition, last, other: last() if edges else other()}
    ),
  ):
    if case.op == "d-weights":
      f = lambda x, dy, sizes: megablox.tgmm(x.T, dy, sizes, jnp.bfloat16, tiling)
    else:
      f = lambda x, w, sizes: megablox.gmm(
        x, w, sizes, jnp.bfloat16, tiling, transpose_rhs=case.op == "d-rows"
      )
    shapes = operands(case, case.R, tiling[1], tiling[2] * CORES[case.chip])
    text = compiled(case, f, *shapes, ((case.E,), jnp.int32))
  jax.clear_caches()
  return kernel_cycles(text)


def megablox_metadata(case: Case, tm: int) -> int:
  f = lambda sizes: megablox.make_group_metadata(
    group_sizes=sizes,
    m=case.R,
    tm=tm,
    start_group=jnp.int32(0),
    num_nonzero_groups=case.E,
    visit_empty_groups=case.op == "d-weights",
  )
  return fusion_cycles(compiled(case, f, ((case.E,), jnp.int32)))


def megablox_cycles(case: Case, tiling) -> dict[str, float]:
  """Cycles without the group metadata, for each distribution."""
  tm, tk, tn = tiling
  outer = case.op == "d-weights"
  times = -(-case.widths[1] // (tn * CORES[case.chip]))
  inner = case.widths[0] // tk
  every, start = step_and_start(case, partial(megablox_body, case, tiling, True))
  plain = every
  if outer or inner > 1:
    plain, _ = step_and_start(case, partial(megablox_body, case, tiling, False))
  total = {}
  for name, draws in group_sizes(case).items():
    sums = []
    for sizes in draws:
      ends = np.cumsum(sizes)
      visited = int(np.sum(np.where(sizes > 0, -(-ends // tm) - (ends - sizes) // tm, 0)))
      if outer:  # first and last steps are those of a group
        sums.append(inner * (visited * plain + case.E * (every - plain)))
      else:  # and here of a visit
        sums.append(visited * (every + (inner - 1) * plain))
    total[name] = start + times * float(np.mean(sums))
  return total


def all_megablox(case: Case) -> list[tuple[tuple[int, int, int], dict[str, float]]]:
  found = {}
  for tm in MEGABLOX_ROWS:
    for tk, tn in MEGABLOX_OUTER if case.op == "d-weights" else MEGABLOX_PRODUCT:
      tiling = (tm, divisor(case.widths[0], tk), divisor(case.widths[1], tn))
      if tiling in found:
        continue
      try:
        found[tiling] = megablox_cycles(case, tiling)
      except jax.errors.JaxRuntimeError as error:  # tiles that do not fit into fast memory
        if "RESOURCE_EXHAUSTED" not in str(error):
          raise
      print(case, tiling, found.get(tiling), file=sys.stderr)
  return list(found.items())


def report(case: Case) -> list[str]:
  """Lines of the table; kernels are compiled in a process of their own, with the profile."""
  command = [sys.executable, __file__, "--one", json.dumps(case)]
  output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
  mine, theirs = json.loads(output.splitlines()[-1])
  metadata = {tm: megablox_metadata(case, tm) for tm in {tiling[0] for tiling, _ in theirs}}
  added = our_metadata(case)
  lines = []
  for name in mine:
    total = mine[name] + added
    best, tiling = min((cycles[name] + metadata[tiling[0]], tiling) for tiling, cycles in theirs)
    lines.append(
      f"| {case.chip} | {case[2:]} | {case.op} | {name} | {total:,.0f} "
      f"| {case.bound / mine[name]:.0%} | {case.bound / total:.0%} "
      f"| {best:,.0f} at {tuple(tiling)} | {best / total:.2f}x |"
    )
  return lines


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--chips", default="v5e,v5p")
  parser.add_argument("--shapes", default="0,1,2")
  parser.add_argument("--one", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.one:
    case = Case(*json.loads(args.one))
    print(json.dumps([ours(case), all_megablox(case)]))
    return
  versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
  print(f"jax {versions['jax']}, libtpu {versions['libtpu']}, bfloat16, estimated\n")
  print(
    "| chip | (R, D, F, E) | op | groups | cycles | kernel, of the bound | with metadata "
    "| megablox at its best tile | ratio |\n|---|---|---|---|---|---|---|---|---|"
  )
  for chip in args.chips.split(","):
    for shape, op in itertools.product(map(int, args.shapes.split(",")), OPS):
      print("\n".join(report(Case(chip, op, *SHAPES[shape]))), flush=True)


if __name__ == "__main__":
  main()
