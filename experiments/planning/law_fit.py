"""A loss law fitted to runs of one's own, and what it says about a larger one.

As in arXiv 2203.15556: Huber's loss of log L, from a grid of starts; intervals by fitting resampled
runs again. S samples or starts, R runs.
"""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from layers.count import count_params

from ..config import Config, ConfigError
from ..training.folder import read_config
from ..training.metrics import read_metrics
from .laws import Law

_DELTA = 1e-3  # of log loss: where Huber's square becomes a line
# Starts: alpha and beta, e = log E, a = log A and b = log B.
_EXPONENTS, _LOG_E, _LOG_AB = np.arange(5) / 2, np.arange(-2, 3) / 2, np.arange(6) * 5.0
_STEPS = 300
_BOUNDS = 0.01, 2.0  # of the exponents: a fit at either end has found no curve
_FEWEST_RUNS, _FEWEST_SIZES = 6, 3
# What runs must share for their losses to be comparable.
_SAME_DATA = ("source", "path", "text_field", "tokenizer", "objective", "holdout")


class Run(NamedTuple):
  """A finished run: `params` are those a token passes, `loss` is held out, in nats a token."""

  name: str
  params: float
  tokens: float
  loss: float


class _Data(NamedTuple):
  """Logarithms of S samples of runs, N and D about their means: scale and exponent then hardly
  depend on each other."""

  n_SR: np.ndarray
  d_SR: np.ndarray
  loss_SR: np.ndarray
  n_mean: float
  d_mean: float

  def take(self, picked_SR: np.ndarray) -> "_Data":
    """Samples of the runs of a single sample."""
    return self._replace(
      n_SR=self.n_SR[0][picked_SR], d_SR=self.d_SR[0][picked_SR], loss_SR=self.loss_SR[0][picked_SR]
    )


def _data(runs: Sequence[Run]) -> _Data:
  columns = ([getattr(run, name) for run in runs] for name in ("params", "tokens", "loss"))
  n_R, d_R, loss_R = (np.log(np.array(column, float)) for column in columns)
  n_mean, d_mean = float(n_R.mean()), float(d_R.mean())
  return _Data((n_R - n_mean)[None], (d_R - d_mean)[None], loss_R[None], n_mean, d_mean)


def _model(x_S5: np.ndarray, data: _Data) -> tuple[np.ndarray, np.ndarray]:
  """Errors of log loss in units of Huber's delta, and which share each of the three terms has."""
  a, b, e, alpha, beta = (x[:, None] for x in x_S5.T)
  terms_3SR = np.stack(np.broadcast_arrays(a - alpha * data.n_SR, b - beta * data.d_SR, e))
  model_SR = np.logaddexp.reduce(terms_3SR, axis=0)
  return (model_SR - data.loss_SR) / _DELTA, np.exp(terms_3SR - model_SR[None])


def _huber(error_SR: np.ndarray) -> np.ndarray:
  within_SR = np.clip(error_SR, -1, 1)
  return np.sum(within_SR * (error_SR - within_SR / 2), axis=1)


def _descend(x_S5: np.ndarray, data: _Data) -> tuple[np.ndarray, np.ndarray]:
  """From each start to a minimum: Gauss-Newton steps of reweighted squares, damped one by one.

  The paper used L-BFGS; this finds the same minimum, for all starts at once.

  Returns:
    The sums of Huber's loss [S], and where they were reached [S, 5].
  """
  error_SR, share_3SR = _model(x_S5, data)
  value_S, damping_S = _huber(error_SR), np.full(len(x_S5), 1e-2)
  for _ in range(_STEPS):
    by_N, by_D, by_E = share_3SR / _DELTA
    slope_5SR = np.stack([by_N, by_D, by_E, -by_N * data.n_SR, -by_D * data.d_SR])
    weight_SR = 1 / np.maximum(1, np.abs(error_SR))
    normal_S55 = np.einsum("isr,sr,jsr->sij", slope_5SR, weight_SR, slope_5SR, optimize=True)
    slope_S5 = np.einsum("isr,sr,sr->si", slope_5SR, weight_SR, error_SR, optimize=True)
    scale_S5 = np.einsum("sii->si", normal_S55) + 1e-9
    normal_S55 += np.eye(5)[None] * (damping_S[:, None] * scale_S5)[:, None]
    trial_S5 = x_S5 - np.linalg.solve(normal_S55, slope_S5[..., None])[..., 0]
    trial_S5[:, 3:] = np.clip(trial_S5[:, 3:], *_BOUNDS)
    error_trial, share_trial = _model(trial_S5, data)
    value_trial = _huber(error_trial)
    better_S = value_trial < value_S
    gain_S = np.where(better_S, value_S - value_trial, 0)
    x_S5 = np.where(better_S[:, None], trial_S5, x_S5)
    error_SR = np.where(better_S[:, None], error_trial, error_SR)
    share_3SR = np.where(better_S[:, None], share_trial, share_3SR)
    value_S = value_S - gain_S
    damping_S = np.clip(damping_S * np.where(better_S, 0.3, 5), 1e-9, 1e9)
    if np.all((gain_S <= 1e-9 * value_S) & (better_S | (damping_S > 1e6))):
      break
  return value_S, x_S5


