"""Adapters: the model with them is the model of the sums, their gradients are the chain rule's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config import LoraConfig
from experiments.training.state import param_layout
from layers import lora
from layers.linear import LowRank, dense
from layers.params import axes
from layers.spec import (
  AttentionSpec,
  LatentAttentionSpec,
  LayerSpec,
  LinearAttentionSpec,
  MlpSpec,
  ModelSpec,
  MoeSpec,
  RotarySpec,
  Segment,
)
from layers.transformer import TransformerLM, init_caches

D, R, ALPHA = 16, 3, 6.0
HEADS = AttentionSpec(2, 8, position=RotarySpec())
MLP = MlpSpec(24)
ALL = ("query", "key", "value", "out", "up", "gate", "down")


def model_of(*layers: LayerSpec, **more) -> TransformerLM:
  spec = ModelSpec(
    vocab_size=31, embed_dim=D, max_length=16, segments=(Segment(layers, 2),)
  )  # fmt: skip
  return TransformerLM(spec, adapter_scale=ALPHA / R, **more)


def random_tree(model, targets, seed=0):
  """Parameters with adapters, none of them zero."""
  shapes = param_layout(model, adapters=LoraConfig(R, ALPHA, tuple(targets))).shapes
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape, np.float32)), shapes)


def test_the_product_by_hand():
  rng = np.random.default_rng(0)
  x, w, a, b = (rng.standard_normal(s) for s in ((5, 2, 3), (2, 3, 4, 2), (2, 3, R), (R, 4, 2)))
  found = dense(*jax.tree.map(jnp.float32, (x, LowRank(w, a, b))), num_in=2)
  want = np.einsum("mij,ijkl->mkl", x, w + np.einsum("ijr,rkl->ijkl", a, b))
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def test_shapes_and_axes():
  model = model_of(LayerSpec(HEADS, MLP))
  boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
  layer = lora.attach(boxed, R, ("query", "out", "down"))["segment_0"]["layer_0"]
  names = axes(layer)
  assert layer["attention"]["query_lora"]["a"].value.shape == (2, D, R)
  assert layer["attention"]["query_lora"]["b"].value.shape == (2, R, 2, 8)
  assert names["attention"]["query_lora"]["b"] == ("layers", None, "heads", "head_dim")
  assert names["attention"]["out_lora"] == {
    "a": ("layers", "heads", "head_dim", None), "b": ("layers", None, "embed"),
  }  # fmt: skip
  assert layer["mlp"]["down_lora"]["a"].value.shape == (2, 24, R)
  assert "up_lora" not in layer["mlp"]
  with pytest.raises(ValueError, match="added to 'query_proj': the model has down, gate, key, out"):
    lora.attach(boxed, R, ("query", "query_proj"))


def test_only_adapters_are_trained():
  layout = param_layout(model_of(LayerSpec(HEADS, MLP)), adapters=LoraConfig(R, ALPHA, ALL))
  trained, frozen = lora.split(layout.trainable)
  assert all(jax.tree.leaves(trained)) and not any(jax.tree.leaves(frozen))
  shapes = lora.split(layout.shapes)[0]
  # Each of 2 layers: r (inputs + outputs) of four matrices of 16 x 16 and three of 16 x 24.
  assert sum(x.size for x in jax.tree.leaves(shapes)) == 2 * R * (4 * (16 + 16) + 3 * (16 + 24))


def test_first_values():
  model = model_of(LayerSpec(HEADS, MLP))
  layout = param_layout(model, adapters=LoraConfig(R, ALPHA, ("query", "down")))
  drawn = lora.draw(lora.split(layout.shapes)[0], jax.random.key(0))["segment_0"]["layer_0"]
  for weight, fan_in in ((drawn["attention"]["query_lora"], 16), (drawn["mlp"]["down_lora"], 24)):
    assert not np.any(weight["b"])
    bound = fan_in**-0.5  # the authors' kaiming_uniform with a = sqrt(5)
    a = np.asarray(weight["a"])
    assert np.abs(a).max() <= bound
    assert a.std() == pytest.approx(bound / 3**0.5, rel=0.25) and not np.allclose(a[0], a[1])


LAYERS = {
  "attention": (LayerSpec(HEADS, MLP), ALL),
  "shared": (LayerSpec(HEADS, MoeSpec(num_experts=2, expert=MLP, shared=MLP)), ("up", "down")),
  "latent": (
    LayerSpec(
      LatentAttentionSpec(
        num_heads=2, q_lora=8, kv_lora=8, nope_dim=8, rope_dim=4, value_dim=8, position=RotarySpec()
      ),
      MLP,
    ),
    ("query", "query_down", "latent_down", "rotary_key", "out"),
  ),
  "linear": (
    LayerSpec(LinearAttentionSpec("retention", 2, 8), MLP), ("query", "key", "value", "out"),
  ),
}  # fmt: skip


@pytest.mark.parametrize(
  "name", [n if n == "attention" else pytest.param(n, marks=pytest.mark.full) for n in LAYERS]
)
def test_merged_is_unmerged(name):
  layer, targets = LAYERS[name]
  model = model_of(layer)
  params = random_tree(model, targets)
  tokens = np.arange(24, dtype=np.int32).reshape(2, 12) % 31
  run = jax.jit(lambda p: model.apply({"params": p}, tokens).logits_BTV)
  found = run(params)
  assert not np.allclose(found, run(lora.split(params)[1]), atol=1e-2)  # they do something
  merged = lora.merge(jax.tree.map(jnp.copy, params), ALPHA / R)
  assert jax.tree.structure(merged) == jax.tree.structure(lora.split(params)[1])
  np.testing.assert_allclose(run(merged), found, rtol=1e-5, atol=1e-5 * np.abs(found).max())


def test_merging_by_hand():
  params = random_tree(model_of(LayerSpec(HEADS, MLP)), ("out",))
  layer = params["segment_0"]["layer_0"]["attention"]
  w, a, b = (np.asarray(x, np.float64) for x in (layer["out"], *layer["out_lora"].values()))
  merged = lora.merge(params, ALPHA / R)["segment_0"]["layer_0"]["attention"]["out"]
  # W + (alpha / r) B A of the paper, whose B is what is multiplied last.
  np.testing.assert_allclose(merged, w + 2.0 * np.einsum("lnhr,lrd->lnhd", a, b), rtol=1e-5)


def test_gradients_by_hand():
  """y = x (w + a b), with c the gradient of y: dW = x^T c, dA = dW b^T, dB = a^T dW."""
  rng = np.random.default_rng(1)
  x, w, a, b, c = (rng.standard_normal(s) for s in ((5, 6), (6, 4), (6, R), (R, 4), (5, 4)))
  loss = lambda x, a, b: jnp.sum(jnp.float32(c) * dense(x, LowRank(jnp.float32(w), a, b)))
  found = jax.grad(loss, argnums=(0, 1, 2))(*map(jnp.float32, (x, a, b)))
  d_w = x.T @ c
  for got, want in zip(found, (c @ (w + a @ b).T, d_w @ b.T, a.T @ d_w), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_gradients_are_those_of_the_merged_weight():
  """dA = s dW B^T and dB = s A^T dW, with dW the gradient of the merged weight."""
  model = model_of(LayerSpec(HEADS, MLP))
  params = random_tree(model, ("query", "down"))
  tokens = np.arange(24, dtype=np.int32).reshape(2, 12) % 31
  loss = lambda p: model.apply({"params": p}, tokens[:, :-1], targets_BT=tokens[:, 1:]).loss.total
  trained, frozen = lora.split(params)
  found = jax.jit(jax.grad(lambda t: loss(lora.join(t, frozen))))(trained)
  whole = jax.jit(jax.grad(loss))(lora.merge(jax.tree.map(jnp.copy, params), 2.0))
  for branch, name in (("attention", "query"), ("mlp", "down")):
    of = lambda tree, *path: np.asarray(tree["segment_0"]["layer_0"][path[0]][path[1]], np.float64)
    adapter = params["segment_0"]["layer_0"][branch][f"{name}_lora"]
    a, b = (np.asarray(adapter[x], np.float64) for x in "ab")
    d_w = of(whole, branch, name).reshape(2, a.shape[1], -1)
    got = found["segment_0"]["layer_0"][branch][f"{name}_lora"]
    d_a = 2.0 * np.einsum("lkf,lrf->lkr", d_w, b.reshape(2, R, -1))
    d_b = 2.0 * np.einsum("lkr,lkf->lrf", a, d_w).reshape(b.shape)
    for x, y in ((got["a"], d_a), (got["b"], d_b)):
      np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(y).max())


@pytest.mark.full
def test_decoding_with_a_cache():
  model = model_of(LayerSpec(HEADS, MLP))
  params = random_tree(model, ALL)
  tokens = np.arange(8, dtype=np.int32)[None]
  whole = model.apply({"params": params}, tokens).logits_BTV
  caches = init_caches(model.spec, 1, 8)
  step = jax.jit(lambda t, at, c: model.apply({"params": params}, t, positions_BT=at, caches=c))
  for i in range(8):
    out = step(tokens[:, i : i + 1], jnp.full((1, 1), i, jnp.int32), caches)
    caches = out.caches
  np.testing.assert_allclose(out.logits_BTV[0, 0], whole[0, -1], rtol=1e-4, atol=1e-4)
