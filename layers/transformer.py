"""TransformerLM: embedding, scanned segments of blocks, final norm, head.

B batch, T positions, D model width, V vocabulary, L repeats of a segment.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from mesh.constrain import constrain, shard_counts
from mesh.region import region_for

from .attention import Rows, bucket_table, layer_mask
from .block import Block, smallest_inputs
from .cache import KVCache, LinearState, empty_cache, empty_state, num_slots
from .context import Method, zigzag
from .embedding import Embedding
from .kernels.attention.blocks import reach_of
from .kernels.cross_entropy import CrossEntropy
from .linear import dense, take
from .lora import scaled
from .losses import token_loss
from .mlp import activate, affine
from .moe import MoeStats
from .norms import Norm
from .params import declare, kernel_init, unbox
from .router import updated_bias
from .spec import BucketedSpec, LinearAttentionSpec, ModelSpec, MoeSpec, Segment
from .stack import run_segment

# One entry a segment, one a layer of its group, arrays stacked over repeats.
Caches = tuple[tuple[KVCache | LinearState, ...], ...]


class LMOutput(NamedTuple):
  """What a forward pass gives. `loss` when targets were given, else `logits_BTV` in float32."""

  logits_BTV: jax.Array | None
  loss: CrossEntropy | None
  stats: tuple[MoeStats, ...]  # one a MoE layer of each group, stacked over repeats
  caches: Caches | None


class TransformerLM(nn.Module):
  """A language model from its `ModelSpec`.

  Attributes:
    spec: the model.
    dtype: of activations and of weights in use; parameters are stored in float32.
    remat: what backward keeps, see `stack.remat_policy`.
    unroll: see `stack.apply_segment`.
    context_method: on a mesh with context, see `layers.context`.
    microbatches, circular: of the pipeline on a mesh with stages, see `stack.run_segment`.
    adapter_scale: alpha / r of adapters, if the parameters hold some (`layers.lora`).
  """

  spec: ModelSpec
  dtype: Any = jnp.float32
  remat: str | tuple[str, ...] = "none"
  unroll: int | None = None
  microbatches: int = 1
  circular: int = 1
  context_method: Method = "auto"
  adapter_scale: float = 1.0

  @nn.compact
  def __call__(
    self,
    tokens_BT: jax.Array,
    *,
    targets_BT: jax.Array | None = None,
    weights_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    key_B: jax.Array | None = None,
    caches: Caches | None = None,
    at_B: jax.Array | None = None,
    train: bool = False,
    z_loss: float = 0.0,
  ) -> LMOutput:
    """Loss against `targets_BT`, or logits.

    Args:
      tokens_BT: int32 token ids.
      targets_BT: tokens to predict; given, the result holds the summed loss and no logits.
      weights_BT: weight of each target, 1 where None.
      positions_BT: from 0 in each document; None is 0..T-1.
      segments_BT: document of each token within its row, 0 for padding; None is one document.
      key_B: one typed PRNG key a row for jitter and dropout; None is deterministic.
      caches: KV caches from `init_caches`; `positions_BT[:, 0]` is where the tokens are written.
      at_B: logits at this index of each row only, [B, 1, V].
      train: training capacity for experts instead of the evaluation capacity.
      z_loss: coefficient of log(Z)^2 in the loss.
    """
    spec = self.spec
    B, T = tokens_BT.shape
    if positions_BT is None:
      positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    whole = caches is not None or at_B is not None or self.is_initializing()
    region = None if whole else region_for(B, T)
    place_T = None
    if region is not None and region.positions:
      # Positions change places once, here; nothing below depends on their order but attention.
      devices = math.prod(region.sizes[a] for a in region.positions)
      place_T = jnp.asarray(zigzag(T, devices), jnp.int32)
      by_place = (tokens_BT, targets_BT, weights_BT, positions_BT, segments_BT)
      by_place = jax.tree.map(lambda x: take(x, place_T, 1), by_place)
      tokens_BT, targets_BT, weights_BT, positions_BT, segments_BT = by_place
    table_UN = self._shared_bucket_table()
    routers = {layer.mlp.router for layer in spec.layers if isinstance(layer.mlp, MoeSpec)}
    ids_BT = tokens_BT if "hash" in routers else None
    rows = Rows(positions_BT, segments_BT, key_B, table_UN, place_T, ids_BT)
    embedding = Embedding(
      spec.embedding, spec.vocab_size, spec.embed_dim, spec.init, self.dtype, name="embedding"
    )
    with jax.named_scope("embedding"):
      x_BTD = embedding(tokens_BT, positions_BT, key_B=key_B, place_T=place_T)
    x_BTD, stats, caches = self._segments(x_BTD, rows, region, caches, train)
    if spec.head.transform is not None:
      x_BTD = self._transform(x_BTD, spec.head.transform)
    if spec.final_norm is not None:
      x_BTD = Norm(spec.final_norm, spec.embed_dim, name="final_norm")(x_BTD)
    if at_B is not None:
      x_BTD = constrain(x_BTD, "act_batch", None, "act_embed")
      x_BTD = jax.vmap(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, 1))(x_BTD, at_B)
    with jax.named_scope("head"):
      logits_BTV, loss = self._head(x_BTD, embedding, targets_BT, weights_BT, z_loss, region)
    if place_T is not None:
      back = jnp.argsort(place_T)
      in_order = lambda x: take(x, back, 1) if x.ndim > 1 else x
      logits_BTV, loss = jax.tree.map(in_order, (logits_BTV, loss))
    return LMOutput(logits_BTV, loss, stats, caches)

  def _segments(self, x_BTD, rows, region, caches, train):
    """All layers: (x, statistics, caches)."""
    stats, new_caches, first_layer = [], [], 0
    for i, segment in enumerate(self.spec.segments):
      if self.is_initializing():  # only to draw weights
        self._segment_params(i)
        continue
      x_BTD, segment_stats, segment_caches = run_segment(
        segment,
        self._blocks(segment),
        scaled(self._segment_params(i), self.adapter_scale),
        x_BTD,
        rows,
        region=region,
        first_layer=first_layer,
        caches=None if caches is None else caches[i],
        train=train,
        remat=self.remat,
        unroll=self.unroll,
        microbatches=self.microbatches,
        circular=self.circular,
      )
      stats.extend(segment_stats)
      new_caches.append(segment_caches)
      first_layer += segment.repeats * len(segment.layers)
    return x_BTD, tuple(stats), None if caches is None else tuple(new_caches)

  def _blocks(self, segment: Segment) -> list[Block]:
    gain = (2 * self.spec.num_layers) ** -0.5 if self.spec.init.depth_scaled else 1.0
    common = (self.spec.embed_dim, self.spec.init, gain, self.context_method)
    return [Block(layer, *common, parent=None) for layer in segment.layers]

  def _segment_params(self, i: int) -> dict[str, Any]:
    """Stacked weights of segment i: declared once, drawn with one key a layer."""
    name, segment = f"segment_{i}", self.spec.segments[i]
    if not self.is_initializing():
      return unbox(self.get_variable("params", name))

    def draw(key):
      stacked = {}
      for j, block in enumerate(self._blocks(segment)):
        keys_L = jax.random.split(jax.random.fold_in(key, j), segment.repeats)
        inputs = smallest_inputs(block.spec, self.spec.embed_dim)
        one = lambda k, block=block, inputs=inputs: block.init(k, *inputs)["params"]
        boxed = jax.vmap(one)(keys_L)
        stacked[f"layer_{j}"] = nn.meta.add_axis(boxed, 0, {nn.PARTITION_NAME: "layers"})
      return stacked

    return self.param(name, draw)

  def _shared_bucket_table(self) -> jax.Array | None:
    for layer in self.spec.layers:
      position, num_heads = layer.attention.position, layer.attention.num_heads
      if isinstance(position, BucketedSpec) and position.shared:
        return bucket_table(self, position, num_heads)
    return None

  def _transform(self, x_BTD, activation):
    D = self.spec.embed_dim
    w_DD = declare(self, "transform", (D, D), ("embed", None), kernel_init(self.spec.init, D))
    b_D = declare(self, "transform_bias", (D,), ("norm",), nn.initializers.zeros)
    return activate(activation, affine(x_BTD, w_DD, b_D))

  def _head(self, x_BTD, embedding, targets_BT, weights_BT, z_loss, region):
    spec, head = self.spec, self.spec.head
    bias_V = None
    if head.bias:
      bias_V = declare(self, "head_bias", (spec.vocab_size,), ("vocab",), nn.initializers.zeros)
    if head.tied:
      x_BTD, w = embedding.to_table_width(x_BTD), embedding.table
    else:
      init = kernel_init(spec.init, spec.embed_dim)
      shape, axes = (spec.embed_dim, spec.vocab_size), ("embed", "vocab")
      w = declare(self, "head", shape, axes, init)
    if targets_BT is None:
      logits_BTV = dense(x_BTD.astype(jnp.float32), w.T if head.tied else w)
      if bias_V is not None:
        logits_BTV += jnp.expand_dims(bias_V, (0, 1))
      logits_BTV *= head.scale
      if head.softcap is not None:
        logits_BTV = head.softcap * jnp.tanh(logits_BTV / head.softcap)
      return constrain(logits_BTV, "act_batch", "act_seq", "act_vocab"), None
    if weights_BT is None:
      weights_BT = jnp.ones_like(targets_BT, jnp.float32)
    shards = (1, 1)
    if region is None:
      shards = shard_counts("act_batch", "act_seq", shape=targets_BT.shape)
    return None, token_loss(
      x_BTD,
      w,
      targets_BT,
      weights_BT,
      region=region,
      w_axes=("vocab", "embed") if head.tied else ("embed", "vocab"),
      bias_V=bias_V,
      scale=head.scale,
      softcap=head.softcap,
      z_loss=z_loss,
      tied=head.tied,
      shards=shards,
    )


def init_caches(spec: ModelSpec, batch: int, length: int, dtype=jnp.float32) -> Caches:
  """Empty caches of every layer: for as many of `length` positions as its mask sees, or a state.
  Raises ValueError for an encoder."""
  if not spec.causal:
    raise ValueError("an encoder's tokens see later ones, so it can't go on token by token")

  def segment_caches(segment):
    stack = lambda x: jnp.zeros((segment.repeats, *x.shape), x.dtype)
    caches = []
    for layer in segment.layers:
      if isinstance(layer.attention, LinearAttentionSpec):
        cache = empty_state(batch, layer.attention.state, layer.attention.conv_inputs)
      else:
        before, _ = reach_of(layer_mask(layer.attention))
        key, value = layer.attention.cached
        cache = empty_cache(batch, num_slots(length, before), key, value, dtype)
      caches.append(jax.tree.map(stack, cache))
    return tuple(caches)

  return tuple(segment_caches(segment) for segment in spec.segments)


def update_selection_biases(spec: ModelSpec, params: Any, stats: tuple[MoeStats, ...]) -> Any:
  """Parameters after a step with DeepSeek-V3's selection biases moved by the step's loads.

  Args:
    stats: of the whole batch, as in `LMOutput.stats`.
  """
  loads = iter(stats)
  for i, segment in enumerate(spec.segments):
    for j, layer in enumerate(segment.layers):
      if not isinstance(layer.mlp, MoeSpec):
        continue
      load_LE = next(loads).load_E
      if layer.mlp.bias_rate is None:
        continue
      name, sub = f"segment_{i}", f"layer_{j}"
      here = params[name][sub]["moe"]
      bias_LE = updated_bias(here["selection_bias"], load_LE, layer.mlp.bias_rate)
      moe = {**here, "selection_bias": bias_LE}
      params = {**params, name: {**params[name], sub: {**params[name][sub], "moe": moe}}}
  return params


def moe_layers(spec: ModelSpec) -> tuple[tuple[int, ...], ...]:
  """Layer indices behind each entry of `LMOutput.stats`, in its order."""
  result, first = [], 0
  for segment in spec.segments:
    width = len(segment.layers)
    for j, layer in enumerate(segment.layers):
      if isinstance(layer.mlp, MoeSpec):
        result.append(tuple(first + r * width + j for r in range(segment.repeats)))
    first += width * segment.repeats
  return tuple(result)
