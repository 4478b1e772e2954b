"""The training step: what is averaged over what, and that no split of the batch matters.

B rows a batch, T tokens a row, V vocabulary.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.training.compiled_step import CompileOnce
from experiments.training.state import TrainState
from experiments.training.step import make_eval_step, make_train_step, row_keys
from layers.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, MoeSpec, RotarySpec, Segment
from layers.transformer import TransformerLM
from tests.experiments.programs import random_params

B, T, V = 4, 12, 24
MLP = MlpSpec(hidden=16)
ATTENTION = AttentionSpec(num_heads=2, head_dim=8, position=RotarySpec())


def layer(mlp, dropout=0.0):
  segment = Segment((LayerSpec(ATTENTION, mlp, dropout=dropout),))
  return TransformerLM(ModelSpec(vocab_size=V, embed_dim=16, max_length=T, segments=(segment,)))


DENSE = layer(MLP)
# Jitter and dropout so strong that other keys would show; capacity so small that rows drop tokens.
SPARSE = layer(
  MoeSpec(3, MLP, dispatch="capacity", jitter=0.5, balance_loss=0.1, z_loss=0.1, min_capacity=1),
  dropout=0.3,
)


@cache
def batch():
  rng = np.random.default_rng(0)
  segments_BT = np.ones((B, T), np.int32)
  segments_BT[1, 5:] = 2  # two documents
  segments_BT[3, 7:] = 0  # padding, so that halves of the batch weigh unlike
  positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy()
  positions_BT[1, 5:] -= 5
  return {
    "tokens": rng.integers(V, size=(B, T), dtype=np.int32),
    "targets": rng.integers(V, size=(B, T), dtype=np.int32),
    "segments": segments_BT,
    "positions": positions_BT,
    "weights": (segments_BT > 0).astype(np.float32),
  }


@cache
def params_of(model):
  return random_params(model, scale=0.3)


@cache
def step_of(model, **settings):
  """(metrics, gradients) of one step; plain SGD at rate 1 makes the update the gradient."""
  optimizer = optax.sgd(1.0)
  step = jax.jit(make_train_step(model, optimizer, **settings))
  params = params_of(model)

  def run(number=7):
    state = TrainState(jnp.int32(number), params, optimizer.init(params))
    after, metrics = step(state, batch())
    assert int(after.step) == number + 1
    return metrics, jax.tree.map(jnp.subtract, params, after.params)

  return run


def close(a, b, rtol=2e-5, atol=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def test_microbatches_change_nothing():
  """Neither loss nor gradients, routing statistics, jitter or dropout."""
  whole, gradients = step_of(SPARSE, seed=0)()
  split, gradients_of_parts = step_of(SPARSE, seed=0, microbatches=2)()
  close(whole, split)
  close(gradients, gradients_of_parts)
  assert float(whole.moe[0].dropped.sum()) > 0 and float(whole.aux_loss) > 0


def test_noise_follows_seed_and_step():
  run, other_seed = step_of(SPARSE, seed=0), step_of(SPARSE, seed=1)
  again, later, other = run()[0], run(8)[0], other_seed()[0]
  assert float(run()[0].loss) == float(again.loss)
  assert abs(float(again.loss) - float(later.loss)) > 1e-4
  assert abs(float(again.loss) - float(other.loss)) > 1e-4


def test_a_key_belongs_to_a_row_of_the_global_batch():
  keys = jax.random.key_data(row_keys(3, jnp.int32(5), jnp.arange(6)))
  part = jax.random.key_data(row_keys(3, jnp.int32(5), jnp.array([4, 1])))
  np.testing.assert_array_equal(part, keys[np.array([4, 1])])
  assert len({tuple(k) for k in np.asarray(keys)}) == 6


@jax.jit
def reference(params, z_loss):
  """Loss and gradient from whole logits: a mean over the targets that count."""
  b = jax.tree.map(jnp.asarray, batch())

  def total(params):
    logits_BTV = DENSE.apply(
      {"params": params}, b["tokens"], positions_BT=b["positions"], segments_BT=b["segments"]
    ).logits_BTV
    lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, b["targets"][..., None], axis=-1)[..., 0]
    mean = lambda x_BT: jnp.sum(x_BT * b["weights"]) / b["weights"].sum()
    return mean(lse_BT - target_BT) + z_loss * mean(lse_BT**2), mean(lse_BT - target_BT)

  (_, nll), gradients = jax.value_and_grad(total, has_aux=True)(params)
  return nll, gradients


@pytest.mark.parametrize("z_loss", (0.0, 0.5))
def test_loss_and_z_loss_are_means_over_counting_targets(z_loss):
  metrics, gradients = step_of(DENSE, seed=0, z_loss=z_loss)()
  nll, expected = reference(params_of(DENSE), z_loss)
  close(gradients, expected)
  np.testing.assert_allclose(metrics.loss, nll, rtol=1e-5)  # without the z-loss
  norm = np.sqrt(sum(float(np.sum(np.square(g))) for g in jax.tree.leaves(expected)))
  np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
  assert float(metrics.tokens) == batch()["weights"].sum() == 43
  assert metrics.moe == () and float(metrics.aux_loss) == 0


def test_a_batch_without_targets_gives_no_gradient():
  blank = batch() | {"weights": np.zeros((B, T), np.float32)}
  optimizer = optax.sgd(1.0)
  params = params_of(DENSE)
  state = TrainState(jnp.int32(0), params, optimizer.init(params))
  after, metrics = jax.jit(make_train_step(DENSE, optimizer, seed=0))(state, blank)
  jax.tree.map(np.testing.assert_array_equal, after.params, params)
  assert float(metrics.loss) == float(metrics.grad_norm) == 0


@pytest.mark.parametrize("microbatches", (pytest.param(1, marks=pytest.mark.full), 2))
def test_a_skipped_update_leaves_every_bit(microbatches):
  """NaN and infinite gradients, norms above the limit, and steps that are only tried."""
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
  params = params_of(SPARSE)
  step = jax.jit(make_train_step(SPARSE, optimizer, seed=0, microbatches=microbatches))
  state, metrics = step(TrainState(jnp.int32(0), params, optimizer.init(params)), batch(), np.inf)
  assert not metrics.skipped and metrics.update_ratio > 0
  norm = float(metrics.grad_norm)

  def same(limit, weight=1.0, finished=1):
    weights_BT = batch()["weights"].copy()
    weights_BT[2, 3] = weight
    after, told = step(state, batch() | {"weights": weights_BT}, np.float32(limit))
    jax.tree.map(np.testing.assert_array_equal, after[1:], state[1:])
    assert bool(told.skipped) and float(told.update_ratio) == 0
    assert int(after.step) == int(state.step) + finished
    return told

  assert not np.isfinite(same(np.inf, np.nan).grad_norm)
  assert not np.isfinite(same(np.inf, np.inf).loss)
  same(0.0)
  same(-np.inf, finished=0)
  below, told = step(state, batch(), np.float32(2 * norm))
  assert not told.skipped
  plain, _ = step(state, batch())
  jax.tree.map(np.testing.assert_array_equal, below, plain)
  assert any(
    np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (below[1], state[1])), strict=True)
  )


def test_what_a_step_tells_of_itself():
  """log Z and the update's ratio against numpy, blank rows counted."""
  params, optimizer = params_of(DENSE), optax.sgd(0.5)
  blank = {
    k: np.where(np.arange(B)[:, None] == 1, 0, x).astype(x.dtype) for k, x in batch().items()
  }
  state = TrainState(jnp.int32(0), params, optimizer.init(params))
  after, told = jax.jit(make_train_step(DENSE, optimizer, seed=0))(state, blank)
  assert int(told.blank_rows) == 1
  norm = lambda tree: np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in tree))
  old, new = (list(map(np.asarray, jax.tree.leaves(t))) for t in (params, after.params))
  moved = norm([b.astype(np.float64) - a for a, b in zip(old, new, strict=True)])
  np.testing.assert_allclose(told.update_ratio, moved / norm(old), rtol=1e-4)
  logits_BTV = DENSE.apply(
    {"params": params}, blank["tokens"], positions_BT=blank["positions"],
    segments_BT=blank["segments"],
  ).logits_BTV  # fmt: skip
  logits_BTV = np.asarray(logits_BTV, np.float64)
  log_z_BT = np.log(np.exp(logits_BTV).sum(-1))
  expected = (log_z_BT * blank["weights"]).sum() / blank["weights"].sum()
  np.testing.assert_allclose(told.log_z, expected, rtol=1e-5)


