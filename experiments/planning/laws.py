"""How low a loss compute buys, and how to split it between a larger model and more tokens.

N parameters, D tokens, C = 6 N D FLOPs of training. Of a mixture of experts, N is the parameters a
token passes (`layers.count.Counts.active`), though the published laws were fitted to dense models.
Losses are nats a token of their authors' text and tokenizer: they compare sizes, not data.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist, linear_regression
from typing import NamedTuple

TRAIN_FLOPS = 6.0  # a parameter and token
SERVE_FLOPS = 2.0
PF_DAY = 1e15 * 86400  # FLOPs: the unit of compute of Kaplan and of GPT-3


class Optimum(NamedTuple):
  """The split of a budget that a law calls best."""

  params: float
  tokens: float

  @property
  def tokens_per_param(self) -> float:
    return self.tokens / self.params


class Band(NamedTuple):
  """(low, high) of each; the tokens are low where the parameters are high."""

  params: tuple[float, float]
  tokens: tuple[float, float]


class Spread(NamedTuple):
  """How sure the best N of a law is, as standard deviations of log N.

  Least at `pivot` FLOPs, in the midst of the runs the law was fitted to; away from it the error of
  the exponent is added, times the logarithm of the distance.
  """

  pivot: float
  at_pivot: float
  exponent: float


@dataclass(frozen=True)
class Law:
  """L(N, D) = E + A / N^alpha + B / D^beta: what text leaves open, a small model, few tokens."""

  E: float
  A: float
  B: float
  alpha: float
  beta: float
  errors: tuple[float, float, float, float, float] | None = None  # one standard error of each
  spread: Spread | None = None

  def loss(self, params: float, tokens: float) -> float:
    """Nats a token."""
    return self.E + self.A / params**self.alpha + self.B / tokens**self.beta

  @property
  def exponent(self) -> float:
    """The best N grows as C to this power, the best D as C to what remains to 1."""
    return self.beta / (self.alpha + self.beta)

  def optimum(self, compute: float) -> Optimum:
    """The least loss of all N and D with 6 N D = `compute`, in closed form."""
    if compute <= 0:
      raise ValueError(f"a budget of {compute:g} FLOPs trains nothing")
    scale = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
    params = scale * (compute / TRAIN_FLOPS) ** self.exponent
    return Optimum(params, compute / (TRAIN_FLOPS * params))

  def band(self, compute: float, level: float = 0.8) -> Band | None:
    """Where the optimum lies with probability `level`; None for a law without `spread`.

    N is taken as log-normal about this law's own optimum, and D = C / 6 N. Only the runs' noise is
    in it: not that another text, tokenizer or architecture has another law, nor whether the form
    holds so far beyond the runs.
    """
    if self.spread is None:
      return None
    best, pivot = self.optimum(compute), self.spread
    sigma = math.hypot(pivot.at_pivot, pivot.exponent * math.log(compute / pivot.pivot))
    factor = math.exp(NormalDist().inv_cdf((1 + level) / 2) * sigma)
    around = lambda x: (x / factor, x * factor)
    return Band(around(best.params), around(best.tokens))

  def smallest(self, loss: float) -> float:
    """Parameters below which no number of tokens brings this loss."""
    return (self.A / (loss - self.E)) ** (1 / self.alpha) if loss > self.E else math.inf

  def tokens_for(self, loss: float, params: float) -> float:
    """Tokens after which a model of this size has this loss.

    Raises:
      ValueError: it never has.
    """
    least = self.smallest(loss)
    if params <= least:
      raise ValueError(
        f"no number of tokens brings {params:.3g} parameters to a loss of {loss:.4f}; "
        f"that takes more than {least:.3g}"
      )
    return (self.B / (loss - self.E - self.A / params**self.alpha)) ** (1 / self.beta)


# The refit of Chinchilla's runs (arXiv 2404.10102), which agrees with that paper's approaches 1 and
# 2. Its errors come without covariances, and taken as independent they would leave the best N open
# by orders of magnitude. The spread is our own, from 2,000 resamples of the 240 runs published with
# the refit (benchmarks/loss_law.py). They give these errors again, and the exponent's 0.0194 is
# what errors of 0.02 of alpha and beta make of it.
EPOCH = Law(
  1.8172, 482.01, 2085.43, 0.3478, 0.3658,
  errors=(0.03, 124.58, 1293.23, 0.02, 0.02),
  spread=Spread(pivot=1.88e19, at_pivot=0.0226, exponent=0.0194),
)  # fmt: skip
# Approach 3 of arXiv 2203.15556, with the digits of the paper's source, and as printed. Rounding
# takes a fifth off the best N at Gopher's budget; the refit's is twice as large.
CHINCHILLA = Law(1.6934, 406.4, 410.7, 0.3392, 0.2849)
CHINCHILLA_ROUNDED = Law(1.69, 406.4, 410.7, 0.34, 0.28)

# Best budgets of model sizes as arXiv 2203.15556 prints them: approach 1 in table 3, 2 in table A3.
# Table A3 also has approach 3, whose 175B row must read 1.26e25 FLOPs, not 1.26e24.
_SIZES = (400e6, 1e9, 10e9, 67e9, 175e9, 280e9, 1e12)
_APPROACH_1 = (1.92e19, 1.21e20, 1.23e22, 5.76e23, 3.85e24, 9.90e24, 1.27e26)
_APPROACH_2 = (1.84e19, 1.20e20, 1.32e22, 6.88e23, 4.54e24, 1.18e25, 1.59e26)


def _through(budgets: tuple[float, ...]) -> Callable[[float], Optimum]:
  """The power law through the published sizes, by least squares of the logarithms."""
  slope, intercept = linear_regression(*([math.log(x) for x in xs] for xs in (budgets, _SIZES)))

  def optimum(compute: float) -> Optimum:
    params = math.exp(intercept + slope * math.log(compute))
    return Optimum(params, compute / (TRAIN_FLOPS * params))

  return optimum


def kaplan_optimum(compute: float) -> Optimum:
  """Kaplan's split (arXiv 2001.08361): nearly all of a larger budget into a larger model.

  N leaves embeddings out, and C is the least compute, that of batches far below the critical size:
  hence 6 N D of the printed constants is 1.8 C.
  """
  days = compute / PF_DAY
  return Optimum(1.3e9 * days**0.73, 2.0e10 * days**0.27)


def kaplan_loss(compute: float) -> float:
  """Kaplan's loss of the best model a budget of well-chosen batches trains."""
  return (3.1e8 * PF_DAY / compute) ** 0.050


