"""One training step and one evaluation step, as pure functions to be jitted.

B rows a batch, T tokens a row, E experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from layers.embedding import embed_tokens
from layers.lora import join, split
from layers.moe import MoeStats
from layers.transformer import TransformerLM, update_selection_biases
from mesh.constrain import constrain

from .state import TrainState

Batch = dict[str, jax.Array]  # tokens, targets, segments, positions [B, T] int32; weights float32


class StepMetrics(NamedTuple):
  """Scalars of one step, and one MoeStats a MoE layer of each group, stacked over repeats."""

  loss: jax.Array  # nats a target token
  aux_loss: jax.Array  # what the routers added
  grad_norm: jax.Array  # before clipping
  tokens: jax.Array  # target tokens that counted
  moe: tuple[MoeStats, ...]
  update_ratio: jax.Array  # norm of the update over that of the parameters
  log_z: jax.Array  # mean log of the vocabulary softmax's denominator
  skipped: jax.Array  # bool: the update was left out
  blank_rows: jax.Array  # that were all padding, as rows are that can't be read
  load_cv: jax.Array  # standard deviation of experts' load over its mean, averaged over layers
  digests: jax.Array | None = None  # of gradients, see `verify`


class EvalSums(NamedTuple):
  """Sums over a batch: negative log-likelihood in nats, targets that counted, bytes they stand
  for."""

  nll: jax.Array
  tokens: jax.Array
  bytes: jax.Array


def row_keys(seed: int, step: jax.Array, rows_B: jax.Array) -> jax.Array:
  """One key a row from (seed, step, row in the global batch): no split of the batch matters."""
  key = jax.random.fold_in(jax.random.key(seed), step)
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows_B)


def make_train_step(
  model: TransformerLM,
  optimizer: optax.GradientTransformation,
  *,
  seed: int,
  microbatches: int = 1,
  z_loss: float = 0.0,
  digest: Callable[[Any], jax.Array] | None = None,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
  """The step: gradients of the mean loss over the whole batch, summed over microbatches.

  Its third argument, `limit` (float32, infinity if left out), is the gradient norm above which the
  update is skipped: parameters and optimizer state stay as they were, to the bit. So they do when
  the norm is not finite. Minus infinity tries a step: nothing changes, nor is the step counted.

  Args:
    digest: what to tell of the gradients in `StepMetrics.digests`.
  """

  def losses(trained, frozen, batch: Batch, rows_B, step, valid):
    out = model.apply(
      {"params": join(trained, frozen)},
      batch["tokens"],
      targets_BT=batch["targets"],
      weights_BT=batch["weights"],
      positions_BT=batch["positions"],
      segments_BT=batch["segments"],
      key_B=row_keys(seed, step, rows_B),
      train=True,
      z_loss=z_loss,
    )
    aux = sum((jnp.sum(s.aux_loss) for s in out.stats), jnp.zeros(()))
    aux = aux / (rows_B.shape[0] * microbatches)
    mean = lambda x_BT: jnp.sum(x_BT * batch["weights"]) / valid
    means = mean(out.loss.nll_BT), mean(out.loss.log_z_BT)
    return out.loss.total / valid + aux, (means, aux, out.stats)

  grad = jax.value_and_grad(losses, has_aux=True)

  def step(
    state: TrainState, batch: Batch, limit: jax.Array | float = jnp.inf
  ) -> tuple[TrainState, StepMetrics]:
    valid = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
    rows_B = jnp.arange(batch["tokens"].shape[0], dtype=jnp.int32)
    of_part = lambda part: grad(*split(state.params), *part, state.step, valid)
    (means, aux, stats), grads = _sum_over_parts(of_part, (batch, rows_B), microbatches)
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(norm) & (norm <= limit)
    params, opt_state, ratio = _update(model, optimizer, state, grads, stats, good)
    metrics = StepMetrics(
      means[0],
      aux,
      norm,
      jnp.sum(batch["weights"]),
      stats,
      ratio,
      means[1],
      ~good,
      jnp.sum(jnp.all(batch["segments"] == 0, axis=1)),
      _load_cv(stats),
      None if digest is None else digest(grads),
    )
    finished = jnp.asarray(limit > -jnp.inf, state.step.dtype)
    return TrainState(state.step + finished, params, opt_state), metrics

  return step


def _update(
  model: TransformerLM,
  optimizer: optax.GradientTransformation,
  state: TrainState,
  grads,
  stats,
  good,
) -> tuple[Any, optax.OptState, jax.Array]:
  """New parameters, optimizer state, and the update's ratio; if not `good` the old ones, and 0."""
  before, frozen = split(state.params)
  with jax.named_scope("optimizer"):
    updates, opt_state = optimizer.update(grads, state.opt_state, before)
    ratio = optax.tree.norm(updates) / optax.tree.norm(before)
    params = optax.apply_updates(before, updates)
    if not frozen:
      params = update_selection_biases(model.spec, params, stats)
    # The old state is read anyway, and the choice is made where the new one is written.
    old = before, state.opt_state
    choose = lambda new, old: jnp.where(good, new, old)
    params, opt_state = jax.tree.map(choose, (params, opt_state), old)
    return join(params, frozen), opt_state, jnp.where(good, ratio, 0.0)


