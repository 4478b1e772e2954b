"""Published models as configs: counts, recipes, machines, and the family that the oracles test."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import cli
from experiments.configs.gopher import decoder
from experiments.planning.search import ROOM, search, start
from layers.count import count_params
from layers.spec import MoeSpec, Segment
from mesh.hardware import CHIPS
from mesh.slices import parse_topology
from tests.layers import families

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def gopher(layers, heads, head_dim, width):
  """Matrices of Gopher and Chinchilla (arXiv 2112.11446, 2203.15556), then what is not one.

  Vocabulary; query, key, value, output and relative keys; the two matrices of the MLP. Norms, two
  a layer and one; in each layer Transformer-XL's u and v, and biases of the attention's output and
  of the MLP; a bias of the logits.
  """
  matrices = 32_000 * width + layers * (5 * width * head_dim * heads + 2 * width * 4 * width)
  biases = layers * (2 * heads * head_dim + width + 4 * width + width) + 32_000
  return matrices, (2 * layers + 1) * width + biases


def switch(published, layers, width, heads):
  """A published encoder-decoder less what one stack lacks.

  In each layer of the decoder cross-attention with heads of 64 and its norm; once the second table
  of 32 distances and the second final norm.
  """
  return published - layers * (4 * width * heads * 64 + width) - 32 * heads - width


# Published counts: of Hugging Face's classes at the published shapes, or of the papers' tables.
COUNTS = {
  "gpt2:124m": 124_439_808, "gpt2:355m": 354_823_168, "gpt2:774m": 774_030_080,
  "gpt2:1.5b": 1_557_611_200,
  "gpt_j:6b": 6_050_882_784,
  "bloom:560m": 559_214_592, "bloom:1.1b": 1_065_314_304, "bloom:1.7b": 1_722_408_960,
  "bloom:3b": 3_002_557_440, "bloom:7.1b": 7_069_016_064, "bloom:176b": 176_247_271_424,
  # No released class: 51,200 d + 2048 d + 105 (12 d^2 + 13 d) + 2 d at d = 20,480.
  "mt_nlg:530b": 529_600_819_200,
  "gopher:44m": sum(gopher(8, 16, 32, 512)), "gopher:117m": sum(gopher(12, 12, 64, 768)),
  "gopher:417m": sum(gopher(12, 12, 128, 1536)), "gopher:1.4b": sum(gopher(24, 16, 128, 2048)),
  "gopher:7.1b": sum(gopher(32, 32, 128, 4096)),
  "gopher:280b": 279_697_162_240 + gopher(80, 128, 128, 16_384)[1],
  "chinchilla:70b": 70_055_362_560 + gopher(80, 64, 128, 8192)[1],
  "mistral:7b": 7_241_732_096,
  # 49,152 d + L (2 d^2 + 2 d 64 kv + 3 d f + 2 d) + d for the two that models of that class give.
  "smollm2:135m": 134_515_008,
  "smollm2:360m": 49_152 * 960 + 32 * (2 * 960**2 + 2 * 960 * 320 + 3 * 960 * 2560 + 1920) + 960,
  "smollm2:1.7b": 49_152 * 2048 + 24 * (4 * 2048**2 + 3 * 2048 * 8192 + 4096) + 2048,
  "gemma2:2b": 2_614_341_888, "gemma2:9b": 9_241_705_984, "gemma2:27b": 27_227_128_320,
  "qwen3:0.6b": 596_049_920, "qwen3:1.7b": 1_720_574_976, "qwen3:4b": 4_022_468_096,
  "qwen3:8b": 8_190_735_360, "qwen3:14b": 14_768_307_200, "qwen3:32b": 32_762_123_264,
  "qwen3:30b-a3b": 30_532_122_624,
  "gpt_oss:20b": 20_914_757_184, "gpt_oss:120b": 116_829_156_672,
  "switch_decoder:base-8": switch(619_339_008, 12, 768, 12),
  "switch_decoder:base-16": switch(1_072_397_568, 12, 768, 12),
  "switch_decoder:base-32": switch(1_978_514_688, 12, 768, 12),
  "switch_decoder:base-64": switch(3_790_748_928, 12, 768, 12),
  "switch_decoder:base-128": switch(7_415_217_408, 12, 768, 12),
  "switch_decoder:base-256": switch(14_664_154_368, 12, 768, 12),
  "switch_decoder:large-128": switch(26_309_291_008, 24, 1024, 16),
  "switch_decoder:xxl-128": switch(394_675_073_024, 24, 4096, 64),
  "switch_decoder:c-2048": switch(1_571_327_875_360, 15, 2080, 30),
  # Matrices as the paper's 1.2T, then norms and a table of 32 distances in each layer.
  "glam:64b-64e": 1_161_755_099_136 + 129 * 8192 + 64 * 32 * 128,
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

# What a token passes, where that is less.
ACTIVE = {
  "mixtral:8x7b": 12_879_925_248, "mixtral:8x22b": 39_161_468_928,
  "deepseek:v3": 37_552_282_624, "qwen3:30b-a3b": 3_353_032_704,
  "gpt_oss:20b": 4_187_440_704, "gpt_oss:120b": 5_711_982_912,
  "switch_decoder:base-8": switch(222_977_280, 12, 768, 12),
  "switch_decoder:base-16": switch(223_051_008, 12, 768, 12),
  "switch_decoder:base-32": switch(223_198_464, 12, 768, 12),
  "switch_decoder:base-64": switch(223_493_376, 12, 768, 12),
  "switch_decoder:base-128": switch(224_083_200, 12, 768, 12),
  "switch_decoder:base-256": switch(225_262_848, 12, 768, 12),
  "switch_decoder:large-128": switch(740_813_824, 24, 1024, 16),
  "switch_decoder:xxl-128": switch(11_147_915_264, 24, 4096, 64),
  "switch_decoder:c-2048": switch(1_747_228_960, 15, 2080, 30),
  "glam:64b-64e": 96_603_209_728 + 129 * 8192 + 64 * 32 * 128,
}  # fmt: skip


def test_every_family_is_here():
  assert {name for name in cli.config_names() if ":" in name} == COUNTS.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_the_published_ones(name):
  counts = count_params(cli.named_config(name).model)
  assert (counts.total, counts.active) == (COUNTS[name], ACTIVE.get(name, COUNTS[name]))


@pytest.mark.parametrize(
  ("shape", "size"),
  [
    ((8, 16, 32, 512), "44M"), ((12, 12, 64, 768), "117M"), ((12, 12, 128, 1536), "417M"),
    ((24, 16, 128, 2048), "1.4B"), ((32, 32, 128, 4096), "7.1B"), ((80, 128, 128, 16_384), "280B"),
  ],
)  # fmt: skip
def test_gophers_rule_gives_the_names_of_the_sizes(shape, size):
  matrices, _ = gopher(*shape)
  unit = {"M": 1e6, "B": 1e9}[size[-1]]
  assert matrices / unit == pytest.approx(float(size[:-1]), abs=0.5 if "." not in size else 0.05)


# Arguments of `gopher` behind millions of parameters: table A9 of arXiv 2203.15556, whole.
CHINCHILLAS = [
  (44, 8, 8, 64, 512), (57, 9, 9, 64, 576), (74, 10, 10, 64, 640), (90, 13, 10, 64, 640),
  (106, 16, 10, 64, 640), (117, 12, 12, 64, 768), (140, 15, 12, 64, 768), (163, 18, 12, 64, 768),
  (175, 14, 14, 64, 896), (196, 16, 14, 64, 896), (217, 18, 14, 64, 896), (251, 16, 16, 64, 1024),
  (278, 18, 16, 64, 1024), (306, 20, 16, 64, 1024), (425, 18, 10, 128, 1280),
  (489, 21, 10, 128, 1280), (509, 18, 11, 128, 1408), (552, 24, 10, 128, 1280),
  (587, 21, 11, 128, 1408), (632, 19, 12, 128, 1536), (664, 24, 11, 128, 1408),
  (724, 22, 12, 128, 1536), (816, 25, 12, 128, 1536), (893, 20, 14, 128, 1792),
  (1018, 23, 14, 128, 1792), (1143, 26, 14, 128, 1792), (1266, 22, 16, 128, 2048),
  (1424, 22, 17, 128, 2176), (1429, 25, 16, 128, 2048), (1593, 28, 16, 128, 2048),
  (1609, 25, 17, 128, 2176), (1731, 24, 18, 128, 2304), (1794, 28, 17, 128, 2176),
  (2007, 28, 18, 128, 2304), (2283, 32, 18, 128, 2304), (2298, 26, 20, 128, 2560),
  (2639, 30, 20, 128, 2560), (2980, 34, 20, 128, 2560), (3530, 36, 22, 128, 2688),
  (3802, 36, 22, 128, 2816), (4084, 36, 22, 128, 2944), (4516, 36, 24, 128, 3072),
  (6796, 40, 28, 128, 3584), (9293, 42, 32, 128, 4096), (11452, 47, 32, 128, 4352),
  (12295, 44, 36, 128, 4608), (12569, 47, 32, 128, 4608), (13735, 47, 32, 128, 4864),
  (14940, 49, 32, 128, 4992), (16183, 47, 40, 128, 5120),
]  # fmt: skip


def test_gophers_rule_gives_the_counts_of_all_chinchillas():
  assert len(CHINCHILLAS) == 50
  assert [round(sum(gopher(*shape)) / 1e6) for _, *shape in CHINCHILLAS] == [
    millions for millions, *_ in CHINCHILLAS
  ]


def test_the_rule_counts_the_configs_shape_where_heads_are_narrower_than_the_model():
  _, *shape = CHINCHILLAS[48]
  assert count_params(decoder(*shape)).total == sum(gopher(*shape))


# Tokens of the run, tokens of the last batch, peak learning rate, as their papers and logs have it.
RECIPES = {
  "gpt_j:6b": (402e9, 512 * 2048, 1.2e-4),
  "bloom:176b": (366e9, 2048 * 2048, 6e-5),
  "mt_nlg:530b": (270e9, 1920 * 2048, 5e-5),
  "gopher:280b": (300e9, 6 * 2**20, 4e-5),
  "chinchilla:70b": (1.4e12, 3 * 2**20, 1e-4),
  "glam:64b-64e": (600e9, 2**20, 1e-2),
  "switch_decoder:base-128": (576e9, 2**20, 1e-2),
  "smollm2:1.7b": (11e12, 2**21, 5e-4),
  "gpt3:175b": (300e9, 3.2e6, 6e-5),
  "palm:540b": (780e9, 2048 * 2048, 1e-2),
  "llama:65b": (1.4e12, 4 * 2**20, 1.5e-4),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_published_ones(name):
  config = cli.named_config(name)
  batch = config.data.batch_size * config.data.row_length
  tokens, tokens_a_batch, rate = RECIPES[name]
  assert config.train.steps * batch == pytest.approx(tokens, rel=2e-3)
  assert batch == pytest.approx(tokens_a_batch, rel=0.02)
  assert config.optimizer.learning_rate == rate


def on_the_page():
  """Rows of the table: {name: (parameters, active parameters, slice)}."""
  row = r"^\| `(\w+:[\w.-]+)` \| ([\d,]+) \| ([\d,]*) ?\| (v5p-\d+) \|$"
  number = lambda text: int(text.replace(",", ""))
  return {
    name: (number(total), number(active or total), at)
    for name, total, active, at in re.findall(row, PAGE.read_text(), re.MULTILINE)
  }


def test_the_page_has_all_counts():
  assert {name: row[:2] for name, row in on_the_page().items()} == {
    name: (COUNTS[name], ACTIVE.get(name, COUNTS[name])) for name in COUNTS
  }


@pytest.mark.parametrize("name", COUNTS)
def test_the_slice_on_the_page_holds_it_and_half_of_it_does_not(name):
  _, _, at = on_the_page()[name]
  chip, chips = CHIPS["v5p"], parse_topology(at).num_chips
  setup = start(cli.named_config(name))
  best = search(setup, chip, chips, quick=True)[0]
  assert best.fits
  # Weights and gradients in float32, and two moments, of which Adafactor keeps neither.
  state = (8 if setup.config.optimizer.name == "adafactor" else 16) * COUNTS[name]
  assert state / chips < best.memory.total <= ROOM * chip.hbm_bytes
  if chips > 4:  # the smallest slice that is sold
    assert not any(option.fits for option in search(setup, chip, chips // 2, quick=True))


QWEN = {"head_dim": 128, "qk_norm": True, "eps": 1e-6, "theta": 1e6}
BIGBIRD = [f"BigBird(64, 64, 3, {seed})" for seed in range(4)]


def layers_of(spec):
  """Without the choices that change no function of the weights."""

  def plain(layer):
    if not isinstance(layer.mlp, MoeSpec):
      return layer
    return replace(layer, mlp=replace(layer.mlp, jitter=0.0, balance_loss=0.0, min_capacity=1))

  layers = tuple(map(plain, spec.layers))
  return replace(spec, segments=(Segment(layers),), init=families.gpt(1, 8, 2).init)


@pytest.mark.parametrize(
  ("name", "family"),
  [
    ("gpt3:1.3b", families.gpt_sparse(24, 2048, 16, None, length=2048)),
    ("gpt2:1.5b", families.gpt(48, 1600, 25, length=1024)),
    ("mt_nlg:530b", families.gpt(105, 20_480, 128, vocab=51_200)),
    ("gpt_j:6b", families.gpt_j()),
    ("bloom:176b", families.bloom(70, 14_336, 112)),
    ("gopher:280b", families.gopher(80, 16_384, 128, 128, biases=True)),
    ("chinchilla:70b", families.gopher(80, 8192, 64, 128, biases=True)),
    ("mistral:7b", families.llama(32, 4096, 32, 8, 14_336, 32_000, window=4096)),
    ("smollm2:135m", families.llama(30, 576, 9, 3, 1536, 49_152, theta=1e5, tied=True)),
    ("gemma2:27b", families.gemma2(46, 4608, 32, 16, 128, 36_864, scale=144**-0.5)),
    ("qwen3:32b", families.llama(64, 5120, 64, 8, 25_600, 151_936, **QWEN)),
    ("qwen3:4b", families.llama(36, 2560, 32, 8, 9728, 151_936, tied=True, **QWEN)),
    (
      "qwen3:30b-a3b",
      families.llama(48, 2048, 32, 4, 0, 151_936, mlp=families.top_k(128, 8, 768), **QWEN),
    ),
    ("gpt_oss:120b", families.gpt_oss(36, 2880, 64, 8, 64, 2880, 128, 4)),
    ("switch_decoder:base-8", families.switch(24, 768, 12, 64, 3072, 8)),
    ("glam:64b-64e", families.glam(64, 8192, 128, 128, 32_768, 64)),
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
  if name.startswith("gpt3"):  # every second layer has a band
    assert [layer.attention.window for layer in model.layers[:4]] == [None, 256, None, 256]
    plain = lambda layer: replace(layer, attention=replace(layer.attention, window=None))
    model = replace(model, segments=(Segment(tuple(map(plain, model.layers))),))
  assert model == family
