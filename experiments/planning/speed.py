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
from layers.spec import AttentionSpec, LatentAttentionSpec, LayerSpec, LinearAttentionSpec, MoeSpec
from mesh.hardware import Chip

from ..training.setup import Setup
from . import conventions
from .estimate import host_bytes, kept_names, local_bytes
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
# for every chip, though newer links are faster. Nothing is assumed to hide it.
HOST_LINK = 16e9
# Between nodes of GPUs: bytes/s a GPU, each direction (400 Gb/s).
NODE_NETWORK = 50e9
NODE = 8  # GPUs
# Between TPU slices: bytes/s a chip, each direction. 50, 100 and 100 Gb/s for v5p, v6e and tpu7x,
# 6.4 Tb/s for 256 chips of v5e (Google Cloud TPU documentation, 2026-11); v4: 25 GB/s for a host of
# four (jax-ml.github.io/scaling-book/tpus).
SLICE_NETWORK = {"v4": 6.25e9, "v5e": 3.125e9, "v5p": 6.25e9, "v6e": 12.5e9, "tpu7x": 12.5e9}
DCN = "dcn_"  # before the name of an axis: its traffic between slices
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
  host: float  # tensors to the host's memory and back

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
    host=2 * setup.accumulate * host_bytes(setup) * chip.devices_per_chip / HOST_LINK,
  )
  stages, parts = setup.mesh.shape["stage"], setup.config.train.microbatches
  bubble = (stages - 1) / (parts * setup.config.mesh.circular) if stages > 1 else 0.0
  return seconds._replace(
    exposed=exposed(seconds.traffic, seconds.compute, rates), bubble=bubble * seconds.compute
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
    ("to the host and back", step.host),
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


def slice_network(chip: Chip) -> float:
  """Bytes/s that a device receives from other slices."""
  return SLICE_NETWORK[chip.name] / chip.devices_per_chip


def slices_along(setup: Setup, chip: Chip) -> dict[str, int]:
  """TPU slices along each mesh axis that spans several."""
  mesh = setup.config.mesh
  across = {"data": mesh.dcn_data, "fsdp": mesh.dcn_fsdp, "stage": mesh.dcn_stage}
  return {axis: n for axis, n in across.items() if n > 1 and chip.is_tpu}


def inside_sizes(setup: Setup, chip: Chip) -> dict[str, int]:
  """Of the mesh within one slice, by axis."""
  along = slices_along(setup, chip)
  return {axis: n // along.get(axis, 1) for axis, n in setup.mesh.shape.items()}


def bytes_by_network(setup: Setup, chip: Chip) -> tuple[dict[str, float], dict[str, float]]:
  """`bytes_received` by axis: on the links of a slice, and between slices.

  Sums and gathers meet inside of each slice first: of what n devices share, w in each of a slices,
  a device receives 1 - 1/w there and (1 - 1/a) / w from others.
  """
  inside, between = bytes_received(setup), {}
  for axis, a in slices_along(setup, chip).items():
    n = setup.mesh.shape[axis]
    w = n // a
    handed_on = 0.0
    if axis == "stage":
      # What goes on at each tick leaves the slice whole where its last stage hands on.
      handed_on, _ = _stage_bytes(setup)
    shared = (inside[axis] - handed_on) / (1 - 1 / n)
    between[axis] = handed_on + shared / w * (1 - 1 / a)
    inside[axis] = (handed_on if w > 1 else 0.0) + shared * (1 - 1 / w)
  return inside, between


def bytes_received(setup: Setup) -> dict[str, float]:
  """By a device in a step, along each mesh axis."""
  config, sizes = setup.config, setup.mesh.shape
  spec, T = config.model, config.data.row_length
  found = dict.fromkeys(sizes, 0.0)
  parameters = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  shapes = setup.layout.shapes
  stacked = parameters([shapes[f"segment_{i}"] for i in range(len(spec.segments))])
  cut = sizes["tensor"] * sizes["expert"] * sizes["stage"]
  weights = parameters(shapes) / cut
  if sizes["fsdp"] > 1:
    # Gathered in bfloat16 forward and backward; gradients are summed in float32. Stages gather
    # their layers each time they run them; else all weights are, for each part of the batch.
    gathered = setup.accumulate * weights
    if sizes["stage"] > 1:
      gathered = (turns(setup) * stacked / sizes["stage"] + parameters(shapes) - stacked) / (
        sizes["tensor"] * sizes["expert"]
      )
    found["fsdp"] = (2 * 2 + 4) * gathered * (1 - 1 / sizes["fsdp"])
  if sizes["data"] > 1:
    found["data"] = 2 * 4 * weights / sizes["fsdp"] * (1 - 1 / sizes["data"])
  rows = config.data.batch_size / (sizes["data"] * sizes["fsdp"] * sizes["expert"])
  tokens = rows * T / sizes["context"]
  layers = spec.num_layers / sizes["stage"]
  passes = 4 if config.train.remat in ("full", "dots") else 3  # forward, backward, again
  if (t := sizes["tensor"]) > 1:
    # Two gathers and two scatters of the residual stream a pass, half of each in the repeat.
    found["tensor"] = passes * 2 * 2 * 2 * tokens * spec.embed_dim * layers * (1 - 1 / t) / 2
  if (c := sizes["context"]) > 1:
    keys = [layer.attention for layer in spec.layers if isinstance(layer.attention, AttentionSpec)]
    width = sum(2 * a.kv_heads * a.head_dim for a in keys) / sizes["tensor"] / sizes["stage"]
    found["context"] = (passes + 1) * 2 * tokens * width * (c - 1)
  if (e := sizes["expert"]) > 1:
    moes = [layer.mlp for layer in spec.layers if isinstance(layer.mlp, MoeSpec)]
    B = config.data.batch_size
    sent = sum(expert_rows(moe, B, T) for moe in moes) / B * rows / sizes["context"]
    found["expert"] = passes * 2 * 2 * sent * spec.embed_dim * (1 - 1 / e) / sizes["stage"]
  if sizes["stage"] > 1:
    found["stage"] = sum(_stage_bytes(setup))
  return found


def _stage_bytes(setup: Setup) -> tuple[float, float]:
  """A microbatch moves on at each tick, both ways; then all of them from the last stage to all."""
  config, sizes = setup.config, setup.mesh.shape
  tokens = config.data.batch_size * config.data.row_length
  tokens /= sizes["data"] * sizes["fsdp"] * sizes["expert"] * sizes["context"]
  residual = 2 * tokens * config.model.embed_dim
  on = 2 * turns(setup) * config.mesh.circular / config.train.microbatches
  return on * residual, 2 * 2 * (1 - 1 / sizes["stage"]) * residual


def turns(setup: Setup) -> float:
  """How often a pipeline stage runs its layers in a forward pass, idle ticks included."""
  config, stages = setup.config, setup.mesh.shape["stage"]
  return config.train.microbatches + (stages - 1) / config.mesh.circular


def axis_speeds(sizes: Mapping[str, int], chip: Chip) -> dict[str, float]:
  """Bytes/s a device can receive along each mesh axis of its size.

  TPUs: all axes share the links of the torus, each in proportion to the dims it spans (its part of
  the logarithm of the devices). GPUs: the inner axes fill nodes; an axis that leaves them meets the
  network with what a node has not already.
  """
  assert chip.interconnect
  full = chip.interconnect / 2 / chip.devices_per_chip
  devices = math.prod(sizes.values())
  speeds = dict.fromkeys(sizes, full)
  if chip.is_tpu:
    for axis, size in sizes.items():
      if size > 1:
        speeds[axis] = full * math.log(size) / math.log(devices)
    return speeds
  for axis, before in leaving(sizes).items():
    shared = max(1, NODE // before)  # a node's GPUs each fetch a part of what all need
    speeds[axis] = min(full, NODE_NETWORK * shared)
  return speeds


def leaving(sizes: Mapping[str, int]) -> dict[str, int]:
  """Mesh axes that leave a node of GPUs, with the devices of the axes inside each."""
  found, inside = {}, 1
  for axis in reversed(tuple(sizes)):  # inner axes last
    before, inside = inside, inside * sizes[axis]
    if inside > NODE:
      found[axis] = before
  return found