def test_evaluation_sums_without_noise():
  lengths_V = np.arange(V - 2, dtype=np.int32) % 4
  evaluate = jax.jit(make_eval_step(SPARSE, lengths_V))
  params, b = params_of(SPARSE), batch()
  sums, again = evaluate(params, b), evaluate(params, b)
  assert float(sums.nll) == float(again.nll)
  assert float(sums.tokens) == 43
  counted = b["targets"][b["weights"] > 0]
  assert float(sums.bytes) == sum(lengths_V[i] for i in counted if i < V - 2)  # padding ids: none
  rows = [evaluate(params, {k: x[i : i + 1] for k, x in b.items()}) for i in range(B)]
  np.testing.assert_allclose(sums.nll, sum(float(r.nll) for r in rows), rtol=1e-5)


def test_compile_once_tells_what_changed():
  notes = []
  step = CompileOnce(jax.jit(lambda state, batch: state["w"] + batch["x"].sum()), notes.append)
  w, x = jnp.ones(3), jnp.ones((2, 5))
  for _ in range(3):
    step({"w": w}, {"x": x})
  assert notes == []
  step({"w": w}, {"x": jnp.ones((2, 6))})
  step({"w": w}, {"x": jnp.ones((2, 6), jnp.bfloat16)})
  shape, dtype = notes
  assert "recompiled the step: 1 inputs changed, e.g. [1]['x'] from float32[2,5]" in shape
  assert "to float32[2,6]" in shape
  assert "[1]['x'] from float32[2,6]" in dtype and "to bfloat16[2,6]" in dtype
  step({"w": w}, {"x": x})  # known: compiled before
  assert len(notes) == 2
  with jax.default_matmul_precision("highest"):
    step({"w": w}, {"x": x})
  assert "no input changed, so a context did" in notes[2]


