import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from layers.mlp import Mlp, activate, gated_activation, mlp
from layers.params import axes, init_params
from layers.spec import InitSpec, MlpSpec
from tests.oracles import mlp as oracle
from tests.oracles.numeric import numeric_gradient

D, F = 4, 6
NAMES = tuple(oracle.ACTIVATIONS)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, D))
WEIGHTS = {
  "up": RNG.normal(size=(D, F)),
  "down": RNG.normal(size=(F, D)),
  "gate": RNG.normal(size=(D, F)),
  "up_bias": RNG.normal(size=F),
  "gate_bias": RNG.normal(size=F),
  "down_bias": RNG.normal(size=D),
}
PLAIN = ("up", "down")
GPT_OSS = {"activation": "quick_gelu", "clamp": 1.5, "up_offset": 1.0}


# What the function calls the weights that the shell and the oracle name as above.
ARGUMENT = {
  "up": "w_up_DF",
  "down": "w_down_FD",
  "gate": "w_gate_DF",
  "up_bias": "b_up_F",
  "gate_bias": "b_gate_F",
  "down_bias": "b_down_D",
}


def arguments(weights):
  return {ARGUMENT[name]: jnp.asarray(value, jnp.float32) for name, value in weights.items()}


run = jax.jit(mlp, static_argnames=("activation", "clamp", "up_offset"))


@pytest.mark.parametrize("name", NAMES)
def test_activation_values_and_slopes(name):
  x = np.linspace(-6, 6, 48)  # an even count: no point at the kink
  got, slope = jax.jit(jax.vmap(jax.value_and_grad(functools.partial(activate, name))))(
    jnp.asarray(x, jnp.float32)
  )
  np.testing.assert_allclose(got, oracle.activate(name, x), rtol=1e-5, atol=1e-6)
  want = numeric_gradient(lambda v: oracle.activate(name, v).sum(), x)
  np.testing.assert_allclose(slope, want, rtol=1e-4, atol=1e-5)


def test_slopes_inside_a_shard_map():
  mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
  slope = lambda name: jax.shard_map(
    jax.vmap(jax.grad(lambda v: activate(name, v))),
    mesh=mesh,
    in_specs=PartitionSpec("data"),
    out_specs=PartitionSpec("data"),
  )
  x = jnp.linspace(-4, 4, 8, dtype=jnp.float32)
  found = jax.jit(lambda x: {name: slope(name)(x) for name in NAMES})(x)
  for name in NAMES:
    sum_of = lambda v, name=name: oracle.activate(name, v).sum()
    expected = numeric_gradient(sum_of, np.asarray(x, np.float64))
    np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_activation_rounds_once(name):
  x = jnp.asarray(np.linspace(-6, 6, 48), jnp.bfloat16)
  got = activate(name, x)
  assert got.dtype == jnp.bfloat16
  want = oracle.activate(name, np.asarray(x, np.float64))
  np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2.01**-8, atol=1e-6)


def test_an_unknown_activation_is_named():
  with pytest.raises(ValueError, match=r"unknown activation 'swish'.*silu"):
    activate("swish", jnp.ones(2))


@pytest.mark.parametrize(
  ("names", "options"),
  [
    (PLAIN, {"activation": "relu"}),
    ((*PLAIN, "up_bias", "down_bias"), {"activation": "gelu"}),
    ((*PLAIN, "up_bias"), {"activation": "relu2", "clamp": 0.7}),
    ((*PLAIN, "gate"), {"activation": "silu"}),
    (tuple(WEIGHTS), GPT_OSS),
  ],
)
def test_mlp_is_the_definition(names, options):
  weights = {name: WEIGHTS[name] for name in names}
  got = run(jnp.asarray(X, jnp.float32), **arguments(weights), **options)
  np.testing.assert_allclose(got, oracle.mlp(X, weights, **options), rtol=1e-4, atol=1e-5)


def test_gradients_match_differences_of_the_oracle():
  cotangent = RNG.normal(size=X.shape)

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def gradient(x, args):
    return (jnp.asarray(cotangent, jnp.float32) * mlp(x, **args, **GPT_OSS)).sum()

  dx, dargs = gradient(jnp.asarray(X, jnp.float32), arguments(WEIGHTS))

  def loss(x, **changed):
    return (cotangent * oracle.mlp(x, {**WEIGHTS, **changed}, **GPT_OSS)).sum()

  np.testing.assert_allclose(dx, numeric_gradient(loss, X), rtol=1e-4, atol=1e-4)
  for name, value in WEIGHTS.items():
    want = numeric_gradient(lambda v, name=name: loss(X, **{name: v}), value)
    got = dargs[ARGUMENT[name]]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=name)


