"""Prefill and decoding through the KV cache give what one pass over the whole row gives."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from layers.attention import Attention, Rows
from layers.cache import empty_cache, update_cache
from layers.kernels import decode_attention
from layers.kernels.decode_attention import pallas_tpu
from layers.kernels.decode_attention import xla as decode_xla
from layers.params import unbox
from layers.spec import AlibiSpec, AttentionSpec, RotarySpec
from layers.transformer import TransformerLM, init_caches
from tests.layers.stacks import POSITIONS, T, quick_jit, random_params, random_tokens

LENGTHS = np.array([5, 8], np.int32)  # of the prompts, both padded on the right to 8
MODEL = TransformerLM(POSITIONS, unroll=1)


@quick_jit
def whole(params, tokens):
  return MODEL.apply({"params": params}, tokens).logits_BTV


@quick_jit
def prefill(params, prompts, lengths):
  segments = (jnp.arange(prompts.shape[1])[None] < lengths[:, None]).astype(jnp.int32)
  return MODEL.apply(
    {"params": params},
    prompts,
    segments_BT=segments,
    caches=init_caches(POSITIONS, len(prompts), T),
    at_B=lengths - 1,
  )


@quick_jit
def decode(params, token, position, caches):
  return MODEL.apply({"params": params}, token, positions_BT=position, caches=caches)


def test_prefill_and_decode_equal_one_pass():
  """Rotary, ALiBi, learned, buckets, Transformer-XL; window, chunk, latents; experts, sinks."""
  params, tokens = random_params(POSITIONS), random_tokens(2, T)
  want = np.asarray(whole(params, tokens))
  # What stands behind a prompt must not matter: the cache keeps it until it is overwritten.
  prompts = np.where(np.arange(8)[None] < LENGTHS[:, None], tokens[:, :8], 7)
  out = prefill(params, prompts, LENGTHS)
  position = LENGTHS - 1
  rows = np.arange(2)
  np.testing.assert_allclose(out.logits_BTV[:, 0], want[rows, position], atol=2e-5)
  for _ in range(T - LENGTHS.max()):
    position = position + 1
    out = decode(params, tokens[rows, position][:, None], position[:, None], out.caches)
    np.testing.assert_allclose(out.logits_BTV[:, 0], want[rows, position], atol=2e-5)


def test_each_row_is_written_from_its_own_start_in_the_dtype_of_the_cache():
  cache = empty_cache(2, 6, (1, 3), (2, 5), jnp.bfloat16)
  key, value = jnp.ones((2, 2, 1, 3)), 2 * jnp.ones((2, 2, 2, 5))
  cache = update_cache(cache, key, value, jnp.array([0, 3]))
  assert cache.key_BSKH.dtype == cache.value_BSKH.dtype == jnp.bfloat16
  written = np.array([[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0]])
  expand = lambda x: np.broadcast_to(written[:, :, None, None], x.shape)
  np.testing.assert_array_equal(cache.key_BSKH, expand(cache.key_BSKH))
  np.testing.assert_array_equal(cache.value_BSKH, 2 * expand(cache.value_BSKH))


SPECS = {
  "window, sinks, cap": AttentionSpec(
    4, 8, 2, window=6, position=RotarySpec(), sink=True, softcap=2.0
  ),
  "alibi": AttentionSpec(4, 8, 1, position=AlibiSpec()),
  "a mask a head": AttentionSpec(
    4, 8, 2, position=RotarySpec(), mask="PerHead((Local(3), Full(), Dilated(2, 4), Global(3)))"
  ),
}
WIDTH, LENGTH, STEPS = 24, 32, (8, 3, 1, 1, 1)  # the last entries of a cache stay empty


@functools.cache
def by_whole_rows(name):
  """(weights, x, y) of one layer without a cache, by the reference."""
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.normal(size=(2, sum(STEPS) + 3, WIDTH)), jnp.float32)
  layer = Attention(replace(SPECS[name], implementation="reference"), WIDTH)
  positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  shapes = jax.eval_shape(layer.init, jax.random.key(0), x, Rows(positions))["params"]
  weights = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape), w.dtype), unbox(shapes))
  weights = jax.tree.map(lambda w: w * 0.3, weights)
  return weights, x, quick_jit(layer.apply)({"params": weights}, x, Rows(positions))[0]


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
@pytest.mark.parametrize("name", SPECS)
def test_steps_of_each_implementation_equal_whole_rows(name, implementation, monkeypatch):
  """A prompt, three tokens at once, then one by one; the second row is three positions ahead."""
  monkeypatch.setattr(decode_xla, "BLOCK", 8)
  if implementation == "pallas_tpu":
    call = functools.partial(pl.pallas_call, interpret=True)
    monkeypatch.setattr(pallas_tpu, "pl", SimpleNamespace(**vars(pl) | {"pallas_call": call}))
    monkeypatch.setattr(decode_attention, "current_platform", lambda: "tpu")
  weights, x, want = by_whole_rows(name)
  layer = Attention(replace(SPECS[name], implementation=implementation), WIDTH)
  step = quick_jit(lambda x, at, cache: layer.apply({"params": weights}, x, Rows(at), cache))
  cache = empty_cache(2, LENGTH, *SPECS[name].cached, jnp.float32)
  ahead, rows = jnp.array([[0], [3]]), jnp.arange(2)[:, None]
  # What is before the second row's first step.
  _, cache = step(x[:, :8], jnp.broadcast_to(jnp.arange(8), (2, 8)), cache)
  done = 0
  for count in STEPS:
    at = ahead + done + jnp.arange(count)[None]
    y, cache = step(x[rows, at], at, cache)
    np.testing.assert_allclose(y, want[rows, at], atol=1e-5)
    done += count
