"""The guard on synthetic curves, on recorded runs, and on the cases that are known to be hard.

`python -m tests.experiments.training.test_guard WORKDIR...` records runs (made with
--config.train.log_every=1) anew in `tests/golden/guard.json`.
"""

import itertools
import json
import math
import sys
from collections import deque
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.config import ConfigError, GuardConfig
from experiments.training.guard import Decision, Guard, Observation
from experiments.training.metrics import read_metrics
from tests.experiments.training import curves

RECORDED = Path(__file__).parents[2] / "golden" / "guard.json"
DELAY = 4  # steps in flight: a limit is that of the observations before


def drive(guard: Guard, loss, grad_norm=None, *, start=1, **signals) -> list[Decision]:
  """The decisions on a curve whose steps skip what is above the limit; ends at a rewind or stop."""
  grad_norm = np.ones(len(loss)) if grad_norm is None else grad_norm
  limits, decisions = deque([guard.limit] * DELAY), []
  for i, (x, norm) in enumerate(zip(map(float, loss), map(float, grad_norm), strict=True)):
    limits.append(guard.limit)
    rest = {name: float(values[i]) for name, values in signals.items()}
    o = Observation(start + i, x, norm, skipped=not norm <= limits.popleft(), **rest)
    decisions.append(guard.observe(o))
    if decisions[-1].action in ("rewind", "stop"):
      break
  return decisions


def drive_curve(curve: curves.Curve, **settings) -> list[Decision]:
  return drive(
    Guard(GuardConfig(**settings)),
    curve.loss,
    curve.grad_norm,
    update_ratio=curve.update_ratio,
    log_z=curve.log_z,
    load_cv=curve.load_cv,
  )


def said(decisions: list[Decision], start=1) -> list[tuple[int, str]]:
  """(step, what was done or noticed), in order."""
  found = []
  for step, d in enumerate(decisions, start):
    found += [(step, f"{d.action}: {d.reason}")] if d.action != "continue" else []
    found += [(step, f"{'end' if n.recovered else 'notice'}: {n.reason}") for n in d.notices]
  return found


def noisy(levels, sigma=0.01, seed=0) -> np.ndarray:
  noise = np.random.default_rng(seed).standard_normal(len(levels))
  return np.asarray(levels) * np.exp(sigma * noise)


# Synthetic and recorded curves


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


@pytest.mark.parametrize("height", (0.05, 0.1, 0.15))
def test_a_hump_while_warming_up_is_no_spike(height):
  t = np.arange(500)
  loss = 2 + 6 / np.sqrt(1 + t / 10)
  hump = curves.bump(t, 110, 30)
  norms = np.exp(0.2 * np.random.default_rng(1).standard_normal(500)) * (1 + 3 * hump)
  assert said(drive(Guard(GuardConfig()), noisy(loss * (1 + height * hump)), norms)) == []


def test_a_single_outlier_is_noticed_once_and_nothing_is_done():
  loss = noisy(np.full(400, 2.5))
  loss[200] = 3.5
  assert [(step, what.split(":")[0]) for step, what in said(drive(Guard(GuardConfig()), loss))] == [
    (201, "notice"), (209, "end")
  ]  # fmt: skip


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


# The limit


def test_limit_is_four_times_a_constant_norm_and_needs_a_history():
  guard = Guard(GuardConfig())
  for step in range(1, 41):
    assert math.isinf(guard.limit) == (step <= 32)
    guard.observe(Observation(step, 2.0, 0.25))
  assert guard.limit == pytest.approx(1.0)


def test_limit_is_six_robust_deviations_in_logarithms():
  """Norms e^a and e^-a in turn: level 1, median absolute deviation a."""
  guard, a = Guard(GuardConfig()), 0.4
  for step in range(200):
    guard.observe(Observation(step, 2.0, math.exp(a if step % 2 else -a)))
  assert guard.limit == pytest.approx(math.exp(6 * math.hypot(1.4826 * a, math.log(4) / 6)))


def test_limit_does_not_follow_a_spike_and_follows_a_new_level():
  guard = Guard(GuardConfig(mode="act"))
  drive(guard, noisy(np.full(100, 2.5)))
  before = guard.limit
  drive(guard, noisy(np.full(10, 2.5)), np.full(10, 1000.0), start=101)
  assert guard.limit == before
  drive(guard, noisy(np.full(200, 2.5)), np.full(200, 3.0), start=111)
  assert guard.limit == pytest.approx(3 * before)


