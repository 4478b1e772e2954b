"""Configs of models that nobody released, against their papers in float64.

The shipped ModelSpec is made small in its sizes alone. What it computes then must be what the
paper's own function does, which knows nothing of ModelSpecs.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli
from experiments.configs import chinchilla, gopher, gpt3, mt_nlg, palm
from layers.params import init_params
from layers.spec import NormSpec, RotarySpec, Segment
from layers.transformer import TransformerLM
from tests.layers.stacks import quick_jit, random_params
from tests.oracles import unreleased

N, D, T, V, BAND, REPEATS = 3, 24, 12, 29, 3, 2
# Size of a head: N * H is D in the GPTs, and another number where the paper allows it.
HEADS = {"gpt3": 8, "mt_nlg": 8, "gopher": 6, "chinchilla": 6, "palm": 6}
SIZES = {
  "gpt3": gpt3.SIZES, "gopher": gopher.SIZES, "chinchilla": chinchilla.SIZES, "palm": palm.SIZES,
  "mt_nlg": mt_nlg.SIZES,
}  # fmt: skip


def shrunk(family, size=None, *, width=D, vocab=V):
  """The config's model of `size` (None: the largest) with other sizes; nothing else is changed."""
  model = cli.named_config(f"{family}:{size or list(SIZES[family])[-1]}").model
  smaller = lambda hidden: hidden * width // model.embed_dim

  def small(layer):
    window = BAND if layer.attention.window else None
    attention = replace(
      layer.attention, num_heads=N, head_dim=HEADS[family] * width // D, window=window
    )
    return replace(
      layer, attention=attention, mlp=replace(layer.mlp, hidden=smaller(layer.mlp.hidden))
    )

  embedding, scale = model.embedding, model.head.scale
  if embedding.position is not None:
    embedding = replace(embedding, position=replace(embedding.position, length=T))
  if scale != 1.0:  # a factor on the logits is one of the width
    scale *= (model.embed_dim / width) ** 0.5
  return replace(
    model,
    vocab_size=vocab,
    embed_dim=width,
    max_length=T,
    segments=tuple(Segment(tuple(map(small, s.layers)), REPEATS) for s in model.segments),
    embedding=embedding,
    head=replace(model.head, scale=round(scale, 12)),
  )


@pytest.mark.parametrize("family", ["gpt3", "gopher", "palm"])
def test_sizes_of_a_family_differ_in_sizes_alone(family):
  assert len({shrunk(family, size) for size in SIZES[family]}) == 1


def rows():
  """Tokens, targets, positions, segments: a full row, and one of two documents and padding."""
  tokens, targets = np.random.default_rng(1).integers(0, V, (2, 2, T), dtype=np.int32)
  segments = np.array([[1] * T, [1] * 5 + [2] * 4 + [0] * 3], np.int32)
  positions = np.array([range(T), [*range(5), *range(4), *range(3)]], np.int32)
  return tokens, targets, positions, segments


DOCUMENTS = ((0, slice(0, T)), (1, slice(0, 5)), (1, slice(5, 9)))  # (row, where in it)


def paper(family, params, tokens):
  """The oracle's logits of each document."""
  function = functools.partial(unreleased.gpt3, band=BAND)
  function = function if family == "gpt3" else getattr(unreleased, family)
  weights = unreleased.named(family, params)
  return [function(*weights, tokens[row, where]) for row, where in DOCUMENTS]


def compare(family, spec):
  """Raises AssertionError where `spec` has other weights or logits than the family's paper."""
  params = random_params(spec)
  tokens, _, positions, segments = rows()
  want = paper(family, params, tokens)
  got = program(spec)(params, tokens, positions, segments)
  for (row, where), logits in zip(DOCUMENTS, want, strict=True):
    limit = 1e-5 * np.abs(logits).max()
    np.testing.assert_allclose(got[row, where], logits, rtol=0, atol=limit, err_msg="other logits")


@functools.cache  # Chinchilla's is Gopher's
def program(spec):
  model = TransformerLM(spec)

  @quick_jit
  def logits(params, tokens, positions, segments):
    with jax.default_matmul_precision("highest"):
      rows = {"positions_BT": positions, "segments_BT": segments}
      return model.apply({"params": params}, tokens, **rows).logits_BTV

  return logits


@pytest.mark.parametrize("family", SIZES)
def test_logits_are_the_papers(family):
  compare(family, shrunk(family))


def of_layers(**changes):
  """A change of every layer; of its attention or MLP where that has the field."""

  def change(spec):
    def one(layer):
      for name in ("attention", "mlp"):
        part = getattr(layer, name)
        own = {k: v for k, v in changes.items() if hasattr(part, k)}
        layer = replace(layer, **{name: replace(part, **own)})
      return replace(layer, **{k: v for k, v in changes.items() if hasattr(layer, k)})

    segments = (replace(s, layers=tuple(map(one, s.layers))) for s in spec.segments)
    return replace(spec, segments=tuple(segments))

  return change


def banded_first(spec):
  (segment,) = spec.segments
  return replace(spec, segments=(replace(segment, layers=segment.layers[::-1]),))


def logits_times(scale):
  return lambda spec: replace(spec, head=replace(spec.head, scale=scale))


