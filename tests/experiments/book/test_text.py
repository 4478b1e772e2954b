"""LOGBOOK.md: figures worked out by hand, lines as the reference has them, short and long books."""

import json
import re

import pytest

from experiments.book.facts import big, energy, gather, span
from experiments.book.text import human_lines, markdown, time_line, totals, write_book
from experiments.config import ConfigError
from experiments.configs import dense_1b
from experiments.overrides import apply_overrides, to_json
from experiments.planning.cost import Prices
from tests.experiments.book.life import MACHINE, Life

PRICES = """
[price.h100]
usd_per_hour = 2.0
[power.h100]
watts = 500
source = "a meter"
[pue]
value = 1.5
source = "a meter"
[carbon]
kg_per_kwh = 0.1
scope = "the grid"
source = "the grid"
"""


def short(**machine):
  """100 steps of 36 s, an hour in all, on 16 H100; saved twice."""
  life = Life(**machine)
  life.birth()
  life.launch()
  for first, last in ((1, 50), (51, 100)):
    life.steps(first, last, 36.0)
    life.event("checkpoint", last, summary=f"saved {last}", status="finished", bytes=3 * 10**9,
               block_s=0.5)  # fmt: skip
  life.row(100, heldout_loss=1.25, heldout_bits_per_byte=0.5)
  life.event("eval", 100, summary="held out: 0.500 bits a byte", suite="heldout", metrics={})
  life.event("stop", 100, summary="finished at step 100", reason="finished", exit_code=0)
  return life


def figures(folder):
  return dict(totals(gather(folder)))


def test_what_it_took_by_hand(tmp_path):
  """16 chips for an hour: 32 USD, 16 * 0.5 kW * 1.5 = 12 kWh, 1.2 kg. 100,000 tokens of 6e9 FLOP
  over 3600 s * 16 * 989e12 FLOP/s are an MFU of 0.00105 %: shown as 0.0 %."""
  folder = short().save(tmp_path)
  (folder / "prices.toml").write_text(PRICES)
  found = figures(folder)
  assert found["chip-hours"] == "16 of h100"
  assert found["cost"] == "32 USD at 2 USD an hour"
  assert found["energy"] == "12 kWh (500 W a chip, PUE 1.5)"
  assert found["carbon"] == "1.2 kg CO2e (0.1 kg/kWh: the grid)"
  assert found["tokens"] == "100,000" and found["model FLOP"].startswith("6e+14 ")
  assert found["steps"] == "100 of 100" and found["goodput"] == "100.0%"
  assert found["held-out loss"] == "1.25 (0.500 bits a byte) at step 100"
  work = gather(folder).work
  assert work.stepping == pytest.approx(1e5 * 6e9 / (3600 * 16 * 989e12), rel=1e-3)
  assert work.hardware is None  # there is no config to count from


def test_palms_utilisation(tmp_path):
  """238.3e3 tokens a second on 6144 v4 by the paper's formula are 46.2 %; here half of the time
  goes into something else."""
  per_token = 3.2421e12 + 12 * 118 * 48 * 256 * 2048
  life = Life(device_kind="TPU v4", devices=6144, tokens_per_step=238_300,
              flops_per_token=per_token)  # fmt: skip
  life.birth()
  life.launch()
  life.steps(1, 100, 1.0)
  life.spend(100, "evaluation")
  life.event("stop", 100, reason="finished", exit_code=0)
  work = gather(life.save(tmp_path)).work
  assert 100 * work.stepping == pytest.approx(46.23, abs=0.01)
  assert 100 * work.running == pytest.approx(46.23 / 2, abs=0.01)


