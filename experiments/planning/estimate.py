"""Bytes a device needs for a training step, by what they are for, without a compiler.

The state is exact, tiles of the TPU included. What is kept for the backward pass follows the
tensors of a layer and `train.remat`. What a layer or the head needs beside that while it runs is a
multiple of its tensors, fitted on compiled programs: docs/planning.md says how well.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax

from layers.kernels.cross_entropy.xla import CHUNK_BYTES, MIN_TOKENS_ACCELERATOR
from layers.lora import split
from layers.spec import MoeSpec
from layers.stack import DOT_NAMES, MINIMAL_NAMES, is_staged
from mesh.rules import assign

from ..training.setup import Setup
from .shapes import LANES, Tensor, in_runs, layer_input, named

SUBLANES = 8  # of a TPU's tile, whose other side is LANES

# Fitted. How many times a branch's named tensors are there while its backward pass runs (values,
# gradients, float32 between them), and the residual stream.
ATTENTION_WORK, EXPERT_WORK, GATED_WORK, PLAIN_WORK, RESIDUAL_WORK = 3.5, 2.3, 3.0, 5.7, 5.0
# Whole weights of a layer in bfloat16, and as many bytes of gradients not yet summed.
WEIGHT_WORK = 2.0
# Of the rows of a pipeline: what enters and what leaves it, each once a stage, and their gradients.
PIPELINE_WORK = 5.0
# Of tensors kept in the host's memory: so many groups of layers are on their way at a time.
IN_FLIGHT = 2.5
# Without recomputation, what is kept beside the named tensors: float32 inside of activations and
# norms, and inputs of products; times the tensors of the MLP, of the attention, of the residual.
REST = (3.5, 0.5, 5.0)


class Memory(NamedTuple):
  """Bytes on the fullest device."""

  parameters: int
  optimizer: int
  batch: int
  gradients: int
  kept: dict[str, int]  # saved for the backward pass, by kind of tensor
  head_gradient: int  # of the vocabulary matrix, whole: there before those of the layers
  layer: int  # beside that, while a layer's backward pass runs
  head: int  # or while the loss is computed

  @property
  def arguments(self) -> int:
    return self.parameters + self.optimizer + self.batch

  @property
  def total(self) -> int:
    """The peak: either layers run backward, or the loss is computed before them."""
    saved = self.arguments + sum(self.kept.values()) + self.head_gradient
    return saved + max(self.head, self.gradients + self.layer)


def memory_rows(memory: Memory) -> list[tuple[str, int]]:
  """(what for, bytes), which add up to the peak."""
  backward = memory.gradients + memory.layer
  if backward >= memory.head:
    last = [("gradients", memory.gradients), ("a layer's backward pass", memory.layer)]
  else:
    last = [("the loss", memory.head)]
  return [
    ("parameters", memory.parameters),
    ("optimizer", memory.optimizer),
    ("batch", memory.batch),
    *((f"kept: {kind}", n) for kind, n in memory.kept.items()),
    ("gradient of the vocabulary", memory.head_gradient),
    *last,
  ]


class Weights(NamedTuple):
  """Bytes of a device that the mesh alone decides, not the policy or the parts of a batch."""

  parameters: int
  trained: int  # of the parameters
  optimizer: int
  gathered: dict[tuple[int, int], int]  # by segment and layer: see `_gathered`


def weights_of(setup: Setup) -> Weights:
  """To be counted once where many policies are compared on a mesh."""
  tree = lambda x: sum(map(held, jax.tree.leaves(x)))
  layers = [(i, j) for i, s in enumerate(setup.config.model.segments) for j in range(len(s.layers))]
  gathered = {layer: _gathered(setup, *layer) for layer in layers}
  params, opt_state = setup.abstract.params, setup.abstract.opt_state
  return Weights(tree(params), tree(split(params)[0]), tree(opt_state), gathered)


def memory(setup: Setup, weights: Weights | None = None) -> Memory:
  """What the step of `setup` needs on its mesh, which may be numbers only.

  Args:
    weights: of `weights_of` a setup on the same mesh, where that is known.
  """
  weights = weights or weights_of(setup)
  rows = (setup.config.data.batch_size, setup.config.data.row_length)
  # With parts of a batch, the sum of their gradients and those of one.
  copies = 1 if setup.accumulate == 1 else 2
  kept, layer = _activations(setup, weights)
  head_gradient, head = _head(setup)
  return Memory(
    parameters=weights.parameters,
    optimizer=weights.optimizer,
    # Five arrays of rows, and the limit of the gradient's norm.
    batch=5 * local_bytes(setup)(Tensor("", rows, ("act_batch", "act_seq"), 4)) + padded((), 4),
    gradients=copies * weights.trained,
    kept=kept,
    head_gradient=head_gradient,
    layer=layer,
    head=head,
  )


def held(leaf: jax.ShapeDtypeStruct) -> int:
  """Bytes of a device's share of an array."""
  return padded(leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize)


