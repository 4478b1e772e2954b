"""Compile a training step for hardware that is not here, and print what it needs.

`python -m experiments.plan --config=moe_70b --topology=v5p:4x4x4` (or a cloud name: v5p-128).
Nothing is allocated; the compiler is the TPU's own, from the libtpu package.
"""

import os
import time

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import NamedSharding

from mesh.constrain import use_mesh
from mesh.hardware import CHIPS, parse_topology
from mesh.rules import spec_for
from mesh.topology import describe_devices

from . import cli
from .config import ConfigError
from .planning.memory import bytes_per_device, gigabytes, training_bytes
from .training.setup import Setup, build
from .training.step import make_train_step

# libtpu then neither asks a cloud what it runs on, nor complains that nobody told it.
_NO_TPU_HERE = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5p-8",
}
_TOPOLOGY = flags.DEFINE_string("topology", "", "v5p:4x4x4, or a cloud name such as v5p-128.")


def main() -> int:
  if not _TOPOLOGY.value:
    raise ConfigError("--topology is missing: for example --topology=v5p:4x4x4 or v5p-128")
  for name, value in _NO_TPU_HERE.items():
    os.environ.setdefault(name, value)
  config = cli.requested_config()
  try:
    topology = parse_topology(_TOPOLOGY.value)
    devices = describe_devices(_TOPOLOGY.value)
  except ModuleNotFoundError as e:
    raise ConfigError("describing a TPU needs libtpu: pip install 'meshyard[test]'") from e
  except ValueError as e:
    raise ConfigError(str(e)) from e
  setup = build(config, devices)
  axes = " x ".join(f"{name}={size}" for name, size in setup.mesh.shape.items() if size > 1)
  print(f"{config.name} on {topology.num_chips} x {topology.chip}, mesh {axes}")
  print(
    f"state    {gigabytes(training_bytes(setup))}, {gigabytes(bytes_per_device(setup))} a device"
  )
  jax.config.update("jax_enable_compilation_cache", False)  # it can't be read back without a TPU
  began = time.monotonic()
  try:
    memory = compile_step(setup).memory_analysis()
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    raise ConfigError(
      f"{config.name} does not fit {topology.num_chips} x {topology.chip}: "
      f"{str(e).splitlines()[0].removeprefix('RESOURCE_EXHAUSTED: ')} "
      "Try more --config.train.microbatches, --config.train.remat=full, or a larger slice."
    ) from e
  hbm = CHIPS[topology.chip].hbm_bytes // CHIPS[topology.chip].devices_per_chip
  print(f"compiled in {time.monotonic() - began:.0f} s")
  verdict = "fits" if memory.peak_memory_in_bytes <= hbm else "does NOT fit"
  print(
    f"peak     {gigabytes(memory.peak_memory_in_bytes)} a device of {gigabytes(hbm)}: {verdict}"
  )
  return cli.FINISHED


def compile_step(setup: Setup) -> jax.stages.Compiled:
  """The train step compiled for the setup's (described) devices."""
  config = setup.config
  step = make_train_step(
    setup.model,
    setup.optimizer,
    seed=config.train.seed,
    microbatches=config.train.microbatches,
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
    return jitted.lower(setup.abstract, batch).compile()


if __name__ == "__main__":
  cli.run(main)
