"""The optimizer on stacked weights against plain optax on each matrix alone, and numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.config import ConfigError, OptimizerConfig
from experiments.training import stacked
from experiments.training.optimizer import (
  global_norm,
  leaf_rules,
  make_optimizer,
  make_schedule,
  state_axes,
)
from tests.oracles import optimizers as oracle

# leaf: shape, logical axes, shape of one slice's matrix or vector, batch dims, muon's rule, decay
LEAVES = {
  "table": ((9, 128), ("vocab", "embed"), (9, 128), 0, "adamw", True),
  "head": ((128, 9), ("embed", "vocab"), (128, 9), 0, "adamw", True),
  "positions": ((5, 128), (None, "embed"), (5, 128), 0, "adamw", True),
  "q": ((2, 128, 2, 64), ("layers", "embed", "heads", "head_dim"), (128, 128), 1, "muon", True),
  "k": ((2, 128, 2, 32), ("layers", "embed", "kv_heads", "head_dim"), (128, 64), 1, "muon", True),
  "out": ((2, 2, 64, 128), ("layers", "heads", "head_dim", "embed"), (128, 128), 1, "muon", True),
  "k_bias": ((2, 2, 32), ("layers", "kv_heads", "head_dim"), (64,), 1, "adamw", False),
  "sink": ((2, 2), ("layers", "heads"), (2,), 1, "adamw", False),
  "norm": ((2, 128), ("layers", "norm"), (128,), 1, "adamw", False),
  "router": ((2, 128, 3), ("layers", "embed", None), (128, 3), 1, "adamw", True),
  "up": (
    (2, 2, 128, 130), ("layers", "expert", "expert_embed", "expert_mlp"), (128, 130), 2,
    "muon", True,
  ),
  "up_bias": ((2, 2, 130), ("layers", "expert", "expert_mlp"), (130,), 2, "adamw", False),
  "router_bias": ((2, 3), ("layers", "expert"), (3,), 1, "frozen", False),
}  # fmt: skip
FROZEN = "router_bias"
RULES = ("adamw", "adafactor", "lion", "muon", "sgd")


def nest(leaves):
  """The tree's real form: dicts and a tuple of segments."""
  top = {name: leaves[name] for name in ("table", "head", "positions")}
  return {**top, "segments": ({k: v for k, v in leaves.items() if k not in top},)}


def flat(tree):
  top = {name: leaf for name, leaf in tree.items() if name != "segments"}
  return {**top, **tree["segments"][0]}


AXES = nest({name: leaf[1] for name, leaf in LEAVES.items()})
TRAINABLE = nest({name: name != FROZEN for name in LEAVES})


def random_tree(seed, scale):
  generator = np.random.default_rng(seed)
  draw = lambda shape: scale * generator.standard_normal(shape, np.float32)
  return nest({name: draw(leaf[0]) for name, leaf in LEAVES.items()})


PARAMS = random_tree(0, 0.1)
# A frozen leaf's gradient is huge, so counting it in the norm could not go unseen.
GRADIENTS = [random_tree(seed, 0.01 * seed) for seed in (1, 2, 3)]
for _tree in GRADIENTS:
  _tree["segments"][0][FROZEN] *= 1e6


def unstack(tree):
  """One entry a matrix or vector of the trained leaves: {(name, i, j): array}."""
  slices = {}
  for name, array in flat(tree).items():
    if name == FROZEN:
      continue
    shape, batch = LEAVES[name][2], LEAVES[name][3]
    for index in np.ndindex(*array.shape[:batch]):
      slices[(name, *index)] = np.asarray(array[index]).reshape(shape)
  return {"/".join(map(str, key)): value for key, value in slices.items()}


@functools.cache
def compiled(config):
  """The optimizer's init and one step for the tree above."""
  optimizer = make_optimizer(config, make_schedule(config, 20), AXES, TRAINABLE)
  return jax.jit(optimizer.init), jax.jit(functools.partial(plain_step, optimizer))


def run(config, gradients=GRADIENTS):
  """Parameters after each gradient, and the last state."""
  init, step = compiled(config)
  params, state, history = PARAMS, init(PARAMS), []
  for gradient in gradients:
    params, state = step(params, state, gradient)
    history.append(params)
  return history, state


def plain_step(optimizer, params, state, gradient):
  updates, state = optimizer.update(gradient, state, params)
  return optax.apply_updates(params, updates), state


