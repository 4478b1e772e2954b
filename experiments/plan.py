"""See a run before renting the machine: where it fits, how fast it would be, on which mesh.

`python -m experiments.plan --config=moe_70b` lists machines that hold it. With --topology
(v5p:4x4x4, or a cloud name: v5p-128, or GPUs: h100:16, or here: what JAX sees) it shows memory and
time on that one and searches for better meshes. These are estimates from shapes and data sheets,
and need no accelerator's library. --compile asks the TPU's own compiler, from the libtpu package.
"""

import math
import sys
import tempfile
from pathlib import Path

from absl import flags

from mesh.hardware import CHIPS, Chip, device_memory_bytes, find_chip
from mesh.slices import Topology, parse_topology

from . import cli
from .config import Config, ConfigError
from .planning import budget, compiling, decoding, machines, page, tables
from .planning.compiled import print_cached, print_compiled, print_decoding, print_groups
from .planning.cost import Prices
from .planning.estimate import memory
from .planning.fixes import fixes
from .planning.machines import Run, where
from .planning.search import ROOM, Option, abstract_mesh, move, search, slices, start
from .planning.speed import step_time
from .training.setup import build, devices_here, mesh_sizes

HERE = "here"  # value of --topology: the accelerators that JAX sees

_COMPILE = flags.DEFINE_bool(
  "compile", False, "Compile the training step, or with --inference the step that draws a token."
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
  if _TOKENS.value is not None and not 0 < _TOKENS.value < math.inf:
    raise ConfigError(f"--tokens={_TOKENS.value:g}: must be positive")
  run = Run(_TOKENS.value or tokens, prices)
  if _INFERENCE.value and not _COMPILE.value:
    tables.print_serving(config, topology, _WEIGHT_BITS.value)
    return cli.FINISHED
  if topology is None:
    for flag in (_COMPILE, _PRINT_OVERRIDES, _REPORT):
      if flag.value:
        raise ConfigError(f"--{flag.name} needs a --topology: for example v5p:4x4x4 or v5p-128")
    machines.print_machines(config, run)
    return cli.FINISHED
  if _COMPILE.value:
    return compile_step(config, topology)
  chip = CHIPS[topology.chip]
  options = search(start(config), chip, topology.num_chips)
  if _PRINT_OVERRIDES.value:
    if not options or not options[0].fits:
      raise ConfigError(f"{config.name} fits no mesh of {where(config, topology)}")
    print(" ".join(options[0].overrides(config)))
    return cli.FINISHED
  show(config, topology, chip, options, run)
  return cli.FINISHED


def _topology() -> Topology | None:
  """What `--topology` names; None without it."""
  if cli.topology_flag() == HERE:
    return machines.topology_of(devices_here())
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
  """The config as it is on the topology, and the options beside it.

  Raises:
    ConfigError: its mesh is not one of this machine, and no other is.
  """
  assert chip.hbm_bytes
  available = chip.hbm_bytes // chip.devices_per_chip
  note, found = "", []
  try:
    own = _as_it_is(config, topology, chip, available)
    note = _left_over(config, own, topology, chip)
  except ConfigError as e:
    if not options:
      raise
    own, note = options[0], _instead(config, options[0], e)
  chips = slices(config) * topology.num_chips
  if note:
    print(f"{note}\n")
  print(f"{config.name} on {where(config, topology)}, {own.name}\n")
  tables.print_memory(own.memory, available)
  if not own.fits:
    tables.print_largest(own.setup)
    found = fixes(own.setup, chip, available, options)
    tables.print_fixes(found, config, int(ROOM * available))
  tables.print_time(own, chip)
  tables.print_flops(own, chip)
  machines.print_bill(own, chip, chips, run)
  if not options:
    print("No other mesh of these chips divides the model and its batch.")
  else:
    _show_options(config, options, chip, available)
  if _REPORT.value:
    cost = machines.bill_of(own, chip, chips, run)
    written = page.write_page(config, topology, own, options, available, cost, found, note)
    _write(Path(_REPORT.value), written)


def _instead(config: Config, best: Option, error: ConfigError) -> str:
  """Why the config's own mesh is not shown, and what to write to get the one that is."""
  what = (
    "the quickest that does" if best.fits else "the nearest of those that do, too large as well"
  )
  return (
    f"{config.name} as it is does not divide over this machine: {str(error).rstrip('.')}. "
    f"Shown is {what}, with these in place of its mesh:\n  {' '.join(best.overrides(config))}"
  )


def _left_over(config: Config, own: Option, topology: Topology, chip: Chip) -> str:
  """That the config's mesh has fewer devices than the machine; empty if it has as many."""
  devices = slices(config) * topology.num_chips * chip.devices_per_chip
  if own.setup.mesh.size == devices:
    return ""
  return (
    f"{config.name}'s mesh takes {own.setup.mesh.size} of {devices} devices, and the others are "
    "idle: give one axis -1 for all that remain, or take one of the options below."
  )


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
    sizes = mesh_sizes(config, slices(config) * topology.num_chips * chip.devices_per_chip)
  except ValueError as e:
    raise ConfigError(str(e)) from e
  setup = move(start(config), config, abstract_mesh(sizes))
  needed = memory(setup)
  return Option(setup, needed, step_time(setup, chip), needed.total <= ROOM * available)


def compile_step(config: Config, topology: Topology) -> int:
  """What the compiler says of the training step, or of drawing a token; the exit code.

  Raises:
    ConfigError: no TPUs, it does not fit, or libtpu is missing.
  """
  if not CHIPS[topology.chip].is_tpu:
    raise ConfigError("--compile asks the TPU's compiler: only TPUs can be compiled for")
  devices = cli.described_devices(config, topology.name)
  assert devices is not None
  chip, hbm = find_chip(devices[0]), device_memory_bytes(devices[0])
  assert chip is not None and hbm is not None, devices[0].device_kind  # what libtpu describes
  setup = build(config, devices)
  axes = " x ".join(f"{name}={size}" for name, size in setup.mesh.shape.items() if size > 1)
  print(f"{config.name} on {len(devices) // chip.devices_per_chip} x {chip.name}, mesh {axes}")
  program, on_memory = compiling.__name__, lambda peak: print_groups(memory(setup), peak, hbm)
  if _INFERENCE.value:
    program, on_memory = decoding.__name__, lambda peak: print_cached(setup, peak, hbm)
  with tempfile.TemporaryDirectory() as folder:
    try:
      with tables.console.status("compiling: memory within seconds, the rest within minutes"):
        arguments = cli.config_arguments(topology.name)
        found = compiling.compile_apart(arguments, Path(folder), on_memory, program)
    except compiling.CompilerError as e:
      print(f"error: {e}", file=sys.stderr)
      return cli.OUR_FAULT
  (print_decoding if _INFERENCE.value else print_compiled)(setup, found, chip)
  return cli.FINISHED


if __name__ == "__main__":
  cli.run(main)
