"""Dropless experts over devices equal those of one device, whatever way rows and experts meet."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from layers import expert_parallel
from layers.expert_parallel import Choices, choose_exchange, dropless
from layers.experts import ExpertMath, ExpertWeights, grouped_expert_mlp
from mesh.collectives import _runs

M, X, E, D, F = 24, 2, 8, 6, 10  # M tokens a device
DEVICES = {"expert": 4, "data": 2}


def run(rows_RD, size_E, weights, weight_R, seed_R, dropout=0.0):
  math = ExpertMath(dropout=dropout)
  return grouped_expert_mlp(rows_RD, size_E, weights, math, weight_R, seed_R)


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


def graded(choices, weights, options):
  """Gradients, outputs and dropped choices of one device's share, or of everything."""
  options = dict(options)
  options.pop("ragged", None)  # a program of its own
  here = functools.partial(run, dropout=options.pop("dropout", 0.0))

  def loss(x_MD, weight_MX, weights):
    given = choices._replace(x_MD=x_MD, weight_MX=weight_MX)
    y_MD, dropped = dropless(given, weights, here, **options)
    return jnp.sum(jnp.sin(y_MD)), (y_MD, dropped)

  wanted = (choices.x_MD, choices.weight_MX, weights)
  grads, (y_MD, dropped) = jax.grad(loss, (0, 1, 2), has_aux=True)(*wanted)
  return grads, y_MD, dropped


_one = jax.jit(graded, static_argnums=2)


@functools.cache
def on_one(skew, dropout):
  return _one(*inputs(skew), (("dropout", dropout),))


@functools.cache
def _eight(*options):
  mesh = jax.make_mesh(tuple(DEVICES.values()), tuple(DEVICES), axis_types=(AxisType.Auto,) * 2)
  rows, experts = PartitionSpec(("data", "expert")), PartitionSpec("expert")

  def local(choices, weights):
    grads, y_MD, dropped = graded(choices, weights, options)
    return grads, y_MD, jax.lax.psum(dropped, ("data", "expert"))

  out = ((rows, rows, experts), rows, PartitionSpec())
  return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(rows, experts), out_specs=out))


def on_eight(skew, **options):
  return _eight(*options.items())(*inputs(skew))


@pytest.mark.parametrize("skew", [False, True], ids=["spread", "skewed"])
@pytest.mark.parametrize("exchange", ["all_to_all", "ring"])
def test_equals_one_device(exchange, skew):
  want, got = on_one(skew, 0.25), on_eight(skew, exchange=exchange, dropout=0.25)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), got, want)
  assert got[2] == 0


def ragged_by_gathering(rows, out, first, sizes, there, received, *, axis_name):
  """What `lax.ragged_all_to_all`, which no CPU has, is documented to do."""
  everywhere = lambda a: jax.lax.all_gather(a, axis_name)
  rows_P, first_PP, sizes_PP, there_PP = map(everywhere, (rows, first, sizes, there))
  me, place_R = jax.lax.axis_index(axis_name), jnp.arange(out.shape[0])
  for src in range(rows_P.shape[0]):
    step_R = place_R - there_PP[src, me]
    mine_R = (step_R >= 0) & (step_R < sizes_PP[src, me])
    sent = rows_P[src].at[first_PP[src, me] + step_R].get(mode="clip")
    out = jnp.where(mine_R.reshape(-1, *(1,) * (out.ndim - 1)), sent, out)
  agreed = (received == sizes_PP[:, me]).all()
  return jnp.where(agreed, out, jnp.full_like(out, 77))


@pytest.mark.parametrize("skew", [False, True], ids=["spread", "skewed"])
def test_rows_that_travel_alone(skew, monkeypatch):
  monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_by_gathering)
  monkeypatch.setattr(expert_parallel, "has_ragged", lambda: True)
  want, got = on_one(skew, 0.25), on_eight(skew, exchange="all_to_all", dropout=0.25, ragged=True)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), got, want)


def test_bounded_counts_what_it_drops():
  choices, _ = inputs(True)
  options = {"exchange": "bounded", "buffer_factor": 1.0}
  *_, dropped = on_eight(True, **options)
  block = M * X // DEVICES["expert"]  # a device may send so many rows to the one with the experts
  made = np.asarray(choices.chosen_MX).reshape(8, -1).sum(1)
  assert dropped == np.maximum(made - block, 0).sum() > 0
  expert = np.where(choices.chosen_MX, inputs(False)[0].expert_MX, -1).reshape(8, -1)
  sent = [[np.sum(e // 2 == d) for d in range(4)] for e in expert]
  assert on_eight(False, **options)[2] == np.maximum(np.array(sent) - block, 0).sum()


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