WRONG = {
  "gpt3, banded layers first": ("gpt3", banded_first, "logits"),
  "gpt3, all layers dense": ("gpt3", of_layers(window=None), "logits"),
  "gpt3, a band one wider": ("gpt3", of_layers(window=BAND + 1), "logits"),
  "gpt3, the exact GELU": ("gpt3", of_layers(activation="gelu"), "logits"),
  "gpt3, norms after": ("gpt3", of_layers(norm_placement="post"), "logits"),
  "mt_nlg, a band": ("mt_nlg", of_layers(window=BAND), "logits"),
  "mt_nlg, ReLU": ("mt_nlg", of_layers(activation="relu"), "logits"),
  "mt_nlg, no bias": ("mt_nlg", of_layers(qkv_bias=False), "weights"),
  "mt_nlg, scores times 1": ("mt_nlg", of_layers(scale=1.0), "logits"),
  "gopher, LayerNorm": ("gopher", of_layers(norm=NormSpec("layer")), "logits"),
  "gopher, rotary": ("gopher", of_layers(position=RotarySpec()), "weights"),
  "gopher, untied": ("gopher", lambda s: replace(s, head=replace(s.head, tied=False)), "weights"),
  "gopher, the exact GELU": ("gopher", of_layers(activation="gelu"), "logits"),
  "chinchilla, no bias of the MLP": ("chinchilla", of_layers(bias=False), "weights"),
  "palm, one branch after the other": ("palm", of_layers(parallel=False), "weights"),
  "palm, logits as they are": ("palm", logits_times(1.0), "logits"),
  "palm, a head of keys for each": ("palm", of_layers(num_kv_heads=N), "weights"),
  "palm, pairs of neighbours": (
    "palm", of_layers(position=RotarySpec(interleaved=True)), "logits"
  ),
  "palm, GELU for SiLU": ("palm", of_layers(activation="gelu_tanh"), "logits"),
  "palm, RMSNorm": ("palm", of_layers(norm=NormSpec()), "logits"),
}  # fmt: skip
QUICK = (
  "gpt3, banded layers first", "gpt3, the exact GELU", "mt_nlg, no bias", "gopher, LayerNorm",
  "gopher, rotary", "palm, one branch after the other", "palm, logits as they are",
  "palm, a head of keys for each", "chinchilla, no bias of the MLP", "gopher, untied",
)  # fmt: skip


@pytest.mark.parametrize(
  "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in WRONG]
)
def test_another_architecture_is_noticed(name):
  family, change, what = WRONG[name]
  spec = change(shrunk(family))
  assert spec != shrunk(family)
  with pytest.raises(AssertionError, match=f"other {what}"):
    compare(family, spec)


@pytest.mark.parametrize("family", ["gopher", "palm"])
def test_gradients_are_the_slopes_of_the_papers_loss(family):
  """Each weight's gradient against central differences, along itself and across."""
  spec, (tokens, targets, positions, segments) = shrunk(family), rows()
  params = random_params(spec)

  @quick_jit
  @jax.grad
  def gradient(params):
    where = {"positions_BT": positions, "segments_BT": segments}
    weights = jnp.asarray(segments > 0, jnp.float32)
    with jax.default_matmul_precision("highest"):
      model = TransformerLM(spec)
      out = model.apply({"params": params}, tokens, targets_BT=targets, weights_BT=weights, **where)
    return out.loss.total

  def loss(leaves):
    logits = paper(family, jax.tree.unflatten(tree, leaves), tokens)
    pairs = zip(DOCUMENTS, logits, strict=True)
    return sum(unreleased.loss(values, targets[row, where]) for (row, where), values in pairs)

  leaves, tree = jax.tree.flatten(jax.tree.map(lambda x: np.asarray(x, np.float64), params))
  rng, step = np.random.default_rng(2), 1e-5
  slopes = jax.tree.leaves(gradient(params))
  assert len(slopes) == len(leaves)
  for i, slope in enumerate(slopes):
    g = np.asarray(slope, np.float64)
    across = rng.normal(size=g.shape)
    direction = g / np.linalg.norm(g) + across / np.linalg.norm(across)
    moved = lambda sign, i=i, v=direction: [
      *leaves[:i],
      leaves[i] + sign * step * v,
      *leaves[i + 1 :],
    ]
    want = (loss(moved(1)) - loss(moved(-1))) / (2 * step)
    np.testing.assert_allclose((g * direction).sum(), want, rtol=2e-5)


WIDE = 96
PER_LAYER = {"gpt3": 0.02, "mt_nlg": 4e-3}


def spreads(family):
  """Published standard deviations at the start, by the end of a weight's path."""
  if family == "palm":  # one over the square root of what a kernel sums, and the table's is 1
    into = dict.fromkeys(("query", "key", "value", "gate", "up"), WIDE**-0.5)
    heads = N * HEADS[family] * WIDE // D
    return into | {"out": heads**-0.5, "down": (4 * WIDE) ** -0.5, "embedding/table": 1.0}
  stddev, layers = PER_LAYER[family], shrunk(family).num_layers
  into = dict.fromkeys(("query", "key", "value", "up", "embedding/table"), stddev)
  return into | dict.fromkeys(("out", "down"), stddev / (2 * layers) ** 0.5)


@pytest.mark.parametrize("family", [pytest.param("gpt3", marks=pytest.mark.full), "mt_nlg", "palm"])
def test_weights_start_with_the_published_spread(family):
  model = TransformerLM(shrunk(family, width=WIDE, vocab=500), unroll=1)
  tokens = np.zeros((1, 1), np.int32)
  params = quick_jit(lambda key: init_params(model, key, tokens))(jax.random.key(0))
  found = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    path = jax.tree_util.keystr(path, simple=True, separator="/")
    for end in spreads(family):
      if path.endswith("/" + end) or path == end:
        found[path] = np.std(leaf) / spreads(family)[end]
  assert len(found) >= 7 and all(abs(ratio - 1) < 0.05 for ratio in found.values()), found