def test_steps_done_again_and_recomputation_count_as_hardware_flops(tmp_path):
  """Half of the steps twice is half as much again; recomputing everything but a layer's end costs
  up to a third more."""
  found = []
  for name, again, remat in (("a", False, "none"), ("b", True, "none"), ("c", False, "full")):
    life = Life(tokens_per_step=256 * 2048)
    life.birth()
    life.launch()
    life.steps(1, 100, 1.0)
    if again:
      life.event("action", 100, policy="rewind", from_step=100, to_step=50, outcome="pending")
      life.steps(51, 100, 1.0)
    life.event("stop", 100, reason="finished", exit_code=0)
    folder = tmp_path / name
    folder.mkdir()
    config = apply_overrides(
      dense_1b.config(),
      [("train.remat", remat), ("data.batch_size", "256"), ("data.row_length", "2048")],
    )
    (folder / "config.json").write_text(json.dumps(to_json(config)))
    work = gather(life.save(folder)).work
    found.append(work.hardware * (1.5 if again else 1.0) / work.all_tokens)
  assert found[1] == pytest.approx(found[0], rel=1e-6)
  assert 1.2 < found[2] / found[0] < 1.34


def test_a_cpu_has_no_price(tmp_path):
  found = figures(short(device_kind="cpu", devices=8).save(tmp_path))
  assert found["device-hours"] == "8 of cpu"
  assert found["cost, energy"] == "unknown: there is no price and no power of cpu"
  assert not found.keys() & {"MFU", "cost", "chip-hours"}


def test_a_chip_without_published_power(tmp_path):
  found = figures(short(device_kind="TPU v5p").save(tmp_path))
  price = Prices.load().price["v5p"].usd_per_hour
  assert found["cost"] == f"{16 * price:.3g} USD at {price:g} USD an hour"
  assert found["energy"].startswith("unknown: nobody published the power of v5p")


def test_an_undisturbed_run_is_short(tmp_path):
  text = markdown(gather(short().save(tmp_path)))
  assert text.startswith("# dense_1b: logbook\n\nFinished at step 100.\n")
  assert re.findall("^## (.*)", text, re.MULTILINE) == [
    "Where the time went", "Checkpoints", "Time line",
  ]  # fmt: skip
  assert "2 saved; the newest of step 100, 3.0 GB.\n" in text
  assert "| productive | 1 h | 100.0% |" in text
  assert len(text.splitlines()) < 50


def test_the_human_line_of_the_reference():
  event = {
    "id": "00062f0e1f2b3ca1f4", "time": "2026-03-02T09:41:07.250+01:00", "run": "12.43",
    "step": 37_000, "source": "trainer", "owner": "ada", "kind": "action", "refs": [],
    "summary": "loss 2.20->5.10, 100 back, batches 36,990-37,190 skipped",
    "detail": {"policy": "rewind_skip", "cause": "00062f0e1f2b3ca1f3"},
  }  # fmt: skip
  assert human_lines(event) == [
    "2026-03-02 09:41:07 +01:00 [ada] 12.43 step 37,000 REWIND_SKIP loss 2.20->5.10, 100 back, "
    "batches 36,990-37,190 skipped; cause a1f3"
  ]


def eventful():
  """A spike and its rewind, a change of the learning rate, two crashes, a note about one."""
  life = Life()
  life.birth()
  life.launch()
  life.steps(1, 40, 1.0)
  life.event("checkpoint", 40, summary="saved", status="finished", block_s=0.5)
  life.steps(41, 60, 1.0)
  spike = life.event("anomaly", 60, cls="E", severity="warn", summary="loss 1.0->9.0",
                     signal="loss", value=9.0)  # fmt: skip
  life.event("action", 60, cls="E", summary="20 back", policy="rewind_skip", from_step=60,
             to_step=40, cause=spike, outcome="pending")  # fmt: skip
  life.back(40)
  life.steps(41, 70, 1.0)
  life.now += 5
  fault = life.event("fault", source="supervisor", cls="A", severity="error",
                     summary="host a: ECC error", host="a", error="ECC")  # fmt: skip
  life.now += 5
  life.birth()
  life.launch(40)
  life.back(40)
  life.event("env_change", 40, summary="jax 0.10.2 -> 0.10.3", package="jax", old="0.10.2",
             new="0.10.3", intended=False)  # fmt: skip
  change = {"key": "optimizer.learning_rate", "old": 3e-4, "new": 2e-4}
  life.event("action", 40, cls="F", summary="slower", policy="none", change=[change],
             outcome="pending", reason="too fast | <b>")  # fmt: skip
  life.steps(41, 100, 1.0)
  life.event("note", source="human", owner="bo", summary="the power of host a", refs=[fault],
             text="the power of host a\nfailed ```", tags=[])  # fmt: skip
  life.event("stop", 100, reason="crash", exit_code=1, summary="ValueError: x", severity="error")
  return life