def test_the_unit_of_the_gradient_norm_does_not_matter():
  curve, _ = curves.spiked(2000)
  steps = [[step for step, _ in said(drive_curve(curve._replace(grad_norm=curve.grad_norm * c)))]
           for c in (1.0, 1024.0)]  # fmt: skip
  assert steps[0] and steps[0] == steps[1]


# What is done


def test_one_gradient_spike_is_skipped_and_said():
  norms = np.ones(200)
  norms[150] = 960.0
  (step, what), (end, recovered) = said(drive(Guard(GuardConfig()), np.full(200, 2.5), norms))
  assert (step, end) == (151, 159)
  assert what == "skip: gradient norm 960 is 30 deviations above 1: update skipped"
  assert recovered == "end: gradient norm 1 is back where it was before step 151"


@pytest.mark.parametrize("bad", (math.nan, math.inf))
@pytest.mark.parametrize("where", ("loss", "grad_norm"))
def test_ten_steps_in_a_row_that_are_not_finite_stop(bad, where):
  values = np.full(200, 1.0)
  values[100:109] = values[110:119] = bad  # nine, twice
  values[150:] = bad
  other = np.full(200, 1.0)
  loss, norms = (values, other) if where == "loss" else (other, values)
  guard = Guard(GuardConfig())
  healthy = guard.state()
  decisions = drive(guard, loss, norms)
  actions = [d.action for d in decisions]
  assert len(decisions) == 160 and actions[-1] == "stop"
  assert decisions[-1].anomaly.first == 151 and "10 steps in a row" in decisions[-1].reason
  if where == "grad_norm":
    assert actions.count("skip") == 27 and set(actions) == {"continue", "skip", "stop"}
    assert actions[100:109] == ["skip"] * 9
  else:  # the step looks at gradients only
    assert {n.reason for d in decisions for n in d.notices} == {
      "loss is not finite, and the update was made"
    }
  assert guard.state()["signals"]["loss"]["values"] != healthy["signals"]["loss"]["values"]
  assert np.isfinite(guard.state()["signals"][where]["values"]).all()


def test_twenty_skips_in_fifty_steps_rewind():
  """Two of five steps: the 20th skip is the 48th step. One of three (17 in 50) is borne."""
  for every, rewinds in (((1, 1, 0, 0, 0), True), ((1, 0, 0), False)):
    norms = np.concatenate([np.ones(100), np.where(np.resize(every, 120), 50.0, 1.0)])
    decisions = drive(Guard(GuardConfig()), np.full(220, 2.5), norms)
    assert (decisions[-1].action == "rewind") == rewinds
    if rewinds:
      assert len(decisions) == 100 + 47
      found = decisions[-1].anomaly
      assert (found.signal, found.first, found.last) == ("grad_norm", 101, 147)


def spike_at(step: int, guard: Guard, start=1) -> Decision:
  """The last decision of a run whose loss doubles for good at `step`."""
  loss = np.where(np.arange(start, step + 100) < step, 2.5, 5.0)
  decisions = drive(guard, noisy(loss), start=start)
  assert all(d.action == "continue" for d in decisions[:-1])
  return decisions[-1]


def test_a_loss_that_stays_up_is_rewound_further_each_time_and_then_stops():
  guard = Guard(GuardConfig())
  drive(guard, noisy(np.full(880, 2.5)))
  saved = json.loads(json.dumps(guard.state()))
  for skip_batches in (200, 500):
    decision = spike_at(1000, guard, 881)
    assert (decision.action, decision.back, decision.skip_batches) == ("rewind", 100, skip_batches)
    found = decision.anomaly
    assert (found.signal, found.first, found.last) == ("loss", 1000, 1060)
    assert found.baseline == pytest.approx(2.5, rel=0.02) and found.deviations > 30
    assert decision.left_out == (990, 1060 + skip_batches)
    assert decision.reason.endswith(" for 61 steps")
    guard.rewound(saved)
  decision = spike_at(1000, guard, 881)
  assert decision.action == "stop" and "after 2 rewinds" in decision.reason


