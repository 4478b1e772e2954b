"""Overrides by path, flat views, JSON and the rules of resuming."""

import dataclasses
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.config import (
  Config,
  ConfigError,
  DataConfig,
  EvalConfig,
  GuardConfig,
  MeshConfig,
  OptimizerConfig,
  TrainConfig,
)
from experiments.overrides import (
  ABSENT,
  apply_overrides,
  change_class,
  check_resume,
  difference,
  flatten,
  from_json,
  to_json,
)
from layers.spec import (
  AlibiSpec,
  AttentionSpec,
  EmbeddingSpec,
  LayerSpec,
  LearnedPositionSpec,
  LinearScaling,
  MlpSpec,
  ModelSpec,
  MoeSpec,
  NormSpec,
  RotarySpec,
  Segment,
  TransformerXLSpec,
  YarnScaling,
)

ATTENTION = AttentionSpec(num_heads=4, head_dim=8, position=RotarySpec())
DENSE = LayerSpec(ATTENTION, MlpSpec(hidden=32))
SPARSE = LayerSpec(ATTENTION, MoeSpec(num_experts=4, expert=MlpSpec(hidden=16)))
MODEL = ModelSpec(
  vocab_size=64,
  embed_dim=32,
  segments=(Segment((DENSE,)), Segment((DENSE, SPARSE), repeats=3)),
  embedding=EmbeddingSpec(position=LearnedPositionSpec(length=4096)),
)
CONFIG = Config(name="small", model=MODEL)


def override(*assignments, config=CONFIG):
  return apply_overrides(config, [tuple(text.split("=", 1)) for text in assignments])


def refusal(*assignments, config=CONFIG):
  with pytest.raises(ConfigError) as caught:
    override(*assignments, config=config)
  return str(caught.value)


@pytest.mark.parametrize(
  ("text", "path", "value"),
  (
    ("data.batch_size=8", "data.batch_size", 8),
    ("train.steps=1_000_000", "train.steps", 1_000_000),
    ("train.steps=1e6", "train.steps", 1_000_000),
    ("optimizer.learning_rate=3e-5", "optimizer.learning_rate", 3e-5),
    ("optimizer.clip_norm=2", "optimizer.clip_norm", 2.0),
    ("optimizer.clip_norm=none", "optimizer.clip_norm", None),
    ("optimizer.name=muon", "optimizer.name", "muon"),
    ("eval.baselines=TRUE", "eval.baselines", True),
    ("eval.baselines=0", "eval.baselines", False),
    ("eval.sample_prompt=a = b, c", "eval.sample_prompt", "a = b, c"),
    ("eval.sample_prompt=none", "eval.sample_prompt", "none"),
    ("mesh.fsdp=-1", "mesh.fsdp", -1),
    ("train.remat=none", "train.remat", "none"),
    ("train.remat=qkv, out", "train.remat", ("qkv", "out")),
    ("train.remat=qkv,", "train.remat", ("qkv",)),
    ("model.final_norm=none", "model.final_norm", None),
    ("model.segments.-1.repeats=5", "model.segments.1.repeats", 5),
    ("model.segments.0.layers.0.mlp.bias=1", "model.segments.0.layers.0.mlp.bias", True),
    (
      "model.segments.0.layers.0.attention.implementation=pallas_tpu",
      "model.segments.0.layers.0.attention.implementation", "pallas_tpu",
    ),
  ),
)  # fmt: skip
def test_one_value_by_its_type(text, path, value):
  changed = override(text)
  result = flatten(changed)[path]
  assert result == value and type(result) is type(value)
  if path != "model.final_norm":  # whose own fields disappear
    assert set(flatten(changed).items()) ^ set(flatten(CONFIG).items()) <= {
      (path, value), (path, flatten(CONFIG)[path])
    }  # fmt: skip


def test_wildcards_reach_every_layer_that_has_the_field():
  changed = override("model.segments.*.layers.*.mlp.num_experts=8")
  experts = [getattr(layer.mlp, "num_experts", None) for layer in changed.model.layers]
  assert experts == [None, None, 8, None, 8, None, 8]
  changed = override("model.segments.*.layers.1.attention.position.theta=5e5")
  thetas = [layer.attention.position.theta for s in changed.model.segments for layer in s.layers]
  assert thetas == [1e4, 1e4, 5e5]


def test_the_path_with_fewer_wildcards_wins_in_any_order():
  assignments = [
    "model.segments.*.layers.*.mlp.hidden=48",
    "model.segments.1.layers.*.mlp.hidden=56",
  ]
  for order in (assignments, assignments[::-1]):
    changed = override(*order)
    assert changed.model.segments[0].layers[0].mlp.hidden == 48
    assert changed.model.segments[1].layers[0].mlp.hidden == 56


