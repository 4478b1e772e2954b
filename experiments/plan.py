"""Compile a training step for hardware that is not here, and print what it needs.

`python -m experiments.plan --config=moe_70b --topology=v5p:4x4x4` (or a cloud name: v5p-128).
Nothing is allocated; the compiler is the TPU's own, from the libtpu package.
"""

import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from mesh.constrain import use_mesh
from mesh.hardware import device_memory_bytes, find_chip
from mesh.rules import spec_for

from . import cli
from .config import ConfigError
from .planning.memory import bytes_per_device, gigabytes, training_bytes
from .training.setup import Setup, build
from .training.step import make_train_step


def main() -> int:
  config = cli.requested_config()
  devices = cli.described_devices(config)
  if devices is None:
    raise ConfigError("--topology is missing: for example --topology=v5p:4x4x4 or v5p-128")
  chip, hbm = find_chip(devices[0]), device_memory_bytes(devices[0])
  assert chip is not None and hbm is not None, devices[0].device_kind  # what libtpu describes
  where = f"{len(devices) // chip.devices_per_chip} x {chip.name}"
  setup = build(config, devices)
  axes = " x ".join(f"{name}={size}" for name, size in setup.mesh.shape.items() if size > 1)
  print(f"{config.name} on {where}, mesh {axes}")
  print(
    f"state    {gigabytes(training_bytes(setup))}, {gigabytes(bytes_per_device(setup))} a device"
  )
  jax.config.update("jax_enable_compilation_cache", False)  # it can't be read back without a TPU
  began = time.monotonic()
  try:
    memory = lower_step(setup).compile().memory_analysis()
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    raise ConfigError(
      f"{config.name} does not fit {where}: "
      f"{str(e).splitlines()[0].removeprefix('RESOURCE_EXHAUSTED: ')} "
      "Try more --config.train.microbatches, --config.train.remat=full, or a larger slice."
    ) from e
  print(f"compiled in {time.monotonic() - began:.0f} s")
  verdict = "fits" if memory.peak_memory_in_bytes <= hbm else "does NOT fit"
  print(
    f"peak     {gigabytes(memory.peak_memory_in_bytes)} a device of {gigabytes(hbm)}: {verdict}"
  )
  return cli.FINISHED


def lower_step(setup: Setup) -> jax.stages.Lowered:
  """The train step lowered for the setup's (described) devices, to be compiled."""
  config = setup.config
  step = make_train_step(
    setup.model,
    setup.optimizer,
    seed=config.train.seed,
    microbatches=setup.accumulate,
    z_loss=config.train.z_loss,
  )
  placed = NamedSharding(setup.mesh, spec_for(("act_batch", "act_seq"), setup.rules, setup.mesh))
  shape = (config.data.batch_size, config.data.row_length)
  array = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
  names = ("tokens", "targets", "segments", "positions")
  batch = {name: array(jnp.int32) for name in names} | {"weights": array(jnp.float32)}
  shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract)
  with use_mesh(setup.mesh, setup.rules):
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    return jitted.lower(setup.abstract, batch)


if __name__ == "__main__":
  cli.run(main)
