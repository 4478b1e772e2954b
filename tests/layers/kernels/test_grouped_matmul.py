"""Grouped products against a float64 loop over rows; gradients against that of a masked product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from layers.kernels.grouped_matmul import grouped_matmul, grouped_mlp, xla

E, D, F, R = 5, 12, 9, 96
SIZES = {
  "uneven": [40, 1, 0, 30, 25],
  "one expert": [0, 0, 96, 0, 0],
  "short": [7, 0, 21, 3, 2],
  "none": [0, 0, 0, 0, 0],
}


def silu(gate, up):
  return jax.nn.silu(gate) * up


def owners(sizes):
  """The expert of each row, -1 beyond the last group."""
  return np.concatenate([np.repeat(np.arange(E), sizes), np.full(R - sum(sizes), -1)])


def oracle(x, w, sizes):
  x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
  rows = [x[r] @ w[e] if e >= 0 else np.zeros(w.shape[2]) for r, e in enumerate(owners(sizes))]
  return np.stack(rows)


def arrays(dtype=np.float32, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  return draw(R, D), draw(E, D, F), draw(E, D, F)


def with_nan_past(x, sizes):
  return x.at[sum(sizes) :].set(jnp.nan)


_product = jax.jit(grouped_matmul, static_argnames=("transposed", "implementation"))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values(sizes, dtype, implementation):
  x, w, _ = arrays(dtype)
  want, total = oracle(x, w, sizes), sum(sizes)
  x, sizes = with_nan_past(x, sizes), jnp.array(sizes)
  tolerance = {"atol": 2e-5} if dtype == np.float32 else {"rtol": 2**-8, "atol": 1e-5}
  for transposed, given_w in ((False, w), (True, jnp.swapaxes(w, 1, 2))):
    y = _product(x, given_w, sizes, transposed=transposed, implementation=implementation)
    assert y.dtype == dtype
    np.testing.assert_allclose(np.asarray(y, np.float64), want, **tolerance)
    assert not np.asarray(y[total:], np.float32).any()


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_gradients(sizes, implementation):
  """Against autodiff of y_r = sum_e [r in e] x_r w_e, and the MLP against its parts."""
  x, gate, up = (a / 3 for a in arrays())  # a sine of large numbers would magnify rounding
  mask = jnp.asarray(owners(sizes)[:, None] == np.arange(E), jnp.float32)
  group_sizes = jnp.array(sizes)
  total = sum(sizes)
  down = jnp.flip(jnp.swapaxes(up, 1, 2), 0)
  weight = jnp.asarray(np.random.default_rng(1).random(R), jnp.float32)

  def ours(x, weight, gate, up, down):
    options = {"implementation": implementation}
    x = with_nan_past(x, sizes)
    y = grouped_mlp(x, gate, up, down, group_sizes, silu, weight_R=weight, **options)
    y += grouped_mlp(x, up, gate, down, group_sizes, silu, **options)
    z = grouped_matmul(y, down, group_sizes, transposed=True, **options)
    return jnp.sum(jnp.sin(z))

  def plain(x, weight, gate, up, down):
    each = lambda w: jnp.einsum("re,rd,edf->rf", mask, x, w)
    hidden = weight[:, None] * silu(each(gate), each(up)) + silu(each(up), each(gate))
    y = jnp.einsum("re,rf,efd->rd", mask, hidden, down)
    return jnp.sum(jnp.sin(jnp.einsum("re,rd,efd->rf", mask, y, down)))

  arguments = (x, weight, gate, up, down)
  got = jax.jit(jax.value_and_grad(ours, (0, 1, 2, 3, 4)))(*arguments)
  want = jax.value_and_grad(plain, (0, 1, 2, 3, 4))(*arguments)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5, rtol=3e-5), got, want)
  dx, d_weight, *dws = got[1]
  assert not np.asarray(d_weight[total:]).any()
  assert not np.asarray(dx[total:]).any()
  for dw in dws:
    assert not np.asarray(dw)[np.array(sizes) == 0].any()


def test_gradient_of_float32_weights_is_not_rounded_to_bfloat16():
  x, w, _ = arrays()
  sizes = jnp.array(SIZES["uneven"])
  loss = lambda w: jnp.sum(grouped_matmul(x.astype(jnp.bfloat16), w, sizes).astype(jnp.float32))
  dw = jax.grad(loss)(w)
  wide = np.asarray(x.astype(jnp.bfloat16), np.float64)
  want = np.stack([wide[owners(SIZES["uneven"]) == e].sum(0) for e in range(E)])
  np.testing.assert_allclose(dw, np.repeat(want[:, :, None], F, 2), rtol=1e-5, atol=1e-5)


_plan = jax.jit(xla.make_plan, static_argnames="num_rows")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=7, max_size=7), st.integers(0, 5))
def test_every_row_is_multiplied_once_by_its_own_expert(sizes, rest):
  """The plan against brute force, and its work against its promise."""
  R = 280 + rest
  plan = _plan(jnp.array(sizes), num_rows=R)
  seen = np.full(R, -1)
  rows_EA, E = np.asarray(plan.row_EA), len(sizes)
  for e, rows in enumerate(rows_EA):
    rows = rows[rows < R]
    assert (seen[rows] == -1).all()
    seen[rows] = e
    np.testing.assert_array_equal(
      np.asarray(plan.place_R)[rows], e * rows_EA.shape[1] + np.arange(len(rows))
    )
  for i in range(int(plan.count)):
    start, count = int(plan.start_I[i]), int(plan.rows_I[i])
    assert count > 0 and (seen[start : start + count] == -1).all()
    seen[start : start + count] = int(plan.expert_I[i])
  np.testing.assert_array_equal(seen[: sum(sizes)], np.repeat(np.arange(E), sizes))
  assert (seen[sum(sizes) :] == -1).all()
  small = int(plan.count) * plan.size
  left = sum(max(n - rows_EA.shape[1], 0) for n in sizes)
  assert rows_EA.size <= 1.15 * R + 12 * E and small <= left + plan.size * E


def test_bad_input():
  x, w, _ = arrays()
  with pytest.raises(ValueError, match="the groups hold 97 rows, x has only 96"):
    grouped_matmul(x, w, jnp.array([97, 0, 0, 0, 0]))
  with pytest.raises(ValueError, match=r"needs x \[R, D\] and w \[E, D, F\] of one width"):
    grouped_matmul(x, jnp.swapaxes(w, 1, 2), jnp.array(SIZES["short"]))
  with pytest.raises(ValueError, match="w has 5 groups"):
    grouped_matmul(x, w, jnp.array([1, 2]))
  with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
    grouped_matmul(x, w, jnp.array(SIZES["short"]), implementation="cuda")
  with pytest.raises(ValueError, match=r"gate and up \[E, D, F\] and down \[E, F, D\], got"):
    grouped_mlp(x, w, w, w, jnp.array(SIZES["short"]), silu)


@pytest.mark.parametrize("width, tpu_kernels", [(256, True), (200, False)])
def test_the_platform_decides(width, tpu_kernels):
  """For a layer and its gradients."""
  device = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=2, platform="tpu")
  mesh = jax.sharding.AbstractMesh((1,), ("d",), (AxisType.Auto,), abstract_device=device)
  s = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)

  def loss(x, gate, down, sizes):
    return jnp.sum(grouped_mlp(x, gate, gate, down, sizes, silu).astype(jnp.float32))

  args = s(512, 128), s(4, 128, width), s(4, width, 128), jax.ShapeDtypeStruct((4,), jnp.int32)
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(jax.grad(loss, (1, 2))).trace(*args)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
  for name in ("gated", "product", "outer"):
    assert (f"grouped_matmul_{name}" in text) == tpu_kernels
  assert ("dot_general" in text) != tpu_kernels


def test_a_named_kernel_is_not_replaced():
  x, w, _ = arrays()
  with pytest.raises(NotImplementedError, match="the kernel is for TPUs, not for cpu"):
    grouped_matmul(x, w, jnp.array(SIZES["short"]), implementation="pallas_tpu")
