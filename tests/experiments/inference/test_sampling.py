"""Decoding with a cache is the full forward pass, token by token, whatever the rows beside it."""

from functools import cache

import jax
import numpy as np
import pytest

from experiments.inference import sampling
from experiments.inference.draw import Draw
from experiments.inference.sampling import Decoder, dropless, generate
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
# Those whose caches differ most; the slow twins run the others.
SOME = [
  name if name in (FIRST, "states beside a cache") else pytest.param(name, marks=pytest.mark.full)
  for name in SPECS
]


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
  assert [chunk.shape for chunk in chunks] == [(3, 1), (3, 8), (3, 8), (3, 3)]


def test_padding_ids_stay_out_of_a_generated_text():
  found = run(FIRST, [[1]], 20, draw=Draw(REAL_IDS, temperature=50.0), stride=8)
  assert found.max() < REAL_IDS and len(set(found[0].tolist())) > 8


PROMPT = [5, 9, 31, 2, 7, 11, 0, 36, 8, 14, 22, 3, 1, 30, 4, 17, 6, 25, 12]  # 19 tokens


# One shape of decoder for most tests, and that of `run` where it has one row: few programs.
SHAPE = {"length": 44, "width": 16, "stride": 8}


def decoder_of(name, batch=1, **settings):
  model, params = model_of(name)
  defaults = {"draw": Draw(REAL_IDS, temperature=0), **SHAPE}
  return Decoder(model, params, batch=batch, **defaults | settings)


def drawn(decoder, rows, count, **arguments):
  """(tokens, log-probabilities) of `count` tokens a row."""
  chunks = [decoder.feed(rows, **arguments)]
  while (left := count - sum(c.tokens_BN.shape[1] for c in chunks)) > 0:
    chunks.append(decoder.step(left))
  return tuple(np.concatenate(parts, axis=1) for parts in zip(*chunks, strict=True))


def log_probabilities(name, row, count):
  """Of the last `count` tokens of a row, by a full pass."""
  row_BT = np.zeros((1, 48), np.int32)
  row_BT[0, : len(row)] = row
  segments_BT = (np.arange(48)[None] < len(row)).astype(np.int32)
  log_p_TV = np.array(jax.nn.log_softmax(forward_of(name)(row_BT, segments_BT)[0]))
  at = np.arange(len(row) - count - 1, len(row) - 1)
  return log_p_TV[at, row[len(row) - count :]]


