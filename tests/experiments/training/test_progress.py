"""What the display says of a row."""

import io
import types

import pytest
from rich.console import Console

from experiments.cli import named_config
from experiments.training import progress
from experiments.training.progress import ProgressDisplay, duration, load_bars
from experiments.training.setup import build
from experiments.training.timing import StepTimer
from layers.count import train_flops_per_token
from mesh import hardware

ROW = {
  "loss": 2.3456, "tokens_per_second": 17_887.4, "mfu": None, "drop_rate": 0.021,
  "load": [[0.5, 0.25, 0.25, 0.0], [0.25] * 4], "load_max_over_mean": 2.0,
  "dead_experts": 0, "nonfinite": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
  ("seconds", "text"),
  ((0.2, "0:00"), (59.6, "1:00"), (83, "1:23"), (3600, "1:00:00"), (90061, "25:01:01")),
)
def test_duration(seconds, text):
  assert duration(seconds) == text


def test_load_bars_are_full_at_twice_the_fair_share():
  assert load_bars([0.5, 0.25, 0.25, 0.0]) == "█▅▅ "
  assert load_bars([0.9, 0.05, 0.04, 0.01]) == "█▂▂▁"  # something is not nothing


def test_row_with_and_without_a_known_chip():
  assert progress.describe_speed(ROW) == "loss 2.346   17,887 tok/s"
  assert progress.describe_speed(ROW | {"mfu": 0.412}) == "loss 2.346   17,887 tok/s   MFU 41.2%"
  assert progress.describe_speed({"loss": None, "mfu": None}) == "loss nan"


def test_experts_of_a_row():
  assert progress.describe_experts(ROW) == "experts │█▅▅ │ │▅▅▅▅│   fullest 2.0x   dropped 2.1%"
  many = ROW | {"load": [[1 / 64] * 64] * 16}
  assert progress.describe_experts(many) == "experts fullest 2.0x   dropped 2.1%"
  deep = progress.describe_experts(ROW | {"load": [[0.25] * 4] * 6})
  assert deep.count("│▅▅▅▅│") == 4 and "…" in deep
  assert progress.describe_experts({"loss": 1.0}) == ""
  ill = progress.describe_experts(ROW | {"dead_experts": 3, "nonfinite": 12.0})
  assert ill.endswith("dropped 2.1%   dead 3   not finite 12")


@pytest.mark.parametrize(("kind", "share"), (("h100", 989e12), ("cpu", None)))
def test_mfu_is_model_flops_over_the_peak_where_it_is_known(kind, share, monkeypatch):
  """Peak of all devices of the mesh; waiting for data counts as time of steps."""
  config = named_config("debug")
  setup = build(config)
  monkeypatch.setattr("experiments.training.timing.find_chip", lambda _: hardware.CHIPS[kind])
  clock = types.SimpleNamespace(seconds={"productive": 100.0, "data": 0.0})
  timer = StepTimer(config, setup.mesh, clock)
  timer.restart()
  clock.seconds = {"productive": 103.0, "data": 1.0}
  row = timer.interval(steps=10)
  assert row["tokens_per_second"] == 10 * 8 * 64 / 4
  if share is None:
    assert row["mfu"] is None
  else:
    flops = row["tokens_per_second"] * train_flops_per_token(config.model, 64)
    assert row["mfu"] == pytest.approx(flops / (share * setup.mesh.size))


def test_the_speed_of_all_steps_since_it_was_told(monkeypatch):
  """30 steps in 6 s, of 8 devices: told once, then those after them."""
  config = named_config("debug")
  setup = build(config)
  monkeypatch.setattr("experiments.training.timing.find_chip", lambda _: hardware.CHIPS["h100"])
  clock = types.SimpleNamespace(seconds={"productive": 0.0, "data": 0.0})
  timer = StepTimer(config, setup.mesh, clock)
  timer.interval(steps=1)  # the compiled one
  assert timer.perf() is None
  for seconds in (2.0, 6.0):
    clock.seconds = {"productive": seconds, "data": 0.0}
    timer.interval(steps=15)
  told = timer.perf()
  assert told["steps"] == 30 and told["tok_s"] == 30 * 512 / 6
  flops = train_flops_per_token(config.model, 64) * 30 * 512 / 6 / setup.mesh.size
  assert told["tflops_model"] == pytest.approx(flops / 1e12)
  assert told["mfu"] == pytest.approx(flops / 989e12)
  assert timer.perf() is None
  clock.seconds = {"productive": 7.0, "data": 0.0}
  timer.interval(steps=2)
  assert timer.perf()["tok_s"] == 2 * 512 / 1


def shown(monkeypatch, terminal):
  """What a display writes on 80 columns."""
  out = io.StringIO()
  make = lambda **settings: Console(file=out, force_terminal=terminal, width=80, **settings)
  monkeypatch.setattr(progress, "Console", make)
  monkeypatch.setattr("builtins.print", lambda *a, **k: out.write(" ".join(a) + "\n"))
  display = ProgressDisplay(40, "run")
  with display.live(10):
    display.started()
    display.update(11, ROW)
    display.note("an event")
    display.update(40, ROW | {"loss": 1.0})
  return out.getvalue()


def test_plain_lines_outside_a_terminal(monkeypatch):
  lines = shown(monkeypatch, terminal=False).splitlines()
  assert lines[0] == "run  compiling the step"
  assert lines[1].startswith("run  step 11/40   loss 2.346   17,887 tok/s   experts │█▅▅ │")
  assert lines[2] == "an event"
  assert lines[3].startswith("run  step 40/40   loss 1.000") and lines[3].endswith("   done")
  assert len(lines) == 4


def test_live_lines_in_a_terminal(monkeypatch):
  text = shown(monkeypatch, terminal=True)
  for piece in ("step 40/40", "loss 1.000", "│█▅▅ │ │▅▅▅▅│", "an event", "done"):
    assert piece in text


def test_a_process_that_is_not_the_first_is_silent(monkeypatch, capsys):
  display = ProgressDisplay(40, "run", enabled=False)
  with display.live(0):
    display.update(1, ROW)
    display.note("an event")
  assert capsys.readouterr().out == ""
