"""Published energy tables, what a bill says about itself, and files of prices that are refused."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.config import ConfigError
from experiments.planning.cost import Carbon, Power, Prices, bill
from mesh.hardware import CHIPS

SHIPPED = Prices.load()

# Table 15 of arXiv 2302.13971: hours of an A100-80, MWh, tonnes CO2e, as printed.
LLAMA = {
  "OPT-175B": (809_472, 356, 137),
  "BLOOM-176B": (1_082_880, 475, 183),  # its own formula gives 476.5
  "LLaMA-7B": (82_432, 36, 14),
  "LLaMA-13B": (135_168, 59, 23),
  "LLaMA-33B": (530_432, 233, 90),
  "LLaMA-65B": (1_022_362, 449, 173),
}
RECOMPUTED = {
  "OPT-175B": 356.2, "BLOOM-176B": 476.5, "LLaMA-7B": 36.3, "LLaMA-13B": 59.5, "LLaMA-33B": 233.4,
  "LLaMA-65B": 449.8,
}  # fmt: skip


def with_carbon(tmp_path: Path, intensity: float) -> Prices:
  path = tmp_path / "prices.toml"
  path.write_text(f"[carbon]\nkg_per_kwh = {intensity}\n")
  return Prices.load(path)


@pytest.mark.parametrize("name", LLAMA)
def test_energy_of_llama_opt_and_bloom(name, tmp_path):
  """400 W, PUE 1.1, 0.385 t/MWh for every row; the paper cuts decimals off."""
  hours, mwh, tonnes = LLAMA[name]
  found = bill("a100", 1, hours, with_carbon(tmp_path, 0.385))
  assert found.kwh == pytest.approx(hours * 0.44)
  assert found.kwh / 1000 == pytest.approx(RECOMPUTED[name], abs=0.05)
  assert int(found.kwh / 1000) == mwh + (name == "BLOOM-176B")
  assert round(found.kg_co2e / 1000) == tonnes


def test_hours_of_opt_and_all_of_llama(tmp_path):
  opt = bill("a100", 992, 34 * 24, SHIPPED)
  assert opt.chip_hours == 809_472
  all_of_it = with_carbon(tmp_path, 0.385)
  hours = 2_638_000 / 0.44
  assert bill("a100", 1, hours, all_of_it).kg_co2e == pytest.approx(1_015_630, abs=1)


def test_bloom_by_its_own_study(tmp_path):
  """arXiv 2211.02001: 433,195 kWh measured, on French electricity: 24.7 t."""
  prices = with_carbon(tmp_path, 0.057)
  assert 433_195 * prices.carbon.kg_per_kwh == pytest.approx(24_700, rel=1e-3)


def test_a_bill_with_everything_known():
  found = bill("h100", 8, 100, SHIPPED)
  assert found.chip_hours == 800
  assert found.usd == pytest.approx(800 * SHIPPED.price["h100"].usd_per_hour)
  assert found.kwh == pytest.approx(800 * 0.7 * SHIPPED.pue.value)
  assert found.kg_co2e == pytest.approx(found.kwh * SHIPPED.carbon.kg_per_kwh)
  rows = {what: (figure, grounds) for what, figure, grounds in found.rows()}
  assert rows["chip-hours"] == ("800", "8 h100, 100.0 h")
  assert rows["cost"][0] == f"{800 * SHIPPED.price['h100'].usd_per_hour:,.0f} USD"
  assert SHIPPED.price["h100"].source in rows["cost"][1]
  assert rows["energy"][0] == "616 kWh"
  for part in ("700 W", "board power limit", "NVIDIA", "PUE 1.1", SHIPPED.pue.source):
    assert part in rows["energy"][1]
  for part in ("kg/kWh", SHIPPED.carbon.scope, SHIPPED.carbon.source):
    assert part in rows["carbon"][1]


def test_what_nobody_published_is_unknown():
  assert "tpu7x" not in SHIPPED.price
  found = bill("tpu7x", 64, 10, SHIPPED)
  assert (found.chip_hours, found.usd, found.kwh, found.kg_co2e) == (640, None, None, None)
  rows = {what: (figure, grounds) for what, figure, grounds in found.rows()}
  assert rows["chip-hours"][0] == "640"
  assert {rows[name][0] for name in ("cost", "energy", "carbon")} == {"unknown"}
  assert "--prices" in rows["cost"][1]
  v5p = bill("v5p", 64, 10, SHIPPED)
  assert (v5p.usd, v5p.kwh) == (640 * 4.20, None)
  v4 = "highest measurement without host and network, Google Cloud TPU documentation"
  assert SHIPPED.power_of("v4") == Power(192, v4)


def test_every_shipped_price_has_a_source():
  assert {"v4", "v5e", "v5p", "v6e", "a100", "h100", "h200", "b200"} <= SHIPPED.price.keys()
  for price in SHIPPED.price.values():
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", price.date)
    assert price.source.startswith("https://")
    assert 0 < price.usd_per_hour < 20
  for text in (SHIPPED.pue.source, SHIPPED.carbon.source, SHIPPED.carbon.scope):
    assert len(text) > 20
  assert SHIPPED.power == {}  # the chip table has them


def test_own_prices_replace_tables_of_the_same_name(tmp_path):
  path = tmp_path / "mine.toml"
  path.write_text("""
