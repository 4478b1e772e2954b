"""Prefill and decoding through the KV cache give what one pass over the whole row gives."""

import contextlib
import functools
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from layers import cache as cache_module
from layers.attention import Attention, Rows, layer_mask
from layers.cache import KVCache, empty_cache, num_slots, roll_cache, slot_positions, update_cache
from layers.kernels import decode_attention
from layers.kernels.attention.blocks import reach_of
from layers.kernels.decode_attention import pallas_tpu
from layers.kernels.decode_attention import xla as decode_xla
from layers.params import unbox
from layers.spec import (
  AlibiSpec,
  AttentionSpec,
  LatentAttentionSpec,
  LayerSpec,
  MlpSpec,
  ModelSpec,
  RotarySpec,
  Segment,
)
from layers.transformer import TransformerLM, init_caches
from mesh.constrain import use_mesh
from mesh.topology import describe_devices, make_mesh
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


@pytest.mark.xdist_group("devices")
@pytest.mark.parametrize("mesh", [None, {"data": 2, "tensor": 2, "context": 2}, {"tensor": 8}])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_layer_of_a_stack_is_written_at_each_rows_place(platform, mesh, monkeypatch):
  """Rows and heads over devices, and heads that do not divide; on a TPU row by row."""
  monkeypatch.setattr(cache_module, "current_platform", lambda: platform)
  rng = np.random.default_rng(0)
  L, B, S, K, H, T, start = 3, 4, 12, 2, 8, 2, np.array([0, 3, 10, 7], np.int32)
  stacks = rng.normal(size=(2, L, B, S, K, H)).astype(np.float32)
  new = rng.normal(size=(2, B, T, K, H)).astype(np.float32)
  wanted = stacks.copy()
  for b in range(B):
    wanted[:, 1, b, start[b] : start[b] + T] = new[:, b]
  write = quick_jit(
    lambda stacks, new, start, layer: update_cache(KVCache(*stacks, layer), *new, start)[:2]
  )
  with use_mesh(make_mesh(mesh), "all") if mesh else contextlib.nullcontext():
    found = write(stacks, new, start, jnp.array(1))
  np.testing.assert_array_equal(np.stack(found), wanted)


