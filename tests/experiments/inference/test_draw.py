"""Which tokens may be drawn, and how often: `transformers`, numpy and the chi-square law say so."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.inference.draw import Draw, draw_token, problem_with, scores, split

parity = pytest.mark.skipif(
  not (importlib.util.find_spec("transformers") and importlib.util.find_spec("torch")),
  reason="needs the extra parity",
)
V = 50
B = 4
SEEN = [[3, 3, 7, 49], [0, 1, 2, 3], [5, 5, 5, 5], [40, 41, 42, 43]]
SETTINGS = [
  {"temperature": 1.0},
  {"temperature": 0.3},
  {"temperature": 1.0, "top_k": 7},
  {"temperature": 1.0, "top_k": 49},
  {"temperature": 1.0, "top_p": 0.6},
  {"temperature": 2.5, "top_p": 0.05},
  {"temperature": 1.0, "top_p": 0.999},
  {"temperature": 1.0, "min_p": 0.2},
  {"temperature": 0.7, "min_p": 1.0},
  {"temperature": 1.0, "repetition_penalty": 1.3},
  {"temperature": 1.0, "repetition_penalty": 0.5},
  {"temperature": 0.8, "top_k": 20, "top_p": 0.7, "min_p": 0.1, "repetition_penalty": 1.7},
]
jitted = jax.jit(scores, static_argnames="uses")


def logits(seed=0, scale=3.0):
  return (scale * np.random.default_rng(seed).standard_normal((B, V))).astype(np.float32)


def seen_tokens():
  seen_BV = np.zeros((B, V), bool)
  for row, tokens in zip(seen_BV, SEEN, strict=True):
    row[tokens] = True
  return seen_BV


def ours(x_BV, vocab_size=V, **settings):
  uses, numbers = split(Draw(vocab_size, **settings))
  return np.asarray(jitted(x_BV, uses=uses, numbers=numbers, seen_BV=seen_tokens()))


def by_sorting(x_V, seen, temperature, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
  """One row in float64, token by token from the likeliest down."""
  x_V = x_V.astype(np.float64)
  for i in set(seen):
    x_V[i] = x_V[i] * repetition_penalty if x_V[i] < 0 else x_V[i] / repetition_penalty
  x_V /= temperature
  order = np.argsort(-x_V)
  if top_k:
    order = order[:top_k]
  p = np.exp(x_V[order] - x_V[order[0]])
  p /= p.sum()
  if top_p < 1:
    order = [i for n, i in enumerate(order) if p[:n].sum() < top_p]
  order = [i for i in order if math.exp(x_V[i] - x_V[order[0]]) >= min_p]
  kept_V = np.full(V, -np.inf)
  kept_V[order] = x_V[order]
  return kept_V


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_scores_are_those_of_the_definitions(settings):
  x_BV = logits()
  expected = [by_sorting(x_V, seen, **settings) for x_V, seen in zip(x_BV, SEEN, strict=True)]
  np.testing.assert_allclose(ours(x_BV, **settings), expected, rtol=1e-5)


@parity
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_scores_are_those_of_transformers(settings):
  """Of the processors that it makes itself, in its own order."""
  import torch
  import transformers

  config = transformers.GenerationConfig(do_sample=True, **({"top_k": 0} | settings))
  host = transformers.GenerationMixin()
  host.config = transformers.PretrainedConfig()
  chain = host._get_logits_processor(config, 1, None, None, None, device="cpu", model_kwargs={})
  for seed in range(3):
    x_BV = logits(seed)
    expected = chain(torch.tensor(SEEN), torch.tensor(x_BV, dtype=torch.float64))
    np.testing.assert_allclose(ours(x_BV, **settings), expected.numpy(), rtol=1e-5)


def test_what_is_as_likely_as_the_last_stays():
  x_BV = np.tile(np.array([2.0, 1.0, 1.0, 0.0, -1.0], np.float32), (B, V // 5))
  kept = lambda **settings: np.isfinite(ours(x_BV, temperature=1.0, **settings))[0].sum()
  assert kept(top_k=3) == 10 and kept(top_k=10) == 10  # ten tokens share the first place
  assert kept(top_k=11) == 30
  assert kept(top_p=0.5) == 10 and kept(top_p=0.9) == 30


def test_padding_ids_are_never_drawn_and_never_counted():
  x_BV = logits()
  x_BV[:, 40:] = 100.0
  assert np.isneginf(ours(x_BV, vocab_size=40, temperature=1.0, top_p=0.9)[:, 40:]).all()
  settings = {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.01}
  alone = [by_sorting(np.where(np.arange(V) < 40, x_V, -1e9), [], **settings) for x_V in x_BV]
  np.testing.assert_allclose(ours(x_BV, vocab_size=40, **settings), alone, rtol=1e-5)
  assert ours(x_BV, vocab_size=40, temperature=0).argmax(-1).max() < 40


CHI_SQUARE_999 = {6: 22.46, 49: 85.35}  # 99.9 % of the law with so many degrees of freedom


@pytest.mark.parametrize(
  ("settings", "freedom"), [({"temperature": 2.0}, 49), ({"temperature": 1.0, "top_k": 7}, 6)]
)
def test_draws_follow_the_odds(settings, freedom):
  count, x_BV = 20_000, logits(scale=1.0)[:1]
  uses, numbers = split(Draw(V, **settings))
  draw = jax.jit(lambda x_BV, keys: draw_token(x_BV, keys, uses, numbers))
  drawn = draw(jnp.tile(x_BV, (count, 1)), jax.random.split(jax.random.key(1), count))
  expected = np.exp(by_sorting(x_BV[0], [], **settings))
  expected *= count / expected.sum()
  found = np.bincount(np.asarray(drawn), minlength=V)
  there = expected > 0
  assert found[~there].sum() == 0 and there.sum() == freedom + 1
  statistic = ((found - expected)[there] ** 2 / expected[there]).sum()
  assert statistic < CHI_SQUARE_999[freedom]


def test_greedy_takes_the_likeliest_after_the_penalty():
  x_BV = logits()
  x_BV[:, 10], x_BV[0, 3] = 20.0, 21.0
  uses, numbers = split(Draw(V, temperature=0, top_k=3, repetition_penalty=1.5))
  assert not (uses.random or uses.top_k)
  keys = jax.random.split(jax.random.key(0), B)
  drawn = draw_token(x_BV, keys, uses, numbers, seen_tokens())
  assert drawn.tolist() == [10] * B and x_BV[0].argmax() == 3


def test_other_numbers_are_no_other_program():
  one, _ = split(Draw(V, 0.5, 3, 0.5, 0.1, 1.2))
  other, _ = split(Draw(V, 0.9, 30, 0.9, 0.3, 0.7))
  assert one == other
  assert split(Draw(V, 0.5))[0] != one


@pytest.mark.parametrize(
  "settings",
  [
    {"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1},
    {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": math.nan}, {"min_p": -0.1}, {"min_p": math.nan},
    {"repetition_penalty": 0.0}, {"repetition_penalty": math.inf},
  ],
  ids=str,
)  # fmt: skip
def test_numbers_that_mean_nothing_are_named(settings):
  (name,) = settings
  assert problem_with(Draw(V, **settings)).startswith(f"{name}={settings[name]}: give ")
  with pytest.raises(ValueError, match=name):
    split(Draw(V, **settings))
