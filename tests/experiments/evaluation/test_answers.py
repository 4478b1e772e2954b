"""Log-likelihoods and answers against float64 numpy, on one device and on eight."""

import functools

import jax
import numpy as np
import pytest

from experiments.config import Config, ConfigError, DataConfig, MeshConfig
from experiments.evaluation.answers import Answers
from experiments.evaluation.scoring import Scorer
from experiments.evaluation.subject import Subject
from experiments.training.setup import build
from layers.spec import (
  AttentionSpec,
  HeadSpec,
  LayerSpec,
  MlpSpec,
  ModelSpec,
  MoeSpec,
  RotarySpec,
  Segment,
)
from mesh.constrain import use_mesh
from tests.layers.stacks import random_params
from tests.oracles import decoder

pytestmark = pytest.mark.xdist_group("answers")

CONTEXT, EOD, IDS, V = 32, 256, 257, 264
MESHES = {"one": {"data": 1}, "eight": {"fsdp": 2, "expert": 2, "tensor": 2}}


def spec(dispatch="capacity", router="top_k"):
  """A window, experts with too few slots in capacity mode, and a table with ids of no token."""
  attention = lambda window: AttentionSpec(
    num_heads=2, num_kv_heads=2, head_dim=8, position=RotarySpec(), window=window
  )
  expert = MlpSpec(hidden=12)
  moe = MoeSpec(4, expert, 2, router=router, dispatch=dispatch, eval_capacity_factor=0.25,
                min_capacity=1, noncausal=router == "expert_choice")  # fmt: skip
  layers = (LayerSpec(attention(5), MlpSpec(hidden=24)), LayerSpec(attention(None), moe))
  return ModelSpec(V, 16, (Segment(layers),), CONTEXT, head=HeadSpec(bias=True))


class Latin:
  """A byte a letter, so that all that is drawn is text."""

  eod, vocab_size = EOD, IDS

  def encode(self, text):
    return np.frombuffer(text.encode("latin-1"), np.uint8).astype(np.int32)

  def decode(self, ids):
    return bytes(i for i in ids if i < EOD).decode("latin-1")


@pytest.fixture(scope="module")
def weights():
  """Far from uniform; ids that are no token are likelier than any that is."""
  params = random_params(spec())
  params["head_bias"][IDS:], params["head_bias"][EOD] = 4.0, -9.0
  return params


def config(mesh, model=None):
  return Config(name="tiny", model=model or spec(), data=DataConfig(row_length=16, batch_size=8),
                mesh=MeshConfig(**MESHES[mesh]))  # fmt: skip


@functools.cache
def setup_on(mesh):
  return build(config(mesh), jax.devices()[: 8 if mesh == "eight" else 1], batch=False)


def subject(mesh, weights, **changes):
  setup = setup_on(mesh)
  params = jax.tree.map(
    lambda x, a: jax.device_put(np.asarray(x), a.sharding), weights, setup.abstract.params
  )
  found = Subject(setup, params, Latin(), frozenset([EOD]), None, EOD)
  return found._replace(**changes)


@pytest.fixture(params=MESHES)
def asked(request, weights):
  found = subject(request.param, weights)
  with use_mesh(found.setup.mesh, found.setup.rules):
    yield Answers(found)


class Oracle:
  """The same model, dropless, in float64."""

  def __init__(self, weights):
    self.weights = jax.tree.map(np.asarray, weights)

  def logits(self, ids):
    return decoder.logits(spec("dropless"), self.weights, np.array([ids]))[0]

  def score(self, ids, count):
    logits, targets = self.logits(ids[:-1])[-count:], np.array(ids[-count:])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    likeliest = logits[:, :IDS].argmax(-1)
    return log_p[np.arange(count), targets].sum(), bool((likeliest == targets).all())

  def greedy(self, text, count):
    ids = list(text.encode("latin-1"))
    for _ in range(count):
      ids.append(int(self.logits(ids)[-1, :IDS].argmax()))
    return bytes(ids[len(text) :]).decode("latin-1")


@pytest.fixture(scope="module")
def oracle(weights):
  return Oracle(weights)


