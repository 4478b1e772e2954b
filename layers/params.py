"""The one way to declare a weight: name, shape, logical axes, initialiser, dtype.

`declare` is called inside a Linen shell. What `init` returns is boxed in `Weight`, which knows
the logical axes and whether an optimizer may touch the leaf; `unbox` strips that, `axes` and
`trainable` read it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from mesh.collectives import manual_size

from .linear import LowRank
from .spec import InitSpec

Initializer = Callable[..., jax.Array]

SUFFIX = "_lora"  # of the adapter beside a weight

# A normal cut at two standard deviations has this standard deviation.
_TRUNCATED_STDDEV = 0.87962566103423978


class Weight(nn.LogicallyPartitioned):
  """A parameter with logical axis names, whether it is trained, and whether it may be rounded."""

  trainable: bool = struct.field(default=True, pytree_node=False)
  exact: bool = struct.field(default=False, pytree_node=False)
  num_in: int = struct.field(default=0, pytree_node=False)  # see `declare_projection`

  def unbox(self, apply_constraint: bool = True) -> Any:
    # Placement is the caller's business (mesh.rules); Linen's own needs global rules to be set.
    del apply_constraint
    return self.value


def declare(
  module: nn.Module,
  name: str,
  shape: tuple[int, ...],
  axes: tuple[str | None, ...],
  init: Initializer,
  *,
  trainable: bool = True,
  exact: bool = False,
  num_in: int = 0,
) -> jax.Array:
  """Declare parameter `name` of `module` and return its float32 value.

  Args:
    module: the Linen shell that owns the weight, inside `setup` or `@nn.compact`.
    shape: sizes of its dims.
    axes: one logical axis name (or None: never sharded) a dim, see `mesh.axes`.
    init: `(key, shape, dtype) -> array`.
    trainable: False for leaves updated outside the optimizer (DeepSeek's router bias).
    exact: used in float32 whatever the activations are, so never rounded to travel.
    num_in: see `declare_projection`.

  Raises:
    ValueError: when `axes` and `shape` differ in length, or the value given has another shape.
  """
  if len(shape) != len(axes):
    raise ValueError(f"{name}: shape {shape} has {len(shape)} dims, axes {axes} name {len(axes)}")

  def boxed(key: jax.Array) -> Any:  # Linen's `param` takes the value out of the box
    value = init(key, shape, jnp.float32)
    return Weight(value, names=axes, trainable=trainable, exact=exact, num_in=num_in)

  ways = [manual_size("expert") if axis == "expert" else 1 for axis in axes]
  if module.is_initializing() or set(ways) <= {1}:
    return module.param(name, boxed)
  # Inside a region each device has its own experts, which Linen would take for a wrong shape.
  value = unbox(module.get_variable("params", name))
  local = tuple(size // n for size, n in zip(shape, ways, strict=True))
  if value is None or value.shape != local:
    found = None if value is None else value.shape
    raise ValueError(f"{name}: this device's part has the shape {found}, needs {local}")
  return value


def declare_projection(
  module: nn.Module,
  name: str,
  shape: tuple[int, ...],
  axes: tuple[str | None, ...],
  init: Initializer,
  *,
  num_in: int = 1,
) -> jax.Array | LowRank:
  """`declare` a weight that only `linear.dense` uses, with its adapter where parameters hold one.

  Args:
    num_in: how many dims `dense` contracts.
  """
  w = declare(module, name, shape, axes, init, num_in=num_in)
  if module.is_initializing() or not module.has_variable("params", name + SUFFIX):
    return w
  adapter = unbox(module.get_variable("params", name + SUFFIX))
  return LowRank(w, adapter["a"], adapter["b"])


def kernel_init(spec: InitSpec, fan_in: int, gain: float = 1.0) -> Initializer:
  """Initialiser of a matrix whose outputs each sum `fan_in` products, times `gain`."""
  if spec.kind == "normal":
    return nn.initializers.normal(spec.stddev * gain) if spec.stddev else nn.initializers.zeros
  stddev = (spec.scale / fan_in) ** 0.5 * gain / _TRUNCATED_STDDEV
  return nn.initializers.truncated_normal(stddev)


def is_weight(x: Any) -> bool:
  return isinstance(x, Weight)


def unbox(tree: Any) -> Any:
  """The tree of plain arrays."""
  return jax.tree.map(lambda w: w.value if is_weight(w) else w, tree, is_leaf=is_weight)


def axes(tree: Any) -> Any:
  """The same tree with each weight's tuple of logical axis names as its leaf."""
  return jax.tree.map(lambda w: tuple(w.names), tree, is_leaf=is_weight)


def trainable(tree: Any) -> Any:
  """The same tree of booleans: may an optimizer update this leaf?"""
  return jax.tree.map(lambda w: w.trainable, tree, is_leaf=is_weight)


def exact(tree: Any) -> Any:
  """The same tree of booleans: is this leaf used in float32 only?"""
  return jax.tree.map(lambda w: w.exact, tree, is_leaf=is_weight)


def init_params(shell: nn.Module, key: jax.Array, *inputs: Any, **kwargs: Any) -> Any:
  """Unboxed parameters of `shell` for these inputs; works with and without a mesh."""
  return unbox(shell.init(key, *inputs, **kwargs)["params"])


def to_nnx(shell: nn.Module, rngs: Any, *inputs: Any, **kwargs: Any) -> Any:
  """An NNX module of a Linen shell, its weights drawn for `inputs`; with and without a mesh.

  `flax.nnx.bridge.ToNNX` by itself keeps the logical axes as if they were mesh axes, and raises
  where there is no mesh to match; here the parameters are plain.

  Args:
    shell: any shell of this package.
    rngs: `flax.nnx.Rngs`.
    inputs, kwargs: as for a call of the shell.

  Returns:
    A module called like the shell, whose parameters are `nnx.Param`s.
  """
  # NNX is a second module system, which most programs never load.
  from flax import nnx

  class Plain(type(shell)):
    def init_with_output(self, *args: Any, **kwargs: Any) -> Any:
      out, variables = super().init_with_output(*args, **kwargs)
      return out, unbox(variables)

  fields = (
    f.name for f in dataclasses.fields(shell) if f.init and f.name not in ("parent", "name")
  )
  module = nnx.bridge.ToNNX(Plain(**{name: getattr(shell, name) for name in fields}), rngs)
  return nnx.bridge.lazy_init(module, *inputs, **kwargs)
