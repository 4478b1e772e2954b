"""Small decoders that put many unlike layers into one stack, so that one compilation tests all."""

import functools
from dataclasses import replace

import jax
import numpy as np

from layers.count import abstract_params
from layers.params import unbox
from layers.spec import (
  AlibiSpec,
  AttentionSpec,
  BucketedSpec,
  EmbeddingSpec,
  LatentAttentionSpec,
  LayerSpec,
  LearnedPositionSpec,
  LinearAttentionSpec,
  MlpSpec,
  ModelSpec,
  MoeSpec,
  NormSpec,
  RotarySpec,
  Segment,
  TransformerXLSpec,
)

# Compiles in a half to a sixth of the time; nothing here runs long enough to miss LLVM.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

D, T, V = 16, 12, 32

_MLP = MlpSpec(24)
_HEADS = AttentionSpec(num_heads=2, head_dim=8)

# Every way to know a position, experts with a slot for every choice, every linear attention. Sizes
# divide over eight devices.
POSITIONS = ModelSpec(
  vocab_size=V,
  embed_dim=D,
  max_length=T,
  embedding=EmbeddingSpec(position=LearnedPositionSpec(T)),
  segments=(
    Segment(
      (
        LayerSpec(AttentionSpec(4, 8, 2, window=3, position=RotarySpec(), sink=True), _MLP),
        LayerSpec(replace(_HEADS, position=AlibiSpec(), mask="Dilated(2, 9) | Global(2)"), _MLP),
        LayerSpec(replace(_HEADS, position=BucketedSpec(6, 9)), _MLP),
      ),
    ),
    Segment(
      (
        LayerSpec(replace(_HEADS, position=TransformerXLSpec()), _MLP),
        LayerSpec(
          replace(_HEADS, chunk=4, position=RotarySpec(dims=4, interleaved=True)),
          MoeSpec(4, _MLP, 2, router="top_k", capacity_factor=4.0, eval_capacity_factor=4.0),
        ),
        LayerSpec(LatentAttentionSpec(2, 12, 6, 4, 5), _MLP),
      ),
      repeats=2,
    ),
    Segment(
      (
        LayerSpec(LinearAttentionSpec("elu", 2, 4), _MLP),
        LayerSpec(LinearAttentionSpec("retention", 2, 4, position=RotarySpec()), _MLP),
        LayerSpec(LinearAttentionSpec("gla", 2, 4, 6), _MLP),
        LayerSpec(LinearAttentionSpec("delta", 2, 4, 6, conv=3), _MLP),
      ),
    ),
  ),
)

# Switch layers whose experts overflow; noise everywhere.
_SWITCH = MoeSpec(
  4, _MLP, dispatch="capacity", capacity_factor=0.75, min_capacity=1, jitter=0.2, z_loss=1e-2
)
_ROTARY = replace(_HEADS, num_kv_heads=1, position=RotarySpec())
_DENSE = LayerSpec(_ROTARY, _MLP, dropout=0.2)
_SPARSE = LayerSpec(_ROTARY, _SWITCH, NormSpec("layer", bias=True), dropout=0.2)
SWITCH = ModelSpec(
  vocab_size=V,
  embed_dim=D,
  max_length=T,
  embedding=EmbeddingSpec(dropout=0.1),
  segments=(Segment((_DENSE, _SPARSE), 2),),
)


def random_params(spec, seed=0):
  """Every leaf random, also those that start as zeros or ones."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    values = 0.25 * rng.normal(size=leaf.shape)
    return (values + (path[-1].key == "scale")).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, unbox(abstract_params(spec)))


def random_tokens(*shape, seed=1):
  return np.random.default_rng(seed).integers(0, V, shape, dtype=np.int32)
