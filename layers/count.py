"""Parameter and FLOP counts of a model, from its shapes; nothing is allocated."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from .attention import layer_mask
from .block import abstract_block
from .masks import Mask
from .params import is_weight
from .spec import AttentionSpec, LatentAttentionSpec, LinearAttentionSpec, ModelSpec, MoeSpec
from .transformer import TransformerLM


class Counts(NamedTuple):
  """Trainable parameters: all; those a token passes (both tables counted); without input table."""

  total: int
  active: int
  active_matmul: int


def abstract_params(spec: ModelSpec):
  """Parameters as boxed `ShapeDtypeStruct`s (see `layers.params.Weight`)."""
  draw = lambda: _Frame(spec).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  params = dict(jax.eval_shape(draw)["params"])
  for i, segment in enumerate(spec.segments):
    stack = lambda x, L=segment.repeats: jax.ShapeDtypeStruct((L, *x.shape), x.dtype)
    each = (abstract_block(layer, spec.embed_dim) for layer in segment.layers)
    group = {f"layer_{j}": jax.tree.map(stack, boxed) for j, boxed in enumerate(each)}
    params[f"segment_{i}"] = nn.meta.add_axis(group, 0, {nn.PARTITION_NAME: "layers"})
  return params


class _Frame(TransformerLM):
  """All but the layers."""

  def _segment_params(self, i: int) -> dict[str, Any]:
    return {}


@functools.cache
def count_params(spec: ModelSpec) -> Counts:
  """Exact counts; `active` leaves out the experts a token does not choose."""
  leaves = jax.tree.leaves(abstract_params(spec), is_leaf=is_weight)
  total = active = 0
  for leaf in leaves:
    if not leaf.trainable:
      continue
    size = int(np.prod(leaf.value.shape, dtype=np.int64))
    total += size
    if "expert" not in leaf.names:
      active += size
  for layer in spec.layers:
    if isinstance(layer.mlp, MoeSpec):
      active += layer.mlp.experts_per_token * _one_expert(spec, layer.mlp)
  width = spec.embedding.width or spec.embed_dim
  input_table = 0 if spec.head.tied else spec.vocab_size * width
  positions = spec.embedding.position
  if positions is not None:
    input_table += (positions.length + positions.offset) * spec.embed_dim
  return Counts(total, active, active - input_table)


def _one_expert(spec: ModelSpec, moe: MoeSpec) -> int:
  mlp, D = moe.expert, spec.embed_dim
  into = 2 if mlp.gated else 1
  biases = into * mlp.hidden + D if mlp.bias else 0
  return (into + 1) * D * mlp.hidden + biases


def train_flops_per_token(spec: ModelSpec, length: int, *, mean_keys: bool = False) -> float:
  """Model FLOPs of one token's forward and backward pass, PaLM's convention.

  6 N + 12 sum over layers of heads * head_dim * keys (arXiv 2204.02311, appendix B): N the active
  parameters without an untied input table; attention not halved for causality: a windowed layer
  sees its window, one with a mask what the last query sees, and if it is not causal what a query
  sees on average; in latent attention head_dim is the mean of the key's and the value's size. A
  linear attention writes each token to its states and reads them, by the delta rule twice: 12 or
  18 times their size, whatever the length and the chunks. Recomputation, padding and dropped
  slots do not count.

  Args:
    mean_keys: count the keys that a query sees on average instead, half of them in a causal layer.
  """
  attention = 0
  for layer in spec.layers:
    a = layer.attention
    if isinstance(a, LatentAttentionSpec):
      keys = keys_seen(a, length) if mean_keys else length
      attention += 6 * a.num_heads * (a.nope_dim + a.rope_dim + a.value_dim) * keys
    elif isinstance(a, LinearAttentionSpec):
      attention += (18 if a.kind == "delta" else 12) * a.num_heads * a.head_dim * a.value_size
    else:
      keys = keys_seen(a, length) if mean_keys else _seen(a, length)
      attention += 12 * a.num_heads * a.head_dim * keys
  return 6.0 * count_params(spec).active_matmul + attention


def _seen(spec: AttentionSpec, length: int) -> float:
  """Keys of the last query of a causal layer, of the average one of another; a mean over heads."""
  if not spec.causal:
    return keys_seen(spec, length)
  keys = min(x for x in (length, spec.window, spec.chunk) if x is not None)
  if spec.mask is None:
    return keys
  last, all_keys = np.array([length - 1], np.int32), np.arange(length, dtype=np.int32)
  return min(keys, _mean_over_heads(spec, lambda one: one.visible(last, all_keys).sum()))


@functools.cache
def keys_seen(spec: AttentionSpec | LatentAttentionSpec, length: int) -> float:
  """Keys that a layer's mask shows to a query in a row of `length`, on average."""
  return _mean_over_heads(spec, lambda one: one.density(length) * length)


def _mean_over_heads(
  spec: AttentionSpec | LatentAttentionSpec, keys: Callable[[Mask], float]
) -> float:
  mask = layer_mask(spec)
  each = [float(keys(one)) for one in mask.distinct]
  return float(np.mean([each[i] for i in mask.by_head or (0,)]))
