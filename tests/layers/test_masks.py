"""Masks against sets of keys, published row counts and brute force over blocks."""

import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layers.masks import (
  And,
  BigBird,
  BlockLocal,
  Causal,
  Chunked,
  Dilated,
  Fixed,
  Full,
  GemmaLocal,
  Global,
  GPT3Banded,
  Local,
  Longformer,
  MistralWindow,
  PerHead,
  RandomBlocks,
  SparseTransformer,
  Strided,
  parse_mask,
)
from tests.oracles import masks as oracle

S = 16


def seen(mask, q_ids=range(S), kv_ids=range(S)):
  ids = (np.array(q_ids, np.int32)[:, None], np.array(kv_ids, np.int32)[None, :])
  return np.broadcast_to(mask.visible(*ids), (len(q_ids), len(kv_ids)))


# Rows and totals for S = 16 as published in, or computed from, the papers that define them.
@pytest.mark.parametrize(
  ("mask", "row_13", "total"),
  [
    (Causal(), list(range(14)), 136),
    (Full(), list(range(16)), 256),
    (Local(3), [10, 11, 12, 13], 58),
    (Local(4, 4), [9, 10, 11, 12, 13, 14, 15], 124),
    (Dilated(2, 2), [9, 11, 13], 42),
    (Global(2), [0, 1], 60),
    (BlockLocal(4), [12, 13, 14, 15], 64),
    (Causal() & BlockLocal(4), [12, 13], 40),
    (Chunked(4), [12, 13], 40),
    (Causal() & Local(3) & BlockLocal(8), [10, 11, 12, 13], 52),
    (MistralWindow(4), [10, 11, 12, 13], 58),
    (GemmaLocal(4), [10, 11, 12, 13], 58),
    (GPT3Banded(4), [10, 11, 12, 13], 58),
    (SparseTransformer(4, part="local"), [9, 10, 11, 12, 13], 70),
    (SparseTransformer(4, part="far"), [1, 5, 9, 13], 40),
    (SparseTransformer(4), [1, 5, 9, 10, 11, 12, 13], 82),
    (SparseTransformer(4, "fixed", 1, "local"), [12, 13], 40),
    (SparseTransformer(4, "fixed", 1, "far"), [3, 7, 11], 28),
    (SparseTransformer(4, "fixed", 1), [3, 7, 11, 12, 13], 64),
    (Longformer(4, 1), [0, 11, 12, 13, 14, 15], 100),
  ],
  ids=repr,
)
def test_worked_masks(mask, row_13, total):
  visible = seen(mask)
  assert np.flatnonzero(visible[13]).tolist() == row_13
  assert visible.sum() == total


def test_bigbird_without_random_blocks():
  """Visible blocks a block row, eight blocks."""
  mask = BigBird(8, size=4, random=0)
  blocks = mask.table(32)[::4, ::4]
  np.testing.assert_array_equal(np.kron(blocks, np.ones((4, 4), bool)), mask.table(32))
  assert blocks.sum(1).tolist() == [8, 4, 5, 5, 5, 5, 4, 8]


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_bigbird_draws_three_more_blocks_in_every_row(seed):
  rows = BigBird(24, size=2, seed=seed).table(48)[::2, ::2].sum(1)
  assert rows.tolist() == [24, 7] + [8] * 20 + [7, 24]


def test_random_blocks_differ_by_seed_and_cover_all():
  draws = np.stack([RandomBlocks(seed, 1, 2, 20, near=0).table(20) for seed in range(200)])
  assert np.all(draws.sum(2) == 2)
  assert not draws[:, np.arange(20), np.arange(20)].any()  # near=0 leaves out the own block
  share = draws.mean(0)[~np.eye(20, dtype=bool)]
  assert abs(share.mean() - 2 / 19) < 1e-12 and share.min() > 0.03 and share.max() < 0.2
  # Neighbouring rows do not draw together more often than by chance (0.105).
  together = (draws[:, :-1] & draws[:, 1:]).sum() / draws[:, :-1].sum()
  assert 0.05 < together < 0.16


def test_random_blocks_where_fewer_are_left_than_asked_for():
  rows = RandomBlocks(0, 1, 5, 6, edges=1, near=0).table(6).sum(1)
  assert rows.tolist() == [4, 3, 3, 3, 3, 4]


