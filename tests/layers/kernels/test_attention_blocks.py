"""Blocks that a mask leaves: planned while tracing, and cut down when the program runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layers.kernels.attention.blocks import (
  EMPTY,
  FULL,
  block_kinds,
  for_all,
  kinds_at_run_time,
  ranges,
  unpack,
  walk,
  walk_at_run_time,
  walks,
)
from layers.masks import (
  BigBird,
  Causal,
  Chunked,
  Dilated,
  Fixed,
  Global,
  Local,
  Longformer,
  PerHead,
  SparseTransformer,
)

MASKS = st.sampled_from([
  None, Causal(), Local(9), Local(3, 5), Chunked(7), Dilated(3, 4), SparseTransformer(8),
  Longformer(8, 2), BigBird(16, 4), Causal() & ~Global(13), Global(2, 20) & ~Local(30, 30),
])  # fmt: skip


@settings(deadline=None, max_examples=100)
@given(MASKS, st.integers(1, 64), st.integers(1, 64), st.integers(1, 16), st.integers(1, 16))
def test_each_visible_block_is_visited_once(mask, num_queries, num_keys, q_block, kv_block):
  kinds = block_kinds(mask, num_queries, num_keys, q_block, kv_block)
  table = (
    np.ones((num_queries, num_keys), bool) if mask is None else mask.table(num_queries, num_keys)
  )
  for words, turned in ((walk(kinds), False), (walk(kinds.T), True)):
    visits = [unpack(int(word)) for word in words]
    assert len(visits) == (kinds != EMPTY).sum() + (~kinds.any(0 if turned else 1)).sum()
    seen = np.zeros(table.shape, int)
    for visit in visits:
      i, j = (visit.column, visit.row) if turned else (visit.row, visit.column)
      block = np.s_[i * q_block : (i + 1) * q_block, j * kv_block : (j + 1) * kv_block]
      seen[block] += visit.kind != EMPTY
      assert visit.kind != FULL or table[block].all()
    assert seen.max(initial=0) <= 1 and np.all(seen[table] == 1)
    rows = [visit.row for visit in visits]
    assert rows == sorted(rows) and set(rows) == set(range(kinds.shape[1 if turned else 0]))
    turns = np.diff(rows, prepend=-1, append=len(rows) + 1) != 0
    assert [visit.first for visit in visits] == turns[:-1].tolist()
    assert [visit.last for visit in visits] == turns[1:].tolist()


def test_lists_of_several_lengths():
  long, short = walk(np.ones((2, 3), np.int8)), walk(np.eye(2, dtype=np.int8))
  both = walks([long, short])
  assert both.shape == (2, 6) and both[0].tolist() == long.tolist()
  rest = [unpack(int(word)) for word in both[1, 2:]]
  assert {(v.row, v.column, v.kind, v.first, v.last) for v in rest} == {(1, 1, EMPTY, 0, 0)}


B, T, BLOCK = 3, 41, 8  # the last block holds one place


def packed(rng, num_documents):
  """Positions and segments of rows of documents, each with padding at its end."""
  positions, segments = np.zeros((2, B, T), np.int32)
  for b in range(B):
    cuts = np.sort(rng.choice(np.arange(1, T), num_documents, replace=False))
    for d, (start, stop) in enumerate(zip([0, *cuts], [*cuts, T], strict=True)):
      positions[b, start:stop] = np.arange(stop - start)
      segments[b, start:stop] = (d + 1) * (d < num_documents)
  return positions, segments


RUN_TIME = {
  "causal": Causal(),
  "everything": None,
  "window": Local(9, 4),
  "bigbird": BigBird(6, 8),
  "chunks": Chunked(8),
  "fixed, not global": Fixed(8, 3) & ~Global(11),
  "a mask a head": PerHead((Causal(), SparseTransformer(8), Longformer(4, 9))),
}


@pytest.mark.parametrize("order", ["index", "document", "any"])
@pytest.mark.parametrize("name", RUN_TIME)
def test_blocks_at_run_time_against_brute_force(name, order):
  """Nothing visible is left out, nothing cut is called full, and less is visited than planned."""
  mask = RUN_TIME[name]
  masks = (None,) if mask is None else mask.distinct
  known = [block_kinds(m, T, T, BLOCK, BLOCK, order) for m in masks]

  @jax.jit
  def plan(q, kv):
    kinds = kinds_at_run_time(masks, known, order, ranges(q, BLOCK), ranges(kv, BLOCK), T, BLOCK)
    kinds = [jnp.broadcast_to(k, (B, *k.shape[1:])) for k in kinds]
    lists = [walk_at_run_time(walk(k), now) for k, now in zip(known, kinds, strict=True)]
    joint = for_all(kinds)
    columns = walk_at_run_time(
      walk(block_kinds(mask, T, T, BLOCK, BLOCK, order).T), joint.swapaxes(1, 2)
    )
    return kinds, joint, lists, columns

  visited = 0
  for seed in range(4):
    rng = np.random.default_rng(seed)
    positions, segments = packed(rng, 2)
    if order == "index":
      positions, segments = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)), segments[:1]
      segments = np.broadcast_to(segments, (B, T))
    kv_positions, kv_segments = positions, segments
    if order == "any":  # runs of keys stand elsewhere, as on another device
      move = np.roll(np.arange(T), 16)
      kv_positions, kv_segments = positions[:, move], segments[:, move]
    kinds, joint, lists, columns = plan((positions, segments), (kv_positions, kv_segments))
    for m, kinds_BIJ, words in zip(masks, kinds, lists, strict=True):
      table = (segments[:, :, None] == kv_segments[:, None]) & (segments[:, :, None] > 0)
      if m is not None:
        table &= m.visible(positions[:, :, None], kv_positions[:, None])
      pad = np.pad(table, [(0, 0), (0, 7), (0, 7)]).reshape(B, 6, 8, 6, 8)
      some = pad.any((2, 4))
      inside = np.pad(table, [(0, 0), (0, 7), (0, 0)], constant_values=True)  # these ask nothing
      every = np.pad(inside, [(0, 0), (0, 0), (0, 7)]).reshape(B, 6, 8, 6, 8).all((2, 4))
      kinds_BIJ = np.asarray(kinds_BIJ)
      assert np.all(kinds_BIJ[some] != EMPTY) and np.all(every[kinds_BIJ == FULL])
      visited += (kinds_BIJ != EMPTY).sum()
      assert_walks(words, kinds_BIJ)
    assert_walks(columns, np.asarray(joint).swapaxes(1, 2))
  planned = sum((k != EMPTY).sum() for k in known) * B * 4
  assert visited < 0.9 * planned


def assert_walks(words, kinds_BIJ):
  """Each block that is not empty once, row after row, and then nothing."""
  for row_words, kinds in zip(np.asarray(words), kinds_BIJ, strict=True):
    visits = [unpack(int(word)) for word in row_words]
    count = (kinds != EMPTY).sum() + (~kinds.any(1)).sum()
    live, rest = visits[:count], visits[count:]
    found = [(v.row, v.column, v.kind) for v in live if v.kind != EMPTY]
    assert found == [(*map(int, at), kinds[tuple(at)]) for at in np.argwhere(kinds)]
    rows = [v.row for v in live]
    assert sorted(set(rows)) == list(range(len(kinds))) and rows == sorted(rows)
    turns = np.diff(rows, prepend=-1, append=len(rows) + 1) != 0
    assert [v.first for v in live] == turns[:-1].tolist()
    assert [v.last for v in live] == turns[1:].tolist()
    end = (live[-1].row, live[-1].column)
    assert {(v.row, v.column, v.kind, v.first, v.last) for v in rest} <= {(*end, EMPTY, 0, 0)}
