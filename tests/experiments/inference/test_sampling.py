"""Decoding with a cache is the full forward pass, token by token; and which tokens may be drawn."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.inference import sampling
from experiments.inference.sampling import Draw, generate, sample_token
from layers.spec import (
  AlibiSpec,
  AttentionSpec,
  BucketedSpec,
  EmbeddingSpec,
  LayerSpec,
  LearnedPositionSpec,
  LinearAttentionSpec,
  MlpSpec,
  ModelSpec,
  MoeSpec,
  RotarySpec,
  Segment,
)
from layers.transformer import TransformerLM
from tests.experiments.programs import random_params

V, CONTEXT, REAL_IDS = 40, 50, 37  # a context that is no power of two; three ids are padding
DENSE = MlpSpec(hidden=16)


def layer(position, mlp=DENSE, **attention):
  return LayerSpec(AttentionSpec(num_heads=2, head_dim=8, position=position, **attention), mlp)


def spec(*layers, table=None, repeats=1):
  return ModelSpec(
    vocab_size=V,
    embed_dim=16,
    max_length=CONTEXT,
    segments=(Segment(layers, repeats),),
    embedding=EmbeddingSpec(position=table),
  )


def experts(count, **settings):
  return MoeSpec(count, DENSE, eval_capacity_factor=float(count), **settings)  # drops nothing


SPECS = {
  "rotary, grouped heads, experts": spec(
    layer(RotarySpec(), experts(4), num_kv_heads=1), repeats=2
  ),
  "learned positions, alibi, window": spec(
    layer(None), layer(AlibiSpec(), window=6), table=LearnedPositionSpec(CONTEXT, offset=2)
  ),
  "buckets, routing groups": spec(layer(BucketedSpec(8, 20), experts(2, group_size=12)), repeats=2),
  "states beside a cache": spec(
    LayerSpec(LinearAttentionSpec("elu", 2, 8), DENSE),
    LayerSpec(LinearAttentionSpec("delta", 2, 8, conv=4), DENSE),
    layer(RotarySpec()),
  ),
}
FIRST, SECOND, *_ = SPECS


@cache
def model_of(name):
  model = TransformerLM(SPECS[name], unroll=1)
  return model, random_params(
    model, scale=0.7, seed=4
  )  # so much that the context decides, not one token


def run(name, prompts, count, draw=None, **arguments):
  model, params = model_of(name)
  draw = Draw(REAL_IDS, temperature=0) if draw is None else draw
  chunks = generate(model, params, prompts, num_tokens=count, draw=draw, **arguments)
  return np.concatenate(list(chunks), axis=1)


@cache
def forward_of(name):
  model, params = model_of(name)
  return jax.jit(lambda tokens_BT, segments_BT: model.apply(
    {"params": params}, tokens_BT, segments_BT=segments_BT).logits_BTV)  # fmt: skip


def by_full_forward(name, prompt, count):
  """The likeliest token after a whole forward pass over all before it, again and again."""
  forward = forward_of(name)
  tokens = list(prompt)
  for _ in range(count):
    row_BT = np.zeros((1, 48), np.int32)
    row_BT[0, : len(tokens)] = tokens
    logits_BTV = forward(row_BT, (np.arange(48)[None] < len(tokens)).astype(np.int32))
    tokens.append(int(np.argmax(logits_BTV[0, len(tokens) - 1, :REAL_IDS])))
  return tokens[len(prompt) :]


@pytest.mark.parametrize("name", SPECS)
def test_cache_gives_what_full_passes_give(name):
  prompt = [5, 9, 31, 2, 7]
  found = run(name, [prompt], 20, stride=8)
  assert found.shape == (1, 20) and found.dtype == np.int32
  assert found[0].tolist() == by_full_forward(name, prompt, 20)
  other = run(name, [[8, 1, 0, 3, 7]], 20, stride=8)
  assert found.tolist() != other.tolist()  # more than the last token decides


def test_prompts_of_unlike_lengths_do_not_disturb_each_other():
  prompts = [[1], [5, 9, 31, 2, 7], list(range(12))]
  together = run(FIRST, prompts, 20, stride=8)
  for row, prompt in zip(together, prompts, strict=True):
    assert row.tolist() == run(FIRST, [prompt], 20, stride=8)[0].tolist()


def test_context_can_be_filled_to_the_last_token():
  prompt = list(range(33))  # padded to 64, beyond the 50 of the context
  found = run(SECOND, [prompt], CONTEXT - 33)
  assert found[0, :15].tolist() == by_full_forward(SECOND, prompt, 15)
  with pytest.raises(ValueError, match="33 \\+ 18 tokens do not fit the context of 50"):
    run(SECOND, [prompt], CONTEXT - 33 + 1)


@pytest.mark.parametrize("prompts", ([], [[]], [[1], []]))
def test_no_prompt_is_refused(prompts):
  with pytest.raises(ValueError, match="at least one token"):
    run(SECOND, prompts, 1)


def test_chunks_have_the_stride_and_the_number_of_tokens():
  model, params = model_of(FIRST)
  prompts, draw = [[1], [2], [3]], Draw(REAL_IDS, temperature=0)
  chunks = generate(model, params, prompts, num_tokens=20, draw=draw, stride=8)
  assert [chunk.shape for chunk in chunks] == [(3, 8), (3, 8), (3, 4)]


LOGITS = np.log(np.array([[0.1, 0.2, 0.3, 0.05, 0.35], [0.5, 0.1, 0.1, 0.2, 0.1]], np.float32))


def draws(count=4000, **settings):
  """Frequencies [B, V] of drawn tokens."""
  settings = {"temperature": 1.0, "top_k": 0, "vocab_size": 5} | settings
  keys = jax.random.split(jax.random.key(0), count)
  tokens_NB = jax.vmap(lambda key: sample_token(jnp.asarray(LOGITS), key, **settings))(keys)
  return np.stack([np.bincount(column, minlength=5) / count for column in tokens_NB.T])


def expected(temperature=1.0, kept=range(5)):
  p = np.zeros(LOGITS.shape)
  p[:, list(kept)] = np.exp(LOGITS[:, list(kept)] / temperature)
  return p / p.sum(axis=1, keepdims=True)


def test_temperature_scales_the_odds():
  np.testing.assert_allclose(draws(), expected(), atol=0.03)
  np.testing.assert_allclose(draws(temperature=0.5), expected(0.5), atol=0.03)


def test_padding_ids_are_never_drawn():
  np.testing.assert_allclose(draws(vocab_size=4), expected(kept=range(4)), atol=0.03)
  hot = draws(vocab_size=2, temperature=100.0)
  assert hot[:, 2:].sum() == 0 and hot[:, :2].min() > 0.4
  greedy = sample_token(
    jnp.asarray(LOGITS), jax.random.key(0), temperature=0, top_k=0, vocab_size=4
  )
  assert greedy.tolist() == [2, 0]  # without padding the first would be 4


def test_top_k_keeps_the_likeliest():
  found = draws(top_k=2)
  for row, likeliest in zip(found, ([2, 4], [0, 3]), strict=True):
    p = np.exp(LOGITS[0 if 2 in likeliest else 1])[likeliest]
    np.testing.assert_allclose(row[likeliest], p / p.sum(), atol=0.03)
    assert row.sum() == pytest.approx(row[likeliest].sum())
  np.testing.assert_array_equal(draws(top_k=99), draws())
  padded = draws(top_k=2, vocab_size=4)  # the best two of the real ids
  assert padded[0, [1, 2]].sum() == pytest.approx(1)


def test_padding_ids_stay_out_of_a_generated_text():
  found = run(FIRST, [[1]], 20, draw=Draw(REAL_IDS, temperature=50.0), stride=8)
  assert found.max() < REAL_IDS and len(set(found[0].tolist())) > 8


def test_widths_divide_into_routing_groups():
  for group, longest, width in ((None, 5, 16), (12, 17, 36), (64, 17, 32), (24, 100, 144)):
    mlp = MoeSpec(num_experts=2, expert=DENSE, group_size=group)
    found = sampling._prompt_width(spec(layer(None, mlp)), longest)
    assert found == width and found >= longest
    assert group is None or found < group or found % group == 0
