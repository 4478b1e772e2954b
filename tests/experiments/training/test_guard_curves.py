"""What the guard says of synthetic curves, of recorded runs, and of cases known to be hard.

`python -m tests.experiments.training.test_guard_curves WORKDIR...` records runs (made with
--config.train.log_every=1) anew in `tests/golden/guard.json`.
"""

import json
import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.config import GuardConfig
from experiments.training.guard import Guard
from experiments.training.metrics import read_metrics
from tests.experiments.training import curves
from tests.experiments.training.driving import drive, drive_curve, noisy, said

RECORDED = Path(__file__).parents[2] / "golden" / "guard.json"


@pytest.mark.parametrize("shape", curves.SHAPES)
def test_nothing_is_said_of_healthy_curves(shape):
  """Neither done nor noticed, though only what is done counts as a false positive."""
  found = [curve for curve in map(curves.healthy, curves.HEALTHY_SEEDS) if curve.shape == shape]
  assert len(found) == 5
  for curve in found:
    assert said(drive_curve(curve)) == []


def cut(curve: curves.Curve, steps: int) -> curves.Curve:
  return curves.Curve(*(x[:steps] if isinstance(x, np.ndarray) else x for x in curve))


def test_spikes_are_found_within_three_steps():
  """Of what was said before them, nothing was done, and one curve of fifty had a notice."""
  found, early = dict.fromkeys(curves.KINDS, 0), set()
  for seed in curves.SPIKED_SEEDS:
    curve, spike = curves.spiked(seed)
    for step, what in said(drive_curve(cut(curve, spike.onset + 4))):
      if step <= spike.onset:  # steps count from 1
        assert what.startswith(("notice", "end")), (seed, spike, step, what)
        early.add(seed)
      elif not what.startswith("end"):
        found[spike.kind] += 1
        break
  assert sum(found.values()) >= 48, found
  assert len(early) <= 1, early


def test_gradient_spikes_are_skipped_by_their_own_step():
  """Those of the gradient norm alone, which last 1 to 5 steps; nothing else is done."""
  skipped = 0
  for seed in curves.SPIKED_SEEDS:
    curve, spike = curves.spiked(seed)
    if spike.kind == "grad_norm":
      words = said(drive_curve(cut(curve, spike.onset + 20)))
      steps = [step for step, what in words if not what.startswith(("notice", "end"))]
      assert all(spike.onset < step <= spike.onset + 5 for step in steps)
      skipped += spike.onset + 1 in steps
  assert skipped >= 15  # of 16


def recorded() -> dict[str, dict]:
  return json.loads(RECORDED.read_text())["runs"]


@pytest.mark.parametrize(
  "name",
  ("moe_tiny", "dense_tiny", "hybrid_tiny", "encoder_tiny", "moe_tiny_300", "dense_tiny_300"),
)
def test_nothing_is_said_of_the_shipped_configs(name):
  run = recorded()[name]
  assert len(run["loss"]) in (150, 300) and run["loss"][-1] < 0.6 * run["loss"][0]
  assert said(drive(Guard(GuardConfig()), **run)) == []
  # The same curves with a mistake in them are not passed over.
  norms, losses = list(run["grad_norm"]), list(run["loss"])
  norms[100], losses[130] = 30 * norms[100], 2 * losses[130]
  words = said(drive(Guard(GuardConfig()), **{**run, "grad_norm": norms, "loss": losses}))
  assert [(step, what.split(":")[0]) for step, what in words[:1]] == [(101, "skip")]
  assert any(step == 131 and what.startswith("notice: loss") for step, what in words)


BLOOM = (2.198, 2.220, 2.595, 2.242, 2.345, 5.098, 3.492, 3.213, 2.805)  # its end: 2.216


