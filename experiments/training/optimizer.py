"""From the `optimizer` section to a schedule and one optax transformation over stacked parameters.

Order of an update: gradients in float32, clipped by their global norm; the leaf's rule; decoupled
weight decay; minus the learning rate. Every rule adds `learning_rate * weight_decay * w`, as
PyTorch does.

Which leaf gets what (`leaf_rules`):

| leaf                                         | muon  | other rules | decay |
|----------------------------------------------|-------|-------------|-------|
| matrices between features, experts' too      | muon  | the rule    | yes   |
| embedding, head, learned positions, router   | adamw | the rule    | yes   |
| norms, biases, sinks: one vector a layer     | adamw | the rule    | no    |
| `trainable=False`                            | frozen| frozen      | no    |

Embeddings are decayed as in GPT-3, LLaMA, Megatron-LM and nanoGPT (OLMo 2 is the exception): a
tied table is the output matrix too.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..config import Config, ConfigError, OptimizerConfig
from . import stacked


@dataclass(frozen=True)
class LeafRule:
  """What happens to one leaf: `rule` names an optimizer or is "frozen"; `decay`: weight decay."""

  rule: str
  decay: bool
  slices: stacked.Slices

  def __str__(self) -> str:
    return self.rule + (" + decay" if self.decay else "")


def leaf_rules(config: OptimizerConfig, axes_tree: Any, trainable_tree: Any) -> Any:
  """The tree of `LeafRule`: what the optimizer does to each leaf (see the table above).

  Args:
    config: the `optimizer` section.
    axes_tree: `layers.params.axes` of the parameters: a tuple of logical names a leaf.
    trainable_tree: `layers.params.trainable` of the parameters: a bool a leaf.
  """

  def rule(trainable, axes):
    slices = stacked.split(axes)
    if not trainable:
      return LeafRule("frozen", False, slices)
    name = config.name
    if name == "muon" and not _between_features(slices):
      name = "adamw"
    return LeafRule(name, slices.is_matrix and config.weight_decay > 0, slices)

  return jax.tree.map(rule, trainable_tree, axes_tree)


def _between_features(slices: stacked.Slices) -> bool:
  """A map from features to features: no table's rows (vocab), no unnamed or expert outputs."""
  return slices.is_matrix and not {None, "vocab", "expert"} & set(slices.slice_axes)


def global_norm(gradients: Any, trainable_tree: Any) -> jax.Array:
  """Float32 Euclidean norm of all trained leaves together."""
  square = lambda g, trained: jnp.sum(jnp.square(g.astype(jnp.float32))) if trained else 0.0
  squares = jax.tree.leaves(jax.tree.map(square, gradients, trainable_tree))
  return jnp.sqrt(sum(squares, jnp.float32(0)))


def make_optimizer(
  config: OptimizerConfig, schedule: optax.Schedule, axes_tree: Any, trainable_tree: Any
) -> optax.GradientTransformation:
  """The optimizer for a tree of stacked parameters.

  Rules and the fields they read, besides `weight_decay` and `clip_norm`:

  * adamw (arXiv 1711.05101): beta1, beta2, eps;
  * adafactor (arXiv 1804.04235): none; steps are relative to each matrix's own root mean square;
  * lion (arXiv 2302.06675): beta1, beta2;
  * muon (arXiv 2502.16982): momentum, eps; its adamw leaves beta1, beta2, eps and
    `adam_learning_rate`, which replaces the peak of the same schedule;
  * sgd: momentum, Nesterov's.

  All but adafactor, which has no first moment, read moment_dtype; second moments are float32.
  Leaves that are not trained have no state, a zero update and no part in the global norm.

  Args:
    config: the `optimizer` section.
    schedule: step -> learning rate, from `make_schedule`.
    axes_tree: a tuple of logical axis names a leaf.
    trainable_tree: a bool a leaf.

  Returns:
    A transformation whose `update(gradients, state, params)` gives what to add to the parameters.

  Raises:
    ConfigError: when a coefficient lies outside its range.
  """
  _check(config)
  rules = leaf_rules(config, axes_tree, trainable_tree)
  decay_mask = jax.tree.map(lambda leaf: leaf.decay, rules)
  labels = jax.tree.map(lambda leaf: leaf.rule, rules)
  parts = {
    name: optax.chain(
      _moments_in(config.moment_dtype, _core(config, name, rules)),
      optax.add_decayed_weights(config.weight_decay, decay_mask),
      optax.scale_by_learning_rate(_learning_rate(config, name, schedule)),
    )
    for name in sorted(set(jax.tree.leaves(labels)) - {"frozen"})
  }
  parts["frozen"] = optax.set_to_zero()
  return optax.chain(_clip(config.clip_norm, trainable_tree), optax.partition(parts, labels))


def _core(config: OptimizerConfig, name: str, rules: Any) -> optax.GradientTransformation:
  # Other rules' leaves are absent from the trees that this one sees: optax masks them.
  masked = optax.MaskedNode()
  slices = jax.tree.map(lambda leaf: leaf.slices if leaf.rule == name else masked, rules)
  match name:
    case "adamw":
      return optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    case "adafactor":
      return stacked.scale_by_adafactor(slices)
    case "lion":
      return optax.scale_by_lion(config.beta1, config.beta2)
    case "muon":
      return stacked.scale_by_muon(slices, beta=config.momentum, eps=config.eps)
    case "sgd":
      return optax.trace(config.momentum, nesterov=True)
  raise ConfigError(f"optimizer.name={name}: no such rule")


