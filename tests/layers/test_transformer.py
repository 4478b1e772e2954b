"""Identities of the whole decoder: causality, packing, scan, recomputation, noise, statistics.

What it computes is in test_families; how weights start, in test_init.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from layers.attention import Rows
from layers.block import Block
from layers.count import abstract_params
from layers.embedding import Embedding
from layers.linear import dense
from layers.noise import fold
from layers.norms import Norm
from layers.params import axes, unbox
from layers.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, RotarySpec, Segment
from layers.stack import MINIMAL_NAMES, remat_policy
from layers.transformer import TransformerLM, init_caches, moe_layers
from mesh.constrain import use_mesh
from mesh.rules import PRESETS, shardings, spec_for
from mesh.topology import make_mesh
from tests.layers.stacks import POSITIONS, SWITCH, D, T, V, quick_jit, random_params, random_tokens
from tests.oracles import decoder

STACKS = {"positions": POSITIONS, "switch": SWITCH}
ONES = np.ones((2, T), np.int32)
STEPS = np.tile(np.arange(T, dtype=np.int32), (2, 1))


@functools.cache
def scored(name):
  """Jitted: params, tokens, targets, weights, positions, segments -> nll, d total / d table."""
  model = TransformerLM(STACKS[name], unroll=1)

  @quick_jit
  def run(params, tokens, targets, weights, positions, segments):
    def total(table):
      moved = params | {"embedding": params["embedding"] | {"table": table}}
      loss = model.apply(
        {"params": moved},
        tokens,
        targets_BT=targets,
        weights_BT=weights,
        positions_BT=positions,
        segments_BT=segments,
        train=True,
      ).loss
      return loss.total, loss.nll_BT

    return jax.grad(total, has_aux=True)(params["embedding"]["table"])[::-1]

  return run


@pytest.mark.parametrize("name", STACKS)
def test_causality(name):
  """No loss depends on a later token, and each does on every token up to its own."""
  params, run = random_params(STACKS[name]), scored(name)
  tokens = np.stack([np.random.default_rng(s).permutation(V)[:T] for s in (0, 1)]).astype(np.int32)
  targets = random_tokens(2, T)
  t = np.array([4, 9])
  only_t = (np.arange(T)[None] == t[:, None]).astype(np.float32)
  for row in (0, 1):
    weights = only_t * (np.arange(2) == row)[:, None]
    nll, grad = run(params, tokens, targets, weights, STEPS, ONES)
    moves = np.abs(np.asarray(grad))[tokens[row]].max(-1)
    assert np.all(moves[t[row] + 1 :] == 0)
    assert np.all(moves[: t[row] + 1] > 0)
  after = np.arange(T)[None] > t[:, None]
  other, _ = run(params, np.where(after, 3, tokens), targets, weights, STEPS, ONES)
  np.testing.assert_allclose(other[~after], nll[~after], atol=1e-6)
  assert np.all(np.abs(other - nll)[after] > 1e-6)


def test_packed_documents_are_alone_and_padding_is_nothing():
  params, run = random_params(POSITIONS), scored("positions")
  (first, second), targets = random_tokens(2, T), random_tokens(2, T, seed=2)
  a, b = 5, 7

  def rows(*lists):
    """Rows of (tokens, targets, weights, positions, segments) from lists of (row, length)."""
    out = [
      np.zeros((2, T), dtype) for dtype in (np.int32, np.int32, np.float32, np.int32, np.int32)
    ]
    for row, documents in enumerate(lists):
      at = 0
      for number, (which, length) in enumerate(documents, start=1):
        here = slice(at, at + length)
        values = (first, second)[which], targets[which], np.ones(T), np.arange(T), number * ONES[0]
        for array, value in zip(out, values, strict=True):
          array[row, here] = value[:length]
        at += length
    return out

  packed, packed_grad = run(params, *rows([(0, a), (1, b)], []))
  alone = rows([(0, a)], [(1, b)])
  nll, grad = run(params, *alone)
  np.testing.assert_allclose(packed[0, :a], nll[0, :a], atol=1e-5)
  np.testing.assert_allclose(packed[0, a:], nll[1, :b], atol=1e-5)
  np.testing.assert_allclose(packed_grad, grad, atol=1e-4)

  padding = alone[4] == 0
  absent = next(token for token in range(V) if token not in alone[0])
  alone[0] = np.where(padding, absent, alone[0])
  moved, moved_grad = run(params, *alone)
  np.testing.assert_allclose(moved[~padding], nll[~padding], atol=1e-6)
  assert np.all(np.asarray(moved_grad)[absent] == 0)


@functools.partial(quick_jit, static_argnums=0)
def one_block(layer, weights, x, rows):
  return Block(layer, D).apply({"params": weights}, x, rows, train=True)


def by_hand(spec, params, tokens, key_B):
  """The decoder as a loop over Block.apply, one layer at a time."""
  params, positions = jax.tree.map(jnp.asarray, params), jnp.asarray(STEPS)
  embedding = Embedding(spec.embedding, spec.vocab_size, D, spec.init)
  x = embedding.apply({"params": params["embedding"]}, tokens, positions, key_B=key_B)
  index, stats = 0, []
  for i, segment in enumerate(spec.segments):
    for repeat in range(segment.repeats):
      for j, layer in enumerate(segment.layers):
        weights = jax.tree.map(lambda w: w[repeat], params[f"segment_{i}"][f"layer_{j}"])  # noqa: B023
        x, layer_stats, _ = one_block(layer, weights, x, Rows(positions, key_B=fold(key_B, index)))
        stats.append(layer_stats)
        index += 1
  x = Norm(spec.final_norm, D).apply({"params": params["final_norm"]}, x)
  return dense(x, params["head"]), stats


def test_scan_is_a_loop_over_blocks_however_the_layers_are_grouped():
  """Values, noise and statistics; unrolled or not; one segment of repeats or several."""
  params, tokens = random_params(SWITCH), random_tokens(2, T)
  key_B = jax.random.split(jax.random.key(3), 2)
  want, want_stats = by_hand(SWITCH, params, tokens, key_B)

  (segment,) = SWITCH.segments
  take = lambda index: jax.tree.map(lambda w: w[index : index + 1], params["segment_0"])
  apart = replace(SWITCH, segments=(Segment(segment.layers),) * segment.repeats)
  apart_params = params | {"segment_0": take(0), "segment_1": take(1)}
  for model, weights in (
    (TransformerLM(SWITCH, unroll=1), params),
    (TransformerLM(SWITCH, unroll=2), params),
    (TransformerLM(apart), apart_params),
  ):
    run = quick_jit(functools.partial(model.apply, train=True))
    out = run({"params": weights}, tokens, key_B=key_B)
    np.testing.assert_allclose(out.logits_BTV, want, atol=1e-5)
    layers = moe_layers(model.spec)
    assert sorted(i for entry in layers for i in entry) == [1, 3]
    for entry, stats in zip(layers, out.stats, strict=True):
      for position, layer in enumerate(entry):
        here = jax.tree.map(lambda s: s[position], stats)  # noqa: B023
        jax.tree.map(
          functools.partial(np.testing.assert_allclose, atol=1e-5), here, want_stats[layer]
        )
    assert sum(float(stats.dropped.sum()) for stats in out.stats) > 0


def test_noise_follows_its_row_and_needs_a_key():
  run = quick_jit(functools.partial(TransformerLM(SWITCH, unroll=1).apply, train=True))
  params = {"params": random_params(SWITCH)}
  same = np.tile(random_tokens(1, T), (2, 1))
  keys = jax.random.split(jax.random.key(0), 2)
  noisy = np.asarray(run(params, same, key_B=keys).logits_BTV)
  assert np.abs(noisy[0] - noisy[1]).max() > 1e-2
  swapped = run(params, same, key_B=keys[::-1]).logits_BTV
  np.testing.assert_array_equal(swapped, noisy[::-1])
  quiet = np.asarray(run(params, same, key_B=None).logits_BTV)
  np.testing.assert_array_equal(quiet[0], quiet[1])
  np.testing.assert_array_equal(quiet, run(params, same, key_B=None).logits_BTV)
  assert np.abs(noisy - quiet).max() > 1e-2


def test_bfloat16_is_near_float64_and_reaches_every_weight_in_float32():
  """Without experts: where a token goes may hang on the last bit."""
  kinds = (POSITIONS.layers[i] for i in (0, 3, 5))  # rotary and sinks, Transformer-XL, latents
  layers = tuple(replace(layer, mlp=MlpSpec(24)) for layer in kinds)
  spec = replace(POSITIONS, segments=(Segment(layers, 2),))
  params, tokens, targets = random_params(spec), random_tokens(2, T), random_tokens(2, T, seed=2)
  model = TransformerLM(spec, jnp.bfloat16, unroll=1)

  @quick_jit
  def run(params):
    def total(params):
      loss = model.apply({"params": params}, tokens, targets_BT=targets).loss
      return loss.total, loss.nll_BT

    return jax.grad(total, has_aux=True)(params)

  grads, nll = run(params)
  want, _ = decoder.losses(decoder.logits(spec, params, tokens), targets)
  assert nll.dtype == jnp.float32
  assert np.abs(nll - want).max() < 0.2
  assert np.abs(nll - want).mean() < 0.05
  assert np.abs(nll - want).max() > 1e-5  # it did run in bfloat16
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    assert grad.dtype == jnp.float32, path
    assert np.all(np.isfinite(grad)), path
    assert np.any(grad != 0), path


REMAT = ("none", "full", "dots", "minimal", "offload")

# Attention, experts and an MLP in one layer.
_LAYER = SWITCH.segments[0].layers[1]
_LAYER = replace(_LAYER, mlp=replace(_LAYER.mlp, shared=MlpSpec(20)))
ONE = replace(SWITCH, segments=(Segment((_LAYER,), 2),))


def loss_with(remat, params, tokens, **more):
  model = TransformerLM(ONE, remat=remat, unroll=1, **more)
  out = model.apply({"params": params}, tokens, targets_BT=tokens, train=True)
  return out.loss.total / tokens.size + sum(stats.aux_loss.sum() for stats in out.stats)


def test_recomputation_changes_no_number():
  params, tokens = random_params(ONE), random_tokens(2, T)
  results = [
    quick_jit(jax.value_and_grad(functools.partial(loss_with, remat)))(params, tokens)
    for remat in REMAT
  ]
  equal = functools.partial(np.testing.assert_allclose, atol=1e-6)
  for other in results[1:]:
    jax.tree.map(equal, other, results[0])


@pytest.mark.xdist_group("devices")
def test_offload_over_devices_changes_no_bit():
  """Nor does it trouble the scan whose weights are gathered from eight devices."""
  layer = LayerSpec(AttentionSpec(4, 8, 2, position=RotarySpec()), MlpSpec(96))
  spec = ModelSpec(64, 48, (Segment((layer,), 3),), max_length=32)
  params, tokens = random_params(spec), random_tokens(8, 16)

  def loss(remat, params):
    model = TransformerLM(spec, unroll=1, remat=remat)
    return model.apply({"params": params}, tokens, targets_BT=tokens).loss.total

  with use_mesh(make_mesh({"fsdp": 8}, jax.devices()[:8]), PRESETS["all"]):
    kept, moved = (
      quick_jit(jax.value_and_grad(functools.partial(loss, remat)))(params)
      for remat in ("minimal", "offload")
    )
    text = str(jax.make_jaxpr(jax.grad(functools.partial(loss, "offload")))(params))
  jax.tree.map(np.testing.assert_array_equal, kept, moved)
  assert "Host" in text or "host" in text  # it is asked for, though a CPU has one memory


def test_recomputation_keeps_less():
  params, tokens = random_params(ONE), jnp.asarray(random_tokens(2, T))

  def kept(remat, **more):
    """How many numbers the forward pass leaves for the backward pass."""
    loss = functools.partial(loss_with, remat, tokens=tokens, **more)
    pull = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params)
    return sum(leaf.size for leaf in jax.tree.leaves(pull))

  some = ("query", "mlp_up")
  sizes = {remat: kept(remat) for remat in (*REMAT, some, "query")}
  assert sizes["full"] < sizes["query"] < sizes[some] < sizes["minimal"] < sizes["none"]
  assert sizes["full"] < sizes["dots"] < sizes["minimal"]
  # In bfloat16 products have gradients of their own, which hide them from JAX's own policies.
  half = lambda remat: kept(remat, dtype=jnp.bfloat16)
  assert half("full") < half(some) < half("dots") < half("minimal")


def test_layers_of_a_group_are_recomputed_one_by_one():
  """Each keeps its input, so that backward holds the tensors of one layer, not of a group."""
  tokens = jnp.asarray(random_tokens(2, T))

  def kept(group: int, repeats: int) -> int:
    spec = replace(SWITCH, segments=(Segment((_LAYER,) * group, repeats),))
    model = TransformerLM(spec, remat="full", unroll=1)
    loss = lambda p: model.apply({"params": p}, tokens, targets_BT=tokens).loss.total
    params = random_params(spec)
    pull = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params)
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    return size(pull) - size(params)

  an_input = tokens.size * SWITCH.embed_dim
  assert abs(kept(2, 2) - kept(1, 4)) < an_input / 2
  assert kept(1, 4) - kept(1, 2) == pytest.approx(2 * an_input, rel=0.1)


@pytest.mark.xdist_group("devices")
@pytest.mark.parametrize("remat", REMAT)
def test_whole_weights_are_not_kept(remat):
  """Where they are spread over devices, whatever else is: of 4 tokens, nothing is as large."""
  layer = LayerSpec(AttentionSpec(4, 8, 2, position=RotarySpec()), MlpSpec(96))
  spec = ModelSpec(64, 48, (Segment((layer,), 6),), max_length=32)
  model = TransformerLM(spec, unroll=1, dtype=jnp.bfloat16, remat=remat)
  tokens = jnp.zeros((8, 4), jnp.int32)
  loss = lambda params: model.apply({"params": params}, tokens, targets_BT=tokens).loss.total
  params = jax.eval_shape(lambda: random_params(spec))
  with use_mesh(make_mesh({"fsdp": 8}, jax.devices()[:8]), PRESETS["all"]):
    pull = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params)
  # Stacks of 6 layers on 8 devices.
  kept = [leaf.shape[1:] for leaf in jax.tree.leaves(pull) if leaf.shape[0] == 6 * 8]
  assert (1, 4, 48) in kept
  assert max(map(np.prod, kept)) < 48 * 16, kept


def test_minimal_repeats_no_product_with_weights():
  """What it does again: the two products inside a small attention, and sums over tokens."""
  params, tokens = random_params(ONE), jnp.asarray(random_tokens(2, T))
  is_jaxpr = lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")

  def with_weights(equation):
    if equation.primitive.name != "dot_general":
      return False
    (_, contracted), (_, batch) = equation.params["dimension_numbers"]
    attention = len(batch) == 2
    return not attention and equation.invars[1].aval.ndim > len(contracted) + len(batch)

  def products(jaxpr):
    total = sum(map(with_weights, jaxpr.eqns))
    for equation in jaxpr.eqns:
      for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
        if is_jaxpr(value):
          total += products(getattr(value, "jaxpr", value))
    return total

  count = lambda remat: products(
    jax.make_jaxpr(jax.grad(functools.partial(loss_with, remat)))(params, tokens).jaxpr
  )
  # q, k, v, out, router, three of experts and of the MLP; full saves what ends the layer, and no
  # gradient needs what the experts say.
  assert count("minimal") == count("none")
  assert count("full") == count("none") + 11 - 2


def test_an_unknown_policy_is_refused_with_the_known_ones():
  with pytest.raises(
    ValueError, match=r"'quer': use none, full, dots, minimal, offload, or names among.*query"
  ):
    remat_policy("quer")
  with pytest.raises(ValueError, match="'half'"):
    remat_policy(("query", "half"))
  assert remat_policy("none") is None
  assert callable(remat_policy(MINIMAL_NAMES))


@pytest.mark.xdist_group("devices")
@pytest.mark.parametrize(
  "explicit", [pytest.param(False, marks=pytest.mark.full), True], ids=["auto", "explicit"]
)
def test_eight_devices_compute_the_same(explicit):
  """Loss, gradients and a cached decoding step, also when shardings are part of types."""
  spec = replace(
    POSITIONS, segments=(Segment((*POSITIONS.segments[1].layers[1:], POSITIONS.layers[-1])),)
  )
  model, boxed = TransformerLM(spec, unroll=1), abstract_params(spec)
  params, tokens = random_params(spec), random_tokens(8, T)
  keys = jax.random.split(jax.random.key(0), 8)

  def train(params, tokens, key_B):
    out = model.apply({"params": params}, tokens, targets_BT=tokens, key_B=key_B, train=True)
    return out.loss.total / tokens.size

  def generate(params, tokens, at_B):
    out = model.apply({"params": params}, tokens, caches=init_caches(spec, 8, T), at_B=at_B - 1)
    next_token = jnp.argmax(out.logits_BTV, axis=-1)
    step = model.apply(
      {"params": params}, next_token, positions_BT=at_B[:, None], caches=out.caches
    )
    return out.logits_BTV, step.logits_BTV

  lengths = np.arange(1, 9, dtype=np.int32)
  programs = (
    (jax.value_and_grad(train), tokens, keys),
    (generate, tokens[:, :8], lengths),
  )
  mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2}, explicit=explicit)
  rules = PRESETS["all"]
  placed = jax.device_put(params, shardings(axes(boxed), unbox(boxed), rules, mesh))
  rows = NamedSharding(mesh, spec_for(("act_batch",), rules, mesh))
  for program, *inputs in programs:
    want = quick_jit(program)(params, *inputs)
    with use_mesh(mesh, rules):
      got = quick_jit(program)(placed, *jax.device_put(inputs, rows))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), got, want)
