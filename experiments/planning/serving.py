"""What serving a model needs: weights and caches in memory, and the time of drawing a token.

The rows of a batch draw a token together: weights that some row needs are read once, caches too.
Either that takes longer or the products do (arXiv 2211.05102, section 2).
"""

from typing import NamedTuple

from layers.attention import layer_mask
from layers.attention_spec import LinearAttentionSpec
from layers.cache import num_slots
from layers.count import count_params
from layers.kernels.attention.blocks import reach_of
from layers.spec import ModelSpec, MoeSpec
from mesh.hardware import CHIPS, GPU_NODES, Chip, cloud_slices

from .speed import rates_of

ROOM = 0.9  # of memory for weights and caches; the rest is the program's and its activations'


class Serving(NamedTuple):
  """A batch on a machine."""

  batch: int
  cache_bytes: int  # of all rows
  fits: bool
  seconds: float  # for a token of each row
  bound: str  # memory or compute

  def tokens_per_second(self, chips: int) -> float:
    """Of a chip."""
    return self.batch / self.seconds / chips


def weight_bytes(spec: ModelSpec, bits: int) -> int:
  """All weights at so many bits each."""
  return count_params(spec).total * bits // 8


def cache_bytes(spec: ModelSpec, length: int) -> int:
  """What a row of `length` positions keeps: bfloat16, states of linear attention in float32."""
  total = 0
  for layer in spec.layers:
    attention = layer.attention
    if isinstance(attention, LinearAttentionSpec):
      n, h, u = attention.state
      total += 4 * n * h * u
      continue
    before, _ = reach_of(layer_mask(attention))
    numbers = sum(heads * size for heads, size in attention.cached)
    total += 2 * numbers * num_slots(length, before)
  return total


def serve(spec: ModelSpec, chip: Chip, chips: int, batch: int, length: int, bits: int) -> Serving:
  """Rows of `length` positions, weights and caches spread evenly over the chips.

  The time of traffic between chips is not counted.
  """
  assert chip.hbm_bytes and chip.hbm_bandwidth and chip.bf16_flops
  rates = rates_of(chip)
  weights, caches = weight_bytes(spec, bits), batch * cache_bytes(spec, length)
  read = weights * _share_read(spec, batch) + caches
  memory = read / (chips * rates.memory * chip.hbm_bandwidth)
  flops = 2.0 * count_params(spec).active_matmul * batch
  compute = flops / (chips * rates.products * chip.bf16_flops)
  fits = weights + caches <= ROOM * chips * chip.hbm_bytes
  return Serving(
    batch, caches, fits, max(memory, compute), "memory" if memory > compute else "compute"
  )


def _share_read(spec: ModelSpec, batch: int) -> float:
  """The share of the weights that a step reads: of experts those that some token chose."""
  counts = count_params(spec)
  moes = [layer.mlp for layer in spec.layers if isinstance(layer.mlp, MoeSpec)]
  if not moes:
    return 1.0
  # All choices even: an expert is missed by each token with probability 1 - k / E.
  k, E = moes[0].experts_per_token, moes[0].num_experts
  idle = (counts.total - counts.active) / (1 - k / E)  # parameters of experts
  return 1 - idle * (1 - k / E) ** batch / counts.total


def smallest(spec: ModelSpec, batch: int, length: int, bits: int) -> list[tuple[str, Chip, int]]:
  """(name, chip, count) of each kind's smallest machine that holds weights and caches."""
  needed = weight_bytes(spec, bits) + batch * cache_bytes(spec, length)
  found = []
  for name in ("v4", "v5e", "v5p", "v6e", "tpu7x", "v100-32gb", *GPU_NODES):
    chip = CHIPS[name]
    assert chip.hbm_bytes
    if chip.is_tpu:
      sizes = [(s.name, s.chips) for s in cloud_slices(name)]
    else:
      counts = [1, 2, 4, 8, *(8 * n for n in range(2, 65))]
      sizes = [(f"{name}:{n}" if n <= 8 else f"{name}:{n // 8}x8", n) for n in counts]
    fits = [(label, chip, n) for label, n in sizes if ROOM * n * chip.hbm_bytes >= needed]
    found += fits[:1]
  return found