def _moments_in(dtype: str, core: optax.GradientTransformation) -> optax.GradientTransformation:
  """`core` with its first moment rounded to `dtype` between steps, and float32 within one.

  optax's own `mu_dtype` multiplies in the narrow type as well, and so rounds twice.
  """

  def cast(state, to):
    moments = {"mu", "trace"} & set(state._fields)
    return state._replace(**{name: optax.tree.cast(getattr(state, name), to) for name in moments})

  def update(gradients, state, params=None):
    updates, state = core.update(gradients, cast(state, "float32"), params)
    return updates, cast(state, dtype)

  return optax.GradientTransformation(lambda params: cast(core.init(params), dtype), update)


def _learning_rate(config: OptimizerConfig, name: str, schedule: optax.Schedule) -> optax.Schedule:
  if config.name != "muon" or name == "muon" or config.adam_learning_rate is None:
    return schedule
  ratio = config.adam_learning_rate / config.learning_rate
  return lambda step: ratio * schedule(step)


def _clip(max_norm: float | None, trainable_tree: Any) -> optax.GradientTransformation:
  """Gradients in float32, times min(1, max_norm / global norm).

  One multiplication that fuses with the rule; `optax.clip_by_global_norm` selects between
  whole trees, which on a CPU takes as long as AdamW itself. A norm that is not finite makes
  updates that are not finite: the training guard sees it, nothing hides it.
  """

  def update(gradients, state, params=None):
    del params
    gradients = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
    if max_norm is not None:
      factor = jnp.minimum(1.0, max_norm / global_norm(gradients, trainable_tree))
      gradients = jax.tree.map(lambda g: g * factor, gradients)
    return gradients, state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def state_axes(state: Any, axes_tree: Any) -> Any:
  """Logical axes of every array in an optimizer state, to place it beside its parameters.

  Args:
    state: `make_optimizer(...).init(params)`, or its `jax.eval_shape`.
    axes_tree: a tuple of logical axis names a parameter.

  Returns:
    The state's structure with a tuple of logical names a leaf: the parameter's for a moment of
    its shape; its batch dims' for Adafactor's factored statistics, which are small; () for counts.
  """
  table = dict(jax.tree.leaves_with_path(axes_tree, is_leaf=_is_axes))

  def leaf_axes(path, leaf):
    for start in range(len(path)):
      if path[start:] in table:
        field = getattr(path[start - 1], "name", "") if start else ""
        return _statistic_axes(field, leaf.ndim, stacked.split(table[path[start:]]))
    return (None,) * leaf.ndim

  return jax.tree_util.tree_map_with_path(leaf_axes, state)


def _statistic_axes(field: str, ndim: int, slices: stacked.Slices) -> tuple[str | None, ...]:
  if field not in optax.FactoredState._fields:
    return slices.axes
  whole = field == "v" and ndim == len(slices.merged_axes)
  return slices.merged_axes if whole else slices.axes[: slices.batch] + (None,)


def _is_axes(x: Any) -> bool:
  return isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)


def _check(config: OptimizerConfig) -> None:
  for field in ("beta1", "beta2", "momentum"):
    if not 0 <= getattr(config, field) < 1:
      raise ConfigError(f"optimizer.{field}={getattr(config, field)}: must lie in [0, 1)")
  for field in ("learning_rate", "eps", "clip_norm", "adam_learning_rate"):
    value = getattr(config, field)
    if value is not None and value <= 0:
      raise ConfigError(f"optimizer.{field}={value}: must be positive")
  if config.weight_decay < 0:
    raise ConfigError(f"optimizer.weight_decay={config.weight_decay}: must not be negative")
  if config.name == "adafactor" and config.moment_dtype != "float32":
    raise ConfigError(
      f"optimizer.moment_dtype={config.moment_dtype}: adafactor keeps no first moment; use float32"
    )


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
  end = total_steps if config.decay_steps is None else config.decay_steps
  if config.warmup_fraction is not None:
    if not 0 <= config.warmup_fraction < 1:
      raise ConfigError(
        f"optimizer.warmup_fraction={config.warmup_fraction}: must be at least 0 and below 1"
      )
    # At least one step is left to come down.
    warmup = min(math.ceil(config.warmup_fraction * end), end - 1)
    config = dataclasses.replace(config, warmup_steps=warmup)
  peak, warmup = config.learning_rate, config.warmup_steps
  _check_schedule(config, end)
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


def _check_schedule(config: OptimizerConfig, end: int) -> None:
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


def hyperparameters(config: Config) -> dict[str, Any]:
  """What decides an update besides the gradient, to be kept with a checkpoint."""
  return dataclasses.asdict(config.optimizer) | {"batch_size": config.data.batch_size}


def refuse_other_values(saved: dict[str, Any], config: Config, reason: str) -> None:
  """That the values to train with are those of the checkpoint, or were changed for a `reason`.

  config.json says the same unless somebody edited it; optax keeps none of them in its state.

  Raises:
    ConfigError: they differ and nobody said why.
  """
  now = hyperparameters(config)
  other = [name for name in saved if name in now and saved[name] != now[name]]
  if other and not reason.strip():
    name = other[0]
    section = "data" if name == "batch_size" else "optimizer"
    more = f" and {len(other) - 1} more" if len(other) > 1 else ""
    raise ConfigError(
      f"the checkpoint was trained with {section}.{name}={saved[name]!r}{more}, the config says "
      f"{now[name]!r}: set it back, or say with --reason=... why it is to change"
    )
