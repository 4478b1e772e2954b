"""Published models as configs: their counts, and the family that the oracles test."""

from dataclasses import replace

import pytest

from experiments import cli
from layers.count import count_params
from layers.spec import Segment
from tests.layers import families

# Published counts (those of Hugging Face's checkpoints, or of the papers' tables).
COUNTS = {
  "gpt3:125m": 125_226_240, "gpt3:350m": 355_871_744, "gpt3:760m": 760_300_032,
  "gpt3:1.3b": 1_315_723_264, "gpt3:2.7b": 2_651_553_280, "gpt3:6.7b": 6_658_404_352,
  "gpt3:13b": 12_853_386_240, "gpt3:175b": 174_604_259_328,
  "gpt_neo:125m": 125_198_592, "gpt_neo:1.3b": 1_315_575_808, "gpt_neo:2.7b": 2_651_307_520,
  "gemma3:270m": 268_098_176, "gemma3:1b": 999_885_952, "gemma3:4b": 3_880_263_168,
  "gemma3:12b": 11_766_034_176, "gemma3:27b": 27_009_346_304,
  "opt:125m": 125_239_296, "opt:350m": 331_196_416, "opt:1.3b": 1_315_758_080,
  "opt:2.7b": 2_651_596_800, "opt:6.7b": 6_658_473_984, "opt:13b": 12_853_473_280,
  "opt:30b": 29_974_540_288, "opt:66b": 65_719_701_504, "opt:175b": 174_604_468_224,
  "llama:7b": 6_738_415_616, "llama:13b": 13_015_864_320, "llama:33b": 32_528_943_616,
  "llama:65b": 65_285_660_672,
  "llama2:7b": 6_738_415_616, "llama2:13b": 13_015_864_320, "llama2:70b": 68_976_648_192,
  "llama3:1b": 1_235_814_400, "llama3:3b": 3_212_749_824, "llama3:8b": 8_030_261_248,
  "llama3:70b": 70_553_706_496, "llama3:405b": 405_853_388_800,
  "palm:8b": 8_632_012_800, "palm:62b": 62_495_662_080, "palm:540b": 540_356_474_880,
  "mixtral:8x7b": 46_702_792_704, "mixtral:8x22b": 140_630_071_296,
  "deepseek:v3": 671_026_404_352,
  # transformers' BigBirdForMaskedLM less its pooler and its two token types.
  "bigbird:base": 128_111_286 - (768 * 768 + 768) - 2 * 768,
  "bigbird:large": 360_225_974 - (1024 * 1024 + 1024) - 2 * 1024,
}  # fmt: skip


def test_every_family_is_here():
  assert {name for name in cli.config_names() if ":" in name} == COUNTS.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_the_published_ones(name):
  assert count_params(cli.named_config(name).model).total == COUNTS[name]


BIGBIRD = [f"BigBird(64, 64, 3, {seed})" for seed in range(4)]


def layers_of(spec):
  """Without the choices that change no function of the weights."""
  return replace(spec, segments=(Segment(spec.layers),), init=families.gpt(1, 8, 2).init)


@pytest.mark.parametrize(
  ("name", "family"),
  [
    ("gpt3:1.3b", families.gpt_sparse(24, 2048, 16, None, length=2048)),
    ("opt:30b", families.opt(48, 7168, 56)),
    ("opt:350m", families.opt_350m()),
    ("llama:33b", families.llama(60, 6656, 52, 52, 17_920, 32_000, eps=1e-6)),
    ("llama2:70b", families.llama(80, 8192, 64, 8, 28_672, 32_000)),
    (
      "llama3:405b",
      families.llama(126, 16_384, 128, 8, 53_248, 128_256, theta=5e5, scaling=families.LLAMA_31),
    ),
    ("palm:62b", families.palm(64, 8192, 32)),
    ("gpt_neo:2.7b", families.gpt_neo(32, 2560, 20)),
    ("bigbird:base", families.bert(12, 768, 12, *BIGBIRD, dropout=0.1)),
    ("bigbird:large", families.bert(24, 1024, 16, *BIGBIRD, dropout=0.1)),
    ("gemma3:27b", families.gemma3(62, 5376, 32, 16, 128, 21504, scale=168**-0.5)),
    ("gemma3:4b", families.gemma3(34, 2560, 8, 4, 256, 10240, scale=256**-0.5)),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
def test_configs_are_the_families_that_oracles_test(name, family):
  model = layers_of(cli.named_config(name).model)
  if name.startswith("opt"):  # the family has no dropout
    (segment,) = model.segments
    layers = tuple(replace(layer, dropout=0.0) for layer in segment.layers)
    model = replace(model, segments=(Segment(layers),))
  family = layers_of(replace(family, max_length=model.max_length))
  if name.startswith("gpt3"):  # every second layer has a band, and GELU is exact
    assert [layer.attention.window for layer in model.layers[:4]] == [None, 256, None, 256]
    plain = lambda layer: replace(
      layer,
      attention=replace(layer.attention, window=None),
      mlp=replace(layer.mlp, activation="gelu"),
    )
    model, family = (
      replace(m, segments=(Segment(tuple(map(plain, m.layers))),)) for m in (model, family)
    )
  assert model == family