def test_values_that_are_valid_only_together():
  # Each alone is refused by a different level: attention, MoE, the position table, the config.
  together = [
    "model.segments.*.layers.*.attention.num_heads=6",
    "model.segments.*.layers.*.attention.num_kv_heads=3",
    "model.segments.1.layers.1.mlp.experts_per_token=2",
    "model.segments.1.layers.1.mlp.router=top_k",
    "model.max_length=8192",
    "model.embedding.position.length=8192",
    "data.row_length=8000",
  ]
  for alone in (together[2], together[4], together[6]):
    refusal(alone)
  expected = override(*together)
  assert expected.model.layers[0].attention.kv_heads == 3
  shuffled = together[:]
  for seed in range(5):
    random.Random(seed).shuffle(shuffled)
    assert override(*shuffled) == expected


@pytest.mark.parametrize(
  ("text", "parts"),
  (
    ("data.batch_sise=8", ("data (DataConfig) has no field 'batch_sise'", "batch_size")),
    ("optimiser.eps=1", ("no field 'optimiser'", "mean optimizer?", "there is optimizer.eps")),
    ("learning_rate=1", ("no field 'learning_rate'", "there is optimizer.learning_rate")),
    ("model.segments.*.layers.*.mlp.hiden=8", ("(MlpSpec) has no field 'hiden'", "mean hidden?")),
    ("model.segments.2.repeats=8", ("model.segments has 2 elements", "from -2 to 1", "'2'")),
    ("model.segments.x.repeats=8", ("an index", "'x'")),
    ("data.batch_size.x=8", ("data.batch_size is an integer, it has no fields",)),
    ("model.segments.1.layers.1.mlp.shared.hidden=8", ("mlp.shared is none",)),
    ("data.batch_size=8.5", ("data.batch_size must be an integer, got '8.5'",)),
    ("data.batch_size=many", ("data.batch_size must be an integer, got 'many'",)),
    ("train.steps=1e999999999", ("train.steps must be an integer",)),
    ("optimizer.eps=nan", ("optimizer.eps must be a number, got 'nan'",)),
    ("optimizer.eps=1e400", ("optimizer.eps must be a number",)),
    ("optimizer.eps=none", ("optimizer.eps must be a number, got 'none'",)),
    ("mesh.fsdp=two", ("mesh.fsdp must be an integer or none, got 'two'",)),
    ("eval.baselines=yes", ("eval.baselines must be true or false, got 'yes'",)),
    ("optimizer.name=adam", ("must be one of adamw, adafactor, lion, muon, sgd, got 'adam'",)),
    ("data=x", ("data is a section", "data.source, data.path")),
    ("model.final_norm=rms", ("model.final_norm.kind, ", "or give none")),
    ("model.segments=1", ("model.segments is a section", "model.segments.*")),
    ("model.segments.0.layers.0.mlp=x", ("mlp.hidden", "mlp.num_experts")),
    ("data.batch_size=0", ("data.batch_size=0: must be at least 1",)),
    ("model.segments.0.layers.0.mlp.hidden=0", ("model.segments.0.layers.0.mlp: ", "positive")),
    ("model.max_length=5000", ("model: max_length=5000 exceeds",)),
    ("=1", ("no field ''",)),
  ),
)
def test_a_mistake_is_named(text, parts):
  message = refusal(text)
  assert all(part in message for part in parts), message


def test_conflicting_overrides_are_refused():
  assert "both 8 and 16" in refusal("data.batch_size=8", "data.batch_size=16")
  both = ("model.embedding.position=none", "model.embedding.position.length=9999")
  assert "model.embedding.position is set as a whole" in refusal(*both)
  assert override("data.batch_size=8", "data.batch_size=8").data.batch_size == 8


@dataclasses.dataclass(frozen=True)
class _Sizes:
  sizes: tuple[int, ...] = (1, 2)
  name: str | None = None


def test_tuples_of_numbers():
  assert override("sizes=3, 4,1e2", config=_Sizes()).sizes == (3, 4, 100)
  assert override("sizes=7", "name=x", config=_Sizes()) == _Sizes((7,), "x")
  assert override("sizes.1=9", config=_Sizes()).sizes == (1, 9)
  assert override("sizes=", config=_Sizes()).sizes == ()
  assert "sizes must be an integer, got 'x'" in refusal("sizes=1,x", config=_Sizes())


