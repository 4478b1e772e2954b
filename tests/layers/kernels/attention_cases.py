"""Cases of attention that the kernels of every platform run, and their masks.

Letters: B batch, T positions, N query heads, K key/value heads, H head size of queries and keys,
U that of values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from layers.kernels.attention import Alibi
from layers.masks import (
  And,
  BigBird,
  Causal,
  Chunked,
  Dilated,
  Global,
  Local,
  Longformer,
  Mask,
  Not,
  Or,
  PerHead,
  SparseTransformer,
)

B = 2


@dataclass(frozen=True)
class Case:
  mask: Mask | PerHead | None = field(default_factory=Causal)
  heads: tuple[int, int] = (2, 2)
  sizes: tuple[int, int] = (32, 32)
  softcap: float | None = None
  sink: bool = False
  alibi: bool = False
  documents: tuple[Sequence[int], ...] = ()  # lengths in each row; the last is padding
  length: int = 300
  others: bool = False  # 140 queries somewhere among the keys, which lie in no order


def run(module, case: Case, dtype=jnp.float32, with_lse=True):
  """(gradients by q, k, v, sinks, slopes; output, log-sum-exps, where they are finite)."""
  rng = np.random.default_rng(0)
  (N, K), (H, U), T, S = case.heads, case.sizes, case.length, case.length
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  k, v = normal(B, S, K, H), normal(B, S, K, U)
  sink, slopes = normal(N) if case.sink else None, jnp.abs(normal(N)) if case.alibi else None
  positions, segments, order = jnp.arange(T, dtype=jnp.int32)[None], None, "index"
  if case.documents:
    order = "document"
    row = lambda each: jnp.asarray(
      np.stack([np.concatenate(each(n)) for n in case.documents]), jnp.int32
    )
    positions = row(lambda n: [np.arange(i) for i in n])
    segments = row(lambda n: [np.full(i, d) for i, d in zip(n, (1, 2, 0), strict=True)])
  q_ids, kv_ids = (positions, segments), (None, segments)
  if case.others:
    place = np.arange(S).reshape(2, 6, -1)[:, ::-1].reshape(1, S)  # runs, the later ones first
    T, order, kv_ids = 140, "any", (jnp.asarray(place, jnp.int32), segments)
    q_ids = jax.tree.map(lambda x: x[:, 60:200], (positions, segments))
  q, do, dlse = normal(B, T, N, H), normal(B, T, N, U), normal(B, T, N)
  mask_N = None
  if isinstance(case.mask, PerHead):
    mask_N = jnp.array(case.mask.by_head, jnp.int32)

  def loss(q, k, v, sink, slopes):
    o, lse = module.attention(
      q, k, v, q_ids[0], kv_ids[0], q_ids[1], kv_ids[1], None if slopes is None else Alibi(slopes),
      sink, mask_N, mask=case.mask, scale=0.2, softcap=case.softcap, order=order,
    )  # fmt: skip
    if not with_lse:
      return jnp.sum((o * do).astype(jnp.float32)), o
    seen = jnp.isfinite(lse)
    lse = jnp.where(seen, lse, 0)
    return jnp.sum((o * do).astype(jnp.float32)) + jnp.sum(lse * dlse), (o, lse, seen)

  return jax.jit(jax.grad(loss, (0, 1, 2, 3, 4), has_aux=True))(q, k, v, sink, slopes)


def close(got, want, tolerance):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


MASKS = st.sampled_from([
  None, Causal(), Local(9), Local(3, 5), Chunked(7), Dilated(3, 4), SparseTransformer(8),
  Longformer(8, 2), BigBird(16, 4), Causal() & ~Global(13), Global(2, 20) & ~Local(30, 30),
])  # fmt: skip
EXPRESSIONS = st.recursive(
  MASKS.filter(lambda mask: mask is not None),
  lambda masks: st.one_of(
    st.builds(And, masks, masks), st.builds(Or, masks, masks), st.builds(Not, masks)
  ),
  max_leaves=3,
)
