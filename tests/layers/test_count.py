"""Counts of full-size decoders are the published ones, to the parameter; nothing is allocated."""

import jax
import jax.numpy as jnp
import pytest

from experiments.configs import deepseek, mixtral, moe_70b
from layers.count import abstract_params, count_params, train_flops_per_token
from layers.spec import AttentionSpec, HeadSpec, LayerSpec, MlpSpec, ModelSpec, Segment
from layers.transformer import TransformerLM
from tests.layers import families as f
from tests.layers.stacks import POSITIONS, SWITCH

LLAMA_3 = {"vocab": 128_256, "theta": 5e5}
DENSE = {
  "gpt3_175b": (lambda: f.gpt(96, 12288, 96), 174_604_259_328),
  "opt_175b": (lambda: f.opt(96, 12288, 96), 174_604_468_224),
  "opt_350m": (lambda: f.opt_350m(), 331_196_416),
  "gpt_neo_2.7b": (lambda: f.gpt_neo(32, 2560, 20), 2_651_307_520),
  "gpt_j_6b": (lambda: f.gpt_j(), 6_050_882_784),
  "bloom_176b": (lambda: f.bloom(70, 14336, 112), 176_247_271_424),
  "gpt2_xl": (lambda: f.gpt(48, 1600, 25, length=1024), 1_557_611_200),
  "llama1_7b": (lambda: f.llama(32, 4096, 32, 32, 11008, 32000, eps=1e-6), 6_738_415_616),
  "llama1_13b": (lambda: f.llama(40, 5120, 40, 40, 13824, 32000, eps=1e-6), 13_015_864_320),
  "llama1_33b": (lambda: f.llama(60, 6656, 52, 52, 17920, 32000, eps=1e-6), 32_528_943_616),
  "llama1_65b": (lambda: f.llama(80, 8192, 64, 64, 22016, 32000), 65_285_660_672),
  "llama2_70b": (lambda: f.llama(80, 8192, 64, 8, 28672, 32000), 68_976_648_192),
  "llama3_8b": (lambda: f.llama(32, 4096, 32, 8, 14336, **LLAMA_3), 8_030_261_248),
  "llama3.1_405b": (
    lambda: f.llama(126, 16384, 128, 8, 53248, **LLAMA_3, scaling=f.LLAMA_31),
    405_853_388_800,
  ),
  "llama3.2_1b": (
    lambda: f.llama(16, 2048, 32, 8, 8192, **LLAMA_3, scaling=f.LLAMA_32, tied=True),
    1_235_814_400,
  ),
  "mistral_7b": (lambda: f.llama(32, 4096, 32, 8, 14336, 32000, window=4096), 7_241_732_096),
  "palm_540b": (lambda: f.palm(118, 18432, 48), 540_356_474_880),
  "gemma2_27b": (
    lambda: f.gemma2(46, 4608, 32, 16, 128, 36864, scale=144**-0.5), 27_227_128_320,
  ),
  "gemma3_27b": (
    lambda: f.gemma3(62, 5376, 32, 16, 128, 21504, scale=168**-0.5), 27_009_346_304,
  ),
  "qwen3_32b": (
    lambda: f.llama(64, 5120, 64, 8, 25600, 151_936, head_dim=128, qk_norm=True), 32_762_123_264,
  ),
  "qwen3_0.6b": (
    lambda: f.llama(28, 1024, 16, 8, 3072, 151_936, head_dim=128, qk_norm=True, tied=True),
    596_049_920,
  ),
  # Without the biases of the configs; the published rule leaves the norms out too.
  "gopher_280b": (lambda: f.gopher(80, 16384, 128, 128), 279_697_162_240 + 161 * 16384),
  "chinchilla_70b": (lambda: f.gopher(80, 8192, 64, 128), 70_055_362_560 + 161 * 8192),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE)
def test_dense(name):
  make, published = DENSE[name]
  counts = count_params(make())
  assert (counts.total, counts.active) == (published, published)