def gpt3_loss(compute: float) -> float:
  """The frontier of GPT-3's training runs (arXiv 2005.14165)."""
  return 2.57 * (compute / PF_DAY) ** -0.048


# Name -> best split of a budget, the default first.
METHODS: Mapping[str, Callable[[float], Optimum]] = {
  "Epoch refit": EPOCH.optimum,
  "Chinchilla 1": _through(_APPROACH_1),
  "Chinchilla 2": _through(_APPROACH_2),
  "Chinchilla 3": CHINCHILLA.optimum,
  "Kaplan": kaplan_optimum,
}


class Overtrained(NamedTuple):
  """A smaller model with the loss of the best one."""

  params: float
  tokens: float
  compute: float  # FLOPs of its training
  extra: float  # of these, beyond the budget whose best model it equals
  pays_after: float  # tokens of inference from which training and inference together cost less


def overtrained(law: Law, compute: float, params: float) -> Overtrained:
  """A model of `params` trained until it is as good as the best one for `compute`.

  Inference counts 2 N FLOPs a token, read or written.

  Raises:
    ValueError: it is not smaller than the best one, or so small that no training suffices.
  """
  best = law.optimum(compute)
  if params >= best.params:
    raise ValueError(f"{params:.3g} parameters are not fewer than the best {best.params:.3g}")
  tokens = law.tokens_for(law.loss(*best), params)
  total = TRAIN_FLOPS * params * tokens
  extra = total - compute
  return Overtrained(params, tokens, total, extra, extra / (SERVE_FLOPS * (best.params - params)))


def nearest(params: float, sizes: Mapping[str, float], count: int = 3) -> list[str]:
  """The names of the sizes closest to `params` by ratio, closest first."""
  return sorted(sizes, key=lambda name: abs(math.log(sizes[name] / params)))[:count]
