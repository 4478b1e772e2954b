"""Bits that should be equal: of a step that is run twice, of parameters that devices copied.

A device that computes wrongly now and then (silent data corruption) leaves no error. So every
`train.verify_every` steps a step is tried first, with the same inputs and the same program, and
its loss, gradient norm and gradients must come out to the bit; and copies of parameters and
optimizer state must agree. A flip in a step that is not tried twice is missed, and so is a fault
that makes the same mistake both times.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from layers.lora import split

from .guard import Anomaly, Decision
from .setup import Setup
from .state import TrainState
from .step import StepMetrics


class Mismatch(NamedTuple):
  """Bits that differ."""

  what: str  # the leaf, or the metric
  devices: dict[str, int]  # that hold the part that differs: name, id
  found: str  # in words


def make_digest(abstract: Any, mesh: Mesh) -> Callable[[Any], jax.Array]:
  """For trees like `abstract` (leaves with shardings): uint32 [leaves, devices], sums of the bits
  that each device of the mesh holds; a flipped bit changes one of them."""
  specs = [leaf.sharding.spec for leaf in jax.tree.leaves(abstract)]
  every = PartitionSpec(None, mesh.axis_names)

  def local(*leaves):
    return jnp.stack([_sum_of_bits(x) for x in leaves])[:, None]

  def digest(tree: Any) -> jax.Array:
    split = jax.shard_map(local, mesh=mesh, in_specs=tuple(specs), out_specs=every, check_vma=False)
    return jax.lax.with_sharding_constraint(
      split(*jax.tree.leaves(tree)), jax.sharding.NamedSharding(mesh, PartitionSpec())
    )

  return digest


def _sum_of_bits(x: jax.Array) -> jax.Array:
  """Modulo 2^32, in any order."""
  if x.dtype == jnp.bool_:
    bits = x
  else:
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
  return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)


class Fault(NamedTuple):
  """Bits that should be equal and are not, and what to do."""

  reason: str
  device: int | None  # its id, if one is to blame
  decision: Decision


class Verifier:
  """Checks steps that were run twice, and what devices hold copies of."""

  def __init__(self, setup: Setup):
    self._mesh = setup.mesh
    self._trained = split(setup.abstract.params)[0]
    self.digest = make_digest(self._trained, setup.mesh)
    self._state = setup.abstract.params, setup.abstract.opt_state
    self._digest_state = jax.jit(make_digest(self._state, setup.mesh))
    self._good, self._faults = 0, 0

  def check(
    self, step: int, first: StepMetrics, second: StepMetrics, state: TrainState
  ) -> Fault | None:
    """Compare; a first fault asks to go back to before the last good comparison, the next to stop.

    Args:
      first, second: of the two runs of the step.
      state: after it.
    """
    first, second = (m._replace(moe=()) for m in (first, second))
    found = compare_tries(*jax.device_get((first, second)), self._trained, self._mesh)
    text = f"step {step} was run twice with other results"
    if not found:
      digests = self._digest_state((state.params, state.opt_state))
      found = compare_copies(np.asarray(digests), self._state, self._mesh)
      text = f"after step {step} devices hold other copies"
    if not found:
      self._good = step
      return None
    named = {name: device for mismatch in found for name, device in mismatch.devices.items()}
    shown = "; ".join(mismatch.found for mismatch in found[:3])
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    reason = f"{text}: {shown}{more}"
    self._faults += 1
    anomaly = Anomaly("bits", float(len(found)), 0.0, math.inf, 0, self._good + 1, step)
    decision = Decision("rewind" if self._faults == 1 else "stop", reason, anomaly)
    return Fault(reason, next(iter(named.values())) if len(named) == 1 else None, decision)


def compare_tries(
  first: StepMetrics, second: StepMetrics, abstract: Any, mesh: Mesh
) -> list[Mismatch]:
  """What differs between two runs of one step, both on the host.

  Args:
    abstract: the parameters, whose gradients were digested.
  """
  found = []
  for row, column in np.argwhere(np.asarray(first.digests) != np.asarray(second.digests)):
    path, _ = jax.tree.leaves_with_path(abstract)[row]
    name = _name(path)
    device = mesh.devices.flat[column]
    found.append(Mismatch(name, {str(device): device.id}, f"the gradient of {name} on {device}"))
  for name in ("loss", "grad_norm"):
    a, b = (np.float32(getattr(m, name)) for m in (first, second))
    if a.tobytes() != b.tobytes():
      found.append(Mismatch(name, {}, f"{name}, {a!r} and {b!r}"))
  return found


def compare_copies(digests: np.ndarray, abstract: Any, mesh: Mesh) -> list[Mismatch]:
  """Devices that hold the same part of a leaf, and other bits than most of them.

  Args:
    digests: [leaves, devices], of `make_digest`.
    abstract: the tree that was digested.
  """
  devices, found = mesh.devices, []
  for row, (path, leaf) in enumerate(jax.tree.leaves_with_path(abstract)):
    parts: dict[tuple, list[int]] = {}
    where = leaf.sharding.devices_indices_map(leaf.shape)
    for column, device in enumerate(devices.flat):
      key = tuple((s.start, s.stop) for s in where[device])
      parts.setdefault(key, []).append(column)
    for columns in parts.values():
      sums = np.asarray(digests)[row, columns]
      values, counts = np.unique(sums, return_counts=True)
      if len(values) == 1:
        continue
      most = values[counts.argmax()]
      clear = counts.max() * 2 > counts.sum()  # else nobody can tell who is right
      odd = [c for c, s in zip(columns, sums, strict=True) if not clear or s != most]
      names = {str(devices.flat[c]): devices.flat[c].id for c in odd}
      name = _name(path)
      text = f"{name} on {', '.join(names)}" + (
        "" if clear else " (which of them, copies can't say)"
      )
      found.append(Mismatch(name, names, text))
  return found


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