def test_log_likelihoods(asked, oracle):
  """Of unlike lengths, with the same context, without one, and longer than the model's context."""
  likely = oracle.greedy("The cat", 3)
  long = "long " * 8 + "er"
  pairs = [("The cat", " sat"), ("The cat", likely), ("", "abc"), ("No context of its", "x" * 9),
           ("The cat", likely[:2]), ("a", "b"), (long, "tail"), ("The cat", "?")]  # fmt: skip
  found = asked.log_likelihoods(pairs)
  ids = [list((a + b).encode("latin-1"))[-CONTEXT - 1 :] for a, b in pairs]
  ids[2] = [EOD, *b"abc"]
  expected = [oracle.score(i, len(b)) for i, (_, b) in zip(ids, pairs, strict=True)]
  np.testing.assert_allclose([s[0] for s in found], [s[0] for s in expected], atol=2e-4)
  assert [s[1] for s in found] == [s[1] for s in expected]
  assert [s[1] for s in found].count(True) >= 2
  assert (asked.cut_requests, asked.cut_tokens) == (1, 42 + 4 - 33)


def test_rolling(asked, oracle):
  """By the rule that each token is predicted once, from as many as the context holds."""
  texts = ["short", "", "a text of more than six windows of the context: " + "xyz" * 50]
  expected = []
  for text in texts:
    line, total = [EOD, *text.encode("latin-1")], 0.0
    n = len(line) - 1
    for start in range(0, n, CONTEXT):
      stop = min(start + CONTEXT, n)
      total += oracle.score(line[max(0, stop - CONTEXT) : stop + 1], stop - start)[0]
    expected.append(total)
  np.testing.assert_allclose(asked.rolling(texts), expected, atol=5e-4)
  assert expected[1] == 0 and asked.cut_requests == 0


@pytest.mark.parametrize("asked", ["one", pytest.param("eight", marks=pytest.mark.full)],
                         indirect=True)  # fmt: skip
def test_answers_end_where_they_should(asked, oracle):
  whole = {text: oracle.greedy(text, 8) for text in ("The cat", "x", "Water")}
  stop = whole["The cat"][4]
  until = lambda text: whole[text].partition(stop)[0]
  plain, stopped = {"max_gen_toks": 8}, {"until": [stop, "none of it"], "max_gen_toks": 8}
  requests = [(t, plain) for t in whole] + [(t, stopped) for t in whole]
  assert asked.generate_until(requests) == [*whole.values(), *map(until, whole)]
  assert len(until("The cat")) <= 4


def test_an_answer_ends_with_its_token(weights, oracle):
  text = oracle.greedy("The cat", 8)
  found = subject("one", weights, stops=frozenset([ord(text[3])]))
  with use_mesh(found.setup.mesh, found.setup.rules):
    answers = Answers(found).generate_until([("The cat", {"max_gen_toks": 8})] * 3)
  assert answers == [text[: text.index(text[3])]] * 3


def test_long_prompts_of_answers_lose_their_beginning(weights, oracle):
  found = subject("one", weights)
  with use_mesh(found.setup.mesh, found.setup.rules):
    answers = Answers(found)
    text = "word " * 9
    found = answers.generate_until([(t, {"max_gen_toks": 24}) for t in ("x", text, "x")])
  assert found == [oracle.greedy(t, 24) for t in ("x", text[-8:], "x")]
  assert (answers.cut_requests, answers.cut_tokens) == (1, 37)


@pytest.mark.parametrize(("settings", "why"), [
  ({"max_gen_toks": 32}, "asks for answers of 32 tokens, but the model's context is 32"),
  ({"do_sample": True, "max_gen_toks": 8, "temperature": -1}, "temperature=-1"),
  ({"do_sample": True, "max_gen_toks": 8, "typical_p": 0.5}, "have typical_p; known are until"),
])  # fmt: skip
def test_settings_that_mean_nothing(weights, settings, why):
  with pytest.raises(ConfigError, match=why):
    Answers(subject("one", weights)).generate_until([("a", settings)])


def test_what_can_not_be_asked(weights):
  found = subject("one", weights)
  with pytest.raises(ConfigError, match="continuation of 33 tokens is longer than the model's con"):
    Answers(found).log_likelihoods([("a", "b" * 33)])
  noncausal = build(config("one", spec(router="expert_choice")), jax.devices()[:1], batch=False)
  with pytest.raises(ConfigError, match="tiny reads later tokens"):
    Answers(found._replace(setup=noncausal))


def test_shapes_are_few(weights):
  """Widths are powers of two, and three quarters of large ones; rows as many as devices share."""
  for mesh, shards in (("one", 1), ("eight", 4)):
    scorer = Scorer(subject(mesh, weights).setup, None, IDS)
    assert [scorer.width(n) for n in (0, 1, 16, 17, 300, 385, 1000)] == [16, 16, 16, 32, 384, 512,
                                                                         1024]  # fmt: skip
    assert [scorer.rows(16, n) for n in (1, 5, 50)] == ([1, 5, 8] if shards == 1 else [4, 8, 8])
    assert scorer.rows(1 << 19, 50) == shards  # logits of more rows would be too many