@functools.lru_cache(maxsize=100_000)
def padded(shape: tuple[int, ...], itemsize: int) -> int:
  """Bytes in tiles of 8 x 128 of whichever two dims take fewest."""
  up = lambda n, to: -(-n // to) * to
  size = math.prod(shape)
  if len(shape) < 2 or size == 0:
    return up(size * itemsize, 512)
  rows = lambda n: up(n, SUBLANES) if n >= SUBLANES else 1 << (n - 1).bit_length()
  tiled = (rows(a) * up(b, LANES) / (a * b) for a, b in itertools.permutations(shape, 2))
  return round(size * itemsize * min(tiled))


def local_bytes(setup: Setup, parts: int = 1) -> Callable[[Tensor], int]:
  """A function of a tensor: a device's share of one of `parts` equal parts of its rows."""
  sizes = setup.mesh.shape
  cuts: dict[tuple[str | None, ...], list[int]] = {}

  def share(tensor: Tensor) -> int:
    cut = cuts.get(tensor.axes)
    if cut is None:  # a model has many tensors and few kinds of axes
      found = assign(tensor.axes, setup.rules, sizes)
      cut = cuts[tensor.axes] = [math.prod(sizes[a] for a in axes) for axes in found]
    first, *rest = (-(-n // count) for n, count in zip(tensor.shape, cut, strict=True))
    return padded((-(-first // parts), *rest), tensor.itemsize)

  return share


def kept_names(remat: str | Sequence[str]) -> tuple[str, ...]:
  """The tensors that a policy of `layers.stack.remat_policy` keeps."""
  if not isinstance(remat, str):
    return tuple(remat)
  every = {"none": MINIMAL_NAMES, "minimal": MINIMAL_NAMES, "dots": DOT_NAMES, "full": ()}
  every["offload"] = MINIMAL_NAMES
  return every.get(remat, (remat,))


def _activations(setup: Setup, weights: Weights) -> tuple[dict[str, int], int]:
  """(kept for the backward pass by kind, needed while one layer runs)."""
  config, sizes = setup.config, setup.mesh.shape
  B, T, D = config.data.batch_size, config.data.row_length, config.model.embed_dim
  stages, parts = sizes["stage"], config.train.microbatches
  size = local_bytes(setup, parts)
  names = kept_names(config.train.remat)
  kept: dict[str, int] = {}
  work = 0
  add = lambda kind, amount: kept.update({kind: kept.get(kind, 0) + int(amount)})
  residual, runs = size(layer_input(B, T, D)), in_runs(setup)
  if stages > 1:
    add("ends of the pipeline", PIPELINE_WORK * local_bytes(setup)(layer_input(B, T, D)))
  for i, segment in enumerate(config.model.segments):
    staged = is_staged(segment.repeats, stages, config.mesh.circular)
    # A stage runs its share of the layers on every part, and on nothing while it waits.
    times = segment.repeats * (parts + stages - 1) / stages if staged else segment.repeats
    for j, layer in enumerate(segment.layers):
      add("layer inputs", times * residual)
      of = {"attention": 0, "mlp": 0, "experts": 0}
      for tensor in named(layer, B, T, D, in_runs=runs):
        local = size(tensor)
        of[_kind(tensor)] += local
        if tensor.name in names and config.train.remat == "offload":
          add("on the way to the host", IN_FLIGHT * local)
        elif tensor.name in names:
          add(_kind(tensor), times * local)
      if config.train.remat == "none":
        amounts = zip(REST, (of["mlp"] + of["experts"], of["attention"], residual), strict=True)
        add("without recomputation", times * sum(factor * n for factor, n in amounts))
      gated = isinstance(layer.mlp, MoeSpec) or layer.mlp.gated
      mlp = (GATED_WORK if gated else PLAIN_WORK) * of["mlp"] + EXPERT_WORK * of["experts"]
      branch = max(mlp, ATTENTION_WORK * of["attention"]) + RESIDUAL_WORK * residual
      work = max(work, int(branch + WEIGHT_WORK * weights.gathered[i, j]))
  return kept, work


def host_bytes(setup: Setup) -> int:
  """What a device keeps in the host's memory between the passes."""
  train = setup.config.train
  if train.remat != "offload":
    return 0
  here = replace(setup.config, train=replace(train, remat="minimal"))
  kept = memory(setup._replace(config=here)).kept
  return sum(n for kind, n in kept.items() if kind in ("attention", "mlp", "experts"))


def _kind(tensor: Tensor) -> str:
  if tensor.name.startswith(("expert", "router")):
    return "experts"
  return "mlp" if tensor.name.startswith("mlp") else "attention"


def _gathered(setup: Setup, i: int, j: int) -> int:
  """Bytes of a layer's weights in bfloat16 where they are used: cut over experts and tensor."""
  segment = setup.config.model.segments[i]
  of = lambda tree: tree[f"segment_{i}"][f"layer_{j}"]
  sizes = {axis: n for axis, n in setup.mesh.shape.items() if axis in ("expert", "tensor")}
  total = 0
  leaves = jax.tree.leaves(of(setup.layout.shapes))
  names = jax.tree.leaves(of(setup.layout.axes), is_leaf=lambda x: isinstance(x, tuple))
  for leaf, logical in zip(leaves, names, strict=True):
    # Widths are whole: only the axis of experts cuts experts.
    kept = tuple(n if n not in ("embed", "expert_embed", "layers") else None for n in logical)
    cut = math.prod(sizes[a] for axes in assign(kept, setup.rules, sizes) for a in axes)
    total += 2 * leaf.size // segment.repeats // cut
  return total


def _head(setup: Setup) -> tuple[int, int]:
  """(gradient of the vocabulary matrix, what else the loss needs while it is computed)."""
  config, sizes = setup.config, setup.mesh.shape
  spec, rows = config.model, config.data.batch_size // config.train.microbatches
  vocab = spec.vocab_size // math.prod(
    sizes[a] for axes in assign(("act_vocab",), setup.rules, sizes) for a in axes
  )
  cut = assign(("act_batch", "act_seq"), setup.rules, sizes)
  tokens = rows * config.data.row_length // math.prod(sizes[a] for axes in cut for a in axes)
  chunk = min(tokens, max(CHUNK_BYTES // (4 * vocab), MIN_TOKENS_ACCELERATOR))
  matrix = vocab * spec.embed_dim
  # Logits and their gradient of a chunk; the matrix in bfloat16, and half of it in copies.
  return 4 * matrix, 2 * 4 * chunk * vocab + (2 + 1) * matrix
