"""Parameter and FLOP counts of a model, from its shapes; nothing is allocated."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .params import is_weight
from .spec import LatentAttentionSpec, LinearAttentionSpec, ModelSpec, MoeSpec
from .transformer import TransformerLM


class Counts(NamedTuple):
  """Trainable parameters: all; those a token passes (both tables counted); without input table."""

  total: int
  active: int
  active_matmul: int


def abstract_params(spec: ModelSpec):
  """Parameters as boxed `ShapeDtypeStruct`s (see `layers.params.Weight`)."""
  model = TransformerLM(spec)
  tokens_BT = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), tokens_BT)["params"]


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


def train_flops_per_token(spec: ModelSpec, length: int) -> float:
  """Model FLOPs of one token's forward and backward pass, PaLM's convention.

  6 N + 12 sum over layers of heads * head_dim * keys (arXiv 2204.02311, appendix B): N the active
  parameters without an untied input table; attention not halved for causality; a windowed layer
  sees at most its window; in latent attention head_dim is the mean of the key's and the value's
  size. A linear attention writes each token to its states and reads them, by the delta rule twice:
  12 or 18 times their size, whatever the length and the chunks. Recomputation, padding and
  dropped slots do not count.
  """
  attention = 0
  for layer in spec.layers:
    a = layer.attention
    if isinstance(a, LatentAttentionSpec):
      attention += 6 * a.num_heads * (a.nope_dim + a.rope_dim + a.value_dim) * length
    elif isinstance(a, LinearAttentionSpec):
      attention += (18 if a.kind == "delta" else 12) * a.num_heads * a.head_dim * a.value_size
    else:
      keys = min(x for x in (length, a.window, a.chunk) if x is not None)
      attention += 12 * a.num_heads * a.head_dim * keys
  return 6.0 * count_params(spec).active_matmul + attention
