"""See a run before renting the machine: where it fits, how fast it would be, on which mesh.

`python -m experiments.plan --config=moe_70b` lists machines that hold it. With --topology
(v5p:4x4x4, or a cloud name: v5p-128, or GPUs: h100:16) it shows memory and time on that one and
searches for better meshes. These are estimates from shapes and data sheets, and need no
accelerator's library. --compile asks the TPU's own compiler, from the libtpu package.
"""

import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import NamedSharding

from mesh.constrain import use_mesh
from mesh.hardware import CHIPS, Chip, Topology, device_memory_bytes, find_chip, parse_topology
from mesh.rules import spec_for

from . import cli
from .config import Config, ConfigError
from .planning import budget, machines, page, tables
from .planning.cost import Prices
from .planning.estimate import memory
from .planning.fixes import fixes
from .planning.machines import Run
from .planning.memory import bytes_per_device, gigabytes, training_bytes
from .planning.program import compile_with_text, device_peak
from .planning.search import ROOM, Option, abstract_mesh, move, search, start
from .planning.speed import step_time
from .planning.traffic import collectives
from .planning.work import work
from .training.setup import Setup, build, mesh_sizes
from .training.step import make_train_step

_COMPILE = flags.DEFINE_bool(
  "compile", False, "Compile the training step for --topology (TPUs) and show what it needs."
)
_PRINT_OVERRIDES = flags.DEFINE_bool(
  "print_overrides", False, "Print only the overrides of the quickest option on --topology."
)


_REPORT = flags.DEFINE_string(
  "report", "", "With --topology: also write the plan to this file, a page for any browser."
)
_TOKENS = flags.DEFINE_float("tokens", None, "Of the run, in place of the config's steps.")
_PRICES = flags.DEFINE_string("prices", "", "A file of prices, power and carbon: see the docs.")
_BUDGET_FLOPS = flags.DEFINE_float("budget_flops", None, "The best model for so many FLOP.")
_BUDGET_USD = flags.DEFINE_float(
  "budget_usd", None, "The best model for so much money, spent on the kind of chip of --topology."
)
_DAYS = flags.DEFINE_float("days", None, "The best model for so many days of --topology.")
_FIT = flags.DEFINE_string("fit", "", "Fit a loss law to finished runs: folders, 'runs/*'.")
_INFERENCE = flags.DEFINE_bool(
  "inference", False, "Plan serving, with rows of data.row_length, instead of training."
)
_WEIGHT_BITS = flags.DEFINE_integer(
  "weight_bits", 16, "With --inference: of each weight.", lower_bound=1, upper_bound=32
)


def main() -> int:
  topology = _topology()
  prices = Prices.load(Path(_PRICES.value) if _PRICES.value else None)
  flops = _budget(topology, prices)
  if _FIT.value:
    budget.print_fit(_FIT.value, flops[0] if flops else None)
    return cli.FINISHED
  if flops:
    budget.print_budget(*flops)
    return cli.FINISHED
  config = cli.requested_config()
  tokens = config.train.steps * config.data.batch_size * config.data.row_length
  run = Run(_TOKENS.value or tokens, prices)
  if _INFERENCE.value:
    tables.print_serving(config, topology, _WEIGHT_BITS.value)
    return cli.FINISHED
  if topology is None:
    for flag in (_COMPILE, _PRINT_OVERRIDES, _REPORT):
      if flag.value:
        raise ConfigError(f"--{flag.name} needs a --topology: for example v5p:4x4x4 or v5p-128")
    machines.print_machines(config, run)
    return cli.FINISHED
  if _COMPILE.value:
    compile_step(config)
    return cli.FINISHED
  chip = CHIPS[topology.chip]
  if not (chip.hbm_bytes and chip.flops_per_device and chip.interconnect):
    raise ConfigError(f"--topology: memory and speed of {chip.name!r} are not in mesh/hardware.py")
  options = search(start(config), chip, topology.num_chips)
  if _PRINT_OVERRIDES.value:
    if not options or not options[0].fits:
      raise ConfigError(f"{config.name} fits no mesh of {topology.num_chips} x {chip.name}")
    print(" ".join(options[0].overrides(config)))
    return cli.FINISHED
  show(config, topology, chip, options, run)
  return cli.FINISHED


