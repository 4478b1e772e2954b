"""The guard's limit, what it does and when, and how it is saved and set.

Curves are in `test_guard_curves.py`.
"""

import itertools
import json
import math

import numpy as np
import pytest

from experiments.config import ConfigError, GuardConfig
from experiments.training.guard import Decision, Guard, Observation
from tests.experiments.training import curves
from tests.experiments.training.driving import drive, drive_curve, noisy, said


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
  assert what == "skip: gradient norm 960 is 30 deviations above 1"
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
  before = json.dumps(saved)  # which further steps leave alone, for another rewind
  drive(guard, noisy(np.full(20, 2.5)), start=201)
  assert json.dumps(saved) == before
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
