"""Prefill and decoding through the KV cache give what one pass over the whole row gives."""

import jax.numpy as jnp
import numpy as np

from layers.cache import empty_cache, update_cache
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