def test_compile_once_sees_shardings_of_donated_arrays():
  notes = []
  step = CompileOnce(jax.jit(lambda state: state + 1, donate_argnums=0), notes.append)
  first, second = jax.devices()[:2]
  step(jax.device_put(np.ones(3, np.float32), first))
  step(jax.device_put(np.ones(3, np.float32), second))
  assert len(notes) == 1 and "SingleDeviceSharding" in notes[0]


def test_selection_biases_follow_the_loads_of_the_whole_batch():
  """DeepSeek-V3: up where the load lies below the mean, down above; only in that layer."""
  rate = 1e-3
  balanced = MoeSpec(6, MLP, 2, router="top_k", scores="sigmoid", bias_rate=rate, jitter=0.0)
  plain = LayerSpec(ATTENTION, MoeSpec(3, MLP, jitter=0.0))
  segments = (
    Segment((plain,)),
    Segment((LayerSpec(ATTENTION, MLP), LayerSpec(ATTENTION, balanced)), 2),
  )
  model = TransformerLM(ModelSpec(vocab_size=V, embed_dim=16, max_length=T, segments=segments))
  metrics, moved = step_of(model, seed=0, microbatches=2)()
  load_LE = np.asarray(metrics.moe[1].load_E)
  assert load_LE.shape == (2, 6) and load_LE.sum() == 2 * 2 * (batch()["segments"] > 0).sum()
  assert (load_LE.std(axis=1) > 0).all()
  want = rate * np.sign(load_LE.mean(axis=1, keepdims=True) - load_LE)
  bias_LE = moved["segment_1"]["layer_1"]["moe"]["selection_bias"]
  np.testing.assert_allclose(-bias_LE, want, atol=1e-6)
