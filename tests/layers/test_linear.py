import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from layers.linear import dense

RNG = np.random.default_rng(0)
# x [B, T, in dims], w [in dims, out dims]: MLP, query projection, attention output.
CASES = pytest.mark.parametrize(
  ("k_dims", "f_dims"), [((8,), (12,)), ((8,), (4, 6)), ((4, 6), (8,))]
)

run = jax.jit(dense, static_argnames="num_in")


def arrays(k_dims, f_dims):
  x = RNG.normal(size=(4, 2, *k_dims))
  w = RNG.normal(size=(*k_dims, *f_dims))
  dy = RNG.normal(size=(4, 2, *f_dims))
  return x, w, dy


@functools.partial(jax.jit, static_argnames="num_in")
def values_and_grads(x, w, dy, num_in):
  y, pull = jax.vjp(functools.partial(dense, num_in=num_in), x, w)
  return y, *pull(dy)


def definition(x, w, dy, num_in):
  lead = x.ndim - num_in
  y = np.tensordot(x, w, num_in)
  dx = np.tensordot(dy, w, (range(lead, dy.ndim), range(num_in, w.ndim)))
  dw = np.tensordot(x, dy, (range(lead), range(lead)))
  return y, dx, dw


def dots(f, *args):
  """Operands of every dot_general in the traced function, nested ones included."""
  found = []

  def visit(jaxpr):
    for eqn in jaxpr.eqns:
      if eqn.primitive.name == "dot_general":
        found.append([v.aval for v in eqn.invars])
      for sub in jaxprs_in_params(eqn.params):
        visit(sub)

  visit(jax.make_jaxpr(f)(*args).jaxpr)
  return found


@CASES
def test_values_and_gradients(k_dims, f_dims):
  exact = arrays(k_dims, f_dims)
  got = values_and_grads(*(jnp.asarray(a, jnp.float32) for a in exact), num_in=len(k_dims))
  for a, b in zip(got, definition(*exact, len(k_dims)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_any_leading_dims():
  x, w, _ = (jnp.asarray(a, jnp.float32) for a in arrays((8,), (4, 6)))
  whole = run(x, w)
  np.testing.assert_allclose(run(x[1, 1], w), whole[1, 1], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(run(x[:, 1], w), whole[:, 1], rtol=1e-5, atol=1e-6)
  assert run(x[:0], w).shape == (0, 2, 4, 6)


def test_dims_that_do_not_meet_are_refused():
  with pytest.raises(ValueError, match=r"the last 1 dims of x \(2, 8\) are not the first"):
    dense(jnp.ones((2, 8)), jnp.ones((7, 3)))


@CASES
def test_bfloat16_rounds_results_but_not_the_weight_gradient(k_dims, f_dims):
  x, w, dy = arrays(k_dims, f_dims)
  x, dy = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)
  y, dx, dw = values_and_grads(x, jnp.asarray(w, jnp.float32), dy, num_in=len(k_dims))
  assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
  rounded = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, w, dy)]
  want_y, want_dx, want_dw = definition(*rounded, len(k_dims))
  for got, want in ((y, want_y), (dx, want_dx)):
    # float32 sums of exact products, rounded once.
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=1e-5)
  np.testing.assert_allclose(dw, want_dw, rtol=1e-5, atol=1e-5)


def test_every_product_of_bfloat16_has_bfloat16_operands():
  x, w = jnp.ones((4, 2, 8), jnp.bfloat16), jnp.ones((8, 12))
  found = dots(jax.grad(lambda x, w: dense(x, w).astype(jnp.float32).sum(), (0, 1)), x, w)
  assert len(found) == 3
  assert {a.dtype for operands in found for a in operands} == {jnp.dtype(jnp.bfloat16)}


def test_float32_has_forward_mode_too():
  x, w, _ = (jnp.asarray(a, jnp.float32) for a in arrays((8,), (12,)))
  _, tangent = jax.jvp(dense, (x, w), (x, w))
  np.testing.assert_allclose(tangent, 2 * run(x, w), rtol=1e-5)


# --- meshes --------------------------------------------------------------------------------------


