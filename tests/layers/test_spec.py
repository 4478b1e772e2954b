"""Specs refuse what cannot be built, naming the field and the value."""

import pytest

from layers.spec import (
  AlibiSpec,
  AttentionSpec,
  BucketedSpec,
  EmbeddingSpec,
  LatentAttentionSpec,
  LayerSpec,
  LearnedPositionSpec,
  LinearAttentionSpec,
  MlpSpec,
  ModelSpec,
  MoeSpec,
  NormSpec,
  RotarySpec,
  Segment,
)

MLP = MlpSpec(8)
LATENT = {"num_heads": 2, "kv_lora": 8, "nope_dim": 4, "rope_dim": 4, "value_dim": 4}


def model(*positions, **kwargs):
  layers = tuple(LayerSpec(AttentionSpec(heads, 4, position=p), MLP) for heads, p in positions)
  return ModelSpec(7, 8, (Segment(layers),), **kwargs)


REFUSED = [
  (lambda: NormSpec(eps=0.0), "norm eps must be positive, got 0.0"),
  (lambda: NormSpec("rms", bias=True), "an RMSNorm has no bias"),
  (lambda: RotarySpec(theta=-1.0), "rotary theta must be positive, got -1.0"),
  (lambda: RotarySpec(dims=3), "rotary dims must be even, got 3"),
  (lambda: AttentionSpec(0, 4), "attention num_heads must be positive, got 0"),
  (lambda: AttentionSpec(4, 4, window=0), "attention window must be positive, got 0"),
  (lambda: AttentionSpec(4, 4, window=3, causal=False), "with causal=false use mask"),
  (
    lambda: AttentionSpec(4, 4, position=AlibiSpec(), causal=False),
    "ALiBi and Transformer-XL look back",
  ),
  (lambda: AttentionSpec(4, 4, 3), "num_heads=4 is not a multiple of num_kv_heads=3"),
  (lambda: AttentionSpec(4, 5, position=RotarySpec()), "rotary dims=5 do not fit an even part"),
  (lambda: AttentionSpec(4, 4, position=RotarySpec(dims=6)), "rotary dims=6 do not fit"),
  (lambda: LatentAttentionSpec(**LATENT | {"kv_lora": 0}), "latent attention kv_lora must be"),
  (lambda: LatentAttentionSpec(**LATENT | {"rope_dim": 3}), "rope_dim=3 must be even"),
  (lambda: LatentAttentionSpec(**LATENT, position=RotarySpec(dims=2)), "leave position.dims out"),
  (lambda: LinearAttentionSpec("gla", 2, 0), "linear attention head_dim must be positive, got 0"),
  (lambda: LinearAttentionSpec("elu", 2, 4, position=RotarySpec()), "belongs to kind=retention"),
  (lambda: LinearAttentionSpec("gla", 2, 4, conv=4), "conv belongs to kind=delta, not to kind=gla"),
  (lambda: LinearAttentionSpec("delta", 2, 4, conv=1), r"0 \(none\) or 2 and more tokens, got 1"),
  (lambda: LinearAttentionSpec("retention", 2, 5, position=RotarySpec()), "rotary dims=5 do not"),
  (lambda: MlpSpec(0), "mlp hidden must be positive, got 0"),
  (lambda: MlpSpec(8, gated=False, up_offset=1.0), "up_offset needs a gated MLP"),
  (lambda: MoeSpec(0, MLP), "num_experts must be positive, got 0"),
  (lambda: MoeSpec(2, MLP, 3), "experts_per_token=3 must lie in 1..num_experts=2"),
  (lambda: MoeSpec(4, MLP, 2), "use router=top_k for more"),
  (lambda: MoeSpec(4, MLP, eval_capacity_factor=0.0), "eval_capacity_factor must be positive"),
  (lambda: MoeSpec(4, MLP, jitter=1.0), r"jitter must lie in \[0, 1\), got 1.0"),
  (lambda: MoeSpec(4, MLP, expert_dropout=-0.1), r"expert_dropout must lie in \[0, 1\)"),
  (lambda: MoeSpec(4, MLP, router="gshard"), "sends a token to two experts, not 1"),
  (lambda: MoeSpec(4, MLP, router="hash"), "hash_vocab, the number of token ids"),
  (lambda: MoeSpec(6, MLP, router="top_k", num_groups=4), "num_groups=4 must divide num_experts=6"),
  (
    lambda: MoeSpec(8, MLP, 3, router="top_k", num_groups=4),
    "1 groups of 2 experts are fewer than experts_per_token=3",
  ),
  (lambda: MoeSpec(4, MLP, scores="sigmoid"), "belong to router=top_k"),
  (
    lambda: MoeSpec(4, MLP, 2, router="top_k", scale_input=True),
    "scale_input needs one expert a token",
  ),
  (lambda: MoeSpec(4, MLP, router="expert_choice", noncausal=True), "use dispatch=capacity"),
  (
    lambda: MoeSpec(4, MLP, router="expert_choice", dispatch="capacity"),
    "a decoder trained with them can't generate; noncausal=true allows it",
  ),
  (lambda: MoeSpec(4, MLP, priority="gate", dispatch="einsum"), "noncausal=true allows it"),
  (lambda: MoeSpec(4, MLP, buffer_factor=0.0), "buffer_factor must be positive"),
  (
    lambda: LayerSpec(AttentionSpec(2, 4), MLP, norm_placement="post", parallel=True),
    "a parallel block normalises before",
  ),
  (lambda: LayerSpec(AttentionSpec(2, 4), MLP, dropout=1.0), r"dropout must lie in \[0, 1\)"),
  (lambda: Segment(()), "a segment needs at least one layer"),
  (lambda: Segment((LayerSpec(AttentionSpec(2, 4), MLP),), 0), "repeats must be positive, got 0"),
  (lambda: ModelSpec(7, 0, ()), "embed_dim must be positive, got 0"),
  (lambda: ModelSpec(7, 8, ()), "a model needs at least one segment"),
  (
    lambda: model((2, None), embedding=EmbeddingSpec(position=LearnedPositionSpec(9))),
    "max_length=2048 exceeds the position table of 9 rows",
  ),
  (lambda: model((2, BucketedSpec()), (4, BucketedSpec())), "need equal num_heads and position"),
  (lambda: model((2, BucketedSpec(8)), (2, BucketedSpec(9))), "need equal num_heads and position"),
]


@pytest.mark.parametrize("make, message", REFUSED, ids=[message for _, message in REFUSED])
def test_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_layers_in_order_and_tables_of_their_own():
  own = BucketedSpec(8, shared=False)
  spec = model((2, own), (4, own))
  assert [layer.attention.num_heads for layer in spec.layers] == [2, 4]
  spec = ModelSpec(7, 8, (Segment(spec.layers, 2), Segment(spec.layers[:1])))
  assert [layer.attention.num_heads for layer in spec.layers] == [2, 4, 2, 4, 2]
  assert spec.num_layers == 5


def test_what_a_position_puts_into_the_cache():
  """DeepSeek-V3 keeps 512 + 64 numbers a position, whatever the number of heads."""
  numbers = lambda attention: sum(heads * size for heads, size in attention.cached)
  assert numbers(LatentAttentionSpec(128, 512, 128, 64, 128)) == 576
  assert numbers(AttentionSpec(32, 128, 8)) == 2 * 8 * 128
