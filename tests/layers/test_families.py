"""Each published model, tiny, against one in float64: logits, and loss without logits."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from layers.spec import LinearScaling, RotarySpec, YarnScaling
from layers.transformer import TransformerLM
from tests.layers import families
from tests.layers.stacks import quick_jit, random_params
from tests.oracles import decoder

D, T, V = 16, 12, 29
Z_LOSS = 1e-2

YARN = YarnScaling(4.0, original_length=16)
FAMILIES = {
  "gpt3": families.gpt(2, D, 2, vocab=V, length=T),
  "opt_350m": families.opt_350m(2, D, 2, width=8, vocab=V, length=T),
  "gpt_neo": families.gpt_neo(2, D, 2, vocab=V, length=T, window=3),
  "gpt_sparse": families.gpt_sparse(
    3, D, 2, "SparseTransformer(4)", "Local(2) | Global(1)", vocab=V, length=T
  ),
  "bert": families.bert(2, D, 2, vocab=V, length=T),
  "bigbird": families.bert(2, D, 2, "BigBird(4, 3, 0)", vocab=V, length=T),
  "gpt_j": families.gpt_j(2, D, 2, rotary=4, vocab=V, length=T),
  "bloom": families.bloom(2, 18, 3, vocab=V),
  "llama31": families.llama(2, D, 4, 2, 24, V, scaling=families.LLAMA_31, bias=True),
  "llama_interpolated": families.llama(2, D, 2, 2, 24, V, scaling=LinearScaling(2.0), tied=True),
  "palm": families.palm(2, D, 2, head_dim=12, vocab=V),
  "gopher": families.gopher(2, D, 2, 12, vocab=V),
  "gopher_biases": families.gopher(1, D, 2, 8, vocab=V, biases=True),
  "gemma2": families.gemma2(2, D, 4, 2, 6, 24, scale=0.3, vocab=V, window=3, cap=2.0),
  "gemma3": families.gemma3(7, D, 2, 1, 8, 24, scale=0.3, vocab=V, window=3),
  "qwen3": families.llama(2, D, 2, 1, 24, V, head_dim=12, qk_norm=True, scaling=YARN),
  "llama4": families.chunked(4, D, 2, 1, 24, V, chunk=4, experts=3),
  "t5": families.t5(2, D, 2, 12, 24, vocab=V, buckets=6, distance=9),
  "switch": families.switch(4, D, 2, 8, 24, 4, vocab=V, buckets=6, distance=9),
  "glam": families.glam(2, D, 2, 8, 24, 4, vocab=V, buckets=6, distance=9),
  "mixtral": families.llama(2, D, 2, 1, 24, V, mlp=families.top_k(4, 2, 24, group_size=6)),
  "gpt_oss": families.gpt_oss(2, D, 4, 2, 6, 24, 4, 2, vocab=V, window=3),
  "deepseek_v3": families.deepseek_v3(
    2, D, 2, 24, 12, 4, 2, vocab=V, dense=1, q_lora=8, kv_lora=10, nope=6, rope=4, value=5,
    original=16,
  ),
  "deepseek_v2_lite": families.deepseek_v3(
    2, D, 2, 24, 12, 4, 2, vocab=V, dense=1, q_lora=None, kv_lora=10, nope=6, rope=4, value=8,
  ),
  "retention": families.hybrid(1, D, 2, 6, 24, "retention", vocab=V, position=RotarySpec()),
  "hybrid": families.hybrid(4, D, 2, 6, 24, "elu", "gla", "delta", vocab=V),
  "convolutions": families.hybrid(2, D, 2, 6, 24, "delta", vocab=V, every=2, conv=4),
}  # fmt: skip


def rows():
  """One row with one document; one with two documents and padding."""
  rng = np.random.default_rng(1)
  tokens, targets = rng.integers(0, V, (2, 2, T), dtype=np.int32)
  segments = np.array([[1] * T, [1] * 5 + [2] * 4 + [0] * 3], np.int32)
  positions = np.array([range(T), [*range(5), *range(4), *range(3)]], np.int32)
  return tokens, targets, positions, segments


@pytest.mark.parametrize("name", FAMILIES)
def test_against_float64(name):
  spec = FAMILIES[name]
  params = random_params(spec)
  tokens, targets, positions, segments = rows()
  valid = segments > 0
  run = partial(TransformerLM(spec).apply, positions_BT=positions, segments_BT=segments, train=True)
  weights = jnp.asarray(valid, jnp.float32)

  @quick_jit
  def both(params):
    scored = run({"params": params}, tokens, targets_BT=targets, weights_BT=weights, z_loss=Z_LOSS)
    return run({"params": params}, tokens).logits_BTV, scored.loss

  logits, loss = both(params)
  want = decoder.logits(spec, params, tokens, positions=positions, segments=segments, train=True)
  np.testing.assert_allclose(np.asarray(logits)[valid], want[valid], atol=2e-5)

  nll, log_z = decoder.losses(want, targets)
  np.testing.assert_allclose(np.asarray(loss.nll_BT)[valid], nll[valid], atol=2e-5)
  np.testing.assert_allclose(loss.total, np.sum((nll + Z_LOSS * log_z**2)[valid]), rtol=1e-5)