def a_mesh(kind, context, tensor=2):
  shape = {"fsdp": 8 // (context * tensor), "context": context, "tensor": tensor}
  return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(kind,) * 3)


def operand_dims(mesh, *args):
  with jax.set_mesh(mesh):
    return {a.ndim for operands in dots(dense, *args) for a in operands[:1]}


def test_tokens_are_flattened_unless_the_sequence_is_sharded():
  x, w = jnp.ones((4, 2, 8)), jnp.ones((8, 12))
  assert {a.ndim for operands in dots(dense, x, w) for a in operands} == {2}
  assert operand_dims(a_mesh(AxisType.Auto, 1, tensor=1), x, w) == {2}
  assert operand_dims(a_mesh(AxisType.Auto, 2, tensor=1), x, w) == {3}
  assert operand_dims(a_mesh(AxisType.Auto, 1, tensor=2), x, w) == {3}  # between blocks
  # Inside a shard_map over `context` each device holds a sequence of its own.
  mesh, seen = a_mesh(AxisType.Auto, 2, tensor=1), []

  def body(x, w):
    seen.append({a.ndim for operands in dots(dense, x, w) for a in operands})
    return dense(x, w)

  local = jax.shard_map(
    body, mesh=mesh, in_specs=(PartitionSpec("fsdp", "context"), PartitionSpec()),
    out_specs=PartitionSpec("fsdp", "context"),
  )  # fmt: skip
  np.testing.assert_allclose(jax.jit(local)(x, w), np.full((4, 2, 12), 8.0))
  assert seen[0] == {2}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@CASES
def test_sharded_equals_whole(k_dims, f_dims, kind, dtype):
  num_in = len(k_dims)
  x, w, dy = arrays(k_dims, f_dims)
  x, dy = jnp.asarray(x, dtype), jnp.asarray(dy, dtype)
  w = jnp.asarray(w, jnp.float32)
  want = values_and_grads(x, w, dy, num_in=num_in)

  mesh = a_mesh(kind, 2)
  # FSDP x context x tensor, Megatron-style: columns into heads or hidden, rows back to the width.
  model, hidden = ("fsdp",), ("tensor",) + (None,) * (max(num_in, len(f_dims)) - 1)
  into = k_dims == (8,)
  w_spec = model + hidden if into else hidden + model
  x_spec = ("fsdp", "context") + ((None,) if into else hidden)
  y_spec = ("fsdp", "context") + (hidden if into else (None,))
  if len(w_spec) < w.ndim:
    w_spec += (None,) * (w.ndim - len(w_spec))
  put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))
  with jax.set_mesh(mesh):
    got = values_and_grads(put(x, x_spec), put(w, w_spec), put(dy, y_spec), num_in=num_in)
  if kind == AxisType.Explicit:
    specs = [tuple(a.sharding.spec) for a in got]
    assert specs == [y_spec, x_spec, w_spec]
  # Float32 sums in another order, then at most one rounding apart.
  rtol = 2.01**-7 if dtype == jnp.bfloat16 else 1e-5
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_inside_a_shard_map_are_summed_over_devices(dtype):
  x, w, dy = arrays((8,), (12,))
  x, w, dy = jnp.asarray(x, dtype), jnp.asarray(w, jnp.float32), jnp.asarray(dy, dtype)
  rows, columns = PartitionSpec("fsdp", "context"), PartitionSpec(None, "tensor")
  sharded = jax.shard_map(
    functools.partial(values_and_grads, num_in=1),
    mesh=a_mesh(AxisType.Auto, 2),
    in_specs=(rows, columns, PartitionSpec("fsdp", "context", "tensor")),
    out_specs=(PartitionSpec("fsdp", "context", "tensor"), rows, columns),
  )
  want = values_and_grads(x, w, dy, num_in=1)
  rtol = 2.01**-7 if dtype == jnp.bfloat16 else 1e-5
  for a, b in zip(jax.jit(sharded)(x, w, dy), want, strict=True):
    # dx is a sum of two halves, each rounded: near a cancellation the halves' rounding shows.
    np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=rtol, atol=4 * rtol)
