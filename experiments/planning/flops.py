"""FLOP of a training step by what they are for: useful, recomputed, wasted; their sum is all done.

Useful is what the model's mathematics takes of each token, forward and backward: products with
weights, and attention to the keys that the mask shows. Recomputed is any of it done again. Wasted
is what belongs to no token, however often it is done: pairs that the mask hides, in blocks that a
kernel visits all the same; expert rows that hold no token; ticks in which a pipeline stage has
nothing to do. Routing is taken as balanced but for the length of runs, rows as one document.
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from layers.attention import layer_mask
from layers.count import keys_seen
from layers.kernels.attention.blocks import EMPTY, block_kinds, even_blocks
from layers.spec import (
  AttentionSpec,
  BucketedSpec,
  LatentAttentionSpec,
  LayerSpec,
  LinearAttentionSpec,
  MoeSpec,
  TransformerXLSpec,
)
from layers.stack import is_staged
from mesh.hardware import Chip

from ..training.setup import Setup
from .estimate import kept_names
from .expert_tiles import device_rows, grouped_rows
from .shapes import expert_rows, in_runs
from .speed import product_flops
from .work import Op

HIDDEN_PAIRS = "pairs that the mask hides"
EMPTY_ROWS = "expert rows without a token"
IDLE = "idle ticks of pipeline stages"
COPIES = "layers that every stage computes"
CHUNKS = "linear attention, beyond its recurrence"
WASTE = (HIDDEN_PAIRS, EMPTY_ROWS, IDLE, COPIES, CHUNKS)
# Sides of the blocks that attention on TPUs visits (layers/kernels/attention/pallas_tpu.py; xla.py
# where that kernel cannot run); cuDNN states none.
_KERNEL, _SMALL_KERNEL, _BLOCKWISE, _GPU = 1024, 512, 512, 128


class Flops(NamedTuple):
  """Of a step, over all devices or of one."""

  useful: float
  recomputed: float
  wasted: dict[str, float]  # by one of WASTE

  @property
  def waste(self) -> float:
    return sum(self.wasted.values())

  @property
  def total(self) -> float:
    return self.useful + self.recomputed + self.waste

  def times(self, factor: float) -> "Flops":
    wasted = {why: factor * n for why, n in self.wasted.items()}
    return Flops(factor * self.useful, factor * self.recomputed, wasted)


def _sum(parts: Iterable[Flops]) -> Flops:
  parts = list(parts)
  wasted = {why: sum(p.wasted.get(why, 0.0) for p in parts) for why in WASTE}
  return Flops(sum(p.useful for p in parts), sum(p.recomputed for p in parts), wasted)


def flop_rows(flops: Flops) -> list[tuple[str, float]]:
  """(what for, FLOP), which add up to all; waste that is none is left out."""
  rows = [("useful", flops.useful), ("recomputed", flops.recomputed)]
  return rows + [(f"wasted: {why}", n) for why, n in flops.wasted.items() if n]


def step_flops(setup: Setup, chip: Chip) -> Flops:
  """Of a step, over all devices."""
  config, stages = setup.config, setup.mesh.shape["stage"]
  spec, B, T = config.model, config.data.batch_size, config.data.row_length
  passes = _passes(setup)
  found = [Flops(passes * 2.0 * B * T * spec.vocab_size * spec.embed_dim, 0.0, {})]  # the head
  for i, segment in enumerate(spec.segments):
    each = [
      part
      for j, layer in enumerate(segment.layers)
      for part in (_products(setup, chip, i, j, layer), _attention(setup, chip, layer))
    ]
    once = _sum(each).times(segment.repeats)
    found.append(once)
    if is_staged(segment.repeats, stages, config.mesh.circular):
      found.append(Flops(0.0, 0.0, {IDLE: once.total * _idle(setup)}))
    elif stages > 1:
      found.append(Flops(0.0, 0.0, {COPIES: once.total * (stages - 1)}))
  return _sum(found)


def _passes(setup: Setup) -> int:
  """Products with a weight: weights that stay have no gradient; adapters are small."""
  return 2 if setup.config.lora.rank else 3


def _idle(setup: Setup) -> float:
  """Ticks in which a stage has nothing, over those in which it has something."""
  config = setup.config
  return (setup.mesh.shape["stage"] - 1) / (config.train.microbatches * config.mesh.circular)


def _products(setup: Setup, chip: Chip, i: int, j: int, layer: LayerSpec) -> Flops:
  """With the weights of one layer."""
  config, names = setup.config, kept_names(setup.config.train.remat)
  useful = recomputed = wasted = 0.0
  for made, flop in product_flops(setup, i, j, layer).items():
    again = config.train.remat != "none" and made not in (*names, "mlp_branch", "expert_down")
    if not made.startswith("expert"):
      useful += _passes(setup) * flop
      recomputed += again * flop
      continue
    assert isinstance(layer.mlp, MoeSpec)
    rows = expert_tiles(setup, chip, layer.mlp)
    again |= made != "expert_down" and repeats_experts(setup, layer.mlp)
    whole = flop * rows.filled / rows.given
    useful += _passes(setup) * whole
    recomputed += again * whole
    # Forward and into the rows, and again, by one tiling; the weights' gradient by another.
    forward, weights = rows.tiled / rows.filled - 1, rows.outer / rows.filled - 1
    wasted += whole * (forward * (2 + again) + weights * (_passes(setup) - 2))
  return Flops(useful, recomputed, {EMPTY_ROWS: wasted})


class ExpertRows(NamedTuple):
  """Of a step and a layer, over all devices."""

  given: float  # that its products are counted with elsewhere
  filled: float  # with a token
  tiled: float  # multiplied by the weights
  outer: float  # multiplied for the weights' gradient


def expert_tiles(setup: Setup, chip: Chip, moe: MoeSpec) -> ExpertRows:
  """Rows of experts: slots of groups of tokens, or runs in the tiles of the grouped products."""
  B, T = setup.config.data.batch_size, setup.config.data.row_length
  runs = in_runs(setup)
  given = expert_rows(moe, B, T, in_runs=runs)
  chosen = B * T * moe.experts_per_token
  if moe.dispatch != "dropless" or not runs:
    return ExpertRows(given, min(given, chosen), given, given)
  tiled, outer = grouped_rows(setup, chip, moe)
  return ExpertRows(given, chosen, chosen * tiled, chosen * outer)


def repeats_experts(setup: Setup, moe: MoeSpec) -> bool:
  """Whether the backward pass computes experts anew whatever the policy: `expert_parallel`."""
  sizes = setup.mesh.shape
  regional = any(n > 1 for axis, n in sizes.items() if axis != "tensor")
  ring = moe.dispatch == "dropless" and moe.exchange == "ring" and sizes["expert"] > 1
  return regional and (sizes["tensor"] > 1 or ring)


class _Kernel(NamedTuple):
  """How attention is multiplied: FLOP of a pair of a query and a key, and the pairs."""

  forward: float
  backward: float  # what the mathematics takes
  again: float  # what the backward pass repeats of the forward one, and of itself
  seen: float  # pairs of a row and head that the mask shows
  visited: float  # that are multiplied


def _attention(setup: Setup, chip: Chip, layer: LayerSpec) -> Flops:
  """Of one layer: queries by keys, and weights by values."""
  config, spec = setup.config, layer.attention
  B, T = config.data.batch_size, config.data.row_length
  repeat = config.train.remat != "none" and "attention_out" not in kept_names(config.train.remat)
  if isinstance(spec, LinearAttentionSpec):
    # Written to states and read; chunks also multiply pairs within them: see layers/count.py.
    state = B * T * spec.num_heads * spec.head_dim * spec.value_size
    useful = 6.0 if spec.kind == "delta" else 4.0
    useful, chunked = useful * state, 8.0 * state
    wasted = max(0.0, chunked - useful) * (3.5 + repeat)
    return Flops(3 * useful, (0.5 + repeat) * useful, {CHUNKS: wasted})
  kernel = _kernel(spec, T, chip)
  heads = B * spec.num_heads
  again = kernel.again + kernel.forward * repeat
  done = kernel.forward + kernel.backward + again
  return Flops(
    heads * kernel.seen * (kernel.forward + kernel.backward),
    heads * kernel.seen * again,
    {HIDDEN_PAIRS: heads * (kernel.visited - kernel.seen) * done},
  )


def _kernel(spec: AttentionSpec | LatentAttentionSpec, length: int, chip: Chip) -> _Kernel:
  if isinstance(spec, LatentAttentionSpec):
    H, U = spec.nope_dim + spec.rope_dim, spec.value_dim
  else:
    H = U = spec.head_dim
  forward, backward, again = 2 * (H + U), 4 * (H + U), 2 * H
  side = min(_GPU, length)
  if chip.is_tpu:
    own = max(H, U) <= 256 and not isinstance(
      getattr(spec, "position", None), BucketedSpec | TransformerXLSpec
    )
    side = (_SMALL_KERNEL if chip.name == "v4" else _KERNEL) if own else _BLOCKWISE
    if own:  # gradients by queries and by keys are two kernels, each with its own probabilities
      again = 2 * (2 * H + U)
      side = even_blocks(length, side)  # whole tiles, also of a shorter row
    else:
      side = min(side, length)
  seen = keys_seen(spec, length) * length
  visited = max(seen, _visited(layer_mask(spec), length, side))
  return _Kernel(forward, backward, again, seen, visited)


@lru_cache(maxsize=256)
def _visited(mask, length: int, side: int) -> float:
  """Pairs of a row and head in blocks that are not empty; a mean over heads."""
  each = [float((block_kinds(one, length, length, side, side) != EMPTY).sum()) * side * side
          for one in mask.distinct]  # fmt: skip
  return float(np.mean([each[i] for i in mask.by_head or (0,)]))


# ---- of a compiled program ----


def compiled_flops(setup: Setup, chip: Chip, ops: Iterable[Op]) -> Flops:
  """The same of a compiled program, of one device, from its products and kernels.

  A product says by its name what it is of; which part of that holds no token is the shapes'. A
  layer's share stands for all of its kind.
  """
  shares = _shares(setup, chip)
  useful = recomputed = 0.0
  wasted = dict.fromkeys(WASTE, 0.0)
  for op in ops:
    if op.kind not in ("product", "kernel"):
      continue
    left = op.total
    if "Block/" in op.name:
      wasted[IDLE] += left * shares.idle
      left -= left * shares.idle
    if op.kind == "kernel" and "attention" in op.name:
      wasted[HIDDEN_PAIRS] += left * shares.hidden
      left -= left * shares.hidden
    elif "/experts/" in op.name:
      wasted[EMPTY_ROWS] += left * shares.empty
      left -= left * shares.empty
    again = 1.0 if op.recomputed else next((x for k, x in shares.kernels if k in op.name), 0.0)
    recomputed += again * left
    useful += (1 - again) * left
  return Flops(useful, recomputed, wasted)


def as_multiplied(setup: Setup, chip: Chip, ops: Iterable[Op]) -> list[Op]:
  """Grouped kernels state the rows of their arrays; what they multiply are those in windows."""
  moes = [m for layer in setup.config.model.layers if isinstance(m := layer.mlp, MoeSpec)]
  if not any(moe.dispatch == "dropless" for moe in moes) or not in_runs(setup):
    return list(ops)
  given = multiplied = 0.0
  for moe in moes:
    stated, rows, _ = device_rows(setup, moe)
    given += moe.expert.hidden * stated
    multiplied += moe.expert.hidden * rows * grouped_rows(setup, chip, moe)[0]
  grouped = lambda op: op.kind == "kernel" and "grouped_matmul" in op.name
  share = multiplied / given
  return [op._replace(amount=op.amount * share) if grouped(op) else op for op in ops]


class _Shares(NamedTuple):
  idle: float  # of a layer's work
  hidden: float  # of attention's
  empty: float  # of the experts'
  kernels: tuple[tuple[str, float], ...]  # kernel, the part of it that repeats another


def _shares(setup: Setup, chip: Chip) -> _Shares:
  length, layers = setup.config.data.row_length, setup.config.model.layers
  seen = visited = filled = tiled = 0.0
  sizes = [0.0, 0.0]
  for layer in layers:
    spec = layer.attention
    if not isinstance(spec, LinearAttentionSpec):
      kernel = _kernel(spec, length, chip)
      weight = spec.num_heads * kernel.forward
      seen, visited = seen + weight * kernel.seen, visited + weight * kernel.visited
      U = spec.value_dim if isinstance(spec, LatentAttentionSpec) else spec.head_dim
      sizes = [sizes[0] + kernel.forward / 2 - U, sizes[1] + U]
    if isinstance(layer.mlp, MoeSpec):
      rows = expert_tiles(setup, chip, layer.mlp)
      weight = layer.mlp.expert.hidden
      filled, tiled = filled + weight * rows.filled, tiled + weight * rows.tiled
  H, U = sizes
  stages = setup.mesh.shape["stage"]
  idle = 1 - 1 / (1 + _idle(setup)) if stages > 1 else 0.0
  part = lambda some, every: 1 - some / every if every else 0.0
  kernels = (("attention_dq", H / (2 * H + U)), ("attention_dkv", 0.5)) if H else ()
  return _Shares(idle, part(seen, visited), part(filled, tiled), kernels)


def per_device(flops: Flops, setup: Setup) -> Flops:
  return flops.times(1 / math.prod(setup.mesh.shape.values()))
