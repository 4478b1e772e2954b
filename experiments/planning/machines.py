"""Machines that hold a config, the best mesh of each, and what a run on it would take."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from layers.count import count_params
from layers.lora import split
from mesh.hardware import CHIPS, GPU_NODES, Chip, cloud_slices, find_chip
from mesh.slices import Topology
from mesh.topology import count_slices

from ..config import Config, ConfigError
from ..training.setup import Setup, count_trained
from . import tables
from .cost import Bill, Prices, bill
from .memory import gigabytes
from .search import ROOM, Option, search, slices, start
from .speed import mfu

# Chips a machine may have, at most; and so many sizes from the first that fits.
MOST, SIZES = 4096, 2


class Machine(NamedTuple):
  """A slice or a number of nodes, and the best way to use it."""

  name: str
  chip: Chip
  chips: int
  best: Option


def fitting(config: Config) -> list[Machine]:
  """For each kind of chip, the smallest machines that hold the config."""
  here = dict.fromkeys(("dcn_data", "dcn_stage", "dcn_fsdp"), 1)
  setup = start(replace(config, mesh=replace(config.mesh, **here)))  # each machine is one slice
  found = []
  for name in ("v4", "v5e", "v5p", "v6e", "tpu7x", *GPU_NODES):
    chip = CHIPS[name]
    count = 0
    for label, chips in _sizes(chip):
      if chips > MOST or count == SIZES:
        break
      if not _may_hold(setup, chip, chips):
        continue
      options = search(setup, chip, chips, quick=True)
      if options and options[0].fits:
        found.append(Machine(label, chip, chips, options[0]))
        count += 1
  return found


def topology_of(devices: Sequence[Any]) -> Topology:
  """The machine that these devices are, as `--topology` would name it.

  Raises:
    ConfigError: no accelerator, one that is not in mesh/hardware.py, or several TPU slices.
  """
  first, instead = devices[0], "name a machine instead: --topology=v5p:4x4x4, v5p-128 or h100:8"
  if first.platform == "cpu":
    raise ConfigError(f"--topology=here: there is no accelerator here, only CPUs; {instead}")
  chip = find_chip(first)
  if chip is None:
    raise ConfigError(
      f"--topology=here: memory and speed of {first.device_kind!r} are not in mesh/hardware.py; "
      f"{instead}"
    )
  if (slices := count_slices(devices)) > 1:
    raise ConfigError(f"--topology=here: {slices} TPU slices, of which plan knows one; {instead}")
  count = len(devices) // chip.devices_per_chip
  if not chip.is_tpu:
    return Topology(chip.name, (count,), count)
  sides = tuple(len(set(column)) for column in zip(*(d.coords for d in devices), strict=True))
  return Topology(chip.name, sides[:2] if chip.name in ("v5e", "v6e") else sides, count)


def where(config: Config, topology: Topology) -> str:
  """The machine in words: several of the topology where the config's mesh spans several slices."""
  one, count = f"{topology.num_chips} x {topology.chip}", slices(config)
  return one if count == 1 else f"{count} slices of {one}"


def _sizes(chip: Chip) -> list[tuple[str, int]]:
  """(name, chips), smallest first."""
  if chip.is_tpu:
    return [(s.name, s.chips) for s in cloud_slices(chip.name)]
  nodes = [2**n for n in range(int(math.log2(MOST // 8)) + 1)]
  return [(f"{chip.name}:{8 if n == 1 else f'{n}x8'}", 8 * n) for n in nodes]


def _may_hold(setup: Setup, chip: Chip, chips: int) -> bool:
  """Whether parameters, optimizer state and gradients alone do."""
  size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  trained = split(setup.abstract.params)[0]
  needed = size(setup.abstract.params) + size(trained) + size(setup.abstract.opt_state)
  return needed <= ROOM * chips * (chip.hbm_bytes or 0)


class Run(NamedTuple):
  """What is to be trained, and what an hour costs."""

  tokens: float
  prices: Prices

  def hours(self, option: Option) -> float:
    """Of the whole run."""
    data = option.setup.config.data
    return self.tokens / (data.batch_size * data.row_length) * option.step.total / 3600


def print_machines(config: Config, run: Run) -> None:
  """The table that `plan` prints without --topology."""
  counts = count_params(config.model)
  trained = f"{count_trained(config):,} trained, " if config.lora.rank else ""
  print(
    f"{config.name}: {counts.total:,} parameters, {counts.active:,} active, {trained}"
    f"{run.tokens:.3g} tokens in steps of {config.data.batch_size * config.data.row_length:,}\n"
  )
  made = tables.table(
    "machine", "chips", "memory a chip", "tokens/s", "MFU", "days", "chip-hours", "USD", "kWh",
    "kg CO2e", "mesh, recomputation, parts",
  )  # fmt: skip
  made.columns[-1].justify = "left"
  figure = lambda value: "unknown" if value is None else f"{value:,.0f}"
  for machine in fitting(config):
    option, chip, chips = machine.best, machine.chip, machine.chips
    hours = run.hours(option)
    cost = bill(chip.name, chips, hours, run.prices)
    made.add_row(
      machine.name,
      str(chips),
      f"{gigabytes(option.memory.total * chip.devices_per_chip)} of "
      f"{gigabytes(chip.hbm_bytes or 0)}",
      f"{run.tokens / hours / 3600:,.0f}",
      f"{mfu(option.setup, chip, option.step.total):.1%}",
      f"{hours / 24:,.1f}",
      f"{cost.chip_hours:,.0f}",
      figure(cost.usd),
      figure(cost.kwh),
      figure(cost.kg_co2e),
      option.name,
    )
  tables.console.print(made)
  print(
    "\nEstimates from data sheets and list prices (experiments/planning/prices.toml, or "
    "--prices).\n"
    f"One machine in detail: python -m experiments.plan --config={config.name} --topology=MACHINE"
  )


def bill_of(option: Option, chip: Chip, chips: int, run: Run) -> Bill:
  """Of the whole run."""
  return bill(chip.name, chips, run.hours(option), run.prices)


def print_bill(option: Option, chip: Chip, chips: int, run: Run) -> None:
  """The same, and on which grounds."""
  print(f"the run: {run.tokens:.3g} tokens, {run.hours(option) / 24:,.1f} days")
  for name, figure, grounds in bill_of(option, chip, chips, run).rows():
    print(f"{name:<11}{figure:>15}  {grounds}")
  print()