sizes = st.integers(1, 20)
few = st.integers(0, 6)
ATOMS = st.one_of(
  st.just((Causal(), oracle.causal)),
  st.just((Full(), oracle.full)),
  st.tuples(few, few).map(lambda a: (Local(*a), oracle.local(*a))),
  st.tuples(sizes, few, few).map(lambda a: (Dilated(*a), oracle.dilated(*a))),
  sizes.map(lambda s: (Strided(s), oracle.strided(s))),
  st.tuples(sizes, few, few).map(lambda a: (BlockLocal(*a), oracle.block_local(*a))),
  st.tuples(sizes, sizes).map(
    lambda a: (Fixed(max(a), min(a)), oracle.fixed(max(a), min(a))),
  ),
  st.tuples(sizes, few).map(lambda a: (Global(*a), oracle.global_tokens(*a))),
)
PAIRS = st.recursive(
  ATOMS,
  lambda pairs: st.one_of(
    st.tuples(pairs, pairs).map(lambda p: (p[0][0] & p[1][0], oracle.both(p[0][1], p[1][1]))),
    st.tuples(pairs, pairs).map(lambda p: (p[0][0] | p[1][0], oracle.either(p[0][1], p[1][1]))),
    pairs.map(lambda p: (~p[0], oracle.none(p[1]))),
  ),
  max_leaves=4,
)
RANDOM = st.builds(
  RandomBlocks, st.integers(0, 9), st.integers(1, 7), st.integers(1, 4), st.integers(2, 12),
  edges=st.integers(0, 2), near=st.integers(-1, 2),
)  # fmt: skip
MASKS = st.one_of(PAIRS.map(lambda pair: pair[0]), RANDOM, st.builds(And, RANDOM, RANDOM))
ids = st.lists(st.integers(0, 60), min_size=1, max_size=12)


@settings(deadline=None, max_examples=150)
@given(PAIRS, ids, ids)
def test_a_mask_is_its_rule_on_any_ids(pair, queries, keys):
  mask, rule = pair
  np.testing.assert_array_equal(seen(mask, queries, keys), oracle.table(rule, queries, keys))


@settings(deadline=None, max_examples=100)
@given(MASKS)
def test_nothing_is_visible_beyond_reach(mask):
  before, after = mask.reach
  i, j = np.nonzero(seen(mask, range(45), range(45)))
  assert before is None or (i - j).max(initial=-99) <= before
  assert after is None or (j - i).max(initial=-99) <= after


@settings(deadline=None, max_examples=100)
@given(MASKS)
def test_an_interval_is_the_whole_rule(mask):
  if mask.interval is not None:
    before, after = (99 if side is None else side for side in mask.interval)
    i, j = np.arange(45)[:, None], np.arange(45)[None]
    np.testing.assert_array_equal(
      seen(mask, range(45), range(45)), (i - before <= j) & (j <= i + after)
    )


def test_which_masks_are_intervals():
  assert Full().interval == (None, None)
  assert MistralWindow(4).interval == (3, 0)
  assert Longformer(8).interval == (4, 4)
  assert (Causal() & Local(8, 3) & Local(9, 1)).interval == (8, 0)
  for mask in (
    Strided(2),
    Dilated(2, 3),
    BlockLocal(4),
    Chunked(4),
    ~Causal(),
    Causal() | Local(3),
  ):
    assert mask.interval is None


@settings(deadline=None, max_examples=60)
@given(MASKS)
def test_a_relative_mask_follows_the_distance(mask):
  if mask.relative:
    np.testing.assert_array_equal(
      seen(mask, range(30), range(30)), seen(mask, range(7, 37), range(7, 37))
    )


@settings(deadline=None, max_examples=200)
@given(MASKS, st.integers(1, 50), st.integers(1, 50), st.integers(1, 12), st.integers(1, 12))
def test_blocks_against_brute_force(mask, T, S, height, width):
  i0, j0 = np.arange(0, T, height)[:, None], np.arange(0, S, width)[None]
  i1, j1 = np.minimum(i0 + height, T) - 1, np.minimum(j0 + width, S) - 1
  shape = (i0.size, j0.size)
  some, every = (np.broadcast_to(x, shape) for x in mask.blocks(i0, i1, j0, j1))
  table = mask.table(T, S)
  for (a, b), is_some, is_every in zip(np.ndindex(shape), some.flat, every.flat, strict=True):
    block = table[i0[a, 0] : i1[a, 0] + 1, j0[0, b] : j1[0, b] + 1]
    assert is_some or not block.any()
    assert block.all() or not is_every
    within = not isinstance(mask, RandomBlocks) or mask.size * mask.num_blocks >= T
    if within and isinstance(
      mask, (Causal, Local, Dilated, Strided, BlockLocal, Fixed, RandomBlocks)
    ):
      assert (is_some, is_every) == (block.any(), block.all())  # atoms are exact
  assert mask.density(T, S) == table.mean()


@pytest.mark.parametrize(
  "mask",
  [
    Full(), Local(3, 9), Dilated(3, 2, 1), Strided(5), BlockLocal(6, 1), Fixed(7, 2), Global(4, 9),
    Causal() & ~Local(4), BigBird(8, 4), RandomBlocks(1, 3, 2, 7),
  ],
  ids=repr,
)  # fmt: skip
def test_blocks_of_traced_positions(mask):
  """The same account of any two ranges, by numpy and by a program; beyond the row too."""
  low = np.array([0, 3, 4, 12, 13, 30, 35], np.int32)
  high = low + np.array([0, 4, 3, 0, 18, 1, 8], np.int32)
  ranges = (low[:, None], high[:, None], low[None], high[None])
  traced = jax.jit(mask.blocks)(*ranges)
  for here, there in zip(mask.blocks(*ranges), traced, strict=True):
    np.testing.assert_array_equal(np.broadcast_to(here, (7, 7)), np.broadcast_to(there, (7, 7)))


