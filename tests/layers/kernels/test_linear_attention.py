"""Linear attention: worked examples, both implementations against numpy, structure, memory."""

import math
from functools import lru_cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from layers.kernels import linear_attention as package
from layers.kernels.linear_attention import linear_attention, pallas_gpu
from tests.layers.stacks import quick_jit
from tests.oracles.linear_attention import quadratic, recurrent
from tests.oracles.linear_cases import CASES, SEGMENTS, B, H, T, U, close, make

IMPLEMENTATIONS = ("reference", "xla")
# In interpret mode; those of TPUs have a file of their own.
ON_GPU = ("feature map", "retention", "gla", "gated delta", "kimi")
CHUNK, GPU_CHUNK = 8, 16  # of 37 tokens: the last one is not full


def call(arrays, **keywords):
  return linear_attention(
    arrays["q"], arrays["k"], arrays["v"], decay=arrays["decay"], beta_BTN=arrays["beta"],
    state_BNHU=arrays["state"], **keywords,
  )  # fmt: skip


def interpret(patch):
  call = partial(pl.pallas_call, interpret=True)
  patch.setattr(pallas_gpu, "pl", SimpleNamespace(**vars(pl) | {"pallas_call": call}))
  patch.setattr(package, "current_platform", lambda: "gpu")


@lru_cache
def run(name, implementation, dtype=jnp.float32):
  """(gradients of all arrays, (o, last state))."""
  if implementation == "pallas_gpu":
    with pytest.MonkeyPatch.context() as patch:
      interpret(patch)
      return traced(name, implementation, dtype, GPU_CHUNK)
  return traced(name, implementation, dtype, CHUNK)


def traced(name, implementation, dtype, chunk):
  arrays, keywords, segments, (do, dstate) = make(name)
  rounded = {x: arrays[x].astype(dtype) for x in ("q", "k", "v")}

  def loss(arrays, segments):
    o, state = call(
      arrays, segments_BT=segments, chunk=chunk, implementation=implementation, **keywords
    )
    return jnp.sum(o * do) + jnp.sum(state * dstate), (o, state)

  return quick_jit(jax.grad(loss, has_aux=True))(arrays | rounded, segments)


@lru_cache
def oracle(name):
  arrays, keywords, segments, _ = make(name)
  return recurrent(**spread(arrays), segments=segments, **keywords)


def spread(arrays):
  """Decays of every token, as the oracle wants them."""
  decay = arrays["decay"]
  if decay is not None and decay.shape[0] == 1:
    decay = np.broadcast_to(decay, (B, T, decay.shape[2]))
  return arrays | {"decay": decay}