def _sum_over_parts(grad, batch: Any, microbatches: int) -> Any:
  """(aux, gradients) of `grad(part) -> ((_, aux), gradients)`, one part after the other."""
  if microbatches == 1:
    (_, aux), grads = grad(batch)
    return aux, grads
  parts = jax.tree.map(lambda x: _split(x, microbatches), batch)

  def accumulate(carry, part):
    (_, aux), grads = grad(part)
    return jax.tree.map(jnp.add, carry, (grads, aux)), None

  first = jax.tree.map(lambda x: x[0], parts)
  shapes = jax.eval_shape(lambda: grad(first))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[1], shapes[0][1]))
  (grads, aux), _ = jax.lax.scan(accumulate, zeros, parts)
  return aux, grads


def _load_cv(stats: tuple[MoeStats, ...]) -> jax.Array:
  """Coefficient of variation of the experts' loads, mean over layers; 0 without experts."""
  loads = [s.load_E for s in stats]
  each = [jnp.std(x, axis=-1) / jnp.maximum(jnp.mean(x, axis=-1), 1e-9) for x in loads]
  total = sum(map(jnp.sum, each), start=jnp.zeros(()))  # layers of stages lie apart: not joined
  return total / max(1, sum(x.size for x in each))


def _split(x: jax.Array, parts: int) -> jax.Array:
  """[B, ...] to [parts, B / parts, ...]; part i takes rows i, i + parts, ..., so that every
  device keeps rows it already holds."""
  y = jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
  return constrain(y, None, "act_batch", *("act_seq",) * (y.ndim > 2))


def make_eval_step(
  model: TransformerLM, byte_lengths_V: np.ndarray
) -> Callable[[Any, Batch], EvalSums]:
  """Sums of the held-out loss: no jitter, no dropout, the evaluation capacity.

  Args:
    byte_lengths_V: UTF-8 bytes each token id stands for; the document end stands for none.
  """
  lengths_V = np.zeros(model.spec.vocab_size, np.float32)
  lengths_V[: len(byte_lengths_V)] = byte_lengths_V

  def step(params, batch: Batch) -> EvalSums:
    out = model.apply(
      {"params": params},
      batch["tokens"],
      targets_BT=batch["targets"],
      weights_BT=batch["weights"],
      positions_BT=batch["positions"],
      segments_BT=batch["segments"],
    )
    weights_BT = batch["weights"]
    lengths_BT = embed_tokens(batch["targets"], jnp.asarray(lengths_V)[:, None], dtype=jnp.float32)
    num_bytes = jnp.sum(lengths_BT[..., 0] * weights_BT)
    return EvalSums(jnp.sum(out.loss.nll_BT * weights_BT), jnp.sum(weights_BT), num_bytes)

  return step
