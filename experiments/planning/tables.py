"""What `plan` prints: memory by use, time by use, options side by side, machines."""

from collections.abc import Sequence

import jax
from rich.console import Console
from rich.table import Table

from mesh.hardware import CHIPS, Chip
from mesh.slices import Topology

from ..config import Config, ConfigError
from ..training.setup import Setup
from . import serving
from .estimate import Memory, held, memory_rows
from .fixes import FIX_COLUMNS, Fix, fix_rows, no_fix
from .flops import flop_rows, per_device, step_flops
from .memory import gigabytes
from .network import DCN, SLICE_NETWORK, bytes_by_network
from .placement import mesh_axes
from .search import Option, loses_by
from .speed import mfu, time_rows

console = Console(highlight=False, soft_wrap=True)
console.width = max(console.width, 160)  # a narrow terminal wraps lines, not columns


def table(*columns: str) -> Table:
  """The first column is text, the others are numbers."""
  made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
  for i, column in enumerate(columns):
    made.add_column(column, justify="right" if i else "left")
  return made


def print_memory(memory: Memory, available: int) -> None:
  made = table("memory of a device", "bytes", "share")
  for name, n in memory_rows(memory):
    made.add_row(name, gigabytes(n), f"{n / available:.1%}")
  verdict = "fits" if memory.total <= available else "does NOT fit"
  made.add_row("peak", gigabytes(memory.total), f"{memory.total / available:.1%}")
  console.print(made)
  console.print(f"of {gigabytes(available)}: {verdict}\n")


LARGEST_COLUMNS = ("largest arrays of the state", "of a device", "bytes", "not cut over")


def print_largest(setup: Setup) -> None:
  made = table(*LARGEST_COLUMNS)
  for row in largest_rows(setup):
    made.add_row(*row)
  console.print(made)
  console.print("")


def largest_rows(setup: Setup, count: int = 5) -> list[tuple[str, ...]]:
  """The largest arrays of a device's state, and the mesh axes that do not cut them."""
  named = jax.tree_util.tree_leaves_with_path(
    {"": setup.abstract.params, "optimizer": setup.abstract.opt_state}
  )
  leaves = sorted(named, key=lambda item: -held(item[1]))[:count]
  rows = []
  for path, leaf in leaves:
    used = {axis for dim in range(len(leaf.shape)) for axis in mesh_axes(leaf.sharding, dim)}
    idle = [f"{axis}={n}" for axis, n in setup.mesh.shape.items() if n > 1 and axis not in used]
    name = jax.tree_util.keystr(path, simple=True, separator="/").strip("/")
    if name.startswith("optimizer"):  # optax's own layers of state say nothing
      name = "optimizer " + name.split("inner_state/")[-1].lstrip("0123456789/")
    local = leaf.sharding.shard_shape(leaf.shape)
    text = f"{leaf.dtype}[{', '.join(map(str, local))}]"
    rows.append((name, text, gigabytes(held(leaf)), ", ".join(idle) or "-"))
  return rows


def print_fixes(fixes: Sequence[Fix], config: Config, available: int) -> None:
  """What to change, those that suffice first."""
  made = table(*FIX_COLUMNS)
  for row in fix_rows(fixes, available):
    made.add_row(*row)
  if fixes:
    console.print(made)
  if not any(fix.fits for fix in fixes):
    console.print(no_fix(config))
  console.print("")


def print_time(option: Option, chip: Chip) -> None:
  step = option.step
  made = table("time of a step", "seconds", "share")
  for name, seconds in time_rows(step):
    if seconds:
      made.add_row(name, f"{seconds:.3f}", f"{seconds / step.total:.1%}")
  made.add_row("step", f"{step.total:.3f}", f"MFU {mfu(option.setup, chip, step.total):.1%}")
  console.print(made)
  axes = ", ".join(f"{axis} {seconds:.3f} s" for axis, seconds in step.traffic.items())
  console.print(f"on the network: {axes or 'nothing'}")
  if between := dcn_text(option.setup, chip):
    console.print(between)
  console.print("")


def dcn_text(setup: Setup, chip: Chip) -> str:
  """What goes between slices; empty if there is one."""
  found = bytes_by_network(setup, chip)[1]
  amounts = ", ".join(f"{DCN}{axis} {gigabytes(round(n))}" for axis, n in found.items())
  rate = f"{SLICE_NETWORK[chip.name] / 1e9:g} GB/s a chip" if found else ""
  return f"between slices a device receives {amounts}, over a network of {rate}" if found else ""


def print_flops(option: Option, chip: Chip) -> None:
  """FLOP of a device in a step, by what they are for."""
  flops = per_device(step_flops(option.setup, chip), option.setup)
  made = table("work of a device", "FLOP", "share")
  for name, n in flop_rows(flops):
    made.add_row(name, f"{n:.3g}", f"{n / flops.total:.1%}")
  assert chip.flops_per_device
  hfu = flops.total / option.step.total / chip.flops_per_device
  made.add_row("all done", f"{flops.total:.3g}", f"HFU {hfu:.1%}")
  console.print(made)
  console.print("")


def print_options(options: Sequence[Option], chip: Chip, available: int, count: int = 8) -> None:
  """The best ones, and why they are not the first."""
  best = options[0]
  made = table("mesh, recomputation, parts", "memory", "s a step", "MFU", "why not the first")
  for option in options[:count]:
    share = f"{gigabytes(option.memory.total)}"
    if not option.fits:
      over = option.memory.total - available
      made.add_row(option.name, share, "", "", f"{gigabytes(max(over, 0))} too much")
      continue
    seconds = option.step.total
    why = "" if option is best else loses_by(option, best)
    made.add_row(
      option.name, share, f"{seconds:.2f}", f"{mfu(option.setup, chip, seconds):.1%}", why
    )
  console.print(made)


_BATCHES = (1, 8, 32, 128, 512)


def print_serving(config: Config, topology: Topology | None, bits: int) -> None:
  """Machines that hold the weights and the cache of one row, or batches on one of them."""
  spec, length = config.model, config.data.row_length
  if not spec.causal:
    raise ConfigError(f"{config.name} is an encoder: it draws no tokens")
  weights, cache = serving.weight_bytes(spec, bits), serving.cache_bytes(spec, length)
  print(
    f"{config.name}: weights of {bits} bits {gigabytes(weights)}, the cache of a row of {length:,} "
    f"positions {gigabytes(cache)}\n"
  )
  columns = ("tokens/s", "tokens/s a chip", "ms a token", "bound by")
  if topology is None:
    made = table("smallest machine", "chips", *columns)
    for name, chip, chips in serving.smallest(spec, 1, length, bits):
      made.add_row(
        name, str(chips), *_drawn(serving.serve(spec, chip, chips, 1, length, bits), chips)
      )
    print("One row:")
  else:
    chip, chips = CHIPS[topology.chip], topology.num_chips
    made = table("batch", "memory a chip", *columns)
    for batch in _BATCHES:
      found = serving.serve(spec, chip, chips, batch, length, bits)
      held_bytes = (weights + found.cache_bytes) / chips
      cells = _drawn(found, chips) if found.fits else ("does not fit", "", "", "")
      made.add_row(str(batch), gigabytes(round(held_bytes)), *cells)
  console.print(made)
  print("\nEstimates without traffic between chips.")


def _drawn(found: serving.Serving, chips: int) -> tuple[str, ...]:
  each = found.tokens_per_second(chips)
  return f"{each * chips:,.0f}", f"{each:,.1f}", f"{1000 * found.seconds:.1f}", found.bound
