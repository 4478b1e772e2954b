"""Each shell through Linen, through a plain dict of arrays and through NNX: one result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import Attention, Rows
from layers.block import Block
from layers.params import to_nnx
from layers.latent_attention import LatentAttention
from layers.moe import SwitchMoE
from layers.params import init_params, unbox
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

D, T = 16, 8
X_BTD = np.random.default_rng(0).normal(size=(2, T, D)).astype(np.float32)
ROWS = Rows(jnp.tile(jnp.arange(T), (2, 1)))
HEADS = AttentionSpec(2, 8, position=BucketedSpec(6, 9, shared=False))
MOE = MoeSpec(4, MlpSpec(24))
SHELLS = {
  "attention": (Attention(HEADS, D), (ROWS,)),
  "latent_attention": (LatentAttention(LatentAttentionSpec(2, 10, 6, 4, 5), D), (ROWS,)),
  "moe": (SwitchMoE(MOE, D), ()),
  "block": (Block(LayerSpec(HEADS, MOE), D), (ROWS,)),
}


@pytest.mark.parametrize("name", SHELLS)
def test_three_ways_of_driving(name):
  shell, rest = SHELLS[name]
  x, key = jnp.asarray(X_BTD), jax.random.key(0)
  linen, variables = jax.jit(shell.init_with_output)(key, x, *rest)

  shapes = jax.eval_shape(functools.partial(init_params, shell), key, x, *rest)
  plain = jax.tree.map(lambda shape, leaf: leaf.reshape(shape.shape), shapes, unbox(variables))
  plain_out = jax.jit(shell.apply)({"params": plain}, x, *rest)

  module = nnx.eval_shape(lambda: to_nnx(shell, nnx.Rngs(params=0), x, *rest))
  state = nnx.state(module, nnx.Param)
  nnx.replace_by_pure_dict(state, plain)
  nnx.update(module, state)
  nnx_out = nnx.jit(lambda m, x: m(x, *rest))(module, x)

  equal = functools.partial(np.testing.assert_allclose, atol=1e-6)
  jax.tree.map(equal, plain_out, linen)
  jax.tree.map(equal, nnx_out, linen)


def test_nnx_parameters_are_drawn_plain():
  module = to_nnx(SHELLS["moe"][0], nnx.Rngs(params=0), jnp.asarray(X_BTD))
  params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
  assert jax.tree.map(jnp.shape, params) == {
    "router": (D, 4), "up": (4, D, 24), "gate": (4, D, 24), "down": (4, 24, D),
  }  # fmt: skip
  assert all(type(leaf) is type(X_BTD) or isinstance(leaf, jax.Array) for leaf in params.values())
  assert np.std(params["up"]) == pytest.approx(D**-0.5, rel=0.1)


@pytest.mark.xdist_group("devices")
def test_nnx_under_a_mesh():
  """Logical axes are no mesh axes: plain `ToNNX` would look for a mesh axis named embed."""
  shell, _ = SHELLS["moe"]
  with use_mesh(make_mesh({"fsdp": 2, "expert": 4}), "all"):
    module = nnx.eval_shape(lambda: to_nnx(shell, nnx.Rngs(params=0), jnp.asarray(X_BTD)))
  assert set(nnx.to_pure_dict(nnx.state(module, nnx.Param))) == {"router", "up", "gate", "down"}
