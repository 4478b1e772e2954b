import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.norms import Norm, layer_norm, rms_norm
from layers.params import axes, init_params
from layers.spec import NormSpec
from tests.oracles import norms as oracle
from tests.oracles.numeric import numeric_gradient

EPS = 1e-3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 5))
GAIN = RNG.normal(size=5)
BIAS = RNG.normal(size=5)
F32 = lambda *arrays: [jnp.asarray(a, jnp.float32) for a in arrays]

rms = jax.jit(functools.partial(rms_norm, eps=EPS), static_argnames="unit_offset")
layer = jax.jit(functools.partial(layer_norm, eps=EPS))


def test_rms_norm_is_the_definition():
  x, w = F32(X, GAIN)
  np.testing.assert_allclose(rms(x, w), oracle.rms_norm(X, GAIN, EPS), rtol=2e-6)
  np.testing.assert_allclose(rms(x), oracle.rms_norm(X, np.ones(5), EPS), rtol=2e-6)


def test_unit_offset_stores_the_gain_less_one():
  x, w = F32(X, GAIN)
  got = rms(x, w, unit_offset=True)
  np.testing.assert_allclose(got, oracle.rms_norm(X, 1 + GAIN, EPS), rtol=2e-6, atol=1e-6)


def test_layer_norm_is_the_definition():
  x, w, b = F32(X, GAIN, BIAS)
  np.testing.assert_allclose(layer(x, w, b), oracle.layer_norm(X, GAIN, BIAS, EPS), rtol=1e-5)
  without = oracle.layer_norm(X, GAIN, np.zeros(5), EPS)
  np.testing.assert_allclose(layer(x, w), without, rtol=1e-5, atol=1e-6)


def test_any_leading_dims():
  x, w, b = F32(X, GAIN, BIAS)
  np.testing.assert_allclose(rms(x[0, 0], w), rms(x, w)[0, 0], rtol=1e-6)
  np.testing.assert_allclose(layer(x[:, 0], w, b), layer(x, w, b)[:, 0], rtol=1e-6)


def test_gradients_match_differences_of_the_oracle():
  cotangent = RNG.normal(size=X.shape)
  x, w, b, c = F32(X, GAIN, BIAS, cotangent)
  dx, dw = jax.jit(jax.grad(lambda x, w: (c * rms(x, w)).sum(), (0, 1)))(x, w)
  loss = lambda x, w: (cotangent * oracle.rms_norm(x, w, EPS)).sum()
  np.testing.assert_allclose(dx, numeric_gradient(lambda v: loss(v, GAIN), X), atol=1e-5)
  np.testing.assert_allclose(dw, numeric_gradient(lambda v: loss(X, v), GAIN), atol=1e-5)

  grads = jax.jit(jax.grad(lambda x, w, b: (c * layer(x, w, b)).sum(), (0, 1, 2)))(x, w, b)
  loss = lambda x, w, b: (cotangent * oracle.layer_norm(x, w, b, EPS)).sum()
  want = (
    numeric_gradient(lambda v: loss(v, GAIN, BIAS), X),
    numeric_gradient(lambda v: loss(X, v, BIAS), GAIN),
    numeric_gradient(lambda v: loss(X, GAIN, v), BIAS),
  )
  for got, expected in zip(grads, want, strict=True):
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_bfloat16_rounds_only_the_result():
  x = jnp.asarray(X, jnp.bfloat16)
  w, b = F32(GAIN, BIAS)
  exact = np.asarray(x, np.float64)
  for got, want in (
    (rms(x, w), oracle.rms_norm(exact, GAIN, EPS)),
    (layer(x, w, b), oracle.layer_norm(exact, GAIN, BIAS, EPS)),
  ):
    assert got.dtype == jnp.bfloat16
    # Half a unit in the last of 8 bits; a second rounding inside would reach a whole one.
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2.01**-8, atol=1e-6)


def test_layer_norm_survives_a_mean_far_above_the_spread():
  x = (1000 + X).astype(np.float32)
  want = oracle.layer_norm(x, GAIN, BIAS, EPS)
  np.testing.assert_allclose(layer(*F32(x, GAIN, BIAS)), want, atol=1e-3)


@pytest.mark.parametrize(
  ("spec", "start"),
  [
    (NormSpec(eps=EPS), {"scale": 1.0}),
    (NormSpec(eps=EPS, unit_offset=True), {"scale": 0.0}),
    (NormSpec("layer", EPS), {"scale": 1.0}),
    (NormSpec("layer", EPS, bias=True), {"scale": 1.0, "bias": 0.0}),
    (NormSpec("layer", EPS, bias=True, unit_offset=True), {"scale": 0.0, "bias": 0.0}),
  ],
)
def test_shell_declares_and_applies(spec, start):
  (x,) = F32(X)
  shell = Norm(spec, 5)
  params = init_params(shell, jax.random.key(0), x)
  assert {name: (w.shape, w.tolist()) for name, w in params.items()} == {
    name: ((5,), [value] * 5) for name, value in start.items()
  }
  # At the start every norm is the plain one: gain one, bias zero.
  plain = oracle.rms_norm(X, np.ones(5), EPS)
  if spec.kind == "layer":
    plain = oracle.layer_norm(X, np.ones(5), np.zeros(5), EPS)
  np.testing.assert_allclose(shell.apply({"params": params}, x), plain, rtol=1e-5, atol=1e-6)
  other = {name: value + 0.5 for name, value in params.items()}
  moved = plain * 1.5 + (0.5 if "bias" in start else 0.0)
  np.testing.assert_allclose(shell.apply({"params": other}, x), moved, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", ["norm", None])
def test_shell_names_its_axis(axis):
  shell = Norm(NormSpec("layer", bias=True), 5, axis)
  boxed = jax.eval_shape(shell.init, jax.random.key(0), jnp.zeros((1, 5)))["params"]
  assert axes(boxed) == {"scale": (axis,), "bias": (axis,)}