@pytest.mark.parametrize("mode", ("observe", "act"))
def test_the_first_spike_of_bloom_is_noticed_and_heals(mode):
  """Step 31,215 of BLOOM-176B: about 30 steps, untouched. What was not published is filled in."""
  loss = np.concatenate([
    noisy(np.full(150, 2.205), 0.005), BLOOM, np.geomspace(2.7, 2.216, 22),
    noisy(np.full(60, 2.216), 0.005, seed=1),
  ])  # fmt: skip
  words = said(drive(Guard(GuardConfig(mode=mode)), loss))
  peak = 150 + BLOOM.index(5.098) + 1
  assert words[0][0] <= peak and words[0][1].startswith("notice: loss")
  assert words[-1][0] <= peak + 60 and words[-1][1].startswith("end: loss")
  assert {what.split(":")[0] for _, what in words} == {"notice", "end"}
  assert "would" not in "".join(what for _, what in words)


# The hard cases


@pytest.mark.parametrize("height", (0.05, 0.1, 0.2))
def test_a_hump_while_warming_up_is_no_spike(height):
  t = np.arange(500)
  loss = 3 + 4 / (1 + t / 10)
  hump = curves.bump(t, 130, 30)
  norms = np.exp(0.2 * np.random.default_rng(1).standard_normal(500)) * (1 + 3 * hump)
  assert said(drive(Guard(GuardConfig()), noisy(loss * (1 + height * hump)), norms)) == []


def test_seven_percent_more_for_a_window_is_no_divergence():
  level = np.interp(np.arange(800), (0, 300, 330, 430, 460, 800), (2.4, 2, 2.14, 2.14, 2, 1.9))
  assert said(drive(Guard(GuardConfig()), noisy(level))) == []


def test_a_single_outlier_is_noticed_once_and_nothing_is_done():
  loss = noisy(np.full(400, 2.5))
  loss[200] = 3.5
  assert [(step, what.split(":")[0]) for step, what in said(drive(Guard(GuardConfig()), loss))] == [
    (201, "notice"), (209, "end")
  ]  # fmt: skip


def test_two_steps_in_a_row_need_less():
  """Five deviations, of half a percent each: noticed at the second step, as begun at the first."""
  loss = np.full(200, 2.5)
  loss[100] *= math.exp(5 * 0.005)
  assert said(drive(Guard(GuardConfig()), loss)) == []
  loss[101] = loss[100]
  decisions = drive(Guard(GuardConfig()), loss)
  assert [step for step, _ in said(decisions)] == [102, 110]
  assert decisions[101].notices[0].anomaly.first == 101
  assert decisions[101].notices[0].anomaly.deviations == pytest.approx(5)


def test_what_is_below_is_no_anomaly():
  loss, norms = noisy(np.full(400, 2.5)), np.ones(400)
  loss[200:203], norms[250] = 0.5, 1e-3
  loss[300:] *= 0.8
  assert said(drive(Guard(GuardConfig()), loss, norms)) == []


@pytest.mark.parametrize("level", (10.8, 2.5, 0.05))
@pytest.mark.parametrize("noise", (0.0, 1e-6))
def test_on_a_quiet_plateau_two_percent_more_are_nothing_and_ten_are(level, noise):
  loss = noisy(np.full(300, level), noise)
  loss[150] *= 1.02
  loss[250] *= 1.1
  words = said(drive(Guard(GuardConfig()), loss))
  assert [step for step, _ in words] == [251, 259]


@pytest.mark.parametrize("rise, over", ((0.10, 200), (0.15, 400), (0.20, 800), (0.5, 1500)))
def test_a_slow_divergence_is_noticed_then_stopped(rise, over):
  """No step of it is a spike: at most 0.05 % more than the one before, of noise 1 %."""
  t = np.arange(2500)
  loss = 2.4 * (1 + rise * np.clip((t - 400) / over, 0, 4))
  words = said(drive(Guard(GuardConfig()), noisy(loss)))
  assert [what.split(":")[0] for _, what in words[-2:]] == ["notice", "stop"]
  assert all(what.startswith(("notice: loss has risen slowly", "stop: loss")) for _, what in words)
  noticed, stopped = words[0][0], words[-1][0]
  reached = 400 + 0.05 / rise * over  # the step at which it matters: 5 % more
  assert reached < noticed < reached + 300 and stopped < 400 + 512 + 0.12 / rise * over


