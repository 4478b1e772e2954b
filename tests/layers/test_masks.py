import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layers.masks import And, BlockLocal, Causal, Local
from tests.oracles import masks as oracle

S = 16


def seen(mask, q_ids=range(S), kv_ids=range(S)):
  return mask(np.array(q_ids)[:, None], np.array(kv_ids)[None, :])


@pytest.mark.parametrize(
  ("mask", "row_13", "total"),
  [
    (Causal(), list(range(14)), 136),
    (Local(4), [10, 11, 12, 13], 58),
    (BlockLocal(4), [12, 13, 14, 15], 64),
    (Causal() & BlockLocal(4), [12, 13], 40),
    (Causal() & Local(4) & BlockLocal(8), [10, 11, 12, 13], 52),
  ],
)
def test_worked_masks(mask, row_13, total):
  visible = seen(mask)
  assert np.flatnonzero(visible[13]).tolist() == row_13
  assert visible.sum() == total


sizes = st.integers(1, 20)
ATOMS = st.one_of(
  st.just((Causal(), oracle.causal)),
  sizes.map(lambda w: (Local(w), oracle.local(w))),
  sizes.map(lambda c: (BlockLocal(c), oracle.block_local(c))),
)
PAIRS = st.recursive(
  ATOMS,
  lambda pairs: st.tuples(pairs, pairs).map(
    lambda two: (two[0][0] & two[1][0], oracle.both(two[0][1], two[1][1]))
  ),
  max_leaves=4,
)
ids = st.lists(st.integers(0, 60), min_size=1, max_size=12)


@settings(deadline=None, max_examples=100)
@given(PAIRS, ids, ids)
def test_a_mask_is_its_rule_on_any_ids(pair, queries, keys):
  mask, rule = pair
  np.testing.assert_array_equal(seen(mask, queries, keys), oracle.table(rule, queries, keys))


@settings(deadline=None, max_examples=100)
@given(PAIRS)
def test_nothing_is_visible_beyond_reach(pair):
  mask, _ = pair
  before, after = mask.reach
  i, j = np.nonzero(seen(mask, range(45), range(45)))
  assert before is None or (i - j).max() <= before
  assert after is None or (j - i).max() <= after


@pytest.mark.parametrize("mask", [Local(1), Local(7), BlockLocal(1), BlockLocal(5)])
def test_reach_of_an_atom_is_attained(mask):
  i, j = np.nonzero(seen(mask, range(40), range(40)))
  assert ((i - j).max(), (j - i).max()) == mask.reach


def test_reach_of_both_is_the_tighter():
  assert Causal().reach == (None, 0)
  assert (Causal() & BlockLocal(4)).reach == (3, 0)
  assert (BlockLocal(4) & Causal()).reach == (3, 0)
  assert (Local(9) & BlockLocal(4)).reach == (3, 0)
  assert (Causal() & Causal()).reach == (None, 0)


@settings(deadline=None, max_examples=30)
@given(ATOMS, ATOMS)
def test_order_does_not_change_what_both_show(a, b):
  np.testing.assert_array_equal(seen(a[0] & b[0]), seen(b[0] & a[0]))


@pytest.mark.parametrize("window", [S, S + 1, 10 * S])
def test_a_window_of_the_whole_row_is_causal(window):
  np.testing.assert_array_equal(seen(Local(window)), seen(Causal()))


def test_masks_are_values():
  assert Causal() & Local(4) == And(Causal(), Local(4))
  assert hash(Causal() & Local(4)) == hash(And(Causal(), Local(4)))
  assert len({Local(4), Local(4), Local(5), BlockLocal(4), Causal(), Causal()}) == 4


def test_traced_ids_and_a_static_mask():
  @jax.jit
  def run(q_ids, kv_ids):
    return (Causal() & Local(3) & BlockLocal(4))(q_ids[:, None], kv_ids[None, :])

  queries = jnp.array([5, 2, 9], jnp.int32)
  rule = oracle.both(oracle.causal, oracle.local(3), oracle.block_local(4))
  got = run(queries, jnp.arange(S))
  assert got.dtype == bool
  np.testing.assert_array_equal(got, oracle.table(rule, queries, range(S)))


@pytest.mark.parametrize("make", [Local, BlockLocal])
def test_a_size_below_one_is_refused(make):
  with pytest.raises(ValueError, match="got 0"):
    make(0)
