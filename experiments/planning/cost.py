"""The bill of a run: chip-hours, energy, carbon and, where a price is known, dollars.

kWh = chips * hours * watts * PUE / 1000; kg CO2e = kWh * intensity. Watts, PUE, intensity and its
scope come with every figure: the same run differs tenfold by what they are.
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mesh.hardware import CHIPS

from ..config import ConfigError
from ..fields import suggest

_SHIPPED = Path(__file__).with_name("prices.toml")


@dataclass(frozen=True)
class ChipPrice:
  """On demand."""

  usd_per_hour: float
  region: str
  date: str
  source: str


@dataclass(frozen=True)
class Power:
  """Of one chip while it trains."""

  watts: float
  source: str


@dataclass(frozen=True)
class Pue:
  """All the energy of a data centre over that of its machines."""

  value: float
  source: str


@dataclass(frozen=True)
class Carbon:
  """Of a kWh."""

  kg_per_kwh: float
  scope: str
  source: str


@dataclass(frozen=True)
class Prices:
  """What `prices.toml` holds, with a user's file over it."""

  price: Mapping[str, ChipPrice]
  power: Mapping[str, Power]  # in place of the chip table's watts
  pue: Pue
  carbon: Carbon

  @classmethod
  def load(cls, path: Path | None = None) -> Self:
    """The shipped prices, with the tables of the file at `path` in place of theirs.

    Raises:
      ConfigError: it can't be read, or holds an unknown key, chip or unit, or a value out of range.
    """
    tables = _read(_SHIPPED)
    if path is not None:
      own = _read(path)
      per_chip = {name: tables[name] | own.get(name, {}) for name in ("price", "power")}
      tables = tables | own | per_chip
    return cls(**tables)

  def power_of(self, chip: str) -> Power | None:
    """Watts of a chip: these prices', else the chip table's; None where nobody published any."""
    if chip in self.power:
      return self.power[chip]
    watts = CHIPS[chip].watts
    if watts is None:
      return None
    what = "highest measurement" if "TPU" in CHIPS[chip].source else "board power limit"
    return Power(watts, f"{what} without host and network, {CHIPS[chip].source}")


@dataclass(frozen=True)
class Bill:
  """None is unknown: a chip without a published power, or without a price."""

  chip: str
  chips: int
  hours: float
  price: ChipPrice | None
  power: Power | None
  pue: Pue
  carbon: Carbon

  @property
  def chip_hours(self) -> float:
    return self.chips * self.hours

  @property
  def usd(self) -> float | None:
    return None if self.price is None else self.chip_hours * self.price.usd_per_hour

  @property
  def kwh(self) -> float | None:
    if self.power is None:
      return None
    return self.chip_hours * self.power.watts * self.pue.value / 1000

  @property
  def kg_co2e(self) -> float | None:
    return None if self.kwh is None else self.kwh * self.carbon.kg_per_kwh

  def rows(self) -> list[tuple[str, str, str]]:
    """(what, how much, on which grounds), to be printed."""
    price, power, pue, carbon = self.price, self.power, self.pue, self.carbon
    cost = f"no price of {self.chip} with a source; give one with --prices"
    energy = emitted = f"nobody published the power of {self.chip}; give it with --prices"
    if price is not None:
      cost = (
        f"{price.usd_per_hour:g} USD a chip-hour on demand, {price.region}, {price.date}: "
        f"{price.source}"
      )
    if power is not None:
      energy = f"{power.watts:g} W a chip ({power.source}), PUE {pue.value:g} ({pue.source})"
      emitted = f"{carbon.kg_per_kwh:g} kg/kWh ({carbon.scope}): {carbon.source}"
    figure = lambda value, unit: "unknown" if value is None else f"{value:,.0f} {unit}"
    return [
      ("chip-hours", f"{self.chip_hours:,.0f}", f"{self.chips:,} {self.chip}, {self.hours:,.1f} h"),
      ("cost", figure(self.usd, "USD"), cost),
      ("energy", figure(self.kwh, "kWh"), energy),
      ("carbon", figure(self.kg_co2e, "kg CO2e"), emitted),
    ]


def bill(chip: str, chips: int, hours: float, prices: Prices) -> Bill:
  """Of `chips` chips for `hours` hours, as if all of them were at work all the time."""
  price, power = prices.price.get(chip), prices.power_of(chip)
  return Bill(chip, chips, hours, price, power, prices.pue, prices.carbon)


# Each table's class, and whether it holds one entry a chip.
_TABLES = {
  "price": (ChipPrice, True), "power": (Power, True), "pue": (Pue, False),
  "carbon": (Carbon, False),
}  # fmt: skip
_LEAST = {"value": 1.0}  # of a PUE; other numbers: 0
_OPTIONAL = {"region", "scope", "date", "source"}


def _read(path: Path) -> dict[str, Any]:
  """The tables of a file, each checked."""
  try:
    tree = tomllib.loads(path.read_text())
  except (OSError, ValueError) as e:  # not there, not text, not TOML
    raise ConfigError(f"can't read the prices in {path}: {e}") from e
  date = str(tree.pop("date", "undated"))
  tables: dict[str, Any] = {}
  for name, table in tree.items():
    if name not in _TABLES:
      raise ConfigError(f"{path}: unknown key {name!r}; {suggest(name, (*_TABLES, 'date'))[0]}")
    kind, per_chip = _TABLES[name]
    if not isinstance(table, dict):
      raise ConfigError(f"{path}: {name} must be a table, [{name}]")
    if not per_chip:
      tables[name] = _entry(kind, table, f"{path}: {name}", str(path), date)
      continue
    for chip in table:
      if chip not in CHIPS:
        raise ConfigError(f"{path}: unknown chip {name}.{chip}; {suggest(chip, CHIPS)[0]}")
    tables[name] = {
      chip: _entry(kind, entry, f"{path}: {name}.{chip}", str(path), date)
      for chip, entry in table.items()
    }
  return {"price": {}, "power": {}} | tables


def _entry(kind: type, table: Any, where: str, source: str, date: str) -> Any:
  """One dataclass of a TOML table; what a user's file need not say is filled in."""
  if not isinstance(table, dict):
    raise ConfigError(f"{where} must be a table, not {table!r}")
  types = {name: field.type for name, field in kind.__dataclass_fields__.items()}
  for key, value in table.items():
    if key not in types:
      raise ConfigError(f"{where} has an unknown key {key!r}; {suggest(key, types)[0]}")
    if types[key] is str and not isinstance(value, str):
      raise ConfigError(f"{where}.{key} must be text in quotes, not {value!r}")
    if types[key] is float:
      number = isinstance(value, int | float) and not isinstance(value, bool)
      least = _LEAST.get(key, 0.0)
      if not (number and least <= value < math.inf):
        raise ConfigError(f"{where}.{key} must be a number of at least {least:g}, not {value!r}")
  given = {"region": "unnamed", "scope": "as given", "date": date, "source": source}
  filled = {name: given[name] for name in types.keys() & _OPTIONAL} | table
  for name in types.keys() - filled.keys():
    raise ConfigError(f"{where} lacks {name}")
  return kind(**{k: float(v) if types[k] is float else v for k, v in filled.items()})