def test_an_eventful_run(tmp_path):
  text = markdown(gather(eventful().save(tmp_path)))
  assert "Stopped at step 100 of 100: ValueError: x." in text
  assert "| steps | 100 of 100; 50 more were done again |" in text  # 20 by the rewind, 30
  assert "2 attempts, 2 failures," in text
  rows = re.findall(r"^\| 1\.\d \|.*$", text, re.MULTILINE)
  assert rows[0].endswith("| 0 to 70 | 1 min 35 s | A hardware: host a: ECC error | 30 |")
  assert rows[1].endswith("| 40 to 100 | 1 min | ValueError: x |  |")
  changed = [line for line in text.splitlines() if line.startswith("| 2026") and "1.2" in line]
  assert any("| jax 0.10.2 -> 0.10.3 |" in line for line in changed)
  assert any("learning_rate 0.0003 -> 0.0002 | too fast \\| &lt;b> |" in line for line in changed)
  lines = time_line(gather(tmp_path))
  spike = next(line for line in lines if "ANOMALY" in line)
  back = next(line for line in lines if "REWIND_SKIP" in line)
  number = re.search(r"; cause (\w{4})$", back)[1]
  assert spike.endswith(f"loss 1.0->9.0 ({number})")
  fault, note = (next(line for line in lines if word in line) for word in ("FAULT", "NOTE"))
  assert fault.endswith(f"WARNING: see {re.search(r'[(](.{4})[)]$', note)[1]}")
  assert note.startswith("2026-03-02 10:") and "[bo] 1.2 NOTE the power of host a" in note
  block = text.partition("```text\n")[2]
  assert "    failed '''" in block and block.count("```") == 1  # nothing ends the block early


def test_a_hundred_restarts_stay_readable(tmp_path):
  life = Life(steps=10_000)
  for attempt in range(100):
    life.birth()
    life.launch(50 * attempt)
    life.steps(50 * attempt + 1, 50 * attempt + 60, 1.0)
    life.event("checkpoint", 50 * (attempt + 1), summary="saved", status="finished")
    cls = "AAB"[attempt % 3]
    life.event("fault", source="supervisor", cls=cls, severity="error", host="a", error="x")
    life.now += 10
  text = markdown(gather(life.save(tmp_path)))
  assert "100 attempts, 99 failures, 1 min" in text
  assert "| A hardware | 66 | 660 |" in text and "| B network | 33 | 330 |" in text
  assert "| 40 more |" in text
  assert len(re.findall(r"^\| 1\.\d+ \|", text, re.MULTILINE)) == 60
  assert len(text.splitlines()) < 100 + 60 + 100 * 3


def test_a_broken_chain_is_said_at_the_top(tmp_path):
  folder = short().save(tmp_path)
  path = folder / "logbook.jsonl"
  path.write_text(path.read_text().replace("saved 50", "saved 99"))
  text = markdown(gather(folder))
  assert text.index("line 2 is not as it was written") < text.index("## ")


def test_writing_never_stops_training(tmp_path):
  folder, said = short().save(tmp_path), []
  assert write_book(folder, said.append) == folder / "LOGBOOK.md" and said == []
  assert (folder / "LOGBOOK.md").read_text() == markdown(gather(folder))
  (folder / "metrics.jsonl").write_text("noise\n{}\n")
  before = (folder / "LOGBOOK.md").read_text()
  assert write_book(folder, said.append) is None
  assert "LOGBOOK.md could not be written: " in said[0] and "line 1 is not JSON" in said[0]
  assert (folder / "LOGBOOK.md").read_text() == before
  with pytest.raises(ConfigError, match="has no logbook and no metrics"):
    gather(tmp_path / "nowhere")