def test_clamp_is_one_sided_on_the_gate_and_two_sided_on_up():
  up = jnp.array([-9.0, 9.0, -9.0, 9.0])
  gate = jnp.array([9.0, 9.0, -9.0, -9.0])
  got = gated_activation(up, gate, activation="relu", clamp=7.0, up_offset=1.0)
  assert got.tolist() == [7.0 * -6.0, 7.0 * 8.0, 0.0, 0.0]
  got = gated_activation(up, gate, activation="silu", clamp=7.0)
  assert abs(float(got[2]) - 7 * 9 / (1 + np.exp(9.0))) < 1e-6  # -9 passes the gate unclamped


def test_leading_dims_are_free():
  x = jnp.asarray(X, jnp.float32)
  args = arguments(WEIGHTS)
  whole = run(x, **args, **GPT_OSS)
  tokens = run(x.reshape(6, D), **args, **GPT_OSS)
  np.testing.assert_allclose(tokens.reshape(X.shape), whole, rtol=1e-5, atol=1e-6)
  one = run(x[0, 1], **args, **GPT_OSS)
  np.testing.assert_allclose(one, whole[0, 1], rtol=1e-5, atol=1e-6)


def test_bfloat16_stays_near_the_definition():
  x = jnp.asarray(X, jnp.bfloat16)
  got = run(x, **arguments(WEIGHTS), **GPT_OSS)
  assert got.dtype == jnp.bfloat16
  want = oracle.mlp(np.asarray(x, np.float64), WEIGHTS, **GPT_OSS)
  error = np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()
  assert 0 < error < 2e-2


@pytest.mark.parametrize(
  ("kept", "products"), [((), 11), (("mlp_up",), 10), (("mlp_up", "mlp_gate"), 9)]
)
def test_keeping_named_preactivations_saves_their_products(kept, products):
  # Three products forward, two more each backward, and remat repeats `up` and `gate` if not kept.
  policy = jax.checkpoint_policies.save_only_these_names(*kept)

  def loss(x, args):
    again = jax.checkpoint(functools.partial(mlp, activation="silu"), policy=policy)
    return again(x, **args).sum()

  weights = {name: WEIGHTS[name] for name in (*PLAIN, "gate")}
  args = arguments(weights)
  step = jax.jit(jax.value_and_grad(loss, (0, 1)))
  text = step.lower(jnp.asarray(X, jnp.float32), args).as_text()
  assert text.count("stablehlo.dot_general") == products


@pytest.mark.parametrize(
  ("spec", "names"),
  [
    (MlpSpec(F, "relu", gated=False), PLAIN),
    (MlpSpec(F, "gelu", gated=False, bias=True), (*PLAIN, "up_bias", "down_bias")),
    (MlpSpec(F), (*PLAIN, "gate")),
    (MlpSpec(F, bias=True, **GPT_OSS), tuple(WEIGHTS)),
  ],
)
def test_shell_declares_and_applies(spec, names):
  shell = Mlp(spec, D, InitSpec())
  x = jnp.asarray(X, jnp.float32)
  boxed = shell.init(jax.random.key(0), x)["params"]
  expected = {
    "up": ("embed", "mlp"),
    "gate": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "up_bias": ("mlp",),
    "gate_bias": ("mlp",),
    "down_bias": ("norm",),
  }
  assert axes(boxed) == {name: expected[name] for name in names}
  for name, weight in boxed.items():
    assert weight.value.shape == WEIGHTS[name].shape
    assert not name.endswith("bias") or not weight.value.any()
  weights = {name: WEIGHTS[name] for name in names}
  params = {name: jnp.asarray(value, jnp.float32) for name, value in weights.items()}
  options = {"activation": spec.activation, "up_offset": spec.up_offset}
  want = oracle.mlp(X, weights, clamp=spec.clamp or np.inf, **options)
  got = shell.apply({"params": params}, x)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_initial_scales():
  d, f, gain = 128, 256, 0.25
  x = jnp.zeros((1, d))
  fan_in = init_params(Mlp(MlpSpec(f), d, InitSpec(), gain), jax.random.key(0), x)
  np.testing.assert_allclose(fan_in["up"].std(), d**-0.5, rtol=0.02)
  np.testing.assert_allclose(fan_in["gate"].std(), d**-0.5, rtol=0.02)
  np.testing.assert_allclose(fan_in["down"].std(), gain * f**-0.5, rtol=0.02)
  init = InitSpec("normal", stddev=0.1)
  normal = init_params(Mlp(MlpSpec(f), d, init, gain), jax.random.key(0), x)
  np.testing.assert_allclose(normal["up"].std(), 0.1, rtol=0.02)
  np.testing.assert_allclose(normal["down"].std(), 0.1 * gain, rtol=0.02)
