"""Caches of several rows, whole, rolling or in pages, and what one query at a time sees of them."""

from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from layers.masks import BlockLocal, Causal, Dilated, Global, Local, Mask, PerHead
from tests.oracles import masks as rules
from tests.oracles.attention import attention

SEEN = (0, 5, 77, 200)  # tokens of each row so far, the queries included
S = 200


@dataclass(frozen=True)
class Case:
  heads: tuple[int, int] = (4, 2)
  masks: tuple[Mask | None, ...] = field(default_factory=lambda: (Causal(),))  # one, or by head
  rules: tuple = (rules.causal,)
  tokens: int = 1
  sizes: tuple[int, int] = (32, 32)
  softcap: float | None = None
  sink: bool = False
  alibi: bool = False
  rolling: int = 0  # tokens that the longest row has seen beyond S

  @property
  def mask(self):
    return self.masks[0] if len(self.masks) == 1 else PerHead(self.masks)


def _window(left):
  return rules.both(rules.causal, rules.local(left))


CASES = {
  "causal": Case(),
  "several tokens": Case((6, 2), tokens=3, sizes=(32, 16)),
  "multi-query, everything": Case((4, 1), (None,), (rules.full,)),
  "window": Case((4, 4), (Causal() & Local(20),), (_window(20),), tokens=2),
  "sink, cap, alibi": Case((4, 2), tokens=2, softcap=2.0, sink=True, alibi=True),
  "around": Case(masks=(Local(9, 2),), rules=(rules.local(9, 2),), sink=True, rolling=237),
  "a mask a head": Case(
    masks=(Causal(), Causal() & Local(30), Causal() & Dilated(3, 9), Causal() & Local(30)),
    rules=(rules.causal, _window(30), rules.both(rules.causal, rules.dilated(3, 9)), _window(30)),
    tokens=2,
  ),
  "windows a head": Case(
    masks=(Causal() & Local(30), Causal() & Local(7)) * 3,
    rules=(_window(30), _window(7)) * 3,
    heads=(6, 3),
  ),
  "out of order": Case(
    masks=(Causal() & (BlockLocal(32) | Global(3)),),
    rules=(rules.both(rules.causal, rules.either(rules.block_local(32), rules.global_tokens(3))),),
  ),
  "rolling": Case(
    (6, 3), (Causal() & Local(60),), (_window(60),), tokens=3, alibi=True, rolling=237
  ),
}


@dataclass
class Made:
  case: Case
  arrays: dict[str, np.ndarray]  # q, k, v, q_positions_BT, lengths_B, kv_positions_BS, sink, slopes

  def expected(self) -> np.ndarray:
    a, case = self.arrays, self.case
    positions, lengths = a["kv_positions_BS"], a["lengths_B"]
    kept = (np.arange(S)[None] < lengths[:, None]) & (positions >= 0)
    scale, groups = case.sizes[0] ** -0.5, len(case.rules)
    out = []
    for rule_number in range(groups):
      rule = case.rules[rule_number]

      def visible(b, i, j, rule=rule):
        query = int(a["q_positions_BT"][b, i])
        return bool(kept[b, j]) and rule(query, int(positions[b, j]))

      def bias(b, n, i, j):
        return -a["slopes"][n] * float(a["q_positions_BT"][b, i] - positions[b, j])

      out.append(
        attention(
          a["q"], np.nan_to_num(a["k"]), np.nan_to_num(a["v"]), visible=visible, scale=scale,
          softcap=case.softcap, bias=bias if case.alibi else None, sink=a["sink"],
        )
      )  # fmt: skip
    if groups == 1:
      return out[0]
    return np.stack([out[n][:, :, n] for n in range(groups)], axis=2)


def make(name: str, dtype="float32") -> Made:
  """Arrays of a case; what holds no key is NaN. Values are those of `dtype`, in float64."""
  case, rng = CASES[name], np.random.default_rng(list(name.encode()))
  (N, K), (H, U), T, B = case.heads, case.sizes, case.tokens, len(SEEN)
  seen = np.array(SEEN) + case.rolling * (np.array(SEEN) == S)
  rounded = lambda x: np.asarray(jnp.asarray(x, dtype), np.float64)
  normal = lambda *shape: rounded(rng.normal(size=shape))
  lengths = np.minimum(seen, S)
  positions = np.broadcast_to(np.arange(S), (B, S)).copy()
  if case.rolling:
    last = seen[:, None] - 1
    positions = last - (last - positions) % S
    positions[1, 2] = positions[3, 0] = -1  # dropped, and inside the window
  k, v = normal(B, S, K, H), normal(B, S, K, U)
  for x in (k, v):
    x[np.arange(S)[None] >= lengths[:, None]] = np.nan
  return Made(
    case,
    {
      "q": normal(B, T, N, H),
      "k": k,
      "v": v,
      "q_positions_BT": seen[:, None] - T + np.arange(T)[None],
      "lengths_B": lengths,
      "kv_positions_BS": positions,
      "sink": rng.normal(size=N) if case.sink else None,
      "slopes": np.abs(rng.normal(size=N)) if case.alibi else None,
    },
  )


def paged(made: Made, size: int):
  """(k pages, v pages, table): pages in any order, garbage in the table past a row's length."""
  rng, lengths = np.random.default_rng(size), made.arrays["lengths_B"]
  B, J = len(lengths), -(-S // size)
  order = rng.permutation(B * J)
  pages = []
  for x in (made.arrays["k"], made.arrays["v"]):
    rows = np.full((B, J * size, *x.shape[2:]), np.nan)
    rows[:, :S] = x
    shuffled = np.empty((B * J, size, *x.shape[2:]))
    shuffled[order] = rows.reshape(B * J, size, *x.shape[2:])
    pages.append(shuffled)
  table = order.reshape(B, J).copy()
  unused = np.arange(J)[None] * size >= lengths[:, None]
  table[unused] = rng.choice([-7, 10**6, B * J], size=unused.sum())
  return *pages, table