def test_flatten_names_the_member_of_a_union():
  flat = flatten(CONFIG)
  assert flat["model.segments.1.layers.1.mlp.type"] == "MoeSpec"
  assert flat["model.segments.1.layers.0.attention.position.type"] == "RotarySpec"
  assert flat["model.segments.1.layers.1.mlp.shared"] is None
  assert "model.final_norm.type" not in flat  # a norm or none: nothing to tell apart


def test_difference_sees_values_types_and_length():
  layer = dataclasses.replace(DENSE, attention=dataclasses.replace(ATTENTION, position=AlibiSpec()))
  other = dataclasses.replace(
    CONFIG,
    data=DataConfig(batch_size=32),
    model=dataclasses.replace(MODEL, segments=(Segment((layer,), repeats=2),)),
  )
  changes = {path: (old, new) for path, old, new in difference(CONFIG, other)}
  assert changes["data.batch_size"] == (16, 32)
  assert changes["model.segments.0.repeats"] == (1, 2)
  assert changes["model.segments.1.repeats"] == (3, ABSENT)
  position = "model.segments.0.layers.0.attention.position"
  assert changes[f"{position}.type"] == ("RotarySpec", "AlibiSpec")
  assert changes[f"{position}.theta"] == (1e4, ABSENT)
  assert repr(ABSENT) == "absent"
  assert difference(CONFIG, CONFIG) == []


# --- Random configs -------------------------------------------------------------------------------

floats = st.floats(1e-6, 1e6)
words = st.text("abc_ =,.*'é", max_size=6)
norms = st.builds(NormSpec, eps=floats, unit_offset=st.booleans())
mlps = st.builds(
  MlpSpec, hidden=st.integers(1, 9), activation=st.sampled_from(("relu", "silu")),
  bias=st.booleans(), clamp=st.none() | floats,
)  # fmt: skip
moes = st.builds(
  MoeSpec, num_experts=st.integers(1, 9), expert=mlps, shared=st.none() | mlps,
  capacity_factor=floats, group_size=st.none() | st.integers(1, 9),
)  # fmt: skip
scalings = st.none() | st.builds(LinearScaling, floats) | st.builds(YarnScaling, floats, st.just(9))
positions = st.one_of(
  st.none(), st.just(AlibiSpec()), st.builds(TransformerXLSpec, st.booleans()),
  st.builds(RotarySpec, theta=floats, scaling=scalings),
)  # fmt: skip
attentions = st.builds(
  AttentionSpec, num_heads=st.integers(1, 4), head_dim=st.just(4), position=positions,
  qk_norm=st.none() | norms, implementation=st.none() | st.sampled_from(("xla", "reference")),
)  # fmt: skip
layers = st.builds(LayerSpec, attentions, mlps | moes, norms)
segments = st.builds(
  Segment, st.lists(layers, min_size=1, max_size=2).map(tuple), st.integers(1, 3)
)
models = st.builds(
  ModelSpec, vocab_size=st.integers(1, 99), embed_dim=st.integers(1, 9),
  segments=st.lists(segments, min_size=1, max_size=2).map(tuple), final_norm=st.none() | norms,
)  # fmt: skip
# The part of a config whose fields can all be told apart as text.
sections = {
  "mesh": st.builds(MeshConfig, fsdp=st.none() | st.integers(-1, 9)),
  "data": st.builds(DataConfig, path=words, batch_size=st.integers(1, 10**12)),
  "optimizer": st.builds(
    OptimizerConfig, name=st.sampled_from(("adamw", "lion")), learning_rate=floats,
    clip_norm=st.none() | floats,
  ),
  "train": st.builds(
    TrainConfig, steps=st.integers(1, 10**18),
    remat=st.text("abc", max_size=3) | st.tuples(*2 * [st.text("abc", min_size=1, max_size=3)]),
  ),
  "guard": st.builds(GuardConfig, skip_batches=st.lists(st.integers(1, 9), max_size=3).map(tuple)),
  "eval": st.builds(EvalConfig, sample_prompt=words, baselines=st.booleans()),
}  # fmt: skip
configs = st.builds(Config, name=words, model=models, **sections)


def as_text(value):
  return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@settings(max_examples=60, deadline=None)
@given(configs)
def test_json_round_trip(config):
  stored = json.loads(json.dumps(to_json(config)))
  assert from_json(stored) == config
  assert difference(from_json(stored), config) == []


