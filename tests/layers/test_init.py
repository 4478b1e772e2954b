"""How weights start: spreads, depth scaling, a draw a layer, the same on every mesh."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from layers.count import abstract_params, count_params
from layers.params import axes, init_params, is_weight, trainable, unbox
from layers.spec import (
  AttentionSpec,
  EmbeddingSpec,
  InitSpec,
  LatentAttentionSpec,
  LayerSpec,
  LearnedPositionSpec,
  MlpSpec,
  ModelSpec,
  MoeSpec,
  NormSpec,
  RotarySpec,
  Segment,
)
from layers.transformer import TransformerLM
from mesh.axes import LOGICAL_AXES
from mesh.constrain import use_mesh
from mesh.rules import PRESETS, shardings
from mesh.topology import make_mesh
from tests.layers.stacks import quick_jit

D, F, Z, V = 32, 64, 24, 96
LATENT = LatentAttentionSpec(4, Z, nope_dim=8, rope_dim=8, value_dim=16)
SPEC = ModelSpec(
  vocab_size=V,
  embed_dim=D,
  max_length=64,
  embedding=EmbeddingSpec(position=LearnedPositionSpec(64)),
  segments=(
    Segment(
      (
        LayerSpec(AttentionSpec(4, 16, 2, position=RotarySpec(), qkv_bias=True), MlpSpec(F)),
        LayerSpec(LATENT, MoeSpec(4, MlpSpec(F)), NormSpec(unit_offset=True)),
      ),
      repeats=4,
    ),
  ),
  init=InitSpec(scale=0.5, embed_stddev=0.05),
)
GAIN = 16**-0.5  # 8 layers write to the residual twice
TOKENS = np.zeros((1, 1), np.int32)


@functools.cache
def drawn():
  """{path: array} of SPEC."""
  model = TransformerLM(SPEC, unroll=1)
  params = quick_jit(lambda key: init_params(model, key, TOKENS))(jax.random.key(0))
  return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
          for path, leaf in jax.tree_util.tree_leaves_with_path(params)}  # fmt: skip


NORMAL = {"embedding/table": 0.05, "embedding/position_table": 0.05, "layer_1/moe/router": 0.02}
FAN_IN = {
  "head": (D, 1.0),
  "layer_0/attention/query": (D, 1.0), "layer_0/attention/key": (D, 1.0),
  "layer_0/attention/value": (D, 1.0), "layer_0/attention/out": (4 * 16, GAIN),
  "layer_0/mlp/up": (D, 1.0), "layer_0/mlp/gate": (D, 1.0), "layer_0/mlp/down": (F, GAIN),
  "layer_1/attention/query": (D, 1.0), "layer_1/attention/latent_down": (D, 1.0),
  "layer_1/attention/rotary_key": (D, 1.0), "layer_1/attention/key": (Z, 1.0),
  "layer_1/attention/value": (Z, 1.0), "layer_1/attention/out": (4 * 16, GAIN),
  "layer_1/moe/up": (D, 1.0), "layer_1/moe/gate": (D, 1.0), "layer_1/moe/down": (F, GAIN),
}  # fmt: skip
CONSTANT = {
  "final_norm/scale": 1.0,
  "layer_0/attention_norm/scale": 1.0, "layer_0/mlp_norm/scale": 1.0,
  "layer_0/attention/query_bias": 0.0, "layer_0/attention/key_bias": 0.0,
  "layer_0/attention/value_bias": 0.0,
  "layer_1/attention_norm/scale": 0.0, "layer_1/mlp_norm/scale": 0.0,  # unit offset
  "layer_1/attention/latent_norm/scale": 1.0,
}  # fmt: skip


def test_spread_of_every_leaf():
  """Variance scale / fan_in, less where a layer writes to the residual; tables, router normal."""
  leaves = drawn()
  seen = set()
  for path, leaf in leaves.items():
    name = path.removeprefix("segment_0/")
    seen.add(name)
    if name in CONSTANT:
      assert np.all(leaf == CONSTANT[name]), name
      continue
    if name in NORMAL:
      want, cut = NORMAL[name], np.inf
    else:
      fan_in, gain = FAN_IN[name]
      want, cut = gain * (0.5 / fan_in) ** 0.5, 2.0 / 0.8796
    # The standard deviation of n normal draws is itself off by a share of (2 n) ** -0.5.
    assert np.std(leaf) == pytest.approx(want, rel=4 * (2 * leaf.size) ** -0.5), name
    assert abs(np.mean(leaf)) < 4 * want * leaf.size**-0.5, name
    assert np.abs(leaf).max() <= want * cut * 1.001, name
  assert seen == NORMAL.keys() | FAN_IN.keys() | CONSTANT.keys()


@pytest.mark.parametrize("depth_scaled", [True, False])
def test_normal_initialisation(depth_scaled):
  init = InitSpec(kind="normal", stddev=0.006, depth_scaled=depth_scaled)
  layer = LayerSpec(AttentionSpec(1, 2), MlpSpec(F, "relu", gated=False))
  spec = replace(SPEC, segments=(Segment((layer,), 3),), init=init)
  model = TransformerLM(spec, unroll=1)
  mlp = quick_jit(lambda key: init_params(model, key, TOKENS)["segment_0"]["layer_0"]["mlp"])(
    jax.random.key(0)
  )
  for name, gain in (("up", 1.0), ("down", 6**-0.5 if depth_scaled else 1.0)):
    leaf, stddev = mlp[name], 0.006 * gain
    assert np.std(leaf) == pytest.approx(stddev, rel=4 * (2 * leaf.size) ** -0.5)
    assert np.abs(leaf).max() > 2.5 * stddev  # not truncated


def test_every_layer_and_matrix_is_a_draw_of_its_own():
  leaves = drawn()
  rows = {}
  for path, leaf in leaves.items():
    if path.removeprefix("segment_0/") in CONSTANT:
      continue
    stack = leaf if path.startswith("segment") else leaf[None]
    for i, one in enumerate(stack):
      one = one.reshape(-1)[:64]
      rows[f"{path}[{i}]"] = one / one.std()
  names, values = list(rows), np.stack(list(rows.values()))
  together = np.abs(values @ values.T / 64 - np.eye(len(names)))
  first, second = np.unravel_index(np.argmax(together), together.shape)
  assert together.max() < 0.7, (names[first], names[second])


def test_counts_are_those_of_the_arrays():
  sizes = {path: leaf.size for path, leaf in drawn().items()}
  counts = count_params(SPEC)
  assert counts.total == sum(sizes.values())
  experts = sum(n for path, n in sizes.items() if path.split("/")[-2:-1] == ["moe"])
  experts -= sizes["segment_0/layer_1/moe/router"]
  assert counts.active == counts.total - experts * 3 // 4


def test_logical_axes_are_known_and_stacks_begin_with_layers():
  boxed = abstract_params(SPEC)
  for path, names in jax.tree_util.tree_leaves_with_path(
    axes(boxed), is_leaf=lambda x: isinstance(x, tuple)
  ):
    assert set(names) - {None} <= set(LOGICAL_AXES), path
    assert (names[0] == "layers") == (path[0].key == "segment_0"), path
  shapes = jax.tree.map(lambda w: len(w.value.shape) == len(w.names), boxed, is_leaf=is_weight)
  assert all(jax.tree.leaves(shapes))
  assert all(jax.tree.leaves(trainable(boxed)))


@pytest.mark.xdist_group("devices")
def test_the_same_weights_on_eight_devices():
  plain = MlpSpec(F, "relu", gated=False)
  layer = LayerSpec(AttentionSpec(4, 8, 2), MoeSpec(4, plain))
  spec = replace(SPEC, segments=(Segment((layer,), 2),), embedding=EmbeddingSpec())
  model = TransformerLM(spec, unroll=1)
  boxed = abstract_params(spec)
  mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
  placed = shardings(axes(boxed), unbox(boxed), PRESETS["all"], mesh)
  draw = lambda key: init_params(model, key, TOKENS)
  one = quick_jit(draw)(jax.random.key(1))
  with use_mesh(mesh, "all"):
    eight = quick_jit(draw, out_shardings=placed)(jax.random.key(1))
  jax.tree.map(np.testing.assert_array_equal, one, eight)
  up = eight["segment_0"]["layer_0"]["moe"]["up"]
  assert up.addressable_shards[0].data.size == up.size // 8
