"""What the compiler says of a step, beside the estimates: memory by use, work, time."""

import math
from collections.abc import Mapping

from mesh.hardware import Chip

from ..config import ConfigError
from ..training.setup import Setup
from . import conventions
from .buffers import Peak, by_group
from .compiling import Compiled
from .estimate import Memory
from .fixes import fixes
from .flops import WASTE, as_multiplied, compiled_flops, per_device, step_flops
from .memory import gigabytes
from .network import (
  DCN,
  axis_speeds,
  bytes_received,
  inside_sizes,
  slice_network,
  slices_along,
)
from .search import ROOM
from .serving import cache_bytes, serve, weight_bytes
from .speed import Step, exposed, mfu, rates_of, step_time
from .tables import console, print_fixes, table
from .traffic import Collective, collectives
from .work import Op, work

# Of the cycles that libtpu states; v5e and v5p from peak FLOP/s and matrix units, v4 from its paper
# (ISCA 2023), the last two fitted to its own estimates of large products.
CLOCK = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9, "tpu7x": 2.2e9}
_LARGEST = 8
_SHOWN = 5e-4  # share of the peak below which a row says nothing


def print_groups(mine: Memory, peak: Peak, hbm: int) -> None:
  """Bytes of a device by use; a layer's work is estimated as one.

  Args:
    hbm: bytes of a device.
  """
  found = by_group(peak.buffers)
  made = table("memory of a device", "estimate", "compiled")
  for name, estimate in _estimates(mine).items():
    size = found.pop(name, 0)
    if estimate or size:
      made.add_row(name, gigabytes(estimate), gigabytes(size))
  at_work = {name: size for name, size in found.items() if name.startswith("at work")}
  made.add_row("a layer at work", gigabytes(mine.layer), gigabytes(sum(at_work.values())))
  for name, size in found.items():
    if size > _SHOWN * peak.total:
      made.add_row(f"  {name}" if name in at_work else name, "", gigabytes(size))
  made.add_row("gaps between them", "", gigabytes(peak.gaps))
  made.add_row("peak", gigabytes(mine.total), gigabytes(peak.total))
  console.print(made)
  _print_verdict(peak, hbm)


