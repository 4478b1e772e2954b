"""Synthetic training curves, healthy and with an injected spike, for tests of the guard.

Written, with its seeds, before the guard was tuned on it. What is called healthy: losses and
gradient norms of the shapes in `SHAPES`, with noise of 0.2 to 5 % of the loss, lognormal gradient
norms (sigma 0.05 to 0.5) and, at one step in a hundred, a norm two to three times larger still.
"""

from typing import NamedTuple

import numpy as np

HEALTHY_SEEDS = range(1000, 1050)
SPIKED_SEEDS = range(2000, 2050)
SHAPES = (
  "cosine", "hump", "plateau", "wsd", "epochs", "restless", "quiet", "memorising", "sources",
  "heavy",
)  # fmt: skip
KINDS = ("loss", "grad_norm", "both")


class Curve(NamedTuple):
  """Arrays of one length; step i + 1 of a run is index i."""

  shape: str
  loss: np.ndarray
  grad_norm: np.ndarray
  update_ratio: np.ndarray
  log_z: np.ndarray
  load_cv: np.ndarray
  noise: float  # relative standard deviation of the loss
  grad_sigma: float  # of the logarithm of the gradient norm


class Spike(NamedTuple):
  kind: str
  onset: int  # index of the first step it touches
  ramp: int  # steps until it is at its full size
  loss: float  # nats added to the loss at the peak
  grad_factor: float  # of the gradient norm at the peak


def bump(t: np.ndarray, centre: float, width: float) -> np.ndarray:
  return np.exp(-0.5 * ((t - centre) / width) ** 2)


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
  return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def healthy(seed: int) -> Curve:
  """The curve of a seed, of shape `SHAPES[seed % 10]` and 400 to 1200 steps."""
  rng = np.random.default_rng(seed)
  shape = SHAPES[seed % len(SHAPES)]
  steps = int(rng.integers(400, 1201))
  t = np.arange(steps)
  start, floor = rng.uniform(5.5, 11.5), rng.uniform(1.2, 2.6)
  speed, power = rng.uniform(5, 40), rng.uniform(0.3, 0.6)
  noise, grad_sigma = log_uniform(rng, 0.002, 0.05), rng.uniform(0.05, 0.5)
  spread = np.full(steps, noise)
  grad = (
    log_uniform(rng, 0.1, 3) * (1 + 8 * np.exp(-t / 10)) * (1 + rng.uniform(0, 1.5) * t / steps)
  )
  z = rng.standard_normal(steps)

  def power_law(t):
    return floor + (start - floor) * (1 + t / speed) ** -power

  trend = power_law(t)
  if shape == "cosine":
    trend *= 1 - rng.uniform(0.02, 0.06) * (1 - np.cos(np.pi * t / steps)) / 2
  elif shape == "hump":  # while the learning rate warms up
    hump = bump(t, rng.uniform(60, 150), rng.uniform(15, 50))
    trend *= 1 + rng.uniform(0.05, 0.15) * hump
    grad *= 1 + rng.uniform(1, 3) * hump
  elif shape == "plateau":  # nothing is learned at first
    flat = rng.integers(50, 301)
    trend = power_law(np.maximum(t - flat, 0))
    spread = np.where(t < flat, 0.002, spread)
  elif shape == "wsd":  # the learning rate falls in the last fifth
    decay = np.clip((t - 0.8 * steps) / (0.2 * steps), 0, 1)
    trend *= 1 - rng.uniform(0.05, 0.15) * decay
    grad *= 1 + rng.uniform(0, 1) * decay
  elif shape == "epochs":  # the same data again: a step down, then slightly up
    length = int(rng.integers(100, 251))
    trend *= (1 - rng.uniform(0.03, 0.08)) ** (t // length)
    trend *= 1 + 0.01 * (t % length) / length
  elif shape == "restless":  # noise that comes and goes, and a level that wanders
    spread *= 1 + 2 * np.sin(np.pi * t / rng.uniform(50, 200)) ** 2
    wander = np.zeros(steps)
    for i in range(1, steps):
      wander[i] = 0.95 * wander[i - 1] + rng.normal(0, 0.003)
    trend *= np.exp(wander)
  elif shape == "quiet":  # hardly any noise: half a percent now and then
    trend = np.full(steps, rng.uniform(1.5, 3.0))
    spread = np.full(steps, 1e-5)
    trend *= 1 + np.where(rng.random(steps) < 0.02, rng.uniform(0, 0.01, steps), 0)
  elif shape == "memorising":  # towards nothing, with noise a tenth of it
    trend *= np.exp(-4 * t / steps)
    spread = np.full(steps, 0.1)
  elif shape == "sources":  # documents of one kind after those of another
    pieces = np.cumsum(rng.random(steps) < 1 / 40)
    trend *= np.exp(rng.normal(0, 0.01, steps)[pieces])
  else:
    z = rng.standard_t(10, steps)

  grad *= np.exp(grad_sigma * rng.standard_normal(steps))
  grad *= np.where(rng.random(steps) < 0.01, rng.uniform(2, 3, steps), 1)
  ratio = 1e-3 * np.minimum(1, (t + 1) / 50) * np.exp(0.1 * rng.standard_normal(steps))
  log_z = rng.uniform(-2, 8) + rng.uniform(-1, 1) * t / steps + 0.1 * rng.standard_normal(steps)
  load_cv = (0.2 + 1.5 * np.exp(-t / 30)) * np.exp(0.1 * rng.standard_normal(steps))
  return Curve(shape, trend * np.exp(spread * z), grad, ratio, log_z, load_cv, noise, grad_sigma)


def spiked(seed: int) -> tuple[Curve, Spike]:
  """A healthy curve with a spike after its first hundred steps, of kind `KINDS[seed % 3]`.

  The loss rises by 0.3 nats up to 1.5 times itself (x2.5) within one to three steps and heals with
  a time constant of 2 to 40 steps, or not at all. The gradient norm is multiplied by up to 1000, by
  5 at least and that beyond three standard deviations of its noise, for one to five steps. Of kind
  `both` the norm comes first: a loss is computed before the update.
  """
  curve = healthy(seed)
  rng = np.random.default_rng([seed, 1])
  kind = KINDS[seed % len(KINDS)]
  steps = len(curve.loss)
  onset, ramp = int(rng.integers(100, steps - 100)), int(rng.integers(1, 4))
  size = log_uniform(rng, 0.3, max(1.5 * curve.loss[onset], 0.6))
  factor = log_uniform(rng, 5 * np.exp(3 * curve.grad_sigma), 1000)
  heal = log_uniform(rng, 2, 40) if rng.random() < 0.75 else np.inf
  length = int(rng.integers(1, 6))
  loss, grad = curve.loss.copy(), curve.grad_norm.copy()
  if kind != "grad_norm":
    since = np.arange(steps) - onset - (kind == "both")
    rise = np.clip((since + 1) / ramp, 0, 1) * np.exp(-np.maximum(since - ramp + 1, 0) / heal)
    loss += size * rise
  if kind != "loss":
    grad[onset : onset + length] *= factor
  spike = Spike(kind, onset, ramp, size, factor)
  return curve._replace(loss=loss, grad_norm=grad), spike