def plain_optax(config, schedule, names):
  """The same rule from optax's own aliases, over a dict of separate matrices and vectors."""
  decay = {name: LEAVES[name.split("/")[0]][5] for name in names}
  muon = {name: LEAVES[name.split("/")[0]][4] == "muon" for name in names}
  adamw = lambda rate, mask: optax.adamw(
    rate, config.beta1, config.beta2, config.eps, weight_decay=config.weight_decay, mask=mask
  )
  if config.name == "adamw":
    return adamw(schedule, decay)
  if config.name == "lion":
    return optax.lion(
      schedule, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=decay
    )
  if config.name == "adafactor":
    decay_rate = lambda step: config.weight_decay * schedule(step)
    return optax.adafactor(schedule, weight_decay_rate=decay_rate, weight_decay_mask=decay)
  if config.name == "sgd":
    return optax.chain(
      optax.add_decayed_weights(0.0),
      optax.trace(config.momentum, nesterov=True),
      optax.add_decayed_weights(config.weight_decay, decay),
      optax.scale_by_learning_rate(schedule),
    )
  ratio = config.adam_learning_rate / config.learning_rate
  parts = {
    True: optax.contrib.muon(
      schedule, beta=config.momentum, eps=config.eps, weight_decay=config.weight_decay,
      consistent_rms=0.2,
    ),
    False: adamw(lambda step: ratio * schedule(step), lambda p: {k: decay[k] for k in p}),
  }  # fmt: skip
  return optax.partition(parts, muon)


@pytest.mark.parametrize("name", RULES)
def test_leaf_rules(name):
  rules = flat(leaf_rules(OptimizerConfig(name=name), AXES, TRAINABLE))
  for leaf, (shape, _, slice_shape, batch, muon_rule, decay) in LEAVES.items():
    expected = muon_rule if name == "muon" or leaf == FROZEN else name
    assert (rules[leaf].rule, rules[leaf].decay) == (expected, decay), leaf
    assert str(rules[leaf]) == expected + (" + decay" if decay else "")
    assert rules[leaf].slices.flatten(np.zeros(shape)).shape == shape[:batch] + slice_shape
  rules = leaf_rules(OptimizerConfig(name=name, weight_decay=0.0), AXES, TRAINABLE)
  assert not any(leaf.decay for leaf in jax.tree.leaves(rules))


def config_of(name):
  return OptimizerConfig(
    name=name, learning_rate=1e-2, warmup_steps=2, clip_norm=0.5, adam_learning_rate=4e-3,
    momentum=0.9,
  )  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_stacked_equals_each_matrix_alone(name):
  config = config_of(name)
  ours, _ = run(config)
  params = unstack(PARAMS)
  optimizer = plain_optax(config, make_schedule(config, 20), tuple(params))
  optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
  step = jax.jit(functools.partial(plain_step, optimizer))
  state = optimizer.init(params)
  for number, gradient in enumerate(GRADIENTS):
    previous = params
    params, state = step(params, state, unstack(gradient))
    for key, value in unstack(ours[number]).items():
      assert np.abs(params[key] - previous[key]).max() > 1e-6, f"{key} did not move"
      np.testing.assert_allclose(value, params[key], rtol=0, atol=2e-6, err_msg=f"{number} {key}")


def test_adamw_against_numpy():
  config = OptimizerConfig(
    learning_rate=3e-2, warmup_steps=1, schedule="linear", clip_norm=None, beta2=0.99, eps=1e-6
  )
  ours, _ = run(config)
  schedule = {"peak": 3e-2, "warmup": 1, "end": 20, "final": 0.1, "stable": 0.8}
  rates = [oracle.learning_rate("linear", step, **schedule) for step in range(3)]
  gradients = [flat(tree) for tree in GRADIENTS]
  for name, leaf in LEAVES.items():
    if name == FROZEN:
      continue
    expected = oracle.adamw(
      flat(PARAMS)[name], [tree[name] for tree in gradients],
      rates=rates, beta1=0.9, beta2=0.99, eps=1e-6, decay=0.1 if leaf[5] else 0.0,
    )  # fmt: skip
    for step, params in enumerate(ours):
      np.testing.assert_allclose(flat(params)[name], expected[step], rtol=2e-6, atol=2e-7)


