"""Worked examples of published runs, each by the convention its authors used."""

import pytest

from experiments.configs import mixtral, moe_70b
from experiments.planning.conventions import CONVENTIONS, days, flops_per_token, mfu
from experiments.planning.laws import PF_DAY
from layers import count
from layers.count import count_params
from layers.spec import AttentionSpec, HeadSpec, LayerSpec, MlpSpec, ModelSpec, Segment
from tests.layers import families as f

V4, A100, V6E, V5P = 275e12, 312e12, 918e12, 459e12


def test_palm():
  """238.3e3 tokens a second on 6144 v4: the paper states 46.2 %, and 45.7 % without attention."""
  palm = f.palm(118, 18432, 48)
  with_attention, without = (flops_per_token(palm, 2048, c) for c in ("palm", "6nd"))
  assert without == pytest.approx(3.2421e12, rel=1e-4)
  assert with_attention - without == 12 * 118 * 48 * 256 * 2048
  assert 100 * mfu(238.3e3, with_attention, 6144, V4) == pytest.approx(46.23, abs=0.005)
  assert 100 * mfu(238.3e3, without, 6144, V4) == pytest.approx(45.73, abs=0.005)


def test_opt():
  """300e9 tokens with everything recomputed: 4.30e23 are published."""
  opt = f.opt(96, 12288, 96)
  assert opt.vocab_size == 50272
  recomputed, once, model = (
    3e11 * flops_per_token(opt, 2048, c) for c in ("megatron recompute", "megatron", "6nd")
  )
  assert recomputed == pytest.approx(4.302e23, rel=2e-4)
  formula = 3e11 * 96 * 96 * 12288**2 * (1 + 2048 / (6 * 12288) + 50272 / (16 * 96 * 12288))
  assert recomputed == pytest.approx(formula, rel=1e-12)
  # 72 in place of 96 gives 3.226e23; the logits, which are never recomputed, are the difference.
  assert once == pytest.approx(3.229e23, rel=2e-4)
  assert once - formula * 72 / 96 == pytest.approx(3e11 * 1.5 * 12288 * 50272, rel=1e-9)
  assert model == pytest.approx(3.143e23, rel=2e-4)
  assert days(recomputed, 1024, 147e12) == pytest.approx(33.1, abs=0.05)
  assert days(recomputed, 992, 147e12) == pytest.approx(34.1, abs=0.06)
  # 147 TFLOP/s are 47 % of the hardware's peak, and of the model's FLOPs 35 %.
  assert mfu(1, 147e12, 1, A100) == pytest.approx(0.471, abs=1e-3)
  assert 147e12 / A100 * once / recomputed == pytest.approx(0.353, abs=1e-3)


def test_gpt3():
  gpt3 = f.gpt(96, 12288, 96)
  assert 3e11 * flops_per_token(gpt3, 2048, "6nd") / PF_DAY == pytest.approx(3637, abs=1)


@pytest.mark.parametrize("length, flops", [(2048, 2.479e10), (4096, 2.801e10)])
def test_moe_70b(length, flops):
  """Active parameters without the input table, and 12 * 32 layers * 4096 a key."""
  spec = moe_70b.model()
  found = flops_per_token(spec, length, "palm")
  assert found == 6 * 3_594_784_768 + 12 * 32 * 4096 * length
  assert found == pytest.approx(flops, rel=2e-4)
  assert flops_per_token(spec, length, "6nd") == 6 * count_params(spec).active


# MaxText's published tokens a second and chip, and the share of peak by palm's and causal FLOPs.
MAXTEXT = {
  "llama2_70b_v6e": (lambda: f.llama(80, 8192, 64, 8, 28672, 32000), 4096, 900, V6E, 43.6, 42.0),
  "llama3_8b_v6e": (
    lambda: f.llama(32, 4096, 32, 8, 14336, 128_256), 8192, 7207, V6E, 45.5, 40.4,
  ),
  "llama3_70b_v6e": (
    lambda: f.llama(80, 8192, 64, 8, 28672, 128_256), 8192, 960, V6E, 50.3, 47.0,
  ),
  "mixtral_8x7b_v6e": (lambda: mixtral.model("8x7b"), 4096, 3899, V6E, 35.2, 33.9),
  "mixtral_8x22b_v6e": (lambda: mixtral.model("8x22b"), 4096, 1326, V6E, 36.2, 35.0),
  "mixtral_8x7b_v5p": (lambda: mixtral.model("8x7b"), 4096, 2909, V5P, 52.6, 50.5),
}  # fmt: skip


@pytest.mark.parametrize("name", MAXTEXT)
def test_maxtext_counts_all_keys(name):
  make, length, rate, peak, *published = MAXTEXT[name]
  spec = make()
  found = [100 * mfu(rate, flops_per_token(spec, length, c), 1, peak) for c in ("palm", "causal")]
  assert found == pytest.approx(published, abs=0.06)


def one(heads=2, kv=None, hidden=64, gated=False, **attention) -> ModelSpec:
  layer = LayerSpec(AttentionSpec(heads, 8, kv, **attention), MlpSpec(hidden, gated=gated))
  return ModelSpec(11, 16, (Segment((layer,), 3),), head=HeadSpec(tied=True))


def test_causal_counts_the_pairs_that_are_seen(monkeypatch):
  monkeypatch.setattr(count, "count_params", lambda spec: count.Counts(0, 0, 0))  # attention only

  def keys(spec, convention="causal"):
    return flops_per_token(spec, 100, convention) / (3 * 12 * 2 * 8)

  def seen(visible):
    return sum(visible(i, j) for i in range(100) for j in range(i + 1)) / 100

  assert keys(one()) == pytest.approx(101 / 2)
  assert keys(one(), "palm") == 100
  assert keys(one(window=10)) == pytest.approx(seen(lambda i, j: i - j < 10))
  assert keys(one(chunk=30)) == pytest.approx(seen(lambda i, j: i // 30 == j // 30))
  mask = seen(lambda i, j: i - j <= 10 or j < 4)
  assert keys(one(mask="Local(10, 0) | Global(4)")) == pytest.approx(mask)
  assert keys(one(causal=False)) == keys(one(causal=False), "palm") == pytest.approx(100)
  latent = f.deepseek_v3(2, 16, 2, 8, 8, 4, 2, dense=1, kv_lora=4, nope=6, rope=4, value=8)
  assert flops_per_token(latent, 100, "causal") == pytest.approx(2 * 6 * 2 * (6 + 4 + 8) * 50.5)


def test_megatron_refuses_what_is_not_gpt():
  assert flops_per_token(one(), 100, "megatron") == pytest.approx(
    3 * 24 * 3 * 16**2 * (1 + 100 / 96) + 6 * 16 * 11
  )
  for spec in (one(kv=1), one(heads=4), one(hidden=48), one(gated=True), moe_70b.model()):
    with pytest.raises(ValueError, match="Megatron's formula is for dense GPT"):
      flops_per_token(spec, 100, "megatron")


def test_the_conventions_have_names():
  assert CONVENTIONS[1] == "palm"
  assert flops_per_token(one(), 100) == flops_per_token(one(), 100, "palm")
  with pytest.raises(ValueError, match="'bloom' is none of 6nd, palm, causal, megatron"):
    flops_per_token(one(), 100, "bloom")
