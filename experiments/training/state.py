"""The training state, its shapes, its placement on a mesh, and how it is first drawn."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from layers import lora
from layers.count import abstract_params
from layers.params import axes, trainable, unbox
from layers.stack import is_staged
from layers.transformer import TransformerLM
from mesh.rules import Rules, shardings

from ..config import LoraConfig
from .optimizer import state_axes


class TrainState(NamedTuple):
  """Everything a step reads and writes; keys derive from (seed, step), so none is held."""

  step: jax.Array  # int32, finished steps
  params: Any
  opt_state: optax.OptState


class Layout(NamedTuple):
  """What is known of the parameters before any is allocated."""

  axes: Any  # logical axis names of each leaf
  trainable: Any  # may the optimizer update it?
  shapes: Any  # ShapeDtypeStructs


def param_layout(
  model: TransformerLM, row_length: int = 1, adapters: LoraConfig | None = None
) -> Layout:
  """Shapes, logical axes and trainability of a model's parameters.

  Args:
    row_length: of the rows it will see, so that what does not suit them is found here.
    adapters: which to add, if any; what they are added to is then not trained.

  Raises:
    ValueError, NotImplementedError: the model can't run rows of this length, a named kernel
      implementation can't run here, or the model has no such weights to adapt.
  """
  boxed = abstract_params(model.spec)
  if row_length > 1:
    tokens_BT = jax.ShapeDtypeStruct((1, row_length), jnp.int32)
    apply = lambda params, tokens_BT: model.apply({"params": params}, tokens_BT)
    jax.eval_shape(apply, unbox(boxed), tokens_BT)
  if adapters is not None and adapters.rank:
    boxed = lora.attach(boxed, adapters.rank, adapters.targets)
  return Layout(axes(boxed), trainable(boxed), unbox(boxed))


def abstract_state(
  layout: Layout,
  opt_shapes: optax.OptState,
  mesh: Mesh | AbstractMesh,
  rules: Rules,
  circular: int = 1,
) -> TrainState:
  """The state as ShapeDtypeStructs that carry their shardings.

  Moments are placed like their parameter; counts and factored statistics are small.

  Args:
    opt_shapes: of the optimizer's state, which no mesh changes: `jax.eval_shape` of its `init`.
    circular: see `layers.stack`: segments that do not divide into so many rounds of the pipeline
      stages lie on all of them.

  Raises:
    ValueError: a sharded dim that its mesh axes do not divide, named with its path; stages, and no
      segment that divides into them.
  """
  stages = mesh.shape["stage"]

  def on_stages(leaf, names):
    """`names` without `layers` where every stage holds the whole segment."""
    here = lambda name, size: name != "layers" or is_staged(size, stages, circular)
    return tuple(n if here(n, s) else None for n, s in zip(names, leaf.shape, strict=True))

  placed = jax.tree.map(on_stages, layout.shapes, layout.axes)
  names = jax.tree.leaves(placed, is_leaf=lambda x: isinstance(x, tuple))
  if stages > 1 and not any("layers" in n for n in names):
    raise ValueError(
      f"mesh stage={stages} with circular={circular}: no segment of the model has a multiple of "
      f"{stages * circular} repeats"
    )
  place = lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s)
  put = lambda axes, shapes: jax.tree.map(place, shapes, shardings(axes, shapes, rules, mesh))
  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
  return TrainState(
    step,
    put(placed, layout.shapes),
    put(jax.tree.map(on_stages, opt_shapes, state_axes(opt_shapes, layout.axes)), opt_shapes),
  )


def given(params: Any) -> Any:
  """Those of a model's parameters that weights made elsewhere have: all but adapters."""
  adapters, rest = lora.split(params)
  return rest or adapters


def init_state(
  model: TransformerLM,
  optimizer: optax.GradientTransformation,
  abstract: TrainState,
  seed: int,
  params: Any = None,
) -> TrainState:
  """Draw the state in place: same seed, same weights, on any mesh.

  Args:
    params: parameters on the mesh, in place of drawn ones, without adapters; they are given away.
  """

  def draw(key, params):
    if params is None:
      params = unbox(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])
    adapters, frozen = lora.split(abstract.params)
    if frozen:
      params = lora.join(lora.draw(adapters, jax.random.fold_in(key, 1)), params)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(lora.split(params)[0]))

  placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  # Drawn once, so compiled in a hurry where that is known to help: 1.7 s instead of 6 on a CPU.
  on_cpu = abstract.step.sharding.mesh.devices.flat[0].platform == "cpu"
  options = {"xla_backend_optimization_level": 0} if on_cpu else None
  drawing = jax.jit(draw, out_shardings=placed, compiler_options=options, donate_argnums=1)
  return drawing(jax.random.key(seed), params)
