"""Which family holds a model, and what is said where none does."""

import json
from dataclasses import replace

import pytest

from experiments import cli
from experiments.config import ConfigError
from experiments.weights.express import essence, express, kinds
from experiments.weights.open import FAMILIES
from layers.count import count_params
from layers.spec import MoeSpec

# What each published config is to `transformers`.
PUBLISHED = {
  "bloom": "bloom", "deepseek": "deepseek_v3", "dense_1b": "llama", "dense_tiny": "llama",
  "gemma2": "gemma2", "gemma3": "gemma3_text", "gpt2": "gpt2", "gpt_j": "gptj",
  "gpt_neo": "gpt_neo", "gpt_oss": "gpt_oss", "llama": "llama", "llama2": "llama",
  "llama3": "llama", "mistral": "mistral", "mixtral": "mixtral", "moe_8x1b": "mixtral",
  "mt_nlg": "gpt2", "opt": "opt", "qwen3": "qwen3", "smollm2": "llama",
}  # fmt: skip
HELD = [name for name in cli.config_names() if name.partition(":")[0] in PUBLISHED]
FEW = {
  "bloom:560m", "deepseek:v3", "gemma2:2b", "gemma3:4b", "gpt2:124m", "gpt_j:6b", "gpt_neo:125m",
  "gpt_oss:20b", "llama3:1b", "mistral:7b", "mixtral:8x7b", "opt:350m", "qwen3:0.6b",
  "qwen3:30b-a3b",
}  # fmt: skip


def model(name):
  return cli.named_config(name).model


@pytest.mark.parametrize("name", HELD)
def test_published_configs(name):
  expressed = express(model(name))
  sparse = "qwen3_moe" if name == "qwen3:30b-a3b" else None
  assert expressed.kind == (sparse or PUBLISHED[name.partition(":")[0]])
  again = json.loads(json.dumps(expressed.config))  # nothing but JSON
  family = next(f for f in FAMILIES if expressed.kind in f.TYPES)
  assert without_scale(family.spec(again)) == without_scale(model(name))


def without_scale(spec):
  """The model but for factors on the logits, which come back rounded."""
  made = essence(spec)
  segments = []
  for segment in made.segments:
    layers = [replace(x, attention=replace(x.attention, scale=None)) for x in segment.layers]
    segments.append(replace(segment, layers=tuple(layers)))
  return replace(made, segments=tuple(segments))


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=() if n in FEW else pytest.mark.full) for n in HELD]
)
def test_parameters_are_as_many_as_theirs(name, tmp_path):
  """In the model that `transformers` builds of the config, without weights."""
  why = "needs the extra `parity`: pip install 'meshyard[parity]'"
  torch = pytest.importorskip("torch", reason=why)
  transformers = pytest.importorskip("transformers", reason=why)
  spec = model(name)
  (tmp_path / "config.json").write_text(json.dumps(express(spec).config))
  config = transformers.AutoConfig.from_pretrained(tmp_path)
  with torch.device("meta"):
    theirs = transformers.AutoModelForCausalLM.from_config(config)
  assert sum(p.numel() for p in theirs.parameters()) == count_params(spec).total


@pytest.mark.parametrize(
  "name, nearest, what",
  [
    ("gpt3:125m", "gpt2", "attention.window is 256, not none in layers 1, 3, 5, ..."),
    ("moe_tiny", "qwen3_moe", "mlp.dispatch is capacity, not dropless in layers 1, 3"),
    ("chinchilla:70b", "gpt2", "attention.position is TransformerXLSpec, not none"),
    ("palm:8b", "llama", "parallel is True, not False"),
    ("encoder_tiny", "llama", "attention.causal is False, not True"),
    ("hybrid_tiny", "llama", "attention is LinearAttentionSpec in layer 0"),
  ],
)
def test_what_no_family_has_a_word_for(name, nearest, what):
  with pytest.raises(ConfigError) as error:
    express(model(name))
  said = str(error.value)
  assert f"the nearest is {nearest}, but " in said and what in said and "\n" not in said


def test_a_family_by_name():
  llama = model("llama3:8b")
  assert express(llama, "mistral").config["sliding_window"] is None
  with pytest.raises(ConfigError, match=r"--family=qwen3 can't hold .*attention.qk_norm is none"):
    express(llama, "qwen3")
  with pytest.raises(ConfigError, match="--family=lama: known are auto, llama, mistral"):
    express(llama, "lama")
  assert kinds()[0] == "llama"  # the plainest first: others could hold its models too


def test_a_change_that_no_config_says_is_noticed():
  """Each field of a LLaMA and of a Mixtral that means something, changed by itself."""
  dense, sparse = model("llama3:1b"), model("mixtral:8x7b")

  def changed(spec, **fields):
    segment = spec.segments[0]
    (layer,) = segment.layers
    named = {}
    for path, value in fields.items():
      part, _, field = path.partition("__")
      named[part] = replace(getattr(layer, part), **{field: value}) if field else value
    return replace(spec, segments=(replace(segment, layers=(replace(layer, **named),)),))

  for fields in (
    {"attention__window": 7}, {"attention__softcap": 30.0}, {"attention__scale": 1.0},
    {"attention__sink": True}, {"attention__out_bias": True}, {"attention__chunk": 8},
    {"mlp__bias": True}, {"mlp__clamp": 7.0}, {"mlp__gated": False}, {"parallel": True},
    {"norm_placement": "post"},
  ):  # fmt: skip
    with pytest.raises(ConfigError):
      express(changed(dense, **fields), "llama")
  for fields in (
    {"mlp__normalize": False}, {"mlp__routed_scale": 2.0}, {"mlp__dispatch": "capacity"},
    {"mlp__scores": "sigmoid"}, {"mlp__router_bias": True},
  ):  # fmt: skip
    with pytest.raises(ConfigError):
      express(changed(sparse, **fields))
  for fields in ({"mlp__jitter": 0.1}, {"mlp__balance_loss": 0.5}, {"dropout": 0.1}):
    assert express(changed(sparse, **fields)).kind == "mixtral"
  assert isinstance(sparse.layers[0].mlp, MoeSpec)