SPECS = {
  "window, sinks, cap": AttentionSpec(
    4, 8, 2, window=6, position=RotarySpec(), sink=True, softcap=2.0
  ),
  "alibi": AttentionSpec(4, 8, 1, position=AlibiSpec()),
  "a mask a head": AttentionSpec(
    4, 8, 2, position=RotarySpec(), mask="PerHead((Local(3), Full(), Dilated(2, 4), Global(3)))"
  ),
  "a mask a head, all near": AttentionSpec(
    4, 8, 2, position=AlibiSpec(), mask="PerHead((Local(3), Local(1), Dilated(2, 2), Local(5)))"
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


def test_slots_hold_the_newest_positions():
  """Simulated: each position in turn, round and round."""
  held = np.full(5, -1)
  for last in range(-1, 13):
    if last >= 0:
      held[last % 5] = last
    np.testing.assert_array_equal(slot_positions(jnp.array([last]), 5)[0], held)


@pytest.mark.parametrize(
  ("starts", "counts"), [((0, 0), (8, 3)), ((4, 9), (2, 7)), ((3, 6), (0, 8))]
)
def test_new_positions_go_round(starts, counts):
  """As many writes of one position each; what comes after a row's count is not written."""
  rng = np.random.default_rng(0)
  key, value = (jnp.asarray(rng.normal(size=(2, 8, 1, n)), jnp.float32) for n in (3, 5))
  cache = empty_cache(2, 5, (1, 3), (1, 5), jnp.float32)
  want = np.zeros((2, 5, 1, 3)), np.zeros((2, 5, 1, 5))
  for b, (start, count) in enumerate(zip(starts, counts, strict=True)):
    for t in range(count):
      for kept, new in zip(want, (key, value), strict=True):
        kept[b, (start + t) % 5] = new[b, t]
  got = roll_cache(cache, key, value, jnp.array(starts), jnp.array(counts))
  for a, b in zip(got[:2], want, strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_cache_keeps_what_masks_can_see():
  assert [num_slots(64, before) for before in (None, 0, 15, 63, 500)] == [64, 1, 16, 64, 64]
  shapes = jax.eval_shape(lambda: init_caches(POSITIONS, 3, 64))
  caches = [cache for segment in shapes for cache in segment]
  kept = {cache.key_BSKH.shape[2] for cache in caches if isinstance(cache, KVCache)}
  windows = {a.window or a.chunk for a in (layer.attention for layer in POSITIONS.layers)
             if isinstance(a, AttentionSpec)}  # fmt: skip
  assert kept == {n or 64 for n in windows} and len(kept) > 1
  with pytest.raises(ValueError, match="7 new positions do not fit a cache of 6"):
    new = jnp.zeros((1, 7, 1, 3))
    update_cache(empty_cache(1, 6, (1, 3), (1, 3), jnp.float32), new, new, jnp.array([0]))


@pytest.mark.parametrize("steps", [(8, 3, 1, 1, 1), (3, 1, 7, 2, 1), (1,) * 14], ids=str)
@pytest.mark.parametrize("name", ["window, sinks, cap", "a mask a head, all near"])
def test_a_cache_that_goes_round_gives_whole_rows(name, steps):
  """Rows at different places; a prompt's padding is not written over what is still seen."""
  spec = SPECS[name]
  weights, x, want = by_whole_rows(name)
  layer = Attention(spec, WIDTH)
  step = quick_jit(
    lambda x, at, segments, cache: layer.apply({"params": weights}, x, Rows(at, segments), cache)
  )
  before, _ = reach_of(layer_mask(spec))
  cache = empty_cache(2, num_slots(LENGTH, before), *spec.cached, jnp.float32)
  assert cache.key_BSKH.shape[1] < sum(steps)
  rows, done = jnp.arange(2)[:, None], np.array([[0], [0]])
  padded, valid = done + np.arange(8)[None], np.arange(8)[None] < np.array([[5], [8]])
  _, cache = step(x[rows, padded], jnp.asarray(padded), jnp.asarray(valid, jnp.int32), cache)
  done = np.array([[5], [8]])
  for count in steps:
    at = np.minimum(done + np.arange(count)[None], x.shape[1] - 1)
    valid = done + np.arange(count)[None] < x.shape[1]
    y, cache = step(x[rows, at], jnp.asarray(at), jnp.asarray(valid, jnp.int32), cache)
    np.testing.assert_allclose(y[valid], want[rows, at][valid], atol=1e-5)
    done = done + count
    if done.max() >= x.shape[1]:
      break


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
@pytest.mark.parametrize("name", SPECS)
def test_steps_of_each_implementation_equal_whole_rows(name, implementation, monkeypatch):
  """A prompt, three tokens at once, then one by one; the second row is three positions ahead."""
  monkeypatch.setattr(decode_xla, "BLOCK", 8)
  if implementation == "pallas_tpu":
    call = functools.partial(pl.pallas_call, interpret=True)
    monkeypatch.setattr(pallas_tpu, "pl", SimpleNamespace(**vars(pl) | {"pallas_call": call}))
    for module in (decode_attention, cache_module):
      monkeypatch.setattr(module, "current_platform", lambda: "tpu")
  weights, x, want = by_whole_rows(name)
  layer = Attention(replace(SPECS[name], implementation=implementation), WIDTH)
  step = quick_jit(lambda x, at, cache: layer.apply({"params": weights}, x, Rows(at), cache))
  # One of three layers; the others hold nothing that may be read.
  one = empty_cache(2, LENGTH, *SPECS[name].cached, jnp.float32)
  key, value = (jnp.full((3, *x.shape), jnp.nan).at[1].set(x) for x in one[:2])
  cache = KVCache(key, value, jnp.array(1))
  ahead, rows = jnp.array([[0], [3]]), jnp.arange(2)[:, None]
  # What is before the second row's first step.
  _, cache = step(x[:, :8], jnp.broadcast_to(jnp.arange(8), (2, 8)), cache)
  done = 0
  for count in STEPS:
    at = ahead + done + jnp.arange(count)[None]
    y, cache = step(x[rows, at], at, cache)
    np.testing.assert_allclose(y, want[rows, at], atol=1e-5)
    done += count


FULL = AttentionSpec(8, 128, 8, position=RotarySpec())
DRAWN = {
  # A window whose cache goes round, and a layer that sees everything.
  "softmax": (replace(FULL, window=3072), FULL),
  "small heads": (AttentionSpec(8, 64, 8, position=RotarySpec()),),
  "latent": (LatentAttentionSpec(8, kv_lora=512, nope_dim=32, rope_dim=64, value_dim=32),),
}


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize("platform", ["cpu", "v5e:2x2"])
def test_no_cache_is_copied_while_tokens_are_drawn(platform, kind):
  """Of the compiled program: each layer reads its part of the stack and writes one position.

  On a TPU by its kernel.
  """
  dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16  # which CPUs compute in float32
  layers = tuple(LayerSpec(a, MlpSpec(hidden=32)) for a in DRAWN[kind])
  spec = ModelSpec(vocab_size=64, embed_dim=32, max_length=4096, segments=(Segment(layers, 3),))
  model, rows = TransformerLM(spec, unroll=1, dtype=dtype), 2

  def draw(params, caches, token_B, position_B):
    def one(state, _):
      caches, token_B, position_B = state
      out = model.apply(
        {"params": params}, token_B[:, None], positions_BT=position_B[:, None], caches=caches
      )
      token_B = jnp.argmax(out.logits_BTV[:, 0], -1).astype(jnp.int32)
      return (out.caches, token_B, position_B + 1), token_B

    return jax.lax.scan(one, (caches, token_B, position_B), length=4)

  make = lambda: random_params(spec)
  caches = jax.eval_shape(lambda: init_caches(spec, rows, 4096, dtype))
  number = jax.ShapeDtypeStruct((rows,), jnp.int32)
  arguments = (jax.eval_shape(make), caches, number, number)
  device = jax.devices()[0] if platform == "cpu" else describe_devices(platform)[0]
  mesh = jax.sharding.Mesh(np.array([device]), ("d",))
  one = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one)
  cached = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)  # nothing here reads a TPU's back
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    program = jax.jit(draw, donate_argnums=1).lower(*jax.tree.map(place, arguments)).compile()
  jax.config.update("jax_enable_compilation_cache", cached)
  if platform != "cpu":
    assert "decode_attention" in program.as_text()
  memory = program.memory_analysis()
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches))
  # A layer's keys in the window, or all of its latents.
  numbers = {
    "softmax": 3072 * 8 * 128, "small heads": 4096 * 8 * 64, "latent": 4096 * (512 + 64)
  }[kind]  # fmt: skip
  smallest = rows * numbers * jnp.dtype(dtype).itemsize
  assert memory.alias_size_in_bytes >= size
  assert memory.temp_size_in_bytes < smallest
