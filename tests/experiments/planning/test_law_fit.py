"""A known law is found again from synthetic runs; run directories are read, or refused in words."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.config import Config, ConfigError, DataConfig, EvalConfig, TrainConfig
from experiments.overrides import Change
from experiments.planning import law_fit
from experiments.planning.law_fit import Run, fit_law, read_runs
from experiments.planning.laws import CHINCHILLA, EPOCH, Law
from experiments.training.folder import record_changes, write_config
from experiments.training.metrics import MetricsWriter
from layers.count import count_params
from layers.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, MoeSpec, Segment


def runs_of(law: Law, *, noise: float, seed: int = 0, sizes=6, lengths=5) -> list[Run]:
  """A grid of models from 1e7 to 3e9 parameters, and 2 to 200 tokens a parameter."""
  random = np.random.default_rng(seed)
  runs = []
  for params in np.geomspace(1e7, 3e9, sizes):
    for ratio in np.geomspace(2, 200, lengths):
      loss = law.loss(params, ratio * params) * np.exp(noise * random.normal())
      runs.append(Run(f"{params:.0f}", float(params), float(ratio * params), float(loss)))
  return runs


def constants(law: Law) -> tuple[float, ...]:
  return law.E, law.A, law.B, law.alpha, law.beta


@pytest.mark.parametrize("law", [EPOCH, CHINCHILLA])
def test_runs_without_noise_give_their_law(law):
  fit = fit_law(runs_of(law, noise=0), resamples=5)
  assert constants(fit.law) == pytest.approx(constants(law), rel=1e-4)
  assert fit.predict(1e11, 2e12).low == pytest.approx(law.loss(1e11, 2e12), rel=1e-5)


@pytest.fixture(scope="module")
def noisy():
  return fit_law(runs_of(EPOCH, noise=0.003), resamples=100)


def test_the_interval_holds_the_law_that_was_drawn_from(noisy):
  for name in ("E", "A", "B", "alpha", "beta"):
    found = noisy.interval(lambda law, name=name: getattr(law, name), level=0.95)
    assert found.low < getattr(EPOCH, name) < found.high
    assert found.low <= found.value <= found.high
  narrow = noisy.interval(lambda law: law.alpha, level=0.5)
  wide = noisy.interval(lambda law: law.alpha, level=0.95)
  assert narrow.high - narrow.low < wide.high - wide.low < 0.2


def test_prediction_of_a_larger_run(noisy):
  loss = noisy.predict(7e9, 1.4e11, level=0.95)
  assert loss.low < EPOCH.loss(7e9, 1.4e11) < loss.high
  # Amid the runs the law is sure, and what is left is the scatter of 0.3 % of single runs.
  width = lambda found: (found.high - found.low) / found.value
  amid = noisy.predict(2e8, 4e9, level=0.95)
  assert width(amid) == pytest.approx(2 * 1.96 * 0.003, rel=0.3)
  assert width(noisy.interval(lambda law: law.loss(2e8, 4e9), level=0.95)) < 0.5 * width(amid)
  params, tokens = noisy.optimum(1e22, level=0.95)
  best = EPOCH.optimum(1e22)
  assert params.low < best.params < params.high
  assert tokens.low < best.tokens < tokens.high
  assert 6 * params.value * tokens.value == pytest.approx(1e22)
  near, far = (noisy.optimum(compute)[0] for compute in (1e19, 1e24))
  assert near.high / near.low < far.high / far.low


def test_outliers_weigh_little():
  """Huber's loss: a diverged run moves a fit by least squares, and hardly this one."""
  runs = runs_of(EPOCH, noise=0.001)
  runs[7] = runs[7]._replace(loss=runs[7].loss * 1.5)
  assert fit_law(runs, resamples=1).law.alpha == pytest.approx(EPOCH.alpha, rel=0.05)


def test_same_seed_same_interval():
  runs = runs_of(EPOCH, noise=0.01, sizes=4, lengths=3)
  first, again, other = (fit_law(runs, resamples=8, seed=seed) for seed in (0, 0, 1))
  assert first == again
  assert first.law == other.law
  assert first.resampled != other.resampled


@settings(max_examples=15, deadline=None)
@given(
  st.floats(0.5, 3),
  st.floats(0.25, 0.6),
  st.floats(0.25, 0.6),
  st.floats(0.1, 2),
  st.floats(0.1, 2),
)
def test_any_law_is_found_again(E, alpha, beta, by_size, by_tokens):
  """Laws of unlike shape, by the part of the loss each term has in the middle of the runs."""
  law = Law(E, by_size * 1.7e8**alpha, by_tokens * 3.5e9**beta, alpha, beta)
  fit = fit_law(runs_of(law, noise=0, sizes=4, lengths=4), resamples=1)
  assert constants(fit.law) == pytest.approx(constants(law), rel=2e-2)
  assert fit.law.loss(1e11, 1e12) == pytest.approx(law.loss(1e11, 1e12), rel=1e-3)