def _starts(data: _Data) -> np.ndarray:
  """Of the grid, the best point of each pair of exponents [S, 5]."""
  scales = np.array(list(itertools.product(_LOG_AB, _LOG_AB, _LOG_E)))
  best = []
  for alpha, beta in itertools.product(_EXPONENTS, repeat=2):
    x = np.concatenate([scales, np.full((len(scales), 2), [alpha, beta])], axis=1)
    x[:, :2] -= [alpha * data.n_mean, beta * data.d_mean]
    best.append(x[np.argmin(_huber(_model(x, data)[0]))])
  return np.array(best)


def _law(x_5: np.ndarray, data: _Data) -> Law:
  a, b, e, alpha, beta = map(float, x_5)
  A, B = np.exp(a + alpha * data.n_mean), np.exp(b + beta * data.d_mean)
  return Law(float(np.exp(e)), float(A), float(B), alpha, beta)


@dataclass(frozen=True)
class Interval:
  """A figure of the fitted law, and where it lies among the fits to resampled runs."""

  value: float
  low: float
  high: float


@dataclass(frozen=True)
class Fit:
  """The law of a set of runs, and those of the same runs resampled."""

  law: Law
  resampled: tuple[Law, ...]
  residuals: tuple[float, ...]  # log of each run's loss over the law's

  def interval(self, figure: Callable[[Law], float], level: float = 0.8) -> Interval:
    """Of a figure of the law: `fit.interval(lambda law: law.alpha)`."""
    drawn = np.array([figure(law) for law in self.resampled])
    return _interval(figure(self.law), drawn, level)

  def predict(self, params: float, tokens: float, level: float = 0.8) -> Interval:
    """The loss of another run: the law's uncertainty, and how runs scatter about it."""
    drawn = np.array([law.loss(params, tokens) for law in self.resampled])
    scattered = drawn[:, None] * np.exp(self.residuals)[None]
    return _interval(self.law.loss(params, tokens), scattered, level)

  def optimum(self, compute: float, level: float = 0.8) -> tuple[Interval, Interval]:
    """Parameters and tokens of the best run of a budget."""
    params = self.interval(lambda law: law.optimum(compute).params, level)
    tokens = self.interval(lambda law: law.optimum(compute).tokens, level)
    return params, tokens


def _interval(value: float, drawn: np.ndarray, level: float) -> Interval:
  low, high = np.quantile(drawn, ((1 - level) / 2, (1 + level) / 2))
  return Interval(value, float(low), float(high))


def fit_law(runs: Sequence[Run], *, resamples: int = 200, seed: int = 0) -> Fit:
  """Fit L = E + A / N^alpha + B / D^beta.

  Args:
    resamples: how often as many runs are drawn from them with replacement, and fitted.

  Raises:
    ConfigError: too few runs, sizes or numbers of tokens for the five constants, or no curve in
      them: an exponent that runs away.
  """
  _check(runs)
  data = _data(runs)
  value_S, x_S5 = _descend(_starts(data), data)
  best_5 = x_S5[np.argmin(value_S)]
  for name, exponent in zip(("parameters", "tokens"), best_5[3:], strict=True):
    if exponent in _BOUNDS:
      raise ConfigError(
        f"the {len(runs)} runs do not show how the loss falls with the number of {name} (an "
        f"exponent of {exponent:.2f}); add runs further apart in it"
      )
  picked_SR = _resample(data, resamples, np.random.default_rng(seed))
  starts = np.broadcast_to(best_5, (resamples, 5))
  _, resampled_S5 = _descend(starts, data.take(picked_SR))
  spent = math.sqrt(len(runs) / (len(runs) - len(best_5)))  # by the constants, of the scatter
  residuals = -_model(best_5[None], data)[0][0] * _DELTA * spent
  laws = tuple(_law(x_5, data) for x_5 in resampled_S5)
  return Fit(_law(best_5, data), laws, tuple(map(float, residuals)))


