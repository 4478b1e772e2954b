"""The pipeline against the same layers one after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mesh.pipeline import bubble_fraction, pipeline, stage_order
from mesh.topology import make_mesh

pytestmark = pytest.mark.xdist_group("devices")
LAYERS, WIDTH = 8, 5
rng = np.random.default_rng(0)
WEIGHTS = rng.normal(size=(LAYERS, WIDTH, WIDTH)).astype(np.float32) / 2


def in_turn(weights, x_MX):
  """Output and, for each layer, the sum of its outputs over microbatches."""
  sums = []
  for w in weights:
    x_MX = jnp.tanh(x_MX @ w)
    sums.append(x_MX.sum())
  return x_MX, jnp.stack(sums)


def through(stages, repeats):
  def local(weights, x_MX):
    chunks = weights.reshape(repeats, -1, WIDTH, WIDTH)

    def stage(chunk, microbatch, x):
      del microbatch
      stats = []
      for w in chunks[chunk]:
        x = jnp.tanh(x @ w)
        stats.append(x.sum())
      return x, jnp.stack(stats)

    out, stats = pipeline(stage, x_MX, repeats=repeats)
    return out, stats.reshape(-1)

  run = jax.shard_map(local, in_specs=(P("stage"), P()), out_specs=(P(), P("stage")))
  order = stage_order(LAYERS, stages, repeats)

  def model(weights, x_MX):
    out, stats = run(weights[order], x_MX)
    return out, stats[order.argsort()]

  return model


@pytest.mark.parametrize(
  ("stages", "repeats", "microbatches"), [(4, 1, 3), (4, 2, 4), (2, 4, 3), (2, 2, 2)]
)
def test_stages_compute_what_layers_do(stages, repeats, microbatches):
  x = rng.normal(size=(microbatches, 2, WIDTH)).astype(np.float32)

  def loss(model, weights, x):
    out, stats = model(weights, x)
    return jnp.sum(out**2) + jnp.sum(jnp.sin(stats)), (out, stats)

  def run(model):
    grad = jax.value_and_grad(functools.partial(loss, model), argnums=(0, 1), has_aux=True)
    return jax.jit(grad)(WEIGHTS, x)

  wanted = run(in_turn)
  with jax.set_mesh(make_mesh({"stage": stages}, jax.devices()[:stages])):
    found = run(through(stages, repeats))
  close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5)
  jax.tree.map(close, found, wanted)


def test_a_microbatch_may_not_return_before_it_is_due():
  with jax.set_mesh(make_mesh({"stage": 4}, jax.devices()[:4])), pytest.raises(ValueError) as error:
    jax.eval_shape(through(4, 2), WEIGHTS, np.ones((3, 2, WIDTH), np.float32))
  assert "at least 4 microbatches" in str(error.value)


@pytest.mark.parametrize(("stages", "microbatches", "repeats"), [(4, 8, 1), (4, 8, 2), (2, 2, 3)])
def test_bubble_is_the_idle_share_of_the_schedule(stages, microbatches, repeats):
  """Counted on the schedule: chunk r of microbatch m runs on stage s in tick r M + m + s."""
  busy = np.zeros((stages, repeats * microbatches + stages - 1), int)
  for s in range(stages):
    for r in range(repeats):
      for m in range(microbatches):
        busy[s, r * microbatches + m + s] += 1
  assert busy.max() == 1
  assert bubble_fraction(stages, microbatches, repeats) == pytest.approx(1 - busy.mean())


def test_chunks_go_round_the_stages():
  assert stage_order(8, 2, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
  assert stage_order(8, 4, 1).tolist() == list(range(8))
