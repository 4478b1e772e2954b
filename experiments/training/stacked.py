"""Optimizer rules that see matrices, on weights stacked over layers and experts.

Dimension letters: L layers, E experts. A leaf is read as `[*batch, inputs, outputs]` (a matrix)
or `[*batch, n]` (a vector); batch dims are L, E, both or none, and stay dims of their own:
merged into one, as `optax.contrib.muon` does, they lose their sharding and every device works on
the experts of all of them.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

_BATCH_AXES = ("layers", "expert")
_HEAD_AXES = ("heads", "kv_heads", "head_dim")

# Keller Jordan, https://kellerjordan.github.io/posts/muon/: slope at 0 over convergence to 1.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5

# Root mean square of a Muon update, that of a typical AdamW update: arXiv 2502.16982, section 2.2.
_MUON_RMS = 0.2


@dataclass(frozen=True)
class Slices:
  """How a stacked leaf splits into matrices or vectors.

  `axes` has one logical name a dim of the leaf; the first `batch` dims count slices, the next
  `inputs` are a matrix's first dim, the rest its second. `inputs == 0`: a vector.
  """

  axes: tuple[str | None, ...]
  batch: int
  inputs: int

  @property
  def is_matrix(self) -> bool:
    return self.inputs > 0

  @property
  def slice_axes(self) -> tuple[str | None, ...]:
    return self.axes[self.batch :]

  @property
  def merged_axes(self) -> tuple[str | None, ...]:
    """Logical axes of the leaf as `flatten` returns it: a merged dim is named by its first."""
    starts = (0, self.inputs) if self.is_matrix else (0,)
    return self.axes[: self.batch] + tuple((self.slice_axes or (None,))[i] for i in starts)

  def flatten(self, x: jax.Array) -> jax.Array:
    """`x` as `[*batch, inputs, outputs]` or `[*batch, n]`."""
    batch, rest = x.shape[: self.batch], x.shape[self.batch :]
    parts = (rest[: self.inputs], rest[self.inputs :]) if self.is_matrix else (rest,)
    return x.reshape(*batch, *(math.prod(part) for part in parts))


def split(axes: tuple[str | None, ...]) -> Slices:
  """Read the logical axes of a leaf.

  Leading `layers` and `expert` count slices. Neighbouring head dims are one dim, every other
  axis is one of its own; with two or more of those the leaf is a matrix from the first to the
  others (`embed -> heads, head_dim`; `heads, head_dim -> embed`; `expert_embed -> expert_mlp`).
  """
  batch = len(tuple(itertools.takewhile(lambda name: name in _BATCH_AXES, axes)))
  if batch == len(axes) and batch > 0 and axes[-1] == "expert":
    batch -= 1  # a number an expert (a router's bias) is one vector, not many scalars
  rest = axes[batch:]
  inputs = len(tuple(itertools.takewhile(lambda name: name in _HEAD_AXES, rest))) or 1
  return Slices(axes, batch, inputs if inputs < len(rest) else 0)


def orthogonalize(x: jax.Array, *, eps: float) -> jax.Array:
  """The orthogonal matrix nearest to each `x[..., m, n]`, roughly: singular values in 0.7 to 1.2.

  Five Newton-Schulz steps of Muon (Keller Jordan 2024, https://kellerjordan.github.io/posts/muon/)
  from x / |x|_F, on the side with the smaller Gram matrix.
  """
  a, b, c = _NEWTON_SCHULZ
  tall = x.shape[-2] > x.shape[-1]
  x = jnp.swapaxes(x, -1, -2) if tall else x
  x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + eps)
  for _ in range(_NEWTON_SCHULZ_STEPS):
    gram = x @ jnp.swapaxes(x, -1, -2)
    x = a * x + (b * gram + c * gram @ gram) @ x
  return jnp.swapaxes(x, -1, -2) if tall else x


class MuonState(NamedTuple):
  count: jax.Array  # updates made, int32
  mu: Any  # running mean of the gradients


def scale_by_muon(slices: Any, *, beta: float, eps: float) -> optax.GradientTransformation:
  """Muon's direction for every matrix of every leaf, with the root mean square of AdamW's.

  Equal to `optax.contrib.muon(consistent_rms=0.2)` on each matrix alone: Nesterov momentum with
  bias correction, `orthogonalize`, times 0.2 sqrt(max(inputs, outputs)) (arXiv 2502.16982, eq. 4),
  so that AdamW's learning rate and weight decay carry over.

  Args:
    slices: a tree of `Slices`, all matrices, of the parameters' structure.
    beta: of the momentum.
    eps: added to the Frobenius norm.
  """

  def init(params):
    return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

  def direction(gradient, mean, split_of):
    x = split_of.flatten(beta * mean + (1 - beta) * gradient)
    rms = _MUON_RMS * math.sqrt(max(x.shape[-2:]))
    return (rms * orthogonalize(x, eps=eps)).reshape(gradient.shape)

  def update(gradients, state, params=None):
    del params
    count = optax.safe_increment(state.count)
    mu = optax.tree.update_moment(gradients, state.mu, beta, 1)
    ahead = optax.tree.bias_correction(mu, beta, optax.safe_increment(count))
    now = optax.tree.bias_correction(gradients, beta, count)
    return jax.tree.map(direction, now, ahead, slices), MuonState(count, mu)

  return optax.GradientTransformation(init, update)


def scale_by_adafactor(slices: Any) -> optax.GradientTransformation:
  """Adafactor's step (arXiv 1804.04235, algorithm 4, no momentum) for each matrix and vector.

  The factored second moment, the clip of the update's root mean square at 1 and the scale by the
  parameter's own are `optax`'s, mapped over the batch dims, so a layer's step does not depend on
  the other layers in its stack. A matrix is factored over inputs and outputs (heads and
  head_dim count as one dim) when both reach 128; statistics are float32 as the parameters are.

  Args:
    slices: a tree of `Slices` of the parameters' structure.

  Returns:
    A transformation with an `optax.FactoredState` of stacked statistics.
  """
  factored, clip = optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)
  block_scale, empty = optax.scale_by_param_block_rms(), optax.EmptyState()
  shared_count = optax.FactoredState(count=None, v_row=0, v_col=0, v=0)

  def init_leaf(param, split_of):
    init = factored.init
    for _ in range(split_of.batch):
      init = jax.vmap(init, out_axes=shared_count)
    return init(split_of.flatten(param))

  def init(params):
    states = jax.tree.map(init_leaf, params, slices)
    pick = lambda field: jax.tree.map(
      lambda state: getattr(state, field), states, is_leaf=_is_state
    )
    return optax.FactoredState(jnp.zeros((), jnp.int32), pick("v_row"), pick("v_col"), pick("v"))

  def update_slice(gradient, state, param):
    step, state = factored.update(gradient, state, param)
    step, _ = clip.update(step, empty)
    step, _ = block_scale.update(step, empty, param)
    return step, state

  def update(gradients, state, params):
    def update_leaf(gradient, param, split_of, *statistics):
      step = update_slice
      for _ in range(split_of.batch):
        step = jax.vmap(step, in_axes=(0, shared_count, 0), out_axes=(0, shared_count))
      leaf_state = optax.FactoredState(state.count, *statistics)
      direction, leaf_state = step(split_of.flatten(gradient), leaf_state, split_of.flatten(param))
      return direction.reshape(gradient.shape), *leaf_state[1:]

    leaves, treedef = jax.tree.flatten(gradients)
    columns = (leaves, *map(treedef.flatten_up_to, (params, slices, *state[1:])))
    rows = [update_leaf(*row) for row in zip(*columns, strict=True)]
    direction, *statistics = map(treedef.unflatten, zip(*rows, strict=True))
    return direction, optax.FactoredState(optax.safe_increment(state.count), *statistics)

  return optax.GradientTransformation(init, update)


def _is_state(x: Any) -> bool:
  return isinstance(x, optax.FactoredState)