def print_cached(setup: Setup, peak: Peak, hbm: int) -> None:
  """Bytes of a device by use while a token is drawn for each row of the config's batch."""
  config, devices = setup.config, setup.mesh.size
  rows, length = config.data.batch_size, config.data.row_length
  caches = rows * cache_bytes(config.model, length)
  mine = {"parameters": weight_bytes(config.model, 16), "caches": caches}
  console.print(f"a token for {rows:,} rows of {length:,} positions, weights in bfloat16\n")
  made = table("memory of a device", "estimate", "compiled")
  for name, size in by_group(peak.buffers).items():
    if name in mine or size > _SHOWN * peak.total:
      made.add_row(name, gigabytes(mine[name] // devices) if name in mine else "", gigabytes(size))
  made.add_row("gaps between them", "", gigabytes(peak.gaps))
  made.add_row("peak", "", gigabytes(peak.total))
  console.print(made)
  _print_verdict(peak, hbm)


def print_decoding(setup: Setup, compiled: Compiled, chip: Chip) -> None:
  """Seconds of a token, and tokens a second.

  Raises:
    ConfigError: it does not fit.
  """
  config = setup.config
  if compiled.refused:
    raise ConfigError(f"{config.name} does not fit; the compiler: {compiled.refused}")
  _print_took(compiled)
  rows = config.data.batch_size
  step = compiled_step(setup, chip, work(compiled.text), collectives(compiled.text, setup.mesh))
  seconds = step.compute + sum(step.traffic.values())
  chips = setup.mesh.size // chip.devices_per_chip
  ideal = serve(config.model, chip, chips, rows, config.data.row_length, 16)
  made = table("a token of each row", "estimate", "compiled")
  made.add_row("computing, reading memory", f"{1000 * ideal.seconds:.2f} ms",
               f"{1000 * step.compute:.2f} ms")  # fmt: skip
  for axis, time in step.traffic.items():
    made.add_row(f"network, {axis}", "", f"{1000 * time:.2f} ms")
  made.add_row("tokens/s", f"{rows / ideal.seconds:,.0f}", f"{rows / seconds:,.0f}")
  console.print(made)
  console.print(
    f"estimate: bound by {ideal.bound}, all spread evenly, no traffic; "
    f"compiled: the compiler's cycles at {CLOCK[chip.name] / 1e9:g} GHz, nothing overlapped"
  )


def print_compiled(setup: Setup, compiled: Compiled, chip: Chip) -> None:
  """FLOP and time of a training step.

  Raises:
    ConfigError: it does not fit.
  """
  if compiled.refused:
    assert chip.hbm_bytes
    hbm, config = chip.hbm_bytes // chip.devices_per_chip, setup.config
    print_fixes(fixes(setup, chip, hbm), config, int(ROOM * hbm))
    raise ConfigError(f"{config.name} does not fit; the compiler: {compiled.refused}")
  _print_took(compiled)
  ops = as_multiplied(setup, chip, work(compiled.text))
  sends = collectives(compiled.text, setup.mesh)
  print_work(setup, chip, ops, sends)
  print_step(setup, chip, ops, sends)


def _print_took(compiled: Compiled) -> None:
  console.print(
    f"compiled in {compiled.seconds:.0f} s ({compiled.cpu_seconds:.0f} CPU seconds, "
    f"{gigabytes(compiled.host_bytes)} here); the code takes {gigabytes(compiled.code)}\n"
  )


def _print_verdict(peak: Peak, hbm: int) -> None:
  over = peak.total - hbm
  verdict = "fits" if over <= 0 else f"does NOT fit, {gigabytes(over)} too much"
  console.print(f"of {gigabytes(hbm)}: {verdict}\n")
  if over > 0:
    print_buffers(peak)


def _estimates(mine: Memory) -> dict[str, int]:
  """The groups of `buffers.GROUPS` that the estimate has, too."""
  before_layers = mine.head if mine.head > mine.gradients + mine.layer else 0
  return {
    "parameters": mine.parameters,
    "optimizer": mine.optimizer,
    "batch": mine.batch,
    **{f"kept: {kind}": 0 for kind in ("layer inputs", "attention", "mlp", "experts")},
    **{f"kept: {kind}": size for kind, size in mine.kept.items()},
    "gradients": 0 if before_layers else mine.gradients,
    "the loss and its gradient": mine.head_gradient + before_layers,
  }


def print_buffers(peak: Peak, count: int = _LARGEST) -> None:
  """The largest values that are there at the peak."""
  made = table("largest at the peak", "of a device", "bytes", "made by")
  made.columns[3].justify = "left"
  for buffer in peak.buffers[:count]:
    made.add_row(buffer.group, buffer.shape, gigabytes(buffer.size), scope(buffer.where))
  console.print(made)
  console.print("")


def scope(where: str) -> str:
  """The part of an operation's name that people wrote: from the layer on."""
  for start in ("Block/", "TransformerLM)/", "TransformerLM))/", "state.", "jit(step)/"):
    if start in where:
      return where.split(start, 1)[1] if start != "state." else where
  return where


def print_work(setup: Setup, chip: Chip, ops: list[Op], sends: list[Collective]) -> None:
  """FLOP and bytes received, of a device in a step."""
  devices = math.prod(setup.mesh.shape.values())
  received = bytes_received(setup)
  mine, theirs = per_device(step_flops(setup, chip), setup), compiled_flops(setup, chip, ops)
  data = setup.config.data
  palm = conventions.flops_per_token(setup.config.model, data.row_length)
  palm *= data.batch_size * data.row_length / devices
  in_kernels = sum(op.total for op in ops if op.kind == "kernel")
  wasted = [why for why in WASTE if mine.wasted[why] or theirs.wasted[why]]
  made = table("work of a device", "estimate", "compiled")
  for name, estimate, found in (
    ("FLOP", mine.total, theirs.total),
    ("  useful", mine.useful, theirs.useful),
    ("  recomputed", mine.recomputed, theirs.recomputed),
    *((f"  wasted: {why}", mine.wasted[why], theirs.wasted[why]) for why in wasted),
    ("of them in kernels", None, in_kernels),
    ("model FLOP (PaLM's convention)", palm, None),
  ):
    made.add_row(name, *("" if n is None else f"{n:.3g}" for n in (estimate, found)))
  for axis, n in setup.mesh.shape.items():
    if n > 1:
      along = sum(c.total for c in sends if c.axes == (axis,))
      made.add_row(
        f"received along {axis}", gigabytes(round(received[axis])), gigabytes(round(along))
      )
  if several := sum(c.total for c in sends if len(c.axes) > 1):
    made.add_row("received along several axes", "", gigabytes(round(several)))
  console.print(made)
  console.print("")


def print_step(setup: Setup, chip: Chip, ops: list[Op], sends: list[Collective]) -> None:
  """Seconds: the estimate's, and those of the compiler's cycles and bytes."""
  mine = step_time(setup, chip)
  theirs = compiled_step(setup, chip, ops, sends)
  assert chip.flops_per_device
  done = sum(op.total for op in ops if op.kind in ("product", "kernel"))
  made = table("seconds of a step", "estimate", "compiled", "share")
  row = lambda name, a, b: made.add_row(name, f"{a:.3f}", f"{b:.3f}", f"{b / theirs.total:.0%}")
  row("computing", mine.compute, theirs.compute)
  made.add_row("  products and element-wise", "", f"{theirs.products:.3f}", "")
  made.add_row("  kernels", "", f"{theirs.attention:.3f}", "")
  for axis in sorted(mine.traffic.keys() | theirs.traffic.keys()):
    row(f"network, {axis}", mine.traffic.get(axis, 0.0), theirs.traffic.get(axis, 0.0))
  hidden = lambda step: sum(step.traffic.values()) - step.exposed
  row("  behind the computing", hidden(mine), hidden(theirs))
  row("  in the open", mine.exposed, theirs.exposed)
  row("step", mine.total, theirs.total)
  made.add_row("MFU", *(f"{mfu(setup, chip, step.total):.1%}" for step in (mine, theirs)), "")
  made.add_row("HFU, all FLOP done", "", f"{done / theirs.total / chip.flops_per_device:.1%}", "")
  console.print(made)
  console.print(
    f"compiled: the compiler's cycles at {CLOCK[chip.name] / 1e9:g} GHz; kernels, for which it has "
    "none, and the network at the estimates' shares of the peak"
  )


def compiled_step(setup: Setup, chip: Chip, ops: list[Op], sends: list[Collective]) -> Step:
  """Products and fusions by the compiler's cycles (`products`), kernels (`attention`) by FLOP or
  bytes, whichever take longer."""
  rates, peak = rates_of(chip), chip.flops_per_device
  assert peak and chip.hbm_bandwidth
  memory = rates.memory * chip.hbm_bandwidth / chip.devices_per_chip
  rate = lambda op: rates.attention if "attention" in op.name else rates.experts
  cycles = sum(op.total for op in ops if op.kind == "cycles")
  took = lambda op: op.times * max(op.amount / (rate(op) * peak), op.bytes / memory)
  kernels = sum(took(op) for op in ops if op.kind == "kernel")
  speeds: Mapping[str, float] = axis_speeds(inside_sizes(setup, chip), chip)
  along, sizes = slices_along(setup, chip), setup.mesh.shape
  traffic: dict[str, float] = {}
  for one in sends:
    inside, between = one.total, 0.0
    if across := math.prod(along.get(axis, 1) for axis in one.axes) - 1:
      # In and between slices as in `bytes_by_network`.
      n = math.prod(sizes[axis] for axis in one.axes)
      between = one.total * across / (n - 1)
      inside = one.total - between
      if one.kind == "collective-permute":
        inside, between = 0.0, one.total
    # Over several axes at once: on the links of all of them.
    name, speed = "+".join(one.axes), sum(speeds[axis] for axis in one.axes)
    for key, size, limit in ((name, inside, speed), (DCN + name, between, slice_network(chip))):
      if size:
        traffic[key] = traffic.get(key, 0.0) + size / (rates.network * limit)
  nothing = dict.fromkeys(Step._fields, 0.0)
  known = {"products": cycles / CLOCK[chip.name], "attention": kernels, "traffic": traffic}
  step = Step(**{**nothing, **known, "host": step_time(setup, chip).host})
  return step._replace(exposed=exposed(traffic, step.compute, rates))