def _check(runs: Sequence[Run]) -> None:
  if len(runs) < _FEWEST_RUNS:
    raise ConfigError(
      f"{len(runs)} runs do not determine the five constants of a law: at least {_FEWEST_RUNS}"
    )
  for name, what in (("params", "sizes of model"), ("tokens", "numbers of tokens")):
    values = {getattr(run, name) for run in runs}
    if len(values) < _FEWEST_SIZES:
      raise ConfigError(
        f"the runs have {len(values)} different {what}; a curve takes at least {_FEWEST_SIZES}"
      )
  for run in runs:
    if not all(0 < x < math.inf for x in run[1:]):
      raise ConfigError(f"run {run.name}: parameters, tokens and loss must be positive: {run[1:]}")


def _resample(data: _Data, count: int, random: np.random.Generator) -> np.ndarray:
  """Runs drawn with replacement [S, R], drawn again where too few sizes or lengths are left."""
  num_runs, drawn = data.n_SR.shape[1], []
  few = lambda values_R: len(np.unique(values_R)) < _FEWEST_SIZES
  while len(drawn) < count:
    picked_R = random.integers(num_runs, size=num_runs)
    if not few(data.n_SR[0, picked_R]) and not few(data.d_SR[0, picked_R]):
      drawn.append(picked_R)
  return np.array(drawn)


def read_runs(folders: Sequence[Path]) -> list[Run]:
  """The runs of these directories, to be fitted together.

  Raises:
    ConfigError: one is not a finished run, or they were not trained and evaluated on the same text.
  """
  configs = {folder: _read_config(folder) for folder in folders}
  for (first, a), (second, b) in itertools.pairwise(configs.items()):
    same = {f"data.{name}": (getattr(a.data, name), getattr(b.data, name)) for name in _SAME_DATA}
    same["eval.batches"] = a.eval.batches, b.eval.batches
    for name, (mine, theirs) in same.items():
      if mine != theirs:
        raise ConfigError(
          f"losses of {first} and {second} are not comparable: {name} is {mine!r} and {theirs!r}"
        )
  return [_read_run(folder, config) for folder, config in configs.items()]


def _read_config(folder: Path) -> Config:
  config = read_config(folder)
  if config is None:
    raise ConfigError(f"{folder} is not a run directory: it has no config.json")
  return config


def _read_run(folder: Path, config: Config) -> Run:
  rows = [row for row in read_metrics(folder) if "heldout_loss" in row]
  if not rows:
    raise ConfigError(f"{folder} has no held-out loss in metrics.jsonl: the run did not finish")
  step, loss, steps = rows[-1]["step"], rows[-1]["heldout_loss"], config.train.steps
  if step != steps:  # before the end of its schedule a run is worse than its tokens allow
    raise ConfigError(f"{folder} was last evaluated at step {step:,} of {steps:,}: let it finish")
  if loss is None:
    raise ConfigError(f"{folder} diverged: its held-out loss is not finite; leave it out")
  return Run(str(folder), count_params(config.model).active, _tokens(folder, config), loss)


def _tokens(folder: Path, config: Config) -> int:
  """Positions a run trained on, through what resumes changed."""
  now = {"data.batch_size": config.data.batch_size, "data.row_length": config.data.row_length}
  end, tokens = config.train.steps, 0
  for change in reversed(_interventions(folder)):
    tokens += (end - change["step"]) * math.prod(now.values())
    end = change["step"]
    now |= {c["key"]: c["old"] for c in change["changes"] if c["key"] in now}
  return tokens + end * math.prod(now.values())


def _interventions(folder: Path) -> list[dict[str, Any]]:
  path = folder / "interventions.jsonl"
  try:
    return [json.loads(line) for line in path.read_text().splitlines()]
  except FileNotFoundError:
    return []
  except ValueError as e:
    raise ConfigError(f"{path} is damaged: {e}") from e
