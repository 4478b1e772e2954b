"""Linear attention's kinds as test cases, and implementations run on them."""

from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

B, T, H, U = 2, 37, 8, 6


@dataclass(frozen=True)
class Case:
  heads: tuple[int, int] = (2, 2)
  decay: str | None = None  # "constant", "head" or "channel"
  delta: bool = False
  normalize: bool = False
  segments: bool = False


CASES = {
  "plain": Case(),
  "feature map": Case((4, 2), normalize=True),
  "decayed feature map": Case(decay="head", normalize=True, segments=True),
  "retention": Case((4, 1), "constant"),
  "gla": Case((4, 2), "channel"),
  "delta": Case(delta=True),
  "gated delta": Case((4, 2), "head", delta=True, segments=True),
  "kimi": Case(decay="channel", delta=True, segments=True),
}

# Padding inside a document, between two, before and after; a segment that comes back.
SEGMENTS = np.array(
  [[1] * 10 + [0] * 3 + [1] * 4 + [2] * 15 + [0] * 5, [0] * 2 + [3] * 3 + [4] * 20 + [3] * 12],
  np.int32,
)


@lru_cache
def make(name, length=T):
  """(differentiable arrays, keywords, cotangents) of a case, float32."""
  case, rng = CASES[name], np.random.default_rng(len(name))
  N, K = case.heads
  normal = lambda *shape: rng.normal(size=shape)
  q, k, v = normal(B, length, N, H), normal(B, length, K, H), normal(B, length, K, U)
  if case.normalize:
    q, k = np.abs(q), np.abs(k)
  if case.delta:
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
  shape = {
    None: None, "constant": (1, 1, N), "head": (B, length, N), "channel": (B, length, N, H),
  }[case.decay]  # fmt: skip
  decay = None if shape is None else -np.abs(normal(*shape)) * rng.choice([0.05, 2.0], shape)
  beta = 1 / (1 + np.exp(-2 * normal(B, length, N))) if case.delta else None
  state = np.abs(normal(B, N, H, U + case.normalize))
  arrays = {"q": q, "k": k, "v": v, "decay": decay, "beta": beta, "state": state}
  arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)
  keywords = {"normalize": case.normalize, "scale": 0.5}
  segments = SEGMENTS[:, :length] if case.segments else None
  do, dstate = normal(B, length, N, U), normal(*state.shape)
  return arrays, keywords, segments, (jnp.asarray(do, jnp.float32), jnp.asarray(dstate))


def close(got, want, tolerance):
  """Each array to a part of its largest value."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())
