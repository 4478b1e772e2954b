"""Learning rate against step: linear warmup, then the named decay."""

import jax.numpy as jnp
import optax

from ..config import ConfigError, OptimizerConfig


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
  """The learning rate of update number `step`, counted from 0.

  With peak p, warmup w, end e (`decay_steps`, or `total_steps`) and final fraction f:

  * warmup, step < w: p (step + 1) / (w + 1), so that the first update already moves;
  * cosine: from p at w to f p at e along half a cosine (arXiv 1608.03983);
  * linear: from p at w to f p at e along a line;
  * wsd (warmup, stable, decay; arXiv 2404.06395): p for `stable_fraction` of the e - w steps
    after warmup (rounded to a step), then along a line to f p at e;
  * inverse_sqrt (arXiv 1706.03762): p sqrt(max(w, 1) / max(step, w, 1)), which has no end and
    reads neither e nor f;
  * constant: p, reads neither e nor f.

  From step e on, cosine, linear and wsd stay at f p.

  Args:
    config: the `optimizer` section.
    total_steps: `train.steps`, the end of the schedule unless `decay_steps` is set.

  Returns:
    A function of the step (int or traced scalar), usable inside `jit`.

  Raises:
    ConfigError: when a rate, a fraction or a number of steps makes no sense.
  """
  peak, warmup = config.learning_rate, config.warmup_steps
  end = total_steps if config.decay_steps is None else config.decay_steps
  _check(config, end)
  final = peak * config.final_fraction
  match config.schedule:
    case "cosine":
      decay = optax.cosine_decay_schedule(peak, end - warmup, alpha=config.final_fraction)
    case "linear":
      decay = optax.linear_schedule(peak, final, end - warmup)
    case "wsd":
      stable = round(config.stable_fraction * (end - warmup))
      # A line of no steps would be all peak, so the last step is always left to the decay.
      stable = min(stable, end - warmup - 1)
      decay = optax.linear_schedule(peak, final, end - warmup - stable, transition_begin=stable)
    case "inverse_sqrt":
      scale = max(warmup, 1)
      decay = lambda step: peak * jnp.sqrt(scale / jnp.maximum(step + warmup, scale))
    case "constant":
      decay = optax.constant_schedule(peak)
  if warmup == 0:
    return decay
  rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
  return optax.join_schedules([rise, decay], [warmup])


def _check(config: OptimizerConfig, end: int) -> None:
  if config.learning_rate <= 0:
    raise ConfigError(f"optimizer.learning_rate={config.learning_rate}: must be positive")
  if config.warmup_steps < 0:
    raise ConfigError(f"optimizer.warmup_steps={config.warmup_steps}: must not be negative")
  if config.warmup_steps >= end:
    name = "train.steps" if config.decay_steps is None else "optimizer.decay_steps"
    raise ConfigError(
      f"optimizer.warmup_steps={config.warmup_steps} must be below {name}={end}: "
      "warm up for fewer steps or train for more"
    )
  for field in ("final_fraction", "stable_fraction"):
    if not 0 <= getattr(config, field) <= 1:
      raise ConfigError(f"optimizer.{field}={getattr(config, field)}: must lie between 0 and 1")
