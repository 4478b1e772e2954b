"""Seconds of a training step, by what takes them, from a setup and a chip's data sheet.

FLOP, bytes of memory traffic and bytes between devices are counted; how much of the peak rates
they reach are the constants below, fitted on half of the published runs in docs/planning.md and
checked on the other half.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax

from layers.count import keys_seen
from layers.spec import LatentAttentionSpec, LayerSpec, LinearAttentionSpec, MoeSpec
from mesh.hardware import Chip

from ..training.setup import Setup
from . import conventions
from .estimate import host_bytes, kept_names, local_bytes
from .network import DCN, axis_speeds, bytes_by_network, inside_sizes, slice_network
from .shapes import expert_rows, in_runs, layer_input, named


class Rates(NamedTuple):
  """What parts of a machine's peak rates a program reaches."""

  products: float  # of the FLOP/s in products with weights
  experts: float  # in products of experts, each with its own rows
  attention: float  # in attention, heads of 128 or more
  memory: float = 0.8  # of the memory bandwidth
  network: float = 0.8  # of the interconnect
  overlap: float = 0.8  # share of the compute time under which weights and gradients travel


# Matrix units 128 wide (v4, v5e, v5p), 256 wide (v6e, tpu7x), GPUs.
NARROW = Rates(products=0.70, experts=0.53, attention=0.50)
WIDE = Rates(products=0.65, experts=0.45, attention=0.35)
GPU = Rates(products=0.50, experts=0.38, attention=0.38)


def rates_of(chip: Chip) -> Rates:
  if not chip.is_tpu:
    return GPU
  return WIDE if chip.name in ("v6e", "tpu7x") else NARROW


# Times each named tensor of a layer is read or written, forward and backward together.
PASSES = 8
# Bytes/s between a chip and its host, each way: of a TPU v4 (jax-ml.github.io/scaling-book/tpus),
# for every chip, though newer links are faster. Computing hides it as it hides weights: AXLearn's
# 70B on v5e, which keeps products on the host, has no time for both one after the other.
HOST_LINK = 16e9
# Mesh axes along which weights and gradients travel, which computing hides.
HIDDEN_AXES = ("fsdp", "data")


class Step(NamedTuple):
  """Seconds on each device; `exposed` is the part of the traffic nothing hides."""

  products: float
  attention: float
  repeated: float  # of both, recomputed
  memory: float  # element-wise work
  optimizer: float
  traffic: dict[str, float]  # by mesh axis; between slices by dcn_ and the axis
  exposed: float
  bubble: float  # waiting for other pipeline stages
  host: float  # tensors to the host's memory and back, as far as nothing hides it

  @property
  def compute(self) -> float:
    return self.products + self.attention + self.repeated + self.memory + self.optimizer

  @property
  def total(self) -> float:
    return self.compute + self.exposed + self.bubble + self.host


class Work(NamedTuple):
  """FLOP of a step over all devices."""

  products: float
  experts: float
  attention: float
  repeated_products: float
  repeated_experts: float
  repeated_attention: float


def step_time(setup: Setup, chip: Chip) -> Step:
  """Of the train step of `setup`, on a mesh of such chips.

  Raises:
    ValueError: a chip whose peak rates nobody published.
  """
  if not (chip.flops_per_device and chip.hbm_bandwidth and chip.interconnect):
    raise ValueError(f"the peak rates of {chip.name} are not known")
  rates = rates_of(chip)
  devices = math.prod(setup.mesh.shape.values())
  peak = chip.flops_per_device
  bandwidth = rates.memory * chip.hbm_bandwidth / chip.devices_per_chip
  work = count_work(setup)
  by = Rates(*(rate * peak * devices for rate in rates))
  seconds = Step(
    products=work.products / by.products + work.experts / by.experts,
    attention=work.attention / by.attention,
    repeated=work.repeated_products / by.products
    + work.repeated_experts / by.experts
    + work.repeated_attention / by.attention,
    memory=_element_wise(setup) / bandwidth,
    optimizer=_optimizer(setup) / bandwidth,
    traffic=_traffic(setup, chip, rates),
    exposed=0.0,
    bubble=0.0,
    host=0.0,
  )
  host = 2 * setup.accumulate * host_bytes(setup) * chip.devices_per_chip / HOST_LINK
  stages, parts = setup.mesh.shape["stage"], setup.config.train.microbatches
  bubble = (stages - 1) / (parts * setup.config.mesh.circular) if stages > 1 else 0.0
  return seconds._replace(
    exposed=exposed(seconds.traffic, seconds.compute, rates),
    bubble=bubble * seconds.compute,
    host=max(0.0, host - rates.overlap * seconds.compute),
  )


def exposed(traffic: Mapping[str, float], compute: float, rates: Rates) -> float:
  """Seconds of traffic that nothing hides: that of HIDDEN_AXES lies under part of the computing.

  Links within slices and the network between them are busy at the same time.

  Args:
    traffic: seconds by mesh axis, or by several ("data+fsdp"), or between slices ("dcn_data").
    compute: seconds.
  """
  weights, rest = [0.0, 0.0], 0.0
  for axes, seconds in traffic.items():
    if hides(axes):
      weights[axes.startswith(DCN)] += seconds
    else:
      rest += seconds
  return max(0.0, max(weights) - rates.overlap * compute) + rest


def hides(axes: str) -> bool:
  """Whether computing hides traffic of this name."""
  return {axis.removeprefix(DCN) for axis in axes.split("+")} <= set(HIDDEN_AXES)