def test_metrics_alone_make_a_short_book(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 7, "loss": 2.5}\n')
  text = markdown(gather(tmp_path))
  assert "At step 7." in text and "| loss | 2.5 at step 7 |" in text


@pytest.mark.parametrize(
  ("seconds", "words"),
  (
    (0.314, "0.31 s"), (34, "34 s"), (59.6, "1 min"), (245, "4 min 05 s"), (3600, "1 h"),
    (3720, "1 h 02 min"), (86_400 * 2 + 3 * 3600, "2 d 03 h"),
  ),
)  # fmt: skip
def test_spans(seconds, words):
  assert span(seconds) == words


@pytest.mark.parametrize(
  ("number", "words"),
  ((12_345, "12,345"), (1_234_567, "1.23 million"), (8.2e9, "8.2 billion"), (3e14, "300 trillion"),
   (2e16, "2e+16")),
)  # fmt: skip
def test_large_numbers(number, words):
  assert big(number) == words


def test_an_energy_event_has_the_figures_of_the_totals(tmp_path):
  """16 H100 for an hour at 500 W, as in the first test here; and what a table of chips says."""
  folder = short().save(tmp_path)
  (folder / "prices.toml").write_text(PRICES)
  text, detail = energy(folder, MACHINE, 3600.0)
  assert text == "16 chip-hours of h100, 12 kWh, 1.2 kg CO2e"
  assert {name: detail[name] for name in ("chip_hours", "kwh", "watts", "pue", "kg_per_kwh")} == {
    "chip_hours": 16, "kwh": pytest.approx(12), "watts": 500, "pue": 1.5, "kg_per_kwh": 0.1,
  }  # fmt: skip
  assert detail["scope"] == "the grid" and "watts_source" not in detail
  (made,) = gather(folder).bills
  assert (made.chip_hours, made.kwh) == pytest.approx((16, 12))
  (folder / "prices.toml").unlink()
  kinds = {"NVIDIA H100 80GB HBM3": ("tdp", 700), "TPU v4": ("measured", 192)}
  for kind, (source, watts) in kinds.items():
    _, detail = energy(folder, MACHINE | {"device_kind": kind}, 3600.0)
    assert (detail["watts_source"], detail["watts"]) == (source, watts)
  text, detail = energy(folder, MACHINE | {"device_kind": "TPU v5p"}, 1800.0)
  assert text == "8 chip-hours of v5p, power unknown" and "kwh" not in detail
  # A TPU7x chip is two devices.
  assert energy(folder, MACHINE | {"device_kind": "TPU7x"}, 3600.0)[1]["chip_hours"] == 8
  text, detail = energy(folder, MACHINE | {"device_kind": "cpu"}, 3600.0)
  assert text == "16 device-hours of cpu, power unknown" and detail["chip_hours"] == 16


def test_speed_is_a_total_and_milestones_are_in_the_time_line(tmp_path):
  life = short()
  life.event("milestone", 50, summary="half of 100 steps", what="half of 100 steps")
  for name in ("slow", "fast"):
    life.event("perf", 100, summary=f"{name} steps", steps=9, convention="PaLM", goodput={},
               host_p50_s=0.5, host_max_s=2.0, host_max="process 3 on a")  # fmt: skip
  life.event("energy", 100, chip_hours=16.0, pue=1.0, kg_per_kwh=0.1, scope="the grid")
  text = markdown(gather(life.save(tmp_path)))
  hosts = "hosts' own work 0.5 s a step in the middle, at most 2 s, process 3 on a"
  assert f"| speed | fast steps; {hosts} |" in text
  assert "MILESTONE half of 100 steps" in text
  assert " PERF " not in text and " ENERGY " not in text and "slow steps" not in text