def test_first_moments_in_bfloat16_against_numpy():
  config = OptimizerConfig(
    learning_rate=3e-2, warmup_steps=1, schedule="linear", clip_norm=None, beta2=0.99, eps=1e-6,
    moment_dtype="bfloat16",
  )  # fmt: skip
  ours, _ = run(config)
  schedule = {"peak": 3e-2, "warmup": 1, "end": 20, "final": 0.1, "stable": 0.8}
  rates = [oracle.learning_rate("linear", step, **schedule) for step in range(3)]
  for name in ("up", "table", "q"):
    rounded, exact = (
      oracle.adamw(
        flat(PARAMS)[name], [flat(tree)[name] for tree in GRADIENTS],
        rates=rates, beta1=0.9, beta2=0.99, eps=1e-6, decay=0.1, keep=keep,
      )
      for keep in (oracle.to_bfloat16, lambda m: m)
    )  # fmt: skip
    for step, params in enumerate(ours):
      off = np.abs(flat(params)[name] - rounded[step])
      # Now and then float32 and float64 sums round to either side of a tie.
      assert np.mean(off > 2e-6) < 1e-3 and off.max() < 3e-4, (name, step)
      if step:  # the first step knows its moment exactly; later ones must tell the two apart
        assert np.mean(np.abs(exact[step] - rounded[step]) > 2e-6) > 0.5


@pytest.mark.parametrize("name", ("adamw", "lion", "muon", "sgd"))
def test_only_first_moments_are_narrow(name):
  config = dataclasses.replace(config_of(name), moment_dtype="bfloat16")
  make = lambda config: make_optimizer(config, make_schedule(config, 20), AXES, TRAINABLE)
  state = jax.eval_shape(make(config).init, PARAMS)
  parameters = sum(np.prod(leaf[0]) for key, leaf in LEAVES.items() if key != FROZEN)
  size = lambda dtype: sum(
    leaf.size for leaf in jax.tree.leaves(state) if leaf.dtype == dtype and leaf.ndim
  )
  assert size(jnp.bfloat16) == parameters
  of_adamw = [leaf[0] for key, leaf in LEAVES.items() if key != FROZEN and leaf[4] == "adamw"]
  second = {"adamw": parameters, "muon": sum(map(np.prod, of_adamw))}
  assert size(jnp.float32) == second.get(name, 0)
  # Two steps of a rule are near those in float32, and a step keeps the types of the state.
  (_, narrow), (_, wide) = (run(c, GRADIENTS[:2])[0] for c in (config, config_of(name)))
  off = jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), narrow, wide))
  assert 0 < max(off) < 0.02
  assert jax.tree.map(lambda x: x.dtype, run(config, GRADIENTS[:1])[1]) == (
    jax.tree.map(lambda x: x.dtype, state)
  )


@pytest.mark.parametrize("name", RULES)
def test_a_leaf_that_is_not_trained_is_left_alone(name):
  ours, state = run(config_of(name))
  assert np.asarray(flat(ours[-1])[FROZEN]).tobytes() == flat(PARAMS)[FROZEN].tobytes()
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
  assert not [path for path in paths if FROZEN in path]
  assert [path for path in paths if "norm" in path]


@pytest.mark.parametrize("clip_norm", (None, 0.01, 1e3))
def test_clip_is_by_the_norm_of_all_trained_leaves(clip_norm):
  config = OptimizerConfig(
    name="sgd", momentum=0.0, weight_decay=0.0, learning_rate=1.0, warmup_steps=0,
    schedule="constant", clip_norm=clip_norm,
  )  # fmt: skip
  axes = {"a": ("norm",), "b": ("layers", "mlp"), "c": ("expert",)}
  trainable = {"a": True, "b": True, "c": False}
  params = {"a": np.ones(3, np.float32), "b": np.ones((2, 4), np.float32), "c": np.ones(2)}
  gradients = {
    "a": jnp.full(3, 0.3, jnp.bfloat16), "b": jnp.full((2, 4), -2.3, jnp.bfloat16),
    "c": jnp.full(2, 1e6, jnp.bfloat16),
  }  # fmt: skip
  exact = {name: np.float64(gradients[name]) for name in "ab"}
  norm = np.sqrt(sum(np.square(g).sum() for g in exact.values()))
  np.testing.assert_allclose(global_norm(gradients, trainable), norm, rtol=1e-6)
  factor = 1.0 if clip_norm is None else min(1.0, clip_norm / norm)
  optimizer = make_optimizer(config, make_schedule(config, 20), axes, trainable)
  updates, _ = optimizer.update(gradients, optimizer.init(params), params)
  for name, gradient in exact.items():
    np.testing.assert_allclose(updates[name], -factor * gradient, rtol=1e-6)
  assert not np.any(updates["c"])