SPARSE = {
  "mixtral_8x7b": (
    lambda: mixtral.model("8x7b"),
    46_702_792_704, 12_879_925_248,
  ),
  "mixtral_8x22b": (
    lambda: mixtral.model("8x22b"),
    140_630_071_296, 39_161_468_928,
  ),
  "qwen3_30b_a3b": (
    lambda: f.llama(
      48, 2048, 32, 4, 768, 151_936, head_dim=128, qk_norm=True, mlp=f.top_k(128, 8, 768)
    ),
    30_532_122_624, 3_353_032_704,
  ),
  "deepseek_v3": (
    lambda: deepseek.model("v3"),
    671_026_404_352, 37_552_282_624,
  ),
  # Published without norms and bias tables.
  "glam_64b_64e": (
    lambda: f.glam(64, 8192, 128, 128, 32768, 64),
    1_161_755_099_136 + 129 * 8192 + 64 * 32 * 128, 96_603_209_728 + 129 * 8192 + 64 * 32 * 128,
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPARSE)
def test_sparse(name):
  make, total, active = SPARSE[name]
  assert count_params(make())[:2] == (total, active)


@pytest.mark.parametrize(
  "make, counts",
  [
    (
      lambda: f.gpt_oss(36, 2880, 64, 8, 64, 2880, 128, 4),
      (116_829_156_672, 5_711_982_912, 5_132_849_472),
    ),
    (
      lambda: f.gpt_oss(24, 2880, 64, 8, 64, 2880, 32, 4),
      (20_914_757_184, 4_187_440_704, 3_608_307_264),
    ),
    (moe_70b.model, (70_317_772_800, 3_729_002_496, 3_594_784_768)),
  ],
  ids=["gpt_oss_120b", "gpt_oss_20b", "moe_70b"],
)
def test_without_the_input_table(make, counts):
  assert count_params(make()) == counts


def test_what_multiplies_leaves_out_tables_that_are_only_read():
  """A tied table is the head too; absolute positions and an untied input table are not."""
  base = f.gpt(1, 8, 2, vocab=11, length=6)
  counts = count_params(base)
  assert counts.active - counts.active_matmul == 6 * 8
  narrow = count_params(f.opt_350m(1, 8, 2, width=4, vocab=11, length=6))
  assert narrow.active - narrow.active_matmul == (6 + 2) * 8
  untied = count_params(f.llama(1, 8, 2, 2, 16, 11))
  assert untied.active - untied.active_matmul == 11 * 8


@pytest.mark.parametrize("length, flops", [(2048, 2.479e10), (4096, 2.801e10)])
def test_flops_of_moe_70b(length, flops):
  assert train_flops_per_token(moe_70b.model(), length) == pytest.approx(flops, rel=2e-4)


def test_flops_of_attention():
  """12 heads * head_dim * keys seen at most; latent heads count the mean of key and value size."""

  def attention(spec, length):
    return train_flops_per_token(spec, length) - 6 * count_params(spec).active_matmul

  def one(**kwargs):
    layer = LayerSpec(AttentionSpec(2, 8, **kwargs), MlpSpec(16))
    return ModelSpec(11, 16, (Segment((layer,), 3),), head=HeadSpec(tied=True))

  assert attention(one(), 100) == 3 * 12 * 2 * 8 * 100
  assert attention(one(window=10), 100) == 3 * 12 * 2 * 8 * 10
  assert attention(one(chunk=20, window=30), 100) == 3 * 12 * 2 * 8 * 20
  assert attention(one(window=500), 100) == 3 * 12 * 2 * 8 * 100
  # The last query sees 10 before it, itself and the first 4. Without causality 28 of
  # 10 x 10 pairs are next to each other or the same.
  assert attention(one(mask="Local(10, 3) | Global(4)"), 100) == 3 * 12 * 2 * 8 * 15
  assert attention(one(mask="PerHead((Local(10, 0), Full()))"), 100) == 3 * 12 * 8 * (11 + 100)
  near = attention(one(mask="Local(1, 1)", causal=False), 10)
  assert near == pytest.approx(3 * 12 * 2 * 8 * 2.8)
  # Written and read: 4 FLOPs for each number of a state and direction, three directions.
  linear = f.hybrid(3, 16, 2, 8, 16, "gla", "delta")
  assert attention(linear, 100) == attention(linear, 10**6) == (12 + 18 + 12) * 2 * 8 * 10
  # Convolutions count by their weights: 3 tokens of q, k and v.
  without, with_conv = (
    count_params(f.hybrid(2, 16, 2, 8, 16, "delta", every=2, conv=conv)) for conv in (0, 3)
  )
  extra = with_conv.active_matmul - without.active_matmul
  assert extra == with_conv.total - without.total == 3 * 2 * (8 + 8 + 10)
  latent = f.deepseek_v3(2, 16, 2, 8, 8, 4, 2, dense=1, kv_lora=4, nope=6, rope=4, value=8)
  assert attention(latent, 100) == 2 * 6 * 2 * (6 + 4 + 8) * 100


SHAPES = {  # shared and other tables, latents, a prefix, leaves not trained, exact ones
  "positions": POSITIONS,
  "switch": SWITCH,
  "deepseek": deepseek.model("v3"),
  "gpt_neo_2.7b": f.gpt_neo(32, 2560, 20),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_those_of_what_is_drawn(name):
  """Axes, and whether a leaf is trained or exact, too: they are part of the tree."""
  spec = SHAPES[name]
  tokens_BT = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  drawn = jax.eval_shape(TransformerLM(spec).init, jax.random.key(0), tokens_BT)["params"]
  assert jax.tree.structure(abstract_params(spec)) == jax.tree.structure(drawn)
  kinds = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
  assert kinds(abstract_params(spec)) == kinds(drawn)