def time_rows(step: Step) -> list[tuple[str, float]]:
  """(what takes it, seconds), which add up to the step."""
  return [
    ("products with weights", step.products),
    ("attention", step.attention),
    ("recomputed", step.repeated),
    ("element-wise, in memory", step.memory),
    ("optimizer", step.optimizer),
    ("traffic nothing hides", step.exposed),
    ("waiting for other stages", step.bubble),
    ("to the host and back, unhidden", step.host),
  ]


def mfu(setup: Setup, chip: Chip, seconds: float) -> float:
  """Model FLOP (PaLM's convention) of a step of so many seconds, over the chips' peak."""
  data = setup.config.data
  each = conventions.flops_per_token(setup.config.model, data.row_length)
  assert chip.flops_per_device
  devices = math.prod(setup.mesh.shape.values())
  rate = data.batch_size * data.row_length / seconds
  return conventions.mfu(rate, each, devices, chip.flops_per_device)


def count_work(setup: Setup) -> Work:
  """FLOP, those of padded slots and of recomputation too."""
  config = setup.config
  spec, B, T = config.model, config.data.batch_size, config.data.row_length
  names, repeats = kept_names(config.train.remat), config.train.remat != "none"
  found = dict.fromkeys(Work._fields, 0.0)
  passes = 2 if config.lora.rank else 3  # weights that stay have no gradient; adapters are small

  def add(field, amount):
    found[field] += amount

  for i, segment in enumerate(spec.segments):
    for j, layer in enumerate(segment.layers):
      for name, flop in product_flops(setup, i, j, layer).items():
        kind = "experts" if name.startswith("expert") else "products"
        add(kind, passes * segment.repeats * flop)
        again = name not in (*names, "mlp_branch", "expert_down")  # a layer's end is not repeated
        add(f"repeated_{kind}", segment.repeats * flop * again * repeats)
      pairs = segment.repeats * _attention(layer, B, T)
      add("attention", 3.5 * pairs)  # two products forward, five backward
      add("repeated_attention", pairs * ("attention_out" not in names) * repeats)
  add("products", passes * 2.0 * B * T * spec.vocab_size * spec.embed_dim)
  return Work(**found)


def product_flops(setup: Setup, i: int, j: int, layer: LayerSpec) -> dict[str, float]:
  """FLOP of a layer's products with weights in a forward pass, by the tensor they make."""
  config, segment = setup.config, setup.config.model.segments[i]
  B, T = config.data.batch_size, config.data.row_length
  shapes = setup.layout.shapes[f"segment_{i}"][f"layer_{j}"]
  axes = setup.layout.axes[f"segment_{i}"][f"layer_{j}"]
  found: dict[str, float] = {}
  names = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
  for (path, leaf), logical in zip(jax.tree_util.tree_leaves_with_path(shapes), names, strict=True):
    dims = [n for n in logical if n not in ("layers", "expert")]
    if len(dims) < 2:
      continue
    rows, size = B * T, leaf.size / segment.repeats
    if "expert" in logical:
      assert isinstance(layer.mlp, MoeSpec)
      rows = expert_rows(layer.mlp, B, T, in_runs=in_runs(setup))
      size = size / layer.mlp.num_experts
    made = _made_by(path[-1].key, "expert" in logical, path[0].key)
    found[made] = found.get(made, 0.0) + 2.0 * rows * size
  return found


def _made_by(weight: str, expert: bool, branch: str) -> str:
  """The named tensor that a product with this weight makes."""
  if expert:
    return {"up": "expert_up", "gate": "expert_gate", "down": "expert_down"}.get(weight, weight)
  table = {
    "out": "attention_branch", "down": "mlp_branch", "up": "mlp_up", "gate": "mlp_gate",
    "router": "router_logits",
  }  # fmt: skip
  return "gate" if branch == "attention" and weight == "gate" else table.get(weight, weight)


def _attention(layer: LayerSpec, B: int, T: int) -> float:
  """FLOP of a layer's attention in a forward pass: pairs that the mask leaves."""
  spec = layer.attention
  if isinstance(spec, LinearAttentionSpec):
    return 8.0 * B * T * spec.num_heads * spec.head_dim * spec.value_size
  if isinstance(spec, LatentAttentionSpec):
    sizes = spec.nope_dim + spec.rope_dim + spec.value_dim
    return 2.0 * B * T * spec.num_heads * sizes * keys_seen(spec, T)
  return 4.0 * B * T * spec.num_heads * max(spec.head_dim, 128) * keys_seen(spec, T)


def _element_wise(setup: Setup) -> float:
  """Bytes a device moves between products, in all of a batch."""
  config = setup.config
  B, T, D = config.data.batch_size, config.data.row_length, config.model.embed_dim
  total, size = 0.0, local_bytes(setup)
  for segment in config.model.segments:
    for layer in segment.layers:
      tensors = [layer_input(B, T, D), *named(layer, B, T, D, in_runs=in_runs(setup))]
      total += segment.repeats * PASSES * sum(map(size, tensors))
  return total / setup.mesh.shape["stage"]


def _optimizer(setup: Setup) -> float:
  """Bytes read and written: the state twice, gradients once."""
  share = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
  params = sum(map(share, jax.tree.leaves(setup.abstract.params)))
  return 3.0 * params + 2.0 * sum(map(share, jax.tree.leaves(setup.abstract.opt_state)))


def _traffic(setup: Setup, chip: Chip, rates: Rates) -> dict[str, float]:
  """Seconds each mesh axis is busy."""
  inside, between = bytes_by_network(setup, chip)
  speed = axis_speeds(inside_sizes(setup, chip), chip)
  found = {axis: n / (rates.network * speed[axis]) for axis, n in inside.items() if n}
  for axis, n in between.items():
    found[DCN + axis] = n / (rates.network * slice_network(chip))
  return found