def _topology() -> Topology | None:
  """What `--topology` names; None without it."""
  try:
    return parse_topology(cli.topology_flag()) if cli.topology_flag() else None
  except ValueError as e:
    raise ConfigError(str(e)) from e


def _budget(topology: Topology | None, prices: Prices) -> tuple[float, str] | None:
  """(model FLOP, on which grounds) of whichever budget is given.

  Raises:
    ConfigError: several are, one is not positive, or it needs a topology.
  """
  given = [f for f in (_BUDGET_FLOPS, _BUDGET_USD, _DAYS) if f.value is not None]
  if not given:
    return None
  if len(given) > 1:
    raise ConfigError(f"--{given[0].name} and --{given[1].name} are two budgets: give one")
  (flag,) = given
  if not 0 < flag.value < math.inf:
    raise ConfigError(f"--{flag.name}={flag.value:g}: must be positive")
  if flag is _BUDGET_FLOPS:
    return flag.value, "as asked"
  if topology is None:
    raise ConfigError(f"--{flag.name} needs a --topology: what is it spent on?")
  if flag is _DAYS:
    return budget.flops_of_days(topology, flag.value)
  return budget.flops_of_dollars(topology, flag.value, prices)


def show(config: Config, topology: Topology, chip: Chip, options: list[Option], run: Run) -> None:
  """The config as it is on the topology, and the options beside it."""
  assert chip.hbm_bytes
  available = chip.hbm_bytes // chip.devices_per_chip
  own = _as_it_is(config, topology, chip, available)
  print(f"{config.name} on {topology.num_chips} x {chip.name}, {own.name}\n")
  tables.print_memory(own.memory, available)
  if not own.fits:
    tables.print_largest(own.setup)
    found = fixes(own.setup, chip, available, options)
    tables.print_fixes(found, config, int(ROOM * available))
  tables.print_time(own, chip)
  machines.print_bill(own, chip, topology.num_chips, run)
  if not options:
    print("No other mesh of these chips divides the model and its batch.")
  else:
    _show_options(config, options, chip, available)
  if _REPORT.value:
    title = f"{config.name} on {topology.num_chips} x {chip.name}"
    cost = machines.bill_of(own, chip, topology.num_chips, run)
    _write(Path(_REPORT.value), page.write_page(title, own, options, chip, available, cost))


def _show_options(config: Config, options: list[Option], chip: Chip, available: int) -> None:
  title = "Options, the quickest first" if options[0].fits else "Nothing fits; nearest first"
  print(f"{title} (estimates):")
  tables.print_options(options, chip, int(ROOM * available))
  if options[0].fits:
    print(f"\nthe first: {' '.join(options[0].overrides(config))}")


def _write(path: Path, text: str) -> None:
  try:
    path.write_text(text)
  except OSError as e:
    raise ConfigError(f"--report={path}: {e.strerror}") from e
  print(f"\nreport: {path}")


def _as_it_is(config: Config, topology: Topology, chip: Chip, available: int) -> Option:
  """The config with its own mesh, policy and microbatches."""
  try:
    sizes = mesh_sizes(config, topology.num_chips * chip.devices_per_chip)
  except ValueError as e:
    raise ConfigError(str(e)) from e
  setup = move(start(config), config, abstract_mesh(sizes))
  needed = memory(setup)
  return Option(setup, needed, step_time(setup, chip), needed.total <= ROOM * available)


def compile_step(config: Config) -> None:
  """What the compiler says of the training step.

  Raises:
    ConfigError: it does not fit; libtpu is missing.
  """
  devices = cli.described_devices(config)
  assert devices is not None
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
    compiled, text = compile_with_text(lower_step(setup))
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    raise ConfigError(
      f"{config.name} does not fit {where}: "
      f"{str(e).splitlines()[0].removeprefix('RESOURCE_EXHAUSTED: ')} "
      "Try more --config.train.microbatches, --config.train.remat=full, or a larger slice; "
      "without --compile, plan searches for what fits."
    ) from e
  needed = compiled.memory_analysis()
  print(f"compiled in {time.monotonic() - began:.0f} s")
  peak = device_peak(needed)
  verdict = "fits" if peak <= hbm else "does NOT fit"
  print(f"peak     {gigabytes(peak)} a device of {gigabytes(hbm)}: {verdict}\n")
  tables.print_compiled(setup, needed, work(text), collectives(text, setup.mesh))


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
