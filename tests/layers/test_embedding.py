import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.embedding import Embedding, embed_tokens
from layers.params import axes, init_params, unbox
from layers.spec import EmbeddingSpec, InitSpec, LearnedPositionSpec, NormSpec
from tests.oracles import norms

V, D, W = 11, 6, 4
TOKENS = jnp.array([[3, 0, 10], [3, 3, 7]])
POSITIONS = jnp.array([[0, 1, 2], [4, 0, 1]])
TABLE = np.random.default_rng(0).normal(size=(V, D)).astype(np.float32)

embed = jax.jit(embed_tokens, static_argnames="dtype")


def shell(dtype=jnp.float32, **spec):
  return Embedding(EmbeddingSpec(**spec), V, D, InitSpec(), dtype)


@functools.cache
def params_of(module):
  return init_params(module, jax.random.key(0), TOKENS, POSITIONS)


def run(module, **kwargs):
  return module.apply({"params": params_of(module)}, TOKENS, POSITIONS, **kwargs)


def test_embed_tokens_picks_rows():
  got = embed(TOKENS, TABLE, dtype=jnp.float32)
  np.testing.assert_array_equal(got, TABLE[np.asarray(TOKENS)])


@pytest.mark.parametrize("bad", [V, V + 100, -1])
def test_an_id_outside_the_table_is_nan(bad):
  got = embed(TOKENS.at[1, 1].set(bad), TABLE, dtype=jnp.float32)
  assert np.isnan(got[1, 1]).all()
  assert np.isfinite(np.delete(got.reshape(-1, D), 4, axis=0)).all()


def test_gradient_sums_every_use_of_a_token_in_float32():
  tokens = jnp.zeros((2, 1024), jnp.int32)

  @jax.jit
  @jax.grad
  def gradient(table):
    return embed_tokens(tokens, table, dtype=jnp.bfloat16).astype(jnp.float32).sum()

  got = gradient(jnp.asarray(TABLE))
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got[0], np.full(D, 2048.0))  # bfloat16 stops counting at 256
  np.testing.assert_array_equal(got[1:], 0)


def test_plain_shell_is_the_table():
  module = shell()
  assert {k: v.shape for k, v in params_of(module).items()} == {"table": (V, D)}
  np.testing.assert_array_equal(run(module), params_of(module)["table"][TOKENS])


def test_learned_positions_are_offset_rows():
  module = shell(position=LearnedPositionSpec(length=5, offset=2))
  params = params_of(module)
  assert params["position_table"].shape == (7, D)
  want = params["table"][TOKENS] + params["position_table"][POSITIONS + 2]
  np.testing.assert_allclose(run(module), want, rtol=1e-6)
  beyond = module.apply({"params": params}, TOKENS, POSITIONS + 1)
  assert np.isnan(beyond[1, 0]).all() and np.isfinite(beyond[0]).all()


def test_everything_at_once_in_order():
  module = shell(
    width=W,
    scale_by_sqrt_dim=True,
    position=LearnedPositionSpec(8),
    norm=NormSpec("layer", 1e-5, bias=True),
  )
  params = params_of(module)
  p = {k: np.asarray(v, np.float64) for k, v in params.items() if k != "norm"}
  tokens, positions = np.asarray(TOKENS), np.asarray(POSITIONS)
  x = p["table"][tokens] * D**0.5 @ p["project_in"] + p["position_table"][positions]
  want = norms.layer_norm(x, np.ones(D), np.zeros(D), 1e-5)
  np.testing.assert_allclose(run(module), want, rtol=1e-4, atol=1e-5)


def test_declared_axes():
  module = shell(width=W, position=LearnedPositionSpec(8), norm=NormSpec())
  init = functools.partial(module.init, jax.random.key(0))
  boxed = jax.eval_shape(init, TOKENS, POSITIONS)["params"]
  assert axes(boxed) == {
    "table": ("vocab", "embed"),
    "project_in": (None, "embed"),
    "position_table": (None, "embed"),
    "norm": {"scale": ("norm",)},
  }
  shapes = {k: v.shape for k, v in unbox(boxed).items() if k != "norm"}
  assert shapes == {"table": (V, W), "project_in": (W, D), "position_table": (8, D)}


def test_gemma_scale_is_rounded_to_the_compute_dtype():
  module = shell(jnp.bfloat16, scale_by_sqrt_dim=True)
  got = run(module)
  assert got.dtype == jnp.bfloat16
  factor = jnp.bfloat16(2.453125)  # sqrt(6) = 2.4495 to eight bits
  np.testing.assert_array_equal(
    got, params_of(module)["table"].astype(jnp.bfloat16)[TOKENS] * factor
  )
  exact = run(shell(scale_by_sqrt_dim=True))
  np.testing.assert_allclose(exact, params_of(module)["table"][TOKENS] * 6**0.5, rtol=1e-6)


def test_dropout_only_with_a_key():
  module = shell(dropout=0.5)
  still = run(module)
  np.testing.assert_array_equal(still, params_of(module)["table"][TOKENS])
  dropped = run(module, key_B=jax.random.split(jax.random.key(1), 2))
  np.testing.assert_allclose(dropped, np.where(dropped == 0, 0, 2 * still), rtol=1e-6)
  assert 0 < (dropped == 0).sum() < dropped.size


@pytest.mark.parametrize("width", [None, W])
def test_a_tied_head_reads_the_table_at_its_width(width):
  module = shell(width=width)
  params = params_of(module)
  x_BTD = jax.random.normal(jax.random.key(2), (2, 3, D))
  fresh = module.init(jax.random.key(0), x_BTD, method="to_table_width")["params"]
  narrow, table = module.apply(
    {"params": {**unbox(fresh), "table": params["table"]}},
    x_BTD,
    method=lambda m, x: (m.to_table_width(x), m.table),
  )
  np.testing.assert_array_equal(table, params["table"])
  if width is None:
    assert "project_out" not in fresh
    np.testing.assert_array_equal(narrow, x_BTD)
  else:
    assert axes(fresh)["project_out"] == ("embed", None)
    weight = np.asarray(unbox(fresh)["project_out"], np.float64)
    np.testing.assert_allclose(narrow, np.asarray(x_BTD, np.float64) @ weight, rtol=1e-4, atol=1e-5)


def test_tables_start_at_the_embedding_stddev():
  big = Embedding(
    EmbeddingSpec(position=LearnedPositionSpec(500)), 500, 40, InitSpec(embed_stddev=0.3)
  )
  params = init_params(big, jax.random.key(0), TOKENS, POSITIONS)
  for table in params.values():
    np.testing.assert_allclose(table.std(), 0.3, rtol=0.02)  # 20,000 draws: 0.5 % standard error
