"""Capacity dispatch: who gets a slot, and that rows travel there and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from layers.dispatch import (
  assign_slots,
  expert_capacity,
  permute,
  slot_weights,
  sort_slots,
  unpermute,
)
from tests.oracles import moe as oracle

_assign = jax.jit(assign_slots, static_argnames=("num_experts", "capacity"))


@pytest.mark.parametrize(
  "tokens, experts, k, factor, want",
  [(4096, 64, 1, 1.25, 80), (1000, 32, 2, 1.25, 79), (10, 4, 1, 1.25, 4), (10, 4, 1, 2.0, 5),
   (3, 4, 1, 1.25, 3), (256, 8, 1, 1.0, 32)],
)  # fmt: skip
def test_capacity_is_the_ceiling_with_k_included(tokens, experts, k, factor, want):
  assert expert_capacity(tokens, experts, k, factor, min_capacity=4) == want


def test_worked_example_first_choices_before_second():
  """The routing example's top-2 lists at C=1: token 0 takes both its experts, token 3 the third."""
  experts = jnp.array([[[0, 1], [0, 2], [0, 1], [2, 1]]])
  slots = _assign(experts, jnp.ones((1, 4, 2), bool), num_experts=4, capacity=1)
  kept = np.argwhere(np.asarray(slots.slot_GSX[0]) < 4)
  pairs = {(int(s), int(experts[0, s, x])) for s, x in kept}
  assert pairs == {(0, 0), (0, 1), (3, 2)}
  assert slots.dropped == 5


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31 - 1), st.sampled_from([1, 3, 12]))
def test_slots_agree_with_oracle_and_are_inverse_maps(seed, capacity):
  rng = np.random.default_rng(seed)
  experts = np.stack(
    [rng.permuted(np.tile(np.arange(5), (12, 1)), axis=1)[:, :2] for _ in range(2)]
  )
  valid = rng.random((2, 12)) < 0.8
  chosen = jnp.broadcast_to(jnp.asarray(valid)[..., None], experts.shape)
  slots = _assign(jnp.asarray(experts), chosen, num_experts=5, capacity=capacity)
  for g in range(2):
    kept = oracle.place(experts[g], 5, capacity, valid[g])
    np.testing.assert_array_equal(slots.slot_GSX[g] < 5 * capacity, kept)
    for s, x in np.argwhere(kept):
      slot = int(slots.slot_GSX[g, s, x])
      assert slot // capacity == experts[g, s, x]
      assert slots.choice_GR[g, slot] == s * 2 + x
    assert (np.asarray(slots.token_GR[g]) == 12).sum() == 5 * capacity - kept.sum()
  dropped = sum(
    2 * valid[g].sum() - oracle.place(experts[g], 5, capacity, valid[g]).sum() for g in range(2)
  )
  assert slots.dropped == dropped


def test_gradients_of_permute_and_unpermute():
  rng = np.random.default_rng(0)
  experts = jnp.asarray(np.argsort(rng.random((2, 6, 4)))[..., :2])
  slots = assign_slots(experts, jnp.ones((2, 6, 2), bool), num_experts=4, capacity=2)
  x = jnp.asarray(rng.normal(size=(2, 6, 3)), jnp.float32)
  w = jnp.asarray(rng.random((2, 6, 2)), jnp.float32)

  def there_and_back(x, w):
    return unpermute(jnp.tanh(permute(x, slots)) * slot_weights(w, slots)[..., None], slots)

  rows = np.tanh(np.asarray(x))[:, :, None] * np.asarray(w)[..., None]
  kept = np.asarray(slots.slot_GSX)[..., None] < 4 * 2
  np.testing.assert_allclose(there_and_back(x, w), (rows * kept).sum(2), rtol=1e-6)
  check_grads(there_and_back, (x, w), order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)


def test_a_dropped_token_comes_back_as_exact_zero():
  slots = assign_slots(
    jnp.zeros((1, 3, 1), jnp.int32), jnp.ones((1, 3, 1), bool), num_experts=2, capacity=1
  )
  x = jnp.full((1, 3, 2), 7.0)
  y = unpermute(permute(x, slots), slots)
  np.testing.assert_array_equal(y, [[[7, 7], [0, 0], [0, 0]]])


@pytest.mark.parametrize(
  "priority, capacity, want",
  [
    ("choice", 1, {(0, 0), (0, 1), (3, 2)}),
    ("token", 1, {(0, 0), (0, 1), (1, 2)}),
    ("gate", 1, {(2, 0), (2, 1), (3, 2)}),
    ("choice", 2, {(0, 0), (0, 1), (1, 0), (1, 2), (2, 1), (3, 2)}),
    ("token", 2, {(0, 0), (0, 1), (1, 0), (1, 2), (2, 1), (3, 2)}),
  ],
)
def test_who_comes_first(priority, capacity, want):
  """The worked example's top-2 lists and top-1 gates."""
  experts = np.array([[[0, 1], [0, 2], [0, 1], [2, 1]]])
  gates = jnp.array([[0.643914, 0.455054, 0.696387, 0.579259]])
  slots = assign_slots(
    jnp.asarray(experts), jnp.ones((1, 4, 2), bool),
    num_experts=4, capacity=capacity, priority=priority, gate_GS=gates,
  )  # fmt: skip
  kept = np.argwhere(np.asarray(slots.slot_GSX[0]) < 4 * capacity)
  assert {(int(s), int(experts[0, s, x])) for s, x in kept} == want
  assert slots.dropped == 8 - len(want)


def test_sorting_worked_example():
  """Flat choices [0,1,0,2,0,1,2,1]: order [0,2,4,1,5,7,3,6], sizes [3,3,2,0]."""
  experts = jnp.array([[[0, 1], [0, 2], [0, 1], [2, 1]]])
  slots = sort_slots(experts, jnp.ones((1, 4, 2), bool), num_experts=4)
  np.testing.assert_array_equal(slots.choice_GR[0], [0, 2, 4, 1, 5, 7, 3, 6])
  np.testing.assert_array_equal(slots.token_GR[0], [0, 1, 2, 0, 2, 3, 1, 3])
  np.testing.assert_array_equal(slots.size_GE[0], [3, 3, 2, 0])
  chosen = jnp.ones((1, 4, 2), bool).at[0, 1].set(False)
  slots = sort_slots(experts, chosen, num_experts=4, num_rows=6)
  np.testing.assert_array_equal(slots.choice_GR[0], [0, 4, 1, 5, 7, 6])
  np.testing.assert_array_equal(slots.slot_GSX[0], [[0, 2], [6, 6], [1, 3], [5, 4]])