@pytest.mark.parametrize(
  ("name", "implementation"),
  [(name, implementation) for name in CASES for implementation in IMPLEMENTATIONS]
  + [(name, "pallas_gpu") for name in ON_GPU],
)
def test_values(name, implementation):
  _, (o, state) = run(name, implementation)
  assert o.dtype == state.dtype == jnp.float32
  close((o, state), oracle(name), 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
  """The reference's along a random direction, in float64; the chunks' against the reference."""
  arrays, keywords, segments, (do, dstate) = make(name)
  rng = np.random.default_rng(7)
  direction = jax.tree.map(lambda x: rng.normal(size=x.shape), arrays)

  def loss(step):
    moved = jax.tree.map(lambda x, d: np.asarray(x, np.float64) + step * d, arrays, direction)
    o, state = recurrent(**spread(moved), segments=segments, **keywords)
    return np.sum(o * np.asarray(do)) + np.sum(state * np.asarray(dstate))

  want, _ = run(name, "reference")
  along = sum(
    np.sum(np.asarray(g, np.float64) * direction[x]) for x, g in want.items() if g is not None
  )
  size = math.sqrt(sum(float(jnp.sum(g * g)) for g in want.values() if g is not None))
  assert abs((loss(1e-6) - loss(-1e-6)) / 2e-6 - along) < 1e-5 * size
  close(run(name, "xla")[0], want, 1e-5)
  if name in ON_GPU:
    close(run(name, "pallas_gpu")[0], want, 1e-5)


@pytest.mark.parametrize(
  ("name", "implementation"),
  [("gla", "xla"), ("gated delta", "xla"), ("gated delta", "pallas_gpu")],
)
def test_bfloat16(name, implementation):
  """Products are of rounded values; states and decays are not rounded."""
  grads, (o, state) = run(name, implementation, jnp.bfloat16)
  assert (o.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
  want_grads, want = run(name, "reference", jnp.bfloat16)
  close((o, state), want, 2e-2)
  close(grads, want_grads, 2e-2)


# The numbers of three tokens, by hand.
Q = np.array([[1, -1], [0.5, 0.5], [-1, 2]])
K = np.array([[0, 1], [1, -0.5], [0.5, 0.5]])
V = np.array([[1, 0], [0, 1], [2, -1]])
DELTA_Q, DELTA_K = np.array([[1, 0], [0, 1], [1, 1]]), np.array([[1, 0], [0.6, 0.8], [0, 1]])


def elu_plus_one(x):
  return np.where(x > 0, x + 1, np.exp(x))


def cosines(x):
  """relu(x) times the cosine and the sine of its position, of three (arXiv 2202.08791)."""
  angle = np.pi / 2 * np.arange(3)[:, None] / 3
  return np.concatenate([np.maximum(x, 0) * np.cos(angle), np.maximum(x, 0) * np.sin(angle)], 1)


WORKED = {
  "elu + 1": (
    (elu_plus_one(Q), elu_plus_one(K), None, None, True),
    [[1, 0], [0.535090, 0.464910], [1.178638, -0.178638]],
    [[4, 0.5, 4.5], [5, -0.893469, 4.106531]],
  ),
  "decay": ((Q, K, [0.5] * 3, None, False), [[-1, 0], [0.25, 0.25], [1.5, -1.5]], None),
  "cosFormer": (
    (cosines(Q), cosines(K), None, None, True),
    [[0, 0], [0.464102, 0.535898], [1.5, -0.5]],
    None,
  ),
  "gated delta": (
    (DELTA_Q, DELTA_K, [1, 0.5, 0.9], [1, 0.5, 0.5], False),
    [[1, 0], [-0.12, 0.4], [1.315, -0.05]],
    [[0.369, 0.27], [0.946, -0.32]],
  ),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", WORKED)
def test_worked_examples(name, implementation):
  (q, k, factor, beta, normalize), want, want_state = WORKED[name]
  one = lambda x: None if x is None else jnp.asarray(x, jnp.float32)[None, :, None]
  decay = None if factor is None else one(np.log(factor))
  o, state = linear_attention(
    one(q), one(k), one(V), decay=decay, beta_BTN=one(beta), normalize=normalize, chunk=2,
    implementation=implementation,
  )  # fmt: skip
  np.testing.assert_allclose(o[0, :, 0], want, atol=2e-6)
  if want_state is not None:
    np.testing.assert_allclose(state[0, 0], want_state, atol=2e-6)


@pytest.mark.parametrize("name", ["feature map", "gla"])
def test_weights_of_all_pairs_give_the_same(name):
  """The quadratic form, from the state 0."""
  arrays, keywords, _, _ = make(name)
  o, _ = call(arrays | {"state": None}, chunk=CHUNK, **keywords)
  b, n = 1, 3
  of = lambda x, head: None if x is None else np.asarray(x, np.float64)[b, :, head]
  q, decay = of(arrays["q"], n), of(arrays["decay"], n)
  want = quadratic(q, of(arrays["k"], n // 2), of(arrays["v"], n // 2), decay=decay, **keywords)
  close(o[b, :, n], want, 1e-5)


def test_every_chunk_length_gives_the_same():
  arrays, keywords, segments, _ = make("kimi")
  f = quick_jit(partial(call, **keywords), static_argnames="chunk")
  for chunk in (1, 4, 128):
    close(f(arrays, segments_BT=segments, chunk=chunk), oracle("kimi"), 1e-5)


@pytest.mark.parametrize("name", ["feature map", "gated delta"])
def test_a_row_in_two_parts_gives_the_same(name):
  """The state after 21 tokens is all that the rest needs."""
  arrays, keywords, _, _ = make(name)
  f = quick_jit(partial(call, chunk=CHUNK, **keywords))
  part = lambda where: {
    x: a if x == "state" or a is None else a[:, where] for x, a in arrays.items()
  }
  o_first, state = f(part(np.s_[:21]))
  o_then, state = f(part(np.s_[21:]) | {"state": state})
  close((jnp.concatenate([o_first, o_then], 1), state), f(arrays), 1e-5)


@quick_jit
def of_segments(arrays, segments):
  return call(arrays, segments_BT=segments, chunk=CHUNK, scale=0.5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12)), min_size=1, max_size=12))
def test_any_segments(parts):
  row = np.resize(np.concatenate([np.full(n, segment) for segment, n in parts]), T)
  segments = np.stack([row, row[::-1]]).astype(np.int32)
  arrays = make("kimi")[0]
  close(of_segments(arrays, segments), recurrent(**arrays, segments=segments, scale=0.5), 1e-5)


@pytest.mark.parametrize("name", ["gated delta", "kimi"])
def test_documents_do_not_touch_each_other(name):
  """Not in the last bit, forward or backward; and padding may hold anything, NaN too."""
  arrays, keywords, _, _ = make(name)
  first, padding = SEGMENTS[0] == 1, SEGMENTS[0] == 0

  @quick_jit
  def second(arrays):
    """What the second document of row 0 gives, and its gradient by everything."""

    def total(arrays):
      o, state = call(arrays, segments_BT=SEGMENTS, chunk=CHUNK, **keywords)
      seen = jnp.where((SEGMENTS[0] == 2)[:, None, None], o[0], 0)
      return jnp.sum(seen**2) + jnp.sum(state[0] ** 2), (o[0], state[0])

    return jax.grad(total, has_aux=True)(arrays)

  grads, (o, state) = second(arrays)
  other = {}
  for x, a in arrays.items():
    if x == "state":
      other[x] = 3 * a
    elif a is not None:
      first_1, padding_1 = (w.reshape(T, *(1,) * (a.ndim - 2)) for w in (first, padding))
      changed = jnp.where(padding_1, jnp.nan, jnp.where(first_1, 0.3 * a[0] - 0.1, a[0]))
      other[x] = a.at[0].set(changed)
    else:
      other[x] = None
  other_grads, (other_o, other_state) = second(other)
  there = SEGMENTS[0] == 2
  assert np.abs(np.asarray(other_o - o)[first]).max() > 1e-3
  np.testing.assert_array_equal(other_o[there], o[there])
  np.testing.assert_array_equal(other_state, state)
  assert not np.asarray(other_o)[padding].any()
  assert not np.asarray(grads["state"])[0].any()
  for x, grad in grads.items():
    if grad is not None and x != "state":
      np.testing.assert_array_equal(np.asarray(other_grads[x])[0], grad[0])
      assert not np.asarray(grad)[0, ~there].any() and np.asarray(grad)[0, there].any()


def test_decays_of_any_strength():
  """Where e^-b of a whole chunk would overflow float32 thousands of times over."""
  arrays, keywords, _, _ = make("kimi", 64)
  rng = np.random.default_rng(0)
  decay = -rng.choice([0.0, 1e-3, 30.0, 500.0], arrays["decay"].shape, p=[0.6, 0.2, 0.1, 0.1])
  arrays = arrays | {"decay": jnp.asarray(decay, jnp.float32)}

  def loss(arrays, implementation):
    o, state = call(arrays, chunk=64, implementation=implementation, **keywords)
    return jnp.sum(o**2) + jnp.sum(state**2), (o, state)

  f = quick_jit(jax.grad(loss, has_aux=True), static_argnums=1)
  got, want = f(arrays, "xla"), f(arrays, "reference")
  close(want[1], recurrent(**arrays, **keywords), 1e-5)
  close(got, want, 1e-5)


def test_the_delta_rule_of_equal_keys():
  """The inverse of a matrix of ones: a series in its powers would lose all digits."""
  key = np.tile(np.eye(H)[0], (1, 64, 1, 1)).astype(np.float32)
  v = np.random.default_rng(0).normal(size=(1, 64, 1, U)).astype(np.float32)
  o, _ = linear_attention(key, key, v, beta_BTN=jnp.ones((1, 64, 1)), chunk=64)
  np.testing.assert_allclose(o, v, atol=1e-5)  # each value replaces the one before


@pytest.mark.parametrize("name", ["gla", "gated delta"])
def test_backward_keeps_a_state_a_chunk(name):
  """And under a policy that keeps the named results nothing of the forward pass is repeated."""
  arrays, keywords, _, _ = make(name)

  def kept(implementation):
    f = partial(call, chunk=CHUNK, implementation=implementation, **keywords)
    pull = jax.eval_shape(lambda a: jax.vjp(f, a)[1], arrays)
    return sum(leaf.size for leaf in jax.tree.leaves(pull))

  chunks, N = -(-T // CHUNK), arrays["q"].shape[2]
  inputs = 4 * B * T * N * (H + U)  # at most
  assert chunks * B * N * H * U <= kept("xla") < chunks * B * N * H * U + inputs
  assert kept("reference") > T * B * N * H * U

  policy = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_state")
  f = jax.checkpoint(lambda a: call(a, chunk=CHUNK, **keywords)[0] ** 2, policy=policy)
  loops = str(jax.make_jaxpr(jax.grad(lambda a: jnp.sum(f(a))))(arrays)).count(" scan[")
  assert loops == 2


def test_explicit_axes():
  """Rows and heads stay sharded, of the result and of the state."""
  mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
  arrays, keywords, segments, _ = make("gated delta")
  arrays = arrays | {"k": jnp.repeat(arrays["k"], 2, 2), "v": jnp.repeat(arrays["v"], 2, 2)}
  arrays = arrays | {"state": None}
  f = quick_jit(partial(call, chunk=CHUNK, **keywords))
  want = f(arrays, segments_BT=segments)
  with jax.set_mesh(mesh):
    place = lambda x: jax.device_put(x, NamedSharding(mesh, P("data", None, "tensor")))
    o, state = f(
      jax.tree.map(place, arrays),
      segments_BT=jax.device_put(segments, NamedSharding(mesh, P("data"))),
    )
  assert o.sharding.spec[:3] == ("data", None, "tensor")
  assert state.sharding.spec[:2] == ("data", "tensor")
  close((o, state), want, 1e-6)


def test_what_does_not_fit_says_why():
  x = jnp.ones((1, 4, 2, 8))
  for message, arguments, keywords in (
    (r"q \[B, T, N, H\]", (x[0], x, x), {}),
    ("same tokens", (x, x[:, :3], x), {}),
    ("one head size", (x, x[..., :4], x), {}),
    ("do not divide", (jnp.ones((1, 4, 3, 8)), x, x), {}),
    ("power of two", (x, x, x), {"chunk": 24}),
    ("no sum to normalize", (x, x, x), {"beta_BTN": x[..., 0], "normalize": True}),
    (r"decay needs the shape \(1, 4, 2\)", (x, x, x), {"decay": x[0, :, :, 0]}),
    ("decay needs the shape", (x, x, x), {"decay": x[..., :4]}),
    ("beta_BTN needs the shape", (x, x, x), {"beta_BTN": x}),
    (r"state needs the shape \(1, 2, 8, 9\)", (x, x, x), {"normalize": True, "state_BNHU": x}),
    ("segments_BT needs the shape", (x, x, x), {"segments_BT": jnp.ones((4,), jnp.int32)}),
    ("unknown implementation 'fast'", (x, x, x), {"implementation": "fast"}),
  ):
    with pytest.raises(ValueError, match=message):
      linear_attention(*arguments, **keywords)
