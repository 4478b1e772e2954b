"""From a config to the things a run is made of: mesh, model, optimizer, the state's shapes."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh

from layers.attention import layer_mask
from layers.kernels.attention.blocks import reach_of
from layers.lora import split
from layers.spec import LinearAttentionSpec, MoeSpec, TransformerXLSpec
from layers.stack import remat_policy
from layers.transformer import TransformerLM
from mesh.axes import MESH_AXES
from mesh.multihost import host_batch_to_global, local_rows
from mesh.rules import Rules, assign, parse_rules, spec_for, validate
from mesh.topology import DCN_AXES, count_slices, make_mesh, resolve_sizes

from ..config import Config, ConfigError
from .optimizer import make_optimizer, make_schedule
from .state import Layout, TrainState, abstract_state, param_layout


class Setup(NamedTuple):
  """Everything known before a byte is allocated on a device."""

  config: Config
  mesh: Mesh | AbstractMesh  # abstract where nothing will run or be compiled
  rules: Rules
  model: TransformerLM
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  layout: Layout
  abstract: TrainState

  @property
  def accumulate(self) -> int:
    """Parts of the batch whose gradients are summed one after the other; with pipeline stages they
    follow each other through the stages instead."""
    return 1 if self.mesh.shape["stage"] > 1 else self.config.train.microbatches


def build(config: Config, devices: list[jax.Device] | None = None, *, batch: bool = True) -> Setup:
  """Resolve a config for these devices (default: all there are).

  Args:
    batch: whether batches will be run; their sizes must then divide over the mesh.

  Raises:
    ConfigError: an impossible mesh, a size its mesh axes do not divide, an unknown remat policy,
      rows that do not suit the model, a kernel that can't run here, no device at all.
  """
  devices = devices_here() if devices is None else devices
  try:
    sizes = mesh_sizes(config, len(devices), count_slices(devices))
    dcn = {axis: getattr(config.mesh, f"dcn_{axis}") for axis in DCN_AXES}
    mesh = make_mesh(sizes, devices, dcn=dcn, explicit=config.mesh.axis_types == "explicit")
  except (ValueError, NotImplementedError) as e:
    raise ConfigError(str(e).splitlines()[0]) from e
  return build_on(config, mesh, devices[0].platform, batch=batch)


def mesh_sizes(config: Config, num_devices: int, num_slices: int = 1) -> dict[str, int]:
  """Mesh axis -> size, as the config asks or as suits it best.

  Raises:
    ValueError: see `mesh.topology.resolve_sizes`.
  """
  asked = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
  dcn = {axis: getattr(config.mesh, f"dcn_{axis}") for axis in DCN_AXES}
  # Dropless rows that travel need room for the worst case: not unless asked for.
  moes = [layer.mlp for layer in config.model.layers if isinstance(layer.mlp, MoeSpec)]
  experts = [
    moe.num_experts for moe in moes if (moe.dispatch, moe.exchange) != ("dropless", "auto")
  ]
  rules = parse_rules(config.mesh.rules)
  num_experts = min(experts, default=None) if "expert" in rules.mesh_axes else None
  return resolve_sizes(asked, num_devices, dcn=dcn, num_experts=num_experts, num_slices=num_slices)


def build_on(
  config: Config, mesh: Mesh | AbstractMesh, platform: str, *, batch: bool = True
) -> Setup:
  """The same on a mesh that is there or, to plan, is only numbers; errors as in `build`."""
  try:
    remat_policy(config.train.remat)
    rules = parse_rules(config.mesh.rules)
    validate(rules, mesh)
    if batch:
      check_batch(config, rules, mesh)
      check_parallel(config, mesh)
    model = TransformerLM(
      config.model,
      dtype=compute_dtype(config, platform),
      remat=config.train.remat,
      unroll=None if platform == "cpu" else 1,
      microbatches=config.train.microbatches if mesh.shape["stage"] > 1 else 1,
      circular=config.mesh.circular,
      context_method=config.mesh.context_method,
      adapter_scale=config.lora.scale,
    )
    layout = param_layout(model, config.data.row_length, config.lora)
    schedule = make_schedule(config.optimizer, config.train.steps)
    optimizer, opt_shapes = optimizer_for(config, schedule, layout)
    abstract = abstract_state(layout, opt_shapes, mesh, rules, config.mesh.circular)
  except (ValueError, NotImplementedError) as e:
    raise ConfigError(str(e).splitlines()[0]) from e
  return Setup(config, mesh, rules, model, optimizer, schedule, layout, abstract)


def optimizer_for(
  config: Config, schedule: optax.Schedule, layout: Layout
) -> tuple[optax.GradientTransformation, optax.OptState]:
  """The optimizer of what is trained, and the shapes of its state."""
  axes, trainable, shapes = (
    split(tree)[0] for tree in (layout.axes, layout.trainable, layout.shapes)
  )
  optimizer = make_optimizer(config.optimizer, schedule, axes, trainable)
  return optimizer, jax.eval_shape(optimizer.init, shapes)


def count_trained(config: Config) -> int:
  """Parameters that training changes: those of adapters, if there are any."""
  shapes = param_layout(TransformerLM(config.model), adapters=config.lora).shapes
  return sum(leaf.size for leaf in jax.tree.leaves(split(shapes)[0]))


def devices_here() -> list[jax.Device]:
  """Those that JAX finds; ConfigError where it finds none."""
  try:
    return jax.devices()
  except (RuntimeError, AssertionError) as e:  # JAX_PLATFORMS names what is not there
    platforms = jax.config.jax_platforms or "any platform"
    why = f": {str(e).splitlines()[0]}" if str(e) else ""
    raise ConfigError(f"JAX finds no device for {platforms} (see JAX_PLATFORMS){why}") from e


def compute_dtype(config: Config, platform: str) -> Any:
  """float32 on CPU, bfloat16 on accelerators, unless the config says otherwise."""
  name = config.train.compute_dtype
  if name == "auto":
    return jnp.float32 if platform == "cpu" else jnp.bfloat16
  return jnp.dtype(name)


def check_batch(config: Config, rules: Rules, mesh: Mesh | AbstractMesh) -> None:
  """Raise ConfigError where a (micro)batch does not divide over the mesh."""
  rows = config.data.batch_size // config.train.microbatches
  length = config.data.row_length
  of_rows, of_positions = assign(("act_batch", "act_seq"), rules, mesh.shape)
  for name, size, axes in (("rows", rows, of_rows), ("positions", length, of_positions)):
    shards = math.prod(mesh.shape[axis] for axis in axes)
    if size % shards:
      over = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
      raise ConfigError(
        f"a (micro)batch of {size} {name} does not divide over mesh {over}: data.batch_size="
        f"{config.data.batch_size} / train.microbatches={config.train.microbatches} must be a "
        f"multiple of the batch axes, data.row_length={length} of context"
      )


def check_parallel(config: Config, mesh: Mesh | AbstractMesh) -> None:
  """What the schedules over `stage` and `context` ask of a model and its rows."""
  stages, context = mesh.shape["stage"], mesh.shape["context"]
  parts, circular = config.train.microbatches, config.mesh.circular
  if stages > 1 and circular > 1 and parts < stages:
    raise ConfigError(
      f"mesh.circular={circular} over stage={stages} needs at least {stages} microbatches: set "
      f"train.microbatches={stages} or more, not {parts}"
    )
  if config.mesh.axis_types == "explicit" and stages > 1 and mesh.shape["tensor"] > 1:
    raise ConfigError("mesh.axis_types=explicit can't combine stage and tensor; use auto")
  if context == 1:
    return
  length = config.data.row_length
  if length % (2 * context):
    raise ConfigError(
      f"data.row_length={length} must be a multiple of {2 * context}: context={context} cuts a row "
      f"into twice as many chunks"
    )
  method = config.mesh.context_method
  half = length // context // 2
  for layer in config.model.layers:
    if isinstance(layer.attention, LinearAttentionSpec):
      raise ConfigError(
        f"linear attention hands a state from token to token, so it does not work with "
        f"context={context}"
      )
    if isinstance(getattr(layer.attention, "position", None), TransformerXLSpec):
      raise ConfigError(f"Transformer-XL's relative positions do not work with context={context}")
    if method == "halo" and None in reach_of(layer_mask(layer.attention)):
      raise ConfigError(
        "mesh.context_method=halo is for masks of a bounded reach (model...attention.window): a "
        "layer sees the whole row, use auto"
      )
    if method == "ring" and layer.attention.implementation not in (None, "xla"):
      raise ConfigError(
        f"attention.implementation={layer.attention.implementation} has no ring for context="
        f"{context}: use xla, or --config.mesh.context_method=all_gather"
      )
    group = layer.mlp.group_size if isinstance(layer.mlp, MoeSpec) else half
    if group is None or half % group:
      raise ConfigError(
        f"with context={context} a routing group must lie on one device: set "
        f"--config.model.segments.*.layers.*.mlp.group_size to a divisor of {half}, not {group}"
      )


def batch_rows(setup: Setup) -> np.ndarray:
  """The rows of a global batch that this process loads."""
  spec = spec_for(("act_batch", "act_seq"), setup.rules, setup.mesh)
  return local_rows(setup.mesh, spec, setup.config.data.batch_size)


def batch_placer(setup: Setup) -> Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]:
  """Puts this host's part of a batch on the mesh: rows over the batch axes, length over context."""
  spec = spec_for(("act_batch", "act_seq"), setup.rules, setup.mesh)
  return lambda batch: host_batch_to_global(batch, setup.mesh, spec)
