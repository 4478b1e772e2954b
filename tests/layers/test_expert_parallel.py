"""Dropless experts over devices equal those of one device, whatever way rows and experts meet."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from layers.expert_parallel import Choices, choose_exchange, dropless
from layers.experts import ExpertMath, ExpertWeights, grouped_expert_mlp
from mesh.collectives import _runs

M, X, E, D, F = 24, 2, 8, 6, 10  # M tokens a device
DEVICES = {"expert": 4, "data": 2}


def run(rows_RD, size_E, weights, seed_R, dropout=0.0):
  return grouped_expert_mlp(rows_RD, size_E, weights, ExpertMath(dropout=dropout), seed_R)


def inputs(skew: bool):
  rng = np.random.default_rng(0)
  tokens = M * 8
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  expert = np.argsort(rng.random((tokens, E)))[:, :X]
  if skew:
    expert[:] = [5, 4]  # two experts of one device
  chosen = rng.random((tokens, X)) < 0.8
  choices = Choices(
    draw(tokens, D),
    jnp.asarray(rng.random((tokens, X)) * chosen, jnp.float32),
    jnp.asarray(expert, jnp.int32),
    jnp.asarray(chosen),
    jnp.asarray(rng.integers(0, 2**32, tokens), jnp.uint32),
  )
  return choices, ExpertWeights(draw(E, D, F) / 3, draw(E, F, D) / 3, draw(E, D, F) / 3)


def compute(choices, weights, **options):
  """Loss, outputs and dropped choices of one device's share, or of everything."""
  rate = options.pop("dropout", 0.0)
  here = functools.partial(run, dropout=rate)
  y_MD, dropped = dropless(choices, weights, here, **options)
  return y_MD, dropped


@functools.cache
def on_one(skew, dropout):
  choices, weights = inputs(skew)
  return jax.jit(functools.partial(_graded, dropout=dropout))(choices, weights)


def _graded(choices, weights, **options):
  def loss(x_MD, weight_MX, weights):
    given = choices._replace(x_MD=x_MD, weight_MX=weight_MX)
    y_MD, dropped = compute(given, weights, **options)
    return jnp.sum(jnp.sin(y_MD)), (y_MD, dropped)

  wanted = (choices.x_MD, choices.weight_MX, weights)
  grads, (y_MD, dropped) = jax.grad(loss, (0, 1, 2), has_aux=True)(*wanted)
  return grads, y_MD, dropped


def on_eight(skew, **options):
  mesh = jax.make_mesh(tuple(DEVICES.values()), tuple(DEVICES), axis_types=(AxisType.Auto,) * 2)
  rows, experts = PartitionSpec(("data", "expert")), PartitionSpec("expert")

  def local(choices, weights):
    def loss(x_MD, weight_MX, weights):
      given = choices._replace(x_MD=x_MD, weight_MX=weight_MX)
      y_MD, dropped = compute(given, weights, **options)
      return jnp.sum(jnp.sin(y_MD)), (y_MD, dropped)

    wanted = (choices.x_MD, choices.weight_MX, weights)
    grads, (y_MD, dropped) = jax.grad(loss, (0, 1, 2), has_aux=True)(*wanted)
    return grads, y_MD, jax.lax.psum(dropped, ("data", "expert"))

  sharded = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(rows, experts),
    out_specs=((rows, rows, experts), rows, PartitionSpec()),
  )
  return jax.jit(sharded)(*inputs(skew))


@pytest.mark.parametrize("skew", [False, True], ids=["spread", "skewed"])
@pytest.mark.parametrize("exchange", ["all_to_all", "ring"])
def test_equals_one_device(exchange, skew):
  want, got = on_one(skew, 0.25), on_eight(skew, exchange=exchange, dropout=0.25)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), got, want)
  assert got[2] == 0
  assert np.abs(on_one(skew, 0.0)[1] - want[1]).max() > 0.1  # the dropout was there


def test_bounded_counts_what_it_drops():
  choices, _ = inputs(True)
  *_, dropped = on_eight(True, exchange="bounded", buffer_factor=1.0)
  block = (
    M * X // DEVICES["expert"]
  )  # each device may send so many rows to the one with the experts
  made = np.asarray(choices.chosen_MX).reshape(8, -1).sum(1)
  assert dropped == np.maximum(made - block, 0).sum() > 0
  assert on_eight(False, exchange="bounded", buffer_factor=4.0)[2] == 0


@pytest.mark.parametrize(
  "devices, local, k, ragged, want",
  [(8, 1, 2, True, "all_to_all"),  # Mixtral
   (8, 8, 1, True, "all_to_all"),
   (64, 1, 1, True, "ring"),  # worst case 64 times the load
   (8, 32, 8, True, "ring"),  # every token goes nearly everywhere
   (8, 1, 2, False, "ring")],
)  # fmt: skip
def test_the_rule(devices, local, k, ragged, want):
  assert choose_exchange(devices, local, k, ragged) == want


def test_runs_by_brute_force():
  start, size, target = np.array([0, 4, 4, 9]), np.array([3, 0, 5, 1]), np.array([20, 0, 7, 40])
  want = np.full(12, 99)
  for s, n, t in zip(start, size, target, strict=True):
    want[s : s + n] = t + np.arange(n)
  np.testing.assert_array_equal(_runs(*map(jnp.asarray, (start, size, target)), 12, 99), want)