def test_a_quicker_divergence_is_noticed_sooner():
  """A fifth of a percent a step, from step 400: noticed after one window, 128 steps, not two, and
  stopped before two are over."""
  t = np.arange(1000) - 400
  level = 2.4 * np.where(t < 0, 1 - t / 4000, 1 + t / 500)
  words = said(drive(Guard(GuardConfig()), noisy(level, 0.02)))
  assert [what.split(",")[0] for _, what in words] == [
    "notice: loss has risen slowly", "stop: loss has risen slowly"
  ]  # fmt: skip
  assert 520 < words[0][0] < 560 and 570 < words[1][0] < 650


def test_a_slow_rise_that_turns_is_noticed_and_ends():
  level = np.concatenate([np.full(300, 2.0), np.linspace(2, 2.16, 300), np.full(200, 2.16),
                          np.linspace(2.16, 1.9, 300)])  # fmt: skip
  words = said(drive(Guard(GuardConfig()), noisy(level)))
  assert [what.split(":")[0] for _, what in words] == ["notice", "end"]


def test_a_growing_gradient_norm_is_noticed():
  """Eight times as much over a thousand steps, while the loss falls."""
  t = np.arange(1500)
  norms = np.exp(0.3 * np.random.default_rng(2).standard_normal(1500)) * 8 ** np.clip(
    (t - 300) / 1000, 0, 1
  )
  words = said(drive(Guard(GuardConfig()), noisy(3 * (1 + t) ** -0.05), norms))
  assert [what.split(",")[0] for _, what in words] == ["notice: gradient norm has risen slowly"]


def test_a_small_step_up_becomes_the_level():
  """4 % more for good, as from other data: no rewind, and the next spike is seen from there."""
  loss = noisy(np.where(np.arange(500) < 200, 2.5, 2.6), 0.002)
  loss[400] = 2.9
  notices = [n for d in drive(Guard(GuardConfig()), loss) for n in d.notices]
  assert [(n.anomaly.first, n.recovered) for n in notices] == [
    (201, False), (201, True), (401, False), (401, True)
  ]  # fmt: skip
  assert "has stayed at" in notices[1].reason
  assert [n.anomaly.baseline for n in notices[1:3]] == pytest.approx([2.5, 2.6], rel=0.005)


@pytest.mark.parametrize(
  "name, value, rest",
  (("log_z", 30.0, 2.0), ("load_cv", 2.6, 0.2), ("update_ratio", 0.5, 1e-3)),
)
def test_other_signals_are_only_noticed(name, value, rest):
  loss = noisy(np.full(300, 2.5))
  values = noisy(np.full(300, rest), 0.05)
  values[200:] = value
  words = said(drive(Guard(GuardConfig()), loss, **{name: values}))
  assert [(step, what.split(":")[0]) for step, what in words] == [(201, "notice"), (261, "end")]
  values[150] = math.nan  # of one of these alone nothing follows
  assert said(drive(Guard(GuardConfig()), loss, **{name: values})) == words


def record(folders: list[str]) -> None:
  """Writes what the guard sees of these runs; a name with the steps where they are not 150."""
  runs = {}
  for folder in map(Path, folders):
    rows = [row for row in read_metrics(folder) if "grad_norm" in row]
    name = folder.name if len(rows) != 150 else folder.name.removesuffix("_150")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    keys = [key for key in ("loss", "grad_norm", "load_cv") if key in rows[0]]
    runs[name] = {key: [float(f"{row[key]:.5g}") for row in rows] for key in keys}
  command = (
    "python -m experiments.run --config=NAME --workdir=NAME_STEPS --config.train.steps=STEPS "
    "--config.train.log_every=1"
  )
  RECORDED.write_text(json.dumps({"command": command, "jax": jax.__version__, "runs": runs}) + "\n")


if __name__ == "__main__":
  record(sys.argv[1:])
