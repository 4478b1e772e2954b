"""The GPU kernels for linear attention: parts of values, lowering for CUDA, the choice.

Values and gradients in interpret mode stand in test_linear_attention, with the others'.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from layers.kernels.linear_attention import _select, linear_attention, pallas_gpu
from tests.layers.kernels.cuda import array, described, lowered, lowers
from tests.layers.kernels.test_linear_attention import interpret
from tests.layers.stacks import quick_jit
from tests.oracles.linear_cases import close


def test_parts_of_values_and_padded_channels(monkeypatch):
  """Chunks of 32 tokens, two parts of the values, the last of each and the channels not full."""
  B, T, N, H, U = 1, 70, 1, 20, 40
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
  key = normal(B, T, N, H)
  key = key / jnp.linalg.norm(key.astype(jnp.float32), axis=-1, keepdims=True).astype(key.dtype)
  uniform = lambda low, high: jnp.asarray(rng.uniform(low, high, (B, T, N)), jnp.float32)
  arrays = normal(B, T, N, H), key, normal(B, T, N, U), uniform(-0.3, 0), uniform(0, 1)
  state, do = (normal(*shape).astype(jnp.float32) for shape in ((B, N, H, U), (B, T, N, U)))
  segments = jnp.asarray([[1] * 20 + [2] * 47 + [0] * 3], jnp.int32)

  def loss(arrays, state, implementation):
    q, k, v, decay, beta = arrays
    o, last = linear_attention(
      q, k, v, decay=decay, beta_BTN=beta, state_BNHU=state, segments_BT=segments, chunk=32,
      implementation=implementation,
    )  # fmt: skip
    return jnp.sum(o * do) + jnp.sum(last * state), (o, last)

  f = quick_jit(jax.grad(loss, (0, 1), has_aux=True), static_argnums=2)
  want = f(arrays, state, "xla")
  interpret(monkeypatch)
  assert pallas_gpu._blocks(pallas_gpu._Static(1.0, 32, None), pallas_gpu.Tokens(*arrays)) == (
    32, 32, 8,
  )  # fmt: skip
  close(f(arrays, state, "pallas_gpu"), want, 2e-2)


# ---- lowering for CUDA ----

FORMS = {"none": (None, False), "head": (3, False), "channel": (4, True), "delta": (3, True)}


def gradients(form, H=64, U=64, dtype=jnp.bfloat16, **more):
  """A function of (q, k, v, decay, beta, segments), and its arguments' shapes."""
  dims, is_delta = FORMS[form]

  def loss(q, k, v, decay, beta, segments):
    o, state = linear_attention(q, k, v, decay=decay, beta_BTN=beta, segments_BT=segments, **more)
    return jnp.sum(o.astype(jnp.float32) ** 2) + jnp.sum(state**2)

  f32, B, T, N = jnp.float32, 2, 200, 2
  decay = None if dims is None else array(*(B, T, N, H)[:dims], dtype=f32)
  beta = array(B, T, N, dtype=f32) if is_delta else None
  s = partial(array, dtype=dtype)
  arrays = s(B, T, N, H), s(B, T, 1, H), s(B, T, 1, U), decay, beta, array(B, T, dtype=jnp.int32)
  return jax.grad(loss, tuple(i for i, a in enumerate(arrays[:5]) if a is not None)), arrays


def kernels(text):
  return sorted(re.findall(r'name = "linear_attention_(\w+)"', text))


@lowers
@pytest.mark.parametrize(
  ("form", "more"),
  [
    ("none", {"H": 8, "U": 9, "normalize": True}),
    ("head", {"H": 256, "U": 128, "dtype": jnp.float16}),
    ("channel", {"H": 96, "U": 80}),
    ("delta", {"H": 128, "U": 128}),
    ("delta", {"dtype": jnp.float32, "chunk": 16}),
  ],
)
def test_lowers_for_cuda(form, more):
  f, arrays = gradients(form, implementation="pallas_gpu", **more)
  with described():
    assert kernels(lowered(f, *arrays)) == ["backward", "forward"]


@lowers
def test_in_a_shard_map():
  """Chosen there, and there only: outside nothing spreads the kernel over devices."""
  f, arrays = gradients("head")
  arrays = [a for a in arrays if a is not None]
  few = lambda q, k, v, decay, segments: f(q, k, v, decay, None, segments)
  with described(2):
    rows = P("x")
    inside = jax.shard_map(few, in_specs=(rows,) * 5, out_specs=(rows,) * 4)
    assert kernels(lowered(inside, *arrays)) == ["backward", "forward"]
    assert not kernels(lowered(few, *arrays))
    with pytest.raises(NotImplementedError, match="shard_map"):
      jax.eval_shape(partial(linear_attention, implementation="pallas_gpu"), *arrays[:3])


@lowers
def test_remat_policy_keeps_the_forward_pass():
  """With result and states saved by name, the backward pass does not run it again."""
  names = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_state")

  def calls(policy):
    one = jax.checkpoint(lambda q, k, v: linear_attention(q, k, v)[0], policy=policy)
    loss = lambda q, k, v: jnp.sum(one(q, k, v).astype(jnp.float32) ** 2)
    with described():
      text = lowered(jax.grad(loss, (0, 1, 2)), *[array(2, 64, 1, 32)] * 3)
    results = re.findall(r"(%\d+)(?::\d+)? = stablehlo.custom_call @__gpu\$xla.gpu.triton", text)
    # jax 0.10 leaves a call whose result nobody reads, which the compiler drops.
    return sum(len(re.findall(rf"{result}\b", text)) > 1 for result in results)

  assert calls(names) == 2
  assert calls(jax.checkpoint_policies.nothing_saveable) == 3


@lowers
def test_no_gradient_leaves_no_states():
  x = array(2, 64, 1, 32)
  with described():
    one = lambda *arrays: linear_attention(*arrays, implementation="pallas_gpu")
    text = lowered(one, x, x, x)
  (line,) = [line for line in text.splitlines() if "xla.gpu.triton" in line]
  assert line.partition("->")[2].count("tensor<") == 2


# ---- the choice ----


@pytest.mark.parametrize(
  ("arrays", "chunk", "chosen"),
  [
    ([array(1, 64, 2, 64)] * 3, 64, "pallas_gpu"),
    ([array(1, 1, 2, 20)] * 3, 64, "pallas_gpu"),
    ([array(1, 64, 2, 64)] * 3, 8, "xla"),
    ([array(1, 64, 2, 512)] * 3, 64, "xla"),
  ],
)
def test_choice_on_a_gpu(arrays, chunk, chosen):
  with described():
    assert _select(None, (*arrays, chunk)).__name__.rpartition(".")[2] == chosen


def test_what_is_not_supported_says_why():
  x = array(1, 64, 2, 64)
  assert pallas_gpu.supports(x, x, x, 64) is None
  assert pallas_gpu.supports(x, x, array(1, 64, 2, 513), 64) is None
  wide = array(1, 64, 2, 257)
  assert "not 257" in pallas_gpu.supports(wide, wide, x, 64)
  assert "float64" in pallas_gpu.supports(x, x, array(1, 64, 2, 64, dtype=jnp.float64), 64)
  assert "not 8" in pallas_gpu.supports(x, x, x, 8)
  q = jnp.ones((1, 16, 2, 8))
  with pytest.raises(NotImplementedError, match="for GPUs, not for cpu"):
    linear_attention(q, q, q, implementation="pallas_gpu")