def test_second_moments_of_bfloat16_gradients_are_float32():
  config = OptimizerConfig(clip_norm=None, warmup_steps=0)
  optimizer = make_optimizer(config, make_schedule(config, 20), {"a": ("norm",)}, {"a": True})
  gradient = {"a": jnp.asarray([0.3, -1.1, 7.7], jnp.bfloat16)}
  params = {"a": np.ones(3, np.float32)}
  _, state = optimizer.update(gradient, optimizer.init(params), params)
  squares = [x for x in jax.tree.leaves(state) if x.shape == (3,)][-1]
  np.testing.assert_allclose(squares, 0.05 * np.square(np.float64(gradient["a"])), rtol=1e-6)


def test_gradients_that_are_not_finite_are_not_hidden():
  gradients = jax.tree.map(np.copy, GRADIENTS[0])
  gradients["table"][0, 0] = np.nan
  ours, _ = run(config_of("adamw"), gradients=[gradients])
  assert np.isnan(flat(ours[0])["norm"]).all()


@pytest.mark.parametrize("shape", ((2, 3, 12, 20), (2, 20, 12), (16, 16)))
def test_muon_orthogonalises(shape):
  x = np.random.default_rng(1).standard_normal(shape, np.float32)
  y = np.asarray(jax.jit(functools.partial(stacked.orthogonalize, eps=1e-8))(x))
  s = np.linalg.svd(y, compute_uv=False)
  assert s.min() > 0.3 and s.max() < 1.3, s
  assert s.mean() == pytest.approx(0.95, abs=0.15)
  # The same singular vectors: the polar factor of x lies within the spread of y's values.
  ux, _, vx = np.linalg.svd(np.float64(x), full_matrices=False)
  assert np.einsum("...ij,...ij->...", ux @ vx, y).min() > 0.8 * min(shape[-2:])


def test_a_muon_update_has_the_size_of_an_adamw_update():
  gradient = {"w": np.random.default_rng(2).standard_normal((2, 32, 96), np.float32)}
  muon = stacked.scale_by_muon({"w": stacked.split(("layers", "embed", "mlp"))}, beta=0.9, eps=1e-8)
  update, _ = muon.update(gradient, muon.init(gradient))
  singular = np.linalg.svd(np.asarray(update["w"]), compute_uv=False) / (0.2 * 96**0.5)
  assert singular.min() > 0.6 and singular.max() < 1.3
  assert np.sqrt(np.mean(np.square(update["w"][1]))) == pytest.approx(0.2, rel=0.3)


def test_muon_keeps_experts_where_they_are():
  mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))
  place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
  leaf = {"w": jax.ShapeDtypeStruct((2, 8, 4, 6), jnp.float32, sharding=place(None, "expert"))}
  slices = {"w": stacked.split(("layers", "expert", "expert_embed", "expert_mlp"))}
  muon = stacked.scale_by_muon(slices, beta=0.9, eps=1e-8)
  state = stacked.MuonState(jax.ShapeDtypeStruct((), jnp.int32, sharding=place()), leaf)
  text = jax.jit(muon.update).lower(leaf, state).compile().as_text()
  assert "num_partitions=8" in text
  assert not [op for op in ("all-gather", "all-reduce", "all-to-all", "permute(") if op in text]


@pytest.mark.parametrize("name", RULES)
def test_state_axes_name_every_dim(name):
  config = OptimizerConfig(name=name)
  optimizer = make_optimizer(config, make_schedule(config, 1000), AXES, TRAINABLE)
  state = jax.eval_shape(optimizer.init, PARAMS)
  found = {}

  def check(leaf, axes):
    assert len(axes) == leaf.ndim
    assert all(size > 1 for size, axis in zip(leaf.shape, axes, strict=True) if axis is not None)
    found[axes] = found.get(axes, 0) + 1

  jax.tree.map(check, state, state_axes(state, AXES))
  expert = ("layers", "expert", "expert_embed", "expert_mlp")
  moments = {"adamw": 2, "lion": 1, "sgd": 1, "muon": 1, "adafactor": 0}[name]
  assert found.get(expert, 0) == moments
  if name == "adafactor":
    assert found[("layers", "embed", "kv_heads")] == 1  # too small to factor: kept whole
    assert found[("layers", "expert", None)] > 2


