"""Cross-entropy: every implementation against numpy, values and gradients; memory; meshes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from layers.kernels.cross_entropy import cross_entropy, xla
from tests.oracles.cross_entropy import cross_entropy as oracle

B, T, D, V = 2, 10, 8, 37

CASES = {
  "plain": {},
  "tied_softcap": {"tied": True, "softcap": 3.0},
  "all": {"bias": True, "scale": 0.7, "softcap": 5.0, "z_loss": 0.1},
  "tied_bias_z": {"tied": True, "bias": True, "z_loss": 0.2},
}


def make(tied=False, bias=False, dtype=np.float32):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(B, T, D)).astype(np.float32)
  w = rng.normal(size=(V, D) if tied else (D, V)).astype(np.float32)
  b = rng.normal(size=V).astype(np.float32) if bias else None
  targets = rng.integers(0, V, size=(B, T)).astype(np.int32)
  weights = rng.uniform(0.5, 1.5, size=(B, T)).astype(np.float32) / (B * T)
  weights[0, 3:6] = 0
  rounded = lambda a: None if a is None else jnp.asarray(a, dtype)
  return rounded(x), rounded(w), rounded(b), jnp.asarray(targets), jnp.asarray(weights)


def value_and_grads(arrays, implementation, **options):
  x, w, bias, targets, weights = arrays

  def loss(x, w, bias, weights):
    result = cross_entropy(
      x, w, targets, weights, bias_V=bias, implementation=implementation, **options
    )
    # The statistics must add nothing to the gradient, whatever is done with them.
    return 3.0 * result.total + jnp.sum(result.nll_BT + result.log_z_BT), result

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
  grads, result = gradient(x, w, bias, weights)
  return result, grads


def check(arrays, run, atol, **options):
  result, grads = run
  x, w, bias, targets, weights = arrays
  as64 = lambda a: None if a is None else np.asarray(a, np.float64)
  values, expected = oracle(
    as64(x), as64(w), np.asarray(targets), as64(weights), bias=as64(bias), **options
  )
  for got, want in zip(result, values, strict=True):
    np.testing.assert_allclose(got, want, atol=atol, rtol=atol)
  for got, want in zip(grads, expected, strict=True):
    if got is not None:
      np.testing.assert_allclose(as64(got), 3 * want, atol=atol, rtol=atol)


@pytest.mark.parametrize("implementation", ["reference", "xla", "chunks"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_match_numpy(case, implementation, monkeypatch):
  options = dict(CASES[case])
  arrays = make(options.get("tied", False), options.pop("bias", False))
  if implementation == "chunks":  # of 4 positions: 10 is not a multiple
    monkeypatch.setattr(xla, "chunk_length", lambda *shape: 4)
    implementation = "xla"
  run = value_and_grads(arrays, implementation, **options)
  check(arrays, run, 1e-5, **options)
  x_grad, weights = np.asarray(run[1][0]), np.asarray(arrays[4])
  assert not x_grad[weights == 0].any()


def test_without_differentiation_the_same_loss():
  x, w, bias, targets, weights = make(bias=True)
  plain = jax.jit(
    partial(xla.cross_entropy, scale=1.0, softcap=None, z_loss=0.1, tied=False, shards=(1, 1))
  )
  total, nll, log_z = plain(x, w, bias, targets, weights)
  (want, want_nll, want_z), _ = oracle(x, w, targets, weights, bias=bias, z_loss=0.1)
  np.testing.assert_allclose(total, want, rtol=1e-5)
  np.testing.assert_allclose(nll, want_nll, rtol=1e-5)
  np.testing.assert_allclose(log_z, want_z, rtol=1e-5)


def test_bfloat16(monkeypatch):
  monkeypatch.setattr(xla, "chunk_length", lambda *shape: 4)
  arrays = make(bias=True, dtype=jnp.bfloat16)
  result, grads = value_and_grads(arrays, "xla", z_loss=0.1)
  assert [g.dtype for g in grads] == [jnp.bfloat16] * 3 + [jnp.float32]
  assert result.total.dtype == result.nll_BT.dtype == result.log_z_BT.dtype == jnp.float32
  # Logits accumulate in float32: values at float32's accuracy from bfloat16 inputs.
  x, w, bias, targets, weights = (np.asarray(a.astype(jnp.float32)) for a in arrays)
  values, _ = oracle(x, w, targets.astype(int), weights, bias=bias, z_loss=0.1)
  for got, want in zip(result, values, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5)
  check(arrays, (result, grads), 1e-2, z_loss=0.1)


def test_likely_target_keeps_its_gradient_in_bfloat16():
  """p - 1 = -1e-4 would round to zero had p been cast to bfloat16 before the subtraction."""
  x = jnp.ones((1, 1, 1), jnp.bfloat16)
  w = jnp.asarray([[9.25, 0.0]], jnp.bfloat16)
  one = jnp.ones((1, 1))
  target = jnp.zeros((1, 1), jnp.int32)
  grad = jax.grad(lambda w: cross_entropy(x, w, target, one).total)(w)
  want = 1 / (1 + np.exp(9.25))
  np.testing.assert_allclose(np.asarray(grad, np.float64), [[-want, want]], rtol=1e-2)


def test_targets_outside_the_vocabulary():
  x, w, _, targets, weights = make()
  ignored = jnp.where(weights == 0, -100, targets)
  result = cross_entropy(x, w, ignored, weights)
  np.testing.assert_allclose(result.total, cross_entropy(x, w, targets, weights).total, rtol=1e-6)
  assert jnp.all(jnp.isfinite(result.nll_BT))
  for bad in (-1, V):
    assert jnp.isnan(cross_entropy(x, w, targets.at[1, 1].set(bad), weights).total)


def test_memory_holds_no_whole_logits():
  shape = (16, 1024, 64)
  vocab = 32_000
  args = (
    jax.ShapeDtypeStruct(shape, jnp.float32),
    jax.ShapeDtypeStruct((64, vocab), jnp.float32),
    jax.ShapeDtypeStruct(shape[:2], jnp.int32),
    jax.ShapeDtypeStruct(shape[:2], jnp.float32),
  )

  def temp_bytes(implementation):
    loss = lambda *a: cross_entropy(*a, implementation=implementation).total
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  logits = 4 * shape[0] * shape[1] * vocab
  assert temp_bytes("xla") < logits / 8
  assert temp_bytes("reference") >= logits


def test_chunk_length_divides():
  # 64 MiB of float32 logits are 524 tokens, 131 positions of four rows: two chunks.
  assert xla.chunk_length(4, 256, 32_000) == 128
  assert xla.chunk_length(4, 250, 32_000) == 125
  assert xla.chunk_length(1, 7, 100) == 7
  assert xla.chunk_length(64, 3, 10**6) == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_on_a_mesh(kind, monkeypatch):
  """Batch, sequence and vocabulary sharded: same numbers, no gathered logits, dw reduced once."""
  monkeypatch.setattr(xla, "chunk_length", lambda *shape: 2)  # two chunks
  rng = np.random.default_rng(1)
  x = rng.normal(size=(4, 8, 16)).astype(np.float32)
  w = rng.normal(size=(16, 64)).astype(np.float32)
  targets = rng.integers(0, 64, size=(4, 8)).astype(np.int32)
  weights = np.full((4, 8), 1 / 32, np.float32)
  mesh = jax.make_mesh((2, 2, 2), ("data", "context", "tensor"), axis_types=(kind,) * 3)
  put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
  loss = lambda *arrays: cross_entropy(*arrays, shards=(2, 2)).total
  with jax.set_mesh(mesh):
    rows = ("data", "context")
    args = (put(x, *rows), put(w, None, "tensor"), put(targets, *rows), put(weights, *rows))
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*args).compile()
    total, (dx, dw) = compiled(*args)
  (want, _, _), (want_dx, want_dw, _, _) = oracle(x, w, targets, weights)
  np.testing.assert_allclose(total, want, rtol=1e-5)
  np.testing.assert_allclose(dx, want_dx, atol=1e-6)
  np.testing.assert_allclose(dw, want_dw, atol=1e-6)
  moved = [s.strip() for s in compiled.as_text().splitlines() if " all-" in s and "(" in s]
  assert not [s for s in moved if "all-gather" in s], moved
  reduced_dw = [s for s in moved if "16,32]" in s.split("all-reduce(")[0]]
  assert reduced_dw and not [s for s in reduced_dw if "while/body" in s], moved


def test_errors():
  x, w, _, targets, weights = make()
  with pytest.raises(ValueError, match="known: xla, reference"):
    cross_entropy(x, w, targets, weights, implementation="cuda")
  with pytest.raises(ValueError, match="one width D"):
    cross_entropy(x, w, targets, weights, tied=True)
  with pytest.raises(ValueError, match="shape"):
    cross_entropy(x, w, targets[:, 1:], weights)
  with pytest.raises(ValueError, match="bias"):
    cross_entropy(x, w, targets, weights, bias_V=jnp.zeros(V + 1))
  with pytest.raises(ValueError, match="softcap"):
    cross_entropy(x, w, targets, weights, softcap=0.0)
  with pytest.raises(ValueError, match="does not divide over shards"):
    cross_entropy(x, w, targets, weights, shards=(1, 4))