date = 2026-12-01
[price.h100]
usd_per_hour = 2
[power.v5p]
watts = 500
source = "measured"
[carbon]
kg_per_kwh = 0.05
scope = "market-based"
""")
  prices = Prices.load(path)
  mine = prices.price["h100"]
  assert (mine.usd_per_hour, mine.date, mine.source) == (2.0, "2026-12-01", str(path))
  assert prices.price["v5p"] == SHIPPED.price["v5p"]
  assert prices.pue == SHIPPED.pue
  assert prices.carbon == Carbon(0.05, "market-based", str(path))
  found = bill("v5p", 2, 10, prices)
  assert found.kwh == pytest.approx(20 * 0.5 * SHIPPED.pue.value)
  assert found.rows()[2][2].startswith("500 W a chip (measured), PUE 1.1")


REFUSED = {
  "[prise.h100]\nusd_per_hour = 2": "unknown key 'prise'; did you mean price",
  "[price.h101]\nusd_per_hour = 2": r"unknown chip price\.h101; did you mean .*h100",
  "[price.h100]\nusd_per_hours = 2": r"price\.h100 has an unknown key .* did you mean usd_per_hour",
  "[price.h100]\nusd_per_hour = -2": r"price\.h100\.usd_per_hour must be .* at least 0, not -2",
  "[price.h100]\nusd_per_hour = nan": "must be a number of at least 0, not nan",
  "[price.h100]\nusd_per_hour = inf": "must be a number of at least 0, not inf",
  "[price.h100]\nusd_per_hour = '2'": "must be a number of at least 0, not '2'",
  "[price.h100]\nusd_per_hour = true": "must be a number of at least 0, not True",
  "[price.h100]\nregion = 'here'": r"price\.h100 lacks usd_per_hour",
  "[price.h100]\nusd_per_hour = 2\nregion = 3": r"region must be text in quotes, not 3",
  "[price]\nh100 = 2": r"price\.h100 must be a table, not 2",
  "price = 2": "price must be a table",
  "[pue]\nvalue = 0.9": r"pue\.value must be a number of at least 1, not 0\.9",
  "[pue]\npue = 1.2": r"pue has an unknown key 'pue'; did you mean value",
  "[power.v5p]\nwatts = -1": r"power\.v5p\.watts must be a number of at least 0, not -1",
  "[carbon]\nkg_per_kwh = -1": r"carbon\.kg_per_kwh must be a number of at least 0, not -1",
  "[price": "can't read the prices in .*mine.toml",
}


@pytest.mark.parametrize("text", REFUSED)
def test_files_that_are_refused(text, tmp_path):
  path = tmp_path / "mine.toml"
  path.write_text(text)
  with pytest.raises(ConfigError, match=f"(?s){REFUSED[text]}") as error:
    Prices.load(path)
  assert str(path) in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
  for path in (tmp_path / "none.toml", tmp_path):
    with pytest.raises(ConfigError, match="can't read the prices in"):
      Prices.load(path)


@given(st.sampled_from(sorted(CHIPS)), st.integers(1, 10_000), st.floats(0, 1e5))
def test_bills_add_up(chip, chips, hours):
  once, twice = (bill(chip, n * chips, hours, SHIPPED) for n in (1, 2))
  for name in ("chip_hours", "usd", "kwh", "kg_co2e"):
    single, double = getattr(once, name), getattr(twice, name)
    assert (single is None) == (double is None)
    assert single is None or double == pytest.approx(2 * single)
  assert len(once.rows()) == 4
