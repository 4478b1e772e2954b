"""Bytes between devices in a step, by mesh axis: on the links of a slice or node, and between
slices; and how fast those are."""

import math
from collections.abc import Mapping, Sequence

import jax

from layers.spec import AttentionSpec, LayerSpec, MoeSpec
from mesh.hardware import Chip

from ..training.setup import Setup
from .estimate import kept_names
from .shapes import expert_rows

# Between nodes of GPUs: bytes/s a GPU, each direction (400 Gb/s).
NODE_NETWORK = 50e9
NODE = 8  # GPUs
# Between TPU slices: bytes/s a chip, each direction. 50, 100 and 100 Gb/s for v5p, v6e and tpu7x,
# 6.4 Tb/s for 256 chips of v5e (Google Cloud TPU documentation, 2026-11); v4: 25 GB/s for a host of
# four (jax-ml.github.io/scaling-book/tpus).
SLICE_NETWORK = {"v4": 6.25e9, "v5e": 3.125e9, "v5p": 6.25e9, "v6e": 12.5e9, "tpu7x": 12.5e9}
DCN = "dcn_"  # before the name of an axis: its traffic between slices


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
    # Gathered in bfloat16 forward and backward, table and head once; gradients are summed in
    # float32. Stages gather their layers each time they run them; else all weights are, for each
    # part of the batch.
    layers, ends = setup.accumulate * stacked / cut, setup.accumulate * (weights - stacked / cut)
    if sizes["stage"] > 1:
      within = sizes["tensor"] * sizes["expert"]
      layers = turns(setup) * stacked / sizes["stage"] / within
      ends = (parameters(shapes) - stacked) / within
    found["fsdp"] = ((2 * 2 + 4) * layers + (2 + 4) * ends) * (1 - 1 / sizes["fsdp"])
  if sizes["data"] > 1:
    found["data"] = 2 * 4 * weights / sizes["fsdp"] * (1 - 1 / sizes["data"])
  rows = config.data.batch_size / (sizes["data"] * sizes["fsdp"] * sizes["expert"])
  tokens = rows * T / sizes["context"]
  passes = 4 if config.train.remat in ("full", "dots") else 3  # forward, backward, again
  if (t := sizes["tensor"]) > 1:
    cut_keys = "tensor" in setup.rules["kv_heads"]
    each = sum(_between_blocks(layer, spec.embed_dim, config.train.remat, cut_keys)
               for layer in spec.layers)  # fmt: skip
    # At the ends: the embedding, the last norm and the gradient; that of the head is a sum.
    ends = 3 * 2 + 4
    found["tensor"] = (each / sizes["stage"] + ends) * tokens * spec.embed_dim * (1 - 1 / t)
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


def _between_blocks(
  layer: LayerSpec, width: int, remat: str | Sequence[str], cut_keys: bool
) -> float:
  """Bytes over `tensor` for each of `width` numbers of the residual stream, of one layer.

  What blocks read is gathered in bfloat16, so are the gradients of what they add. The products
  that write to the stream leave sums in float32, and so does each that reads it, going back; but
  keys and values that all devices have, whose own gradients are summed.
  """
  again, branches = remat != "none", 1 if layer.parallel else 2
  gathers = branches * (1 + again) + branches
  sums = 1 + (again and not layer.parallel and "attention_branch" not in kept_names(remat))
  attention = layer.attention
  if not isinstance(attention, AttentionSpec):
    sums += 2  # of latents
  elif cut_keys:
    sums += 3  # of queries, keys, values
  else:
    sums += 1 + 2 * attention.kv_heads * attention.head_dim / width
  if isinstance(layer.mlp, MoeSpec):  # experts: one sum each way, in bfloat16 (`over_tensor`)
    return 2 * gathers + 4 * sums + 2 + 2 * 2
  return 2 * gathers + 4 * (sums + 2 + layer.mlp.gated)


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
