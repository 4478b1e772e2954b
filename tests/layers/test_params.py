"""Declaring weights; each shell through Linen, a plain dict of arrays and NNX: one result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from layers.attention import Attention, Rows
from layers.block import Block
from layers.latent_attention import LatentAttention
from layers.moe import SwitchMoE
from layers.params import declare, is_weight, to_nnx, trainable, unbox
from layers.spec import (
  AttentionSpec,
  BucketedSpec,
  LatentAttentionSpec,
  LayerSpec,
  MlpSpec,
  MoeSpec,
)
from mesh.constrain import use_mesh
from mesh.topology import make_mesh
from tests.layers.stacks import quick_jit

D, T = 16, 8
X_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(2, T, D)), jnp.float32)
ROWS = Rows(jnp.tile(jnp.arange(T), (2, 1)))
HEADS = AttentionSpec(2, 8, position=BucketedSpec(6, 9, shared=False))
MOE = MoeSpec(4, MlpSpec(24))
SHELLS = {
  "attention": (Attention(HEADS, D), (X_BTD, ROWS)),
  "latent_attention": (LatentAttention(LatentAttentionSpec(2, 10, 6, 4, 5), D), (X_BTD, ROWS)),
  "moe": (SwitchMoE(MOE, D), (X_BTD,)),
  "block": (Block(LayerSpec(HEADS, MOE), D), (X_BTD, ROWS)),
}


def bridged(shell, *inputs):
  """`to_nnx`, its weights drawn under `quick_jit`."""
  make = lambda: to_nnx(shell, nnx.Rngs(params=0), *inputs)
  module = nnx.eval_shape(make)
  nnx.update(module, quick_jit(lambda: nnx.state(make()))())
  return module


@pytest.mark.parametrize("name", SHELLS)
def test_three_ways_of_driving(name):
  """Linen's boxed variables, a dict of arrays, and an NNX module that holds the same arrays."""
  shell, inputs = SHELLS[name]
  rng = np.random.default_rng(1)
  boxed = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 4, jnp.float32),
    jax.eval_shape(shell.init, jax.random.key(0), *inputs),
  )
  assert all(map(is_weight, jax.tree.leaves(boxed, is_leaf=is_weight)))
  linen = quick_jit(shell.apply)(boxed, *inputs)

  plain = unbox(boxed["params"])
  dictionary = quick_jit(shell.apply)({"params": plain}, *inputs)

  module = bridged(shell, *inputs)
  state = nnx.state(module, nnx.Param)
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  assert shapes(nnx.to_pure_dict(state)) == shapes(plain)
  nnx.replace_by_pure_dict(state, plain)
  nnx.update(module, state)
  in_nnx = nnx.jit(lambda module, *inputs: module(*inputs))(module, *inputs)

  equal = functools.partial(np.testing.assert_allclose, atol=1e-6)
  jax.tree.map(equal, dictionary, linen)
  jax.tree.map(equal, in_nnx, linen)


@pytest.mark.xdist_group("devices")
def test_nnx_under_a_mesh():
  """Logical axes are no mesh axes: plain `ToNNX` would look for a mesh axis named embed."""
  with use_mesh(make_mesh({"fsdp": 2, "expert": 4}), "all"):
    module = bridged(SHELLS["moe"][0], X_BTD)
  params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
  assert params.keys() == {"router", "up", "gate", "down"}
  assert np.std(params["up"]) == pytest.approx(D**-0.5, rel=0.1)


def test_axes_must_name_every_dim():
  class Wrong(nn.Module):
    @nn.compact
    def __call__(self):
      return declare(self, "w", (2, 3), ("embed",), nn.initializers.zeros)

  with pytest.raises(ValueError, match=r"w: shape \(2, 3\) has 2 dims, axes \('embed',\) name 1"):
    Wrong().init(jax.random.key(0))


def test_a_leaf_may_be_left_to_others_than_the_optimizer():
  class Shell(nn.Module):
    @nn.compact
    def __call__(self):
      zeros = nn.initializers.zeros
      declare(self, "bias", (3,), (None,), zeros, trainable=False)
      return declare(self, "w", (3,), (None,), zeros)

  boxed = Shell().init(jax.random.key(0))["params"]
  assert trainable(boxed) == {"bias": False, "w": True}
  assert jax.tree.map(jnp.shape, unbox(boxed)) == {"bias": (3,), "w": (3,)}