@settings(max_examples=60, deadline=None)
@given(st.builds(Config, name=words, model=st.just(MODEL), **sections), st.randoms())
def test_a_difference_applied_as_overrides_gives_the_other_config(config, order):
  changes = [(path, as_text(new)) for path, _, new in difference(CONFIG, config)]
  order.shuffle(changes)
  assert apply_overrides(CONFIG, changes) == config


@settings(max_examples=60, deadline=None)
@given(configs, configs)
def test_equal_configs_and_only_those_have_no_difference(a, b):
  assert (difference(a, b) == []) == (a == b)
  assert [(path, new, old) for path, old, new in sorted(difference(a, b), key=str)] == sorted(
    difference(b, a), key=lambda change: str((change[0], change[2], change[1]))
  )


@pytest.mark.parametrize(
  ("path", "value", "message"),
  (
    (("data", "batch_sise"), 8, "stored data has an unknown field 'batch_sise'"),
    (("data", "batch_size"), "8", "stored data.batch_size must be an integer, got '8'"),
    (("data", "batch_size"), True, "stored data.batch_size must be an integer"),
    (("data", "batch_size"), 0, "data.batch_size=0"),
    (("eval", "baselines"), 1, "stored eval.baselines must be true or false"),
    (("optimizer", "name"), "adam", "stored optimizer.name must be one of adamw"),
    (("data", "type"), "MeshConfig", "stored data has type 'MeshConfig'; it must be DataConfig"),
    (("model", "final_norm", "eps"), -1.0, "model.final_norm: norm eps must be positive"),
    (("model", "segments", 0, "layers", 0, "mlp", "type"), "X", "must be MlpSpec or MoeSpec"),
    (("model", "segments"), None, "stored model.segments must be"),
  ),
)
def test_json_that_is_not_a_config_is_refused(path, value, message):
  tree = to_json(CONFIG)
  node = tree
  for step in path[:-1]:
    node = node[step]
  node[path[-1]] = value
  with pytest.raises(ConfigError) as caught:
    from_json(tree)
  assert message in str(caught.value)


def test_json_of_an_older_run():
  tree = to_json(CONFIG)
  del tree["train"]["z_loss"], tree["eval"]
  assert from_json(tree) == CONFIG
  del tree["model"]["vocab_size"]
  with pytest.raises(ConfigError, match="stored model lacks the field 'vocab_size'"):
    from_json(tree)
  with pytest.raises(ConfigError, match="stored config must be Config"):
    from_json([])


# --- Resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("path", "kind"),
  (
    ("name", "free"),
    ("train.steps", "free"),
    ("train.remat", "free"),
    ("mesh.expert", "free"),
    ("optimizer.learning_rate", "intervention"),
    ("data.batch_size", "intervention"),
    ("data.path", "identity"),
    ("train.seed", "identity"),
    ("model.segments.0.layers.0.mlp.hidden", "identity"),
    ("model.segments.0.layers.0.attention.implementation", "free"),
  ),
)
def test_change_classes(path, kind):
  assert change_class(path) == kind


def test_every_field_has_a_change_class():
  assert {change_class(path) for path in flatten(CONFIG)} == {"free", "intervention", "identity"}
  with pytest.raises(ConfigError, match=r"data\.nothing"):
    change_class("data.nothing")
  with pytest.raises(ConfigError, match="nothing"):
    change_class("nothing")


def test_a_resume_may_change_what_is_free():
  kernel = "model.segments.*.layers.*.attention.implementation=xla"
  changes = check_resume(CONFIG, override("train.steps=2000", kernel))
  assert ("train.steps", 1000, 2000, "free") in changes
  assert len(changes) == 4 and all(change.kind == "free" for change in changes)
  assert check_resume(CONFIG, CONFIG) == []


def test_an_intervention_needs_a_reason():
  requested = override("optimizer.learning_rate=1e-4", "train.steps=2000")
  for reason in (None, "", "  "):
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate from 0.0003 to 0.0001.*--rea"):
      check_resume(CONFIG, requested, reason=reason, allow=True)
  changes = check_resume(CONFIG, requested, reason="loss spikes")
  assert {change.kind for change in changes} == {"free", "intervention"}


def test_another_model_is_another_run():
  requested = override("model.segments.*.layers.*.mlp.hidden=64", "data.seed=1", "train.seed=1",
                       "data.tokenizer=words")  # fmt: skip
  with pytest.raises(ConfigError, match=r"mlp.hidden from 32 to 64.* and 2 more.*--allow_config"):
    check_resume(CONFIG, requested, reason="because")
  changes = check_resume(CONFIG, requested, allow=True)
  assert len(changes) == 5 and {change.kind for change in changes} == {"identity"}