@pytest.mark.parametrize(
  "mask", [Local(6), Local(2, 3), BlockLocal(1), BlockLocal(5), Dilated(3, 2, 1)], ids=repr
)
def test_reach_of_an_atom_is_attained(mask):
  i, j = np.nonzero(seen(mask, range(40), range(40)))
  assert ((i - j).max(), (j - i).max()) == mask.reach


def test_reach_of_combinations():
  assert Causal().reach == (None, 0)
  assert (Causal() & BlockLocal(4)).reach == (3, 0)
  assert (BlockLocal(4) & Causal()).reach == (3, 0)
  assert (Local(8) & BlockLocal(4)).reach == (3, 0)
  assert (Local(8) | BlockLocal(4)).reach == (8, 3)
  assert (Local(8) | Causal()).reach == (None, 0)
  assert (~Local(8)).reach == (None, None)


@pytest.mark.parametrize("window", [S, S + 1, 10 * S])
def test_a_window_of_the_whole_row_is_causal(window):
  np.testing.assert_array_equal(seen(MistralWindow(window)), seen(Causal()))


def test_masks_are_values():
  assert Causal() & Local(4) == And(Causal(), Local(4))
  assert hash(Causal() & Local(4)) == hash(And(Causal(), Local(4)))
  assert len({Local(4), Local(4), Local(5), BlockLocal(4), Causal(), Causal()}) == 4
  heads = PerHead((Local(4), Causal(), Local(4)))
  assert heads.distinct == (Local(4), Causal())
  assert heads.by_head == (0, 1, 0)


@pytest.mark.parametrize("mask", [BigBird(8, 4), Longformer(8, 2, 2), SparseTransformer(4)])
def test_traced_ids_and_a_static_mask(mask):
  run = jax.jit(lambda i, j: mask.visible(i[:, None], j[None, :]))
  queries = jnp.array([5, 2, 9, 31], jnp.int32)
  got = run(queries, jnp.arange(32))
  assert got.dtype == bool
  np.testing.assert_array_equal(got, mask.table(32)[np.asarray(queries)])


@pytest.mark.parametrize(
  "make",
  [
    lambda: Local(-1), lambda: Dilated(0, 1), lambda: Strided(0), lambda: BlockLocal(0),
    lambda: Fixed(4, 5), lambda: Global(0), lambda: RandomBlocks(0, 0, 1, 4),
    lambda: MistralWindow(0).rule, lambda: SparseTransformer(kind="sparse"), lambda: PerHead(()),
  ],
)  # fmt: skip
def test_sizes_that_make_no_mask_are_refused(make):
  with pytest.raises(ValueError, match=r"need|neither"):
    make()


def test_drawing():
  assert Local(1).show(3) == "■ · ·\n■ ■ ·\n· ■ ■"


LENGTH, BLOCK = 131_072, 512


@pytest.mark.parametrize(
  "mask",
  [
    Causal(), MistralWindow(), GemmaLocal(), GPT3Banded(), Chunked(8192), SparseTransformer(),
    SparseTransformer(kind="fixed"), Longformer(512, 64), BigBird(LENGTH // 64),
  ],
  ids=lambda mask: type(mask).__name__,
)  # fmt: skip
def test_long_rows_are_planned_without_their_pairs(mask):
  i0, j0 = np.arange(0, LENGTH, BLOCK)[:, None], np.arange(0, LENGTH, BLOCK)[None]
  began = time.process_time()
  tracemalloc.start()
  mask.blocks(i0, i0 + BLOCK - 1, j0, j0 + BLOCK - 1)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert time.process_time() - began < 1
  assert peak < 200e6


@settings(deadline=None, max_examples=60)
@given(MASKS)
def test_a_mask_is_what_its_text_says(mask):
  assert parse_mask(repr(mask)) == mask
  assert parse_mask(f"~({mask!r} & Causal()) | Local(3, right=1)") == ~(mask & Causal()) | Local(
    3, 1
  )


def test_patterns_as_text():
  assert parse_mask(" Longformer(8, tokens=2) ") == Longformer(8, 2)
  assert parse_mask("SparseTransformer(4, 'fixed', 1)") == SparseTransformer(4, "fixed", 1)
  assert parse_mask("PerHead((Causal(), Local(2)))") == PerHead((Causal(), Local(2)))


@pytest.mark.parametrize(
  ("text", "why"),
  [
    ("Locl(3)", "'Locl.3.' is unknown; there are Full, Causal"), ("Local(", "not an expression"),
    ("Local()", "left"), ("Local(-1)", "at least 0"), ("3", "no mask"), ("", "not an expression"),
    ("Local(3) + Causal()", "unknown"), ("__import__('os')", "unknown"), ("Local", "unknown"),
    ("Causal() & 3", "both sides"), ("Not(3)", "needs a mask"),
    ("PerHead((1,))", "got 1"), ("(3).bit_length()", "unknown"),
  ],
)  # fmt: skip
def test_text_that_is_no_mask_is_refused(text, why):
  with pytest.raises(ValueError, match=why):
    parse_mask(text)