@pytest.mark.parametrize("kind", ("cosine", "linear", "wsd", "inverse_sqrt", "constant"))
@pytest.mark.parametrize("warmup", (0, 10))
@pytest.mark.parametrize("decay_steps", (None, 50))
def test_schedules_against_closed_forms(kind, warmup, decay_steps):
  config = OptimizerConfig(
    schedule=kind, warmup_steps=warmup, decay_steps=decay_steps, learning_rate=0.02,
    final_fraction=0.25, stable_fraction=0.6,
  )  # fmt: skip
  steps = np.array([0, 1, 5, 9, 10, 11, 30, 34, 35, 49, 50, 63, 64, 65, 99, 100, 150])
  ours = np.asarray(make_schedule(config, 100)(jnp.asarray(steps))) * np.ones(steps.shape)
  end = decay_steps or 100
  expected = [
    oracle.learning_rate(kind, int(step), peak=0.02, warmup=warmup, end=end, final=0.25, stable=0.6)
    for step in steps
  ]
  np.testing.assert_allclose(ours, expected, rtol=2e-6)
  assert ours[0] > 0


def test_wsd_decays_even_when_all_is_stable():
  config = OptimizerConfig(schedule="wsd", warmup_steps=0, stable_fraction=1.0)
  schedule = make_schedule(config, 10)
  assert float(schedule(9)) == pytest.approx(3e-4)
  assert float(schedule(10)) == pytest.approx(3e-5)


@pytest.mark.parametrize(
  ("changes", "field"),
  (
    ({"warmup_steps": 100}, "train.steps=100"),
    ({"warmup_steps": 50, "decay_steps": 50}, "optimizer.decay_steps=50"),
    ({"warmup_steps": -1}, "optimizer.warmup_steps"),
    ({"learning_rate": 0.0}, "optimizer.learning_rate"),
    ({"final_fraction": 1.5}, "optimizer.final_fraction"),
    ({"stable_fraction": -0.1}, "optimizer.stable_fraction"),
  ),
)
def test_impossible_schedules_are_refused(changes, field):
  config = dataclasses.replace(OptimizerConfig(warmup_steps=10), **changes)
  with pytest.raises(ConfigError, match=field):
    make_schedule(config, 100)


def test_warmup_as_a_share_of_the_steps():
  """Alpaca's: 3 % of 1,219 steps are 36.57, of which `transformers` makes 37."""
  config = OptimizerConfig(warmup_fraction=0.03, warmup_steps=7, learning_rate=2e-5)
  plain = dataclasses.replace(config, warmup_fraction=None, warmup_steps=37)
  steps = jnp.arange(0, 1219, 6)
  np.testing.assert_array_equal(
    make_schedule(config, 1219)(steps), make_schedule(plain, 1219)(steps)
  )
  assert float(make_schedule(config, 1219)(37)) == pytest.approx(2e-5)
  few = make_schedule(dataclasses.replace(config, warmup_fraction=0.9), 2)  # one is left to fall
  assert float(few(0)) == pytest.approx(1e-5) and float(few(1)) == pytest.approx(2e-5)
  for wrong in (1.0, -0.1):
    with pytest.raises(ConfigError, match="warmup_fraction"):
      make_schedule(dataclasses.replace(config, warmup_fraction=wrong), 100)


@pytest.mark.parametrize(
  "changes",
  ({"beta1": 1.0}, {"beta2": -0.1}, {"momentum": 1.0}, {"eps": 0.0}, {"clip_norm": 0.0},
   {"weight_decay": -0.1}, {"adam_learning_rate": 0.0},
   {"moment_dtype": "bfloat16", "name": "adafactor"}),
)  # fmt: skip
def test_impossible_coefficients_are_refused(changes):
  config = dataclasses.replace(OptimizerConfig(), **changes)
  with pytest.raises(ConfigError, match=f"optimizer.{next(iter(changes))}"):
    make_optimizer(config, optax.constant_schedule(1.0), AXES, TRAINABLE)