def test_gradient_steps_find_the_minimum():
  """No direction from the fitted constants lowers Huber's sum."""
  data = law_fit._data(runs_of(EPOCH, noise=0.01))
  value_S, x_S5 = law_fit._descend(law_fit._starts(data), data)
  best_5 = x_S5[np.argmin(value_S)]
  steps_S5 = best_5 + 1e-3 * np.random.default_rng(0).normal(size=(200, 5))
  assert law_fit._huber(law_fit._model(steps_S5, data)[0]).min() >= value_S.min() * (1 - 1e-6)
  assert np.sum(value_S < value_S.min() * 1.001) > 3  # not the luck of one start


def test_refusals():
  runs = runs_of(EPOCH, noise=0.001)
  with pytest.raises(ConfigError, match=r"5 runs do not determine .* at least 6"):
    fit_law(runs[:5])
  with pytest.raises(ConfigError, match="2 different sizes of model"):
    fit_law([run._replace(params=1e7 if run.params < 1e8 else 1e9) for run in runs])
  with pytest.raises(ConfigError, match="1 different numbers of tokens"):
    fit_law([run._replace(tokens=1e9) for run in runs])
  with pytest.raises(ConfigError, match="must be positive"):
    fit_law([runs[0]._replace(loss=float("nan")), *runs[1:]])
  with pytest.raises(ConfigError, match="how the loss falls with the number of"):
    fit_law([run._replace(loss=3 + 1e-9 * i) for i, run in enumerate(runs)])


# Run directories


LAYER = LayerSpec(AttentionSpec(2, 8), MlpSpec(32))
MOE = LayerSpec(AttentionSpec(2, 8), MoeSpec(4, MlpSpec(32)))


def config_of(*layers, steps=100, **data) -> Config:
  model = ModelSpec(64, 16, (Segment(layers or (LAYER,)),), max_length=32)
  return Config(
    "small", model, data=DataConfig(row_length=32, batch_size=4, **data),
    train=TrainConfig(steps=steps),
  )  # fmt: skip


def write_run(folder, config, *losses: tuple[int, float | None]):
  folder.mkdir()
  write_config(folder, config)
  writer = MetricsWriter(folder)
  writer.write(1, {"loss": 9.0})
  for step, loss in losses:
    writer.write(step, {"heldout_loss": loss})
  writer.close()
  return folder


def test_runs_are_read(tmp_path):
  dense = write_run(tmp_path / "dense", config_of(), (50, 5.0), (100, 4.0))
  sparse = write_run(tmp_path / "sparse", config_of(MOE, steps=200), (200, 3.5))
  first, second = read_runs([dense, sparse])
  assert first == Run(str(dense), count_params(config_of().model).total, 100 * 4 * 32, 4.0)
  counts = count_params(config_of(MOE).model)
  assert second == Run(str(sparse), counts.active, 200 * 4 * 32, 3.5)
  assert counts.active < counts.total


def test_tokens_follow_what_resumes_changed(tmp_path):
  """2 rows a step up to step 30, 8 up to 60, 4 since."""
  folder = write_run(tmp_path / "run", config_of(), (100, 4.0))
  change = lambda old, new: [Change("data.batch_size", old, new, "intervention")]
  record_changes(folder, 30, "faster", change(2, 8))
  record_changes(folder, 60, "slower", change(8, 4))
  (run,) = read_runs([folder])
  assert run.tokens == 32 * (30 * 2 + 30 * 8 + 40 * 4)


def test_runs_that_can_not_be_used(tmp_path):
  with pytest.raises(ConfigError, match=r"nothing is not a run directory: it has no config\.json"):
    read_runs([tmp_path / "nothing"])
  with pytest.raises(ConfigError, match="no held-out loss"):
    read_runs([write_run(tmp_path / "begun", config_of())])
  with pytest.raises(ConfigError, match="at step 50 of 100: let it finish"):
    read_runs([write_run(tmp_path / "half", config_of(), (50, 4.0))])
  with pytest.raises(ConfigError, match="diverged"):
    read_runs([write_run(tmp_path / "lost", config_of(), (100, float("nan")))])
  one = write_run(tmp_path / "one", config_of(), (100, 4.0))
  two = write_run(tmp_path / "two", config_of(holdout=0.1), (100, 4.0))
  with pytest.raises(ConfigError, match=r"not comparable: data\.holdout is 0\.05 and 0\.1"):
    read_runs([one, two])
  part = replace(config_of(), eval=EvalConfig(batches=3))
  with pytest.raises(ConfigError, match=r"eval\.batches is None and 3"):
    read_runs([one, write_run(tmp_path / "part", part, (100, 4.0))])
  (one / "interventions.jsonl").write_text(json.dumps({"step": 3})[:5])
  with pytest.raises(ConfigError, match=r"interventions\.jsonl is damaged"):
    read_runs([one])
