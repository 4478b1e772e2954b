"""The best model that a budget trains, by the published laws or by one fitted to own runs."""

import glob
from pathlib import Path

from layers.count import count_params
from mesh.hardware import CHIPS
from mesh.slices import Topology

from .. import cli
from ..config import ConfigError
from . import tables
from .cost import Prices
from .law_fit import fit_law, read_runs
from .laws import EPOCH, METHODS, TRAIN_FLOPS, nearest, overtrained
from .speed import rates_of

_SMALLER = (2, 4, 8)  # times fewer parameters than the best
_HOUR = 3600.0
# FLOP about which the laws are asked. Their runs took 6e18 to 3e21 (arXiv 2203.15556, section 3.2):
# much below, they name models worse than an even guess, and far above nothing was ever trained.
_LEAST, _MOST = 1e16, 1e30


def flops_of_days(topology: Topology, days: float) -> tuple[float, str]:
  """(model FLOP of a machine in so many days, on which grounds)."""
  peak, share, name = _rate(topology)
  flops = topology.num_chips * peak * share * days * 24 * _HOUR
  length = "a day" if days == 1 else f"{days:g} days"
  return flops, f"{topology.num_chips:,} {name} for {length} at an MFU of {share:.0%}"


def flops_of_dollars(topology: Topology, usd: float, prices: Prices) -> tuple[float, str]:
  """(model FLOP that money buys on this kind of chip, on which grounds).

  Raises:
    ConfigError: its price is not known.
  """
  peak, share, name = _rate(topology)
  price = prices.price.get(topology.chip)
  if price is None:
    raise ConfigError(f"no price of {name} with a source is known: give one with --prices=FILE")
  hours = usd / price.usd_per_hour
  amount = lambda x: f"{x:,.0f}" if x >= 1 else f"{x:.2g}"
  grounds = f"{amount(usd)} USD: {amount(hours)} hours of {name} at {price.usd_per_hour:g} USD "
  return hours * _HOUR * peak * share, grounds + f"({price.source}), at an MFU of {share:.0%}"


def _rate(topology: Topology) -> tuple[float, float, str]:
  """(peak FLOP/s, the MFU taken, the chip's name): what products reach, less a tenth."""
  chip = CHIPS[topology.chip]
  if chip.bf16_flops is None:
    raise ConfigError(f"the speed of {chip.name!r} is not in mesh/hardware.py")
  return chip.bf16_flops, 0.9 * rates_of(chip).products, chip.name


def print_budget(flops: float, grounds: str) -> None:
  """Best sizes by each law, smaller models as good as the best, and shipped configs near it.

  Raises:
    ConfigError: a budget of which the laws know nothing.
  """
  if not _LEAST <= flops <= _MOST:
    amount, hint = "much", "give less"
    if flops < _LEAST:
      amount = "little"
      hint = f"give at least {_LEAST:g}, or fit a law to your own small runs with --fit"
    raise ConfigError(
      f"{flops:.3g} model FLOP ({grounds}) is too {amount} for the published laws, whose runs took "
      f"6e18 to 3e21: {hint}"
    )
  best, band = EPOCH.optimum(flops), EPOCH.band(flops)
  assert band is not None
  print(f"{flops:.3g} model FLOP ({grounds})\n")
  made = tables.table("law", "parameters", "tokens", "tokens a parameter")
  for name, method in METHODS.items():
    found = method(flops)
    made.add_row(
      name, f"{found.params:.3g}", f"{found.tokens:.3g}", f"{found.tokens_per_param:.1f}"
    )
  tables.console.print(made)
  low, high = band.params
  print(
    f"\nThe first is the default: {best.params:.3g} parameters ({low:.3g} to {high:.3g} with "
    f"80 %), loss {EPOCH.loss(*best):.3f} nats a token of its authors' text.\n"
  )
  made = tables.table("smaller, as good", "tokens", "training", "pays after tokens of inference")
  for factor in _SMALLER:
    try:
      small = overtrained(EPOCH, flops, best.params / factor)
    except ValueError:  # no training makes it as good
      break
    more = f"{small.compute / flops:.2f}x"
    made.add_row(f"{small.params:.3g}", f"{small.tokens:.3g}", more, f"{small.pays_after:.2g}")
  tables.console.print(made)
  configs = {name: cli.named_config(name).model for name in cli.config_names()}
  sizes = {name: float(count_params(m).active) for name, m in configs.items() if m.causal}
  print("\nShipped configs of about that size (active parameters):")
  for name in nearest(best.params, sizes):
    tokens = flops / (TRAIN_FLOPS * sizes[name])
    loss = EPOCH.loss(sizes[name], tokens)
    print(f"  {name:24} {sizes[name]:.3g}, {tokens:.3g} tokens, loss {loss:.3f}")


def print_fit(patterns: str, flops: float | None) -> None:
  """A law fitted to the runs in these folders, and what it says of a budget.

  Raises:
    ConfigError: no such folders, runs that are not comparable, or too few.
  """
  folders = sorted({Path(f) for pattern in patterns.split(",") for f in glob.glob(pattern)})
  if not folders:
    raise ConfigError(f"--fit={patterns}: no such folder")
  runs = read_runs(folders)
  made = tables.table("run", "parameters", "tokens", "held-out loss")
  for run in runs:
    made.add_row(run.name, f"{run.params:.4g}", f"{run.tokens:.4g}", f"{run.loss:.4f}")
  tables.console.print(made)
  fit = fit_law(runs)
  law = fit.law
  print(
    f"\nL(N, D) = {law.E:.3f} + {law.A:.4g} / N^{law.alpha:.3f} + {law.B:.4g} / D^{law.beta:.3f}"
  )
  if flops is None:
    return
  params, tokens = fit.optimum(flops)
  loss = fit.predict(params.value, tokens.value)
  print(
    f"{flops:.3g} FLOP: {params.value:.3g} parameters ({params.low:.3g} to {params.high:.3g}), "
    f"{tokens.value:.3g} tokens ({tokens.low:.3g} to {tokens.high:.3g}), "
    f"loss {loss.value:.3f} ({loss.low:.3f} to {loss.high:.3f}); intervals of 80 %"
  )
