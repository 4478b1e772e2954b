"""Drives a guard along a curve as the training loop does."""

from collections import deque

import numpy as np

from experiments.config import GuardConfig
from experiments.training.guard import Decision, Guard, Observation
from tests.experiments.training import curves

DELAY = 4  # steps in flight: a limit is that of the observations before


def drive(guard: Guard, loss, grad_norm=None, *, start=1, **signals) -> list[Decision]:
  """The decisions on a curve whose steps skip what is above the limit; ends at a rewind or stop."""
  grad_norm = np.ones(len(loss)) if grad_norm is None else grad_norm
  limits, decisions = deque([guard.limit] * DELAY), []
  for i, (x, norm) in enumerate(zip(map(float, loss), map(float, grad_norm), strict=True)):
    limits.append(guard.limit)
    rest = {name: float(values[i]) for name, values in signals.items()}
    o = Observation(start + i, x, norm, skipped=not norm <= limits.popleft(), **rest)
    decisions.append(guard.observe(o))
    if decisions[-1].action in ("rewind", "stop"):
      break
  return decisions


def drive_curve(curve: curves.Curve, **settings) -> list[Decision]:
  return drive(
    Guard(GuardConfig(**settings)),
    curve.loss,
    curve.grad_norm,
    update_ratio=curve.update_ratio,
    log_z=curve.log_z,
    load_cv=curve.load_cv,
  )


def said(decisions: list[Decision], start=1) -> list[tuple[int, str]]:
  """(step, what was done or noticed), in order."""
  found = []
  for step, d in enumerate(decisions, start):
    found += [(step, f"{d.action}: {d.reason}")] if d.action != "continue" else []
    found += [(step, f"{'end' if n.recovered else 'notice'}: {n.reason}") for n in d.notices]
  return found


def noisy(levels, sigma=0.01, seed=0) -> np.ndarray:
  noise = np.random.default_rng(seed).standard_normal(len(levels))
  return np.asarray(levels) * np.exp(sigma * noise)