def test_trouble_far_away_is_new_trouble():
  guard = Guard(GuardConfig())
  assert spike_at(300, guard).skip_batches == 200
  guard.rewound()
  assert spike_at(900, guard, 200).skip_batches == 500
  guard.rewound()
  assert spike_at(4000, guard, 800).skip_batches == 200


def test_after_a_rewind_the_guard_is_as_it_was_at_the_checkpoint():
  guard = Guard(GuardConfig())
  drive(guard, noisy(np.full(200, 2.5)))
  saved, limit = guard.state(), guard.limit
  assert spike_at(260, guard, 201).action == "rewind"
  guard.rewound(saved)
  again = guard.state()
  assert again.pop("rewinds") == [260] and guard.limit == limit
  assert again == {name: value for name, value in saved.items() if name != "rewinds"}
  guard.rewound()
  assert guard.limit == math.inf and guard.state()["rewinds"] == [260]


@pytest.mark.parametrize("seed", (2000, 2001, 2003, 2005))
def test_a_resumed_guard_decides_as_the_one_that_never_stopped(seed):
  """Saved as JSON before, in and after a spike."""
  curve, spike = curves.spiked(seed)
  n = spike.onset + 90
  observations = [
    Observation(i + 1, float(curve.loss[i]), float(curve.grad_norm[i])) for i in range(n)
  ]

  def run(cuts):
    guard, found = Guard(GuardConfig()), []
    for o in observations:
      if o.step in cuts:
        text, guard = json.dumps(guard.state(), allow_nan=False), Guard(GuardConfig())
        guard.restore(json.loads(text))
      limit = guard.limit
      found.append((limit, guard.observe(o._replace(skipped=not o.grad_norm <= limit))))
    return found

  whole = run(())
  assert any(d.action != "continue" or d.notices for _, d in whole)
  assert run((20, 70, spike.onset + 2, spike.onset + 4, spike.onset + 40)) == whole


def test_observing_does_nothing_and_says_what_acting_would():
  guard = Guard(GuardConfig(mode="observe"))
  loss = np.where(np.arange(600) < 300, 2.5, 5.0)
  norms = np.ones(600)
  norms[200] = 100.0
  decisions = drive(guard, noisy(loss), norms)
  assert len(decisions) == 600 and {d.action for d in decisions} == {"continue"}
  assert guard.limit == math.inf
  words = [what for _, what in said(decisions)]
  assert words[0].startswith("notice: gradient norm 100 is")
  assert sum("would rewind" in what for what in words) == 1


def test_off_says_nothing():
  guard = Guard(GuardConfig(mode="off"))
  assert said(drive(guard, [*[2.5] * 100, *[math.nan] * 50])) == [] and guard.limit == math.inf


def test_after_an_intervention_levels_are_learned_anew():
  for reset in (True, False):
    guard = Guard(GuardConfig())
    drive(guard, noisy(np.full(200, 2.5)))
    if reset:
      guard.reset()
    words = said(drive(guard, noisy(np.full(200, 3.5)), np.full(200, 20.0), start=201))
    assert bool(words) == (not reset)


def test_settings_are_checked():
  for name, value in itertools.product(
    ("window", "deviations", "rewind_steps", "nonfinite_steps"), (0, -1)
  ):
    with pytest.raises(ConfigError, match=f"guard.{name}="):
      GuardConfig(**{name: value})
  with pytest.raises(ConfigError, match="skip_batches"):
    GuardConfig(skip_batches=(200, 0))


def test_settings_are_used():
  """Without batches to leave out the first lasting spike stops."""
  assert spike_at(300, Guard(GuardConfig(skip_batches=()))).action == "stop"
  assert spike_at(300, Guard(GuardConfig(rewind_steps=7))).back == 7
  loss = noisy(np.full(200, 2.5), 0.02)
  loss[150] = 2.5 * math.exp(8 * 0.02)
  assert said(drive(Guard(GuardConfig()), loss))
  assert said(drive(Guard(GuardConfig(deviations=12.0)), loss)) == []
  norms = np.concatenate([np.full(60, 8.0), np.full(60, 1.0)])
  guard = Guard(GuardConfig(nonfinite_steps=2, window=32))
  assert drive(guard, np.full(120, 2.5), norms)[-1].action == "continue"
  assert guard.limit == pytest.approx(4.0)
  assert len(drive(guard, [math.nan] * 5, [math.nan] * 5, start=121)) == 2


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