@pytest.mark.parametrize("name", SOME)
def test_prompts_go_in_by_pieces(name):
  """Of unlike lengths, one or two pieces; tokens and log-probabilities are those of full passes."""
  rows = [PROMPT, PROMPT[:3], PROMPT[:16]]
  found, logprobs = drawn(decoder_of(name, batch=3), rows, 6)
  for b, (tokens, row) in enumerate(zip(found.tolist(), rows, strict=True)):
    assert tokens == by_full_forward(name, row, 6)
    expected = log_probabilities(name, row + tokens, 6)
    np.testing.assert_allclose(logprobs[b], expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", SOME)
def test_a_longer_row_runs_only_what_is_new(name):
  decoder = decoder_of(name)
  said, _ = drawn(decoder, [PROMPT[:8]], 5)
  longer = [*PROMPT[:8], *said[0].tolist(), *PROMPT]
  found, _ = drawn(decoder, [longer], 4)
  assert decoder.reused == 12  # all but the last token drawn, which was not run yet
  assert found[0].tolist() == by_full_forward(name, longer, 4)
  other = [*longer[:6], 33, *PROMPT[:9]]  # parts with what the caches hold at the seventh token
  found, _ = drawn(decoder, [other], 4)
  assert decoder.reused == (6 if name == FIRST or "buckets" in name else 0)
  assert found[0].tolist() == by_full_forward(name, other, 4)


ALL_USES = Draw(REAL_IDS, 1.5, top_k=30, top_p=0.95, min_p=0.01, repetition_penalty=1.1)


def test_draws_depend_on_seed_and_row_alone():
  """Not on the length of runs, the rows beside it, or where a batch begins."""
  rows = [PROMPT, PROMPT[:3], PROMPT[:16]]
  together, logprobs = drawn(decoder_of(FIRST, batch=3, draw=ALL_USES, seed=7), rows, 12)
  assert len({tuple(tokens) for tokens in together.tolist()}) == 3
  alone = decoder_of(FIRST, draw=ALL_USES, seed=7)
  for i, row in enumerate(rows):
    assert drawn(alone, [row], 12, first=i)[0].tolist() == together[i : i + 1].tolist()
  expected = log_probabilities(FIRST, PROMPT + together[0].tolist(), 12)
  np.testing.assert_allclose(logprobs[0], expected, rtol=2e-4, atol=2e-4)  # of the plain logits
  single = [alone.feed([PROMPT]), *(alone.step(1) for _ in range(5))]
  assert [int(c.tokens_BN[0, 0]) for c in single] == together[0, :6].tolist()
  same, _ = drawn(decoder_of(FIRST, batch=3, draw=ALL_USES, seed=7), [PROMPT] * 3, 12)
  assert len({tuple(tokens) for tokens in same.tolist()}) == 3  # equal prompts, other draws
  other_seed, _ = drawn(decoder_of(FIRST, draw=ALL_USES, seed=8), [PROMPT], 12)
  assert other_seed.tolist() != together[:1].tolist()


def test_other_numbers_and_seeds_compile_nothing():
  drawn(decoder_of(FIRST, draw=ALL_USES), [PROMPT], 6)
  before = sampling._prefill._cache_size(), sampling._decode._cache_size()
  other = Draw(REAL_IDS, 0.5, top_k=3, top_p=0.5, min_p=0.3, repetition_penalty=2.0)
  drawn(decoder_of(FIRST, draw=other, seed=5), [PROMPT[:9]], 5)
  assert (sampling._prefill._cache_size(), sampling._decode._cache_size()) == before


def test_a_row_ends_at_its_token_and_the_run_with_the_last():
  rows = [PROMPT, PROMPT[:3], PROMPT[:16]]
  free, _ = drawn(decoder_of(FIRST, batch=3), rows, 9)
  end = int(free[0, 3])
  until = [row.index(end) + 1 if end in row else 9 for row in free.tolist()]
  found, _ = drawn(decoder_of(FIRST, batch=3, ends=[end]), rows, max(until))
  for tokens, row, count in zip(found.tolist(), free.tolist(), until, strict=True):
    assert tokens == row[:count] + [row[count - 1]] * (max(until) - count)
  alone = decoder_of(FIRST, ends=[end])
  alone.feed([PROMPT])
  assert alone.step().tokens_BN.shape[1] == until[0] - 1  # none is computed after the end


def test_a_row_ends_where_its_length_is_full():
  rows = [PROMPT, PROMPT[:3], PROMPT[:16]]
  found, _ = drawn(decoder_of(FIRST, batch=3, length=22), rows, 9)
  assert found[0, :3].tolist() == by_full_forward(FIRST, PROMPT, 3)
  assert set(found[0, 2:].tolist()) == {int(found[0, 2])}  # the row holds 22 tokens
  assert found[1].tolist() == by_full_forward(FIRST, PROMPT[:3], 9)


def test_the_repetition_penalty_sees_prompt_and_answer():
  penalty = 1e6  # far more than any difference between logits: no token comes twice
  draw = Draw(REAL_IDS, temperature=0, repetition_penalty=penalty)
  tokens, _ = drawn(decoder_of(FIRST, draw=draw), [PROMPT], 12)
  row, forward = list(PROMPT), forward_of(FIRST)
  for token in tokens[0].tolist():
    row_BT = np.zeros((1, 48), np.int32)
    row_BT[0, : len(row)] = row
    x_V = np.array(
      forward(row_BT, (np.arange(48)[None] < len(row)).astype(np.int32))[0, len(row) - 1]
    )
    seen = sorted(set(row))
    x_V[seen] = np.where(x_V[seen] < 0, x_V[seen] * penalty, x_V[seen] / penalty)
    assert token == x_V[:REAL_IDS].argmax()
    row.append(token)
  assert tokens[0].tolist() != by_full_forward(FIRST, PROMPT, 12)


@pytest.mark.parametrize("router", ["switch", "no_token_left_behind"])
def test_experts_short_of_slots_drop_nothing_of_a_text(router):
  """A capacity for a fraction of the tokens: prompt and answer are those of a model without."""
  few = {"dispatch": "capacity", "eval_capacity_factor": 0.1, "min_capacity": 1, "router": router}
  limited = spec(layer(RotarySpec(), MoeSpec(2, DENSE, group_size=16, **few)), repeats=2)
  if router == "switch":
    free = spec(layer(RotarySpec(), MoeSpec(2, DENSE)), repeats=2)
  else:  # slots for all of a row
    every = few | {"eval_capacity_factor": 2.0}
    free = spec(layer(RotarySpec(), MoeSpec(2, DENSE, **every)), repeats=2)
  model, unlimited = TransformerLM(limited, unroll=1), TransformerLM(free, unroll=1)
  params = random_params(model, scale=0.7, seed=5)
  decoder = Decoder(model, params, batch=1, draw=Draw(REAL_IDS, temperature=0), **SHAPE)
  tokens, logprobs = drawn(decoder, [PROMPT], 13)
  whole = np.array([[*PROMPT, *tokens[0].tolist()]], np.int32)  # 32: two routing groups
  at = np.arange(len(PROMPT) - 1, whole.shape[1] - 1)
  of = lambda model: jax.nn.log_softmax(model.apply({"params": params}, whole).logits_BTV[0])
  np.testing.assert_allclose(logprobs[0], of(unlimited)[at, tokens[0]], rtol=2e-4, atol=2e-4)
  assert np.abs(logprobs[0] - of(model)[at, tokens[0]]).max() > 0.01  # which drops tokens
  dropped = model.apply({"params": params}, whole).stats[0].dropped
  assert float(dropped.sum()) > 0


def test_only_experts_change_for_decoding():
  plain = SPECS["states beside a cache"]
  assert dropless(plain) == plain


def test_misuse_is_refused():
  decoder = decoder_of(FIRST)
  with pytest.raises(ValueError, match="no prompt was fed"):
    decoder.step()
  with pytest.raises(ValueError, match="1 rows of at least one token"):
    decoder.feed([[1], [2]])
  with pytest.raises(ValueError, match="44 tokens and one more do not fit a length of 44"):
    decoder.feed([[1] * 44])
