"""Published models as ModelSpecs of any size: the tests build them tiny and at full size."""

from dataclasses import replace

from layers.spec import (
  AlibiSpec,
  AttentionSpec,
  BucketedSpec,
  EmbeddingSpec,
  HeadSpec,
  LatentAttentionSpec,
  LayerSpec,
  LearnedPositionSpec,
  LinearAttentionSpec,
  LinearScaling,
  Llama3Scaling,
  MlpSpec,
  ModelSpec,
  MoeSpec,
  NormSpec,
  RotarySpec,
  Segment,
  TransformerXLSpec,
  YarnScaling,
)

LAYER_NORM = NormSpec("layer", eps=1e-5, bias=True)
UNIT_NORM = NormSpec(unit_offset=True)


def repeated(*layers, count):
  """`count` layers of the repeating group, the last group cut short if need be."""
  whole, rest = divmod(count, len(layers))
  segments = (Segment(layers, whole),) if whole else ()
  return segments + tuple(Segment((layer,)) for layer in layers[:rest])


def gpt(count, d, heads, *, vocab=50257, length=2048, activation="gelu_tanh"):
  """GPT-2 and GPT-3 (arXiv 2005.14165)."""
  attention = AttentionSpec(heads, d // heads, qkv_bias=True, out_bias=True)
  layer = LayerSpec(attention, MlpSpec(4 * d, activation, gated=False, bias=True), LAYER_NORM)
  return ModelSpec(
    vocab,
    d,
    repeated(layer, count=count),
    max_length=length,
    embedding=EmbeddingSpec(position=LearnedPositionSpec(length)),
    final_norm=LAYER_NORM,
    head=HeadSpec(tied=True),
  )


def opt(count, d, heads, *, vocab=50272, length=2048):
  """OPT (arXiv 2205.01068): GPT with ReLU and two spare position rows."""
  base = gpt(count, d, heads, vocab=vocab, length=length, activation="relu")
  return replace(base, embedding=EmbeddingSpec(position=LearnedPositionSpec(length, offset=2)))


def opt_350m(count=24, d=1024, heads=16, *, width=512, vocab=50272, length=2048):
  """The odd one: norms after the sums, narrow table, no final norm."""
  base = opt(count, d, heads, vocab=vocab, length=length)
  (segment,) = base.segments
  layer = replace(segment.layers[0], norm_placement="post")
  return replace(
    base,
    segments=repeated(layer, count=count),
    embedding=replace(base.embedding, width=width),
    final_norm=None,
  )


def gpt_neo(count, d, heads, *, vocab=50257, length=2048, window=256):
  """Layers alternate global and local; no factor on the logits, no bias on q, k, v."""
  base = gpt(count, d, heads, vocab=vocab, length=length)
  attention = AttentionSpec(heads, d // heads, out_bias=True, scale=1.0)
  layer = replace(base.segments[0].layers[0], attention=attention)
  local = replace(layer, attention=replace(attention, window=window))
  return replace(base, segments=repeated(layer, local, count=count))


def gpt_sparse(count, d, heads, *masks, vocab=50257, length=2048):
  """GPT-3's other half: layers alternate dense and the given sparse masks (arXiv 2005.14165)."""
  base = gpt(count, d, heads, vocab=vocab, length=length)
  layer = base.segments[0].layers[0]
  sparse = [replace(layer, attention=replace(layer.attention, mask=mask)) for mask in masks]
  return replace(base, segments=repeated(layer, *sparse, count=count))


def bert(count, d, heads, *masks, vocab=50358, length=4096, dropout=0.0):
  """BERT (arXiv 1810.04805) and, with masks for layers in turn, BigBird (arXiv 2007.14062)."""
  norm = replace(LAYER_NORM, eps=1e-12)
  base = gpt(count, d, heads, vocab=vocab, length=length)
  (attention,) = {layer.attention for layer in base.layers}
  layers = [
    replace(
      base.layers[0],
      attention=replace(attention, causal=False, mask=mask),
      norm=norm,
      norm_placement="post",
      dropout=dropout,
    )
    for mask in masks or [None]
  ]
  return replace(
    base,
    segments=repeated(*layers, count=count),
    embedding=replace(base.embedding, norm=norm, dropout=dropout),
    final_norm=norm,
    head=HeadSpec(tied=True, bias=True, transform="gelu_tanh"),
  )


def gpt_j(count=28, d=4096, heads=16, *, rotary=64, vocab=50400, length=2048):
  """One norm for both branches, interleaved rotary on part of a head, a head with bias."""
  attention = AttentionSpec(heads, d // heads, position=RotarySpec(dims=rotary, interleaved=True))
  mlp = MlpSpec(4 * d, "gelu_tanh", gated=False, bias=True)
  return ModelSpec(
    vocab,
    d,
    repeated(LayerSpec(attention, mlp, LAYER_NORM, parallel=True), count=count),
    max_length=length,
    final_norm=LAYER_NORM,
    head=HeadSpec(bias=True),
  )


def bloom(count, d, heads, *, vocab=250_880):
  """ALiBi and a norm on the embedding (arXiv 2211.05100)."""
  base = gpt(count, d, heads, vocab=vocab)
  layer = base.segments[0].layers[0]
  layer = replace(layer, attention=replace(layer.attention, position=AlibiSpec()))
  embedding = EmbeddingSpec(norm=LAYER_NORM)
  return replace(base, segments=repeated(layer, count=count), embedding=embedding)


def llama(
  count, d, heads, kv, ff, vocab, *, head_dim=None, tied=False, eps=1e-5, theta=1e4, scaling=None,
  qk_norm=False, window=None, mlp=None, bias=False,
):  # fmt: skip
  """LLaMA 1 to 3 (arXiv 2302.13971, 2407.21783), Mistral, Qwen3; with `mlp` experts, Mixtral."""
  norm = NormSpec(eps=eps)
  attention = AttentionSpec(
    heads,
    head_dim or d // heads,
    num_kv_heads=kv,
    window=window,
    position=RotarySpec(theta, scaling=scaling),
    qk_norm=norm if qk_norm else None,
    qkv_bias=bias,
    out_bias=bias,
  )
  layer = LayerSpec(attention, mlp or MlpSpec(ff), norm)
  segments = repeated(layer, count=count)
  return ModelSpec(vocab, d, segments, final_norm=norm, head=HeadSpec(tied))


LLAMA_31 = Llama3Scaling(factor=8.0)
LLAMA_32 = Llama3Scaling(factor=32.0)


def chunked(count, d, heads, kv, ff, vocab, *, chunk, experts):
  """Llama 4: three layers see runs of `chunk`, the fourth all and no positions; sigmoid experts."""
  local = AttentionSpec(heads, d // heads, kv, chunk=chunk, position=RotarySpec(5e5))
  everything = replace(local, chunk=None, position=None)
  mlp = MlpSpec(ff)
  moe = MoeSpec(experts, mlp, router="top_k", scores="sigmoid", scale_input=True, shared=mlp)
  layers = [LayerSpec(a, moe) for a in (local, local, local, everything)]
  return ModelSpec(vocab, d, repeated(*layers, count=count))


def palm(count, d, heads, *, head_dim=256, vocab=256_000):
  """Parallel blocks, one key/value head, logits over sqrt(d) (arXiv 2204.02311)."""
  norm = NormSpec("layer", eps=1e-6)
  attention = AttentionSpec(heads, head_dim, num_kv_heads=1, position=RotarySpec())
  layer = LayerSpec(attention, MlpSpec(4 * d), norm, parallel=True)
  return ModelSpec(
    vocab,
    d,
    repeated(layer, count=count),
    final_norm=norm,
    head=HeadSpec(tied=True, scale=d**-0.5),
  )


def gopher(count, d, heads, head_dim, *, vocab=32_000, biases=False):
  """Transformer-XL positions, RMSNorm, and with `biases` all of Gopher (arXiv 2112.11446)."""
  attention = AttentionSpec(heads, head_dim, position=TransformerXLSpec(biases), out_bias=biases)
  layer = LayerSpec(attention, MlpSpec(4 * d, "gelu_tanh", gated=False, bias=biases))
  return ModelSpec(vocab, d, repeated(layer, count=count), head=HeadSpec(tied=True, bias=biases))


def gemma2(count, d, heads, kv, head_dim, ff, *, scale, vocab=256_000, window=4096, cap=50.0):
  """Four norms a layer, soft caps, local and global layers in turn (arXiv 2408.00118)."""
  everything = AttentionSpec(heads, head_dim, kv, position=RotarySpec(), scale=scale, softcap=cap)
  local = replace(everything, window=window)
  mlp = MlpSpec(ff, "gelu_tanh")
  layers = [LayerSpec(a, mlp, UNIT_NORM, "both") for a in (local, everything)]
  return ModelSpec(
    vocab,
    d,
    repeated(*layers, count=count),
    embedding=EmbeddingSpec(scale_by_sqrt_dim=True),
    final_norm=UNIT_NORM,
    head=HeadSpec(tied=True, softcap=30.0),
  )


def gemma3(count, d, heads, kv, head_dim, ff, *, scale, vocab=262_208, window=1024):
  """Five local layers to a global one, query and key norms, no caps (arXiv 2503.19786)."""
  base = gemma2(count, d, heads, kv, head_dim, ff, scale=scale, vocab=vocab)
  layer = base.segments[0].layers[0]
  local = replace(layer.attention, window=window, softcap=None, qk_norm=UNIT_NORM)
  position = RotarySpec(1e6, scaling=LinearScaling(8.0))
  everything = replace(local, window=None, position=position)
  layers = [replace(layer, attention=a) for a in (local,) * 5 + (everything,)]
  return replace(base, segments=repeated(*layers, count=count), head=HeadSpec(tied=True))


def t5(count, d, heads, head_dim, ff, *, vocab=32_128, buckets=32, distance=128, shared=True):
  """T5's decoder without cross-attention (arXiv 1910.10683)."""
  attention = AttentionSpec(
    heads, head_dim, position=BucketedSpec(buckets, distance, shared=shared), scale=1.0
  )
  layer = LayerSpec(attention, MlpSpec(ff, "relu", gated=False))
  head = HeadSpec(tied=True, scale=d**-0.5)
  return ModelSpec(vocab, d, repeated(layer, count=count), head=head)


def with_odd_experts(base, count, moe):
  """Every second layer sparse, from the second on (Switch, GLaM)."""
  layer = base.segments[0].layers[0]
  return replace(base, segments=repeated(layer, replace(layer, mlp=moe), count=count))


def switch(count, d, heads, head_dim, ff, experts, **kwargs):
  """Switch Transformer as a decoder (arXiv 2101.03961)."""
  base = t5(count, d, heads, head_dim, ff, **kwargs)
  slots = {"dispatch": "capacity", "capacity_factor": 1.25, "min_capacity": 1}
  moe = MoeSpec(experts, base.layers[0].mlp, **slots)
  return with_odd_experts(base, count, moe)


def glam(count, d, heads, head_dim, ff, experts, *, vocab=256_000, shared=False, **kwargs):
  """Top-2 experts without a gate matrix between gated dense layers (arXiv 2112.06905)."""
  base = t5(count, d, heads, head_dim, ff, vocab=vocab, shared=shared, **kwargs)
  base = replace(
    base, segments=(Segment((replace(base.layers[0], mlp=MlpSpec(ff, "gelu")),), count),)
  )
  moe = MoeSpec(experts, MlpSpec(ff, "gelu", gated=False), 2, router="top_k", normalize=True)
  return with_odd_experts(base, count, moe)


def top_k(experts, k, ff, **kwargs):
  return MoeSpec(experts, MlpSpec(ff), k, router="top_k", normalize=True, **kwargs)


def gpt_oss(count, d, heads, kv, head_dim, ff, experts, k, *, vocab=201_088, window=128):
  """Sinks, biases everywhere, clamped experts, YaRN without rounding (arXiv 2508.10925)."""
  position = RotarySpec(150_000.0, scaling=YarnScaling(32.0, 4096, truncate=False))
  everything = AttentionSpec(
    heads, head_dim, kv, position=position, qkv_bias=True, out_bias=True, sink=True
  )
  local = replace(everything, window=window)
  expert = MlpSpec(ff, "quick_gelu", bias=True, clamp=7.0, up_offset=1.0)
  moe = MoeSpec(experts, expert, k, router="top_k", normalize=True, router_bias=True)
  norm = NormSpec(eps=1e-5)
  layers = [LayerSpec(a, moe, norm) for a in (local, everything)]
  return ModelSpec(vocab, d, repeated(*layers, count=count), final_norm=norm)


def deepseek_v3(
  count, d, heads, ff, expert_ff, experts, k, *, vocab=129_280, dense=3, q_lora=1536, kv_lora=512,
  nope=128, rope=64, value=128, original=4096,
):  # fmt: skip
  """Latent attention, dense layers first, a shared expert (arXiv 2412.19437)."""
  scaling = YarnScaling(40.0, original, attention_factor=1.0)
  attention = LatentAttentionSpec(
    heads,
    kv_lora,
    nope,
    rope,
    value,
    q_lora=q_lora,
    position=RotarySpec(interleaved=True, scaling=scaling),
    scale=(nope + rope) ** -0.5 * 1.3688879454113936**2,  # 0.1 ln 40 + 1
  )
  groups = 8 if experts % 16 == 0 else 2
  moe = top_k(
    experts, k, expert_ff, shared=MlpSpec(expert_ff), scores="sigmoid", routed_scale=2.5,
    num_groups=groups, keep_groups=groups // 2, bias_rate=1e-3, balance_loss=1e-4,
  )  # fmt: skip
  first, then = LayerSpec(attention, MlpSpec(ff)), LayerSpec(attention, moe)
  return ModelSpec(vocab, d, (Segment((first,), dense), Segment((then,), count - dense)))


def hybrid(count, d, heads, head_dim, ff, *kinds, vocab=32_000, every=4, position=None, conv=0):
  """Linear layers of these kinds in turn; each `every`-th layer is softmax attention.

  `conv` is the delta rule's.
  """
  norm, mlp = NormSpec(), MlpSpec(ff)
  softmax = LayerSpec(AttentionSpec(heads, head_dim, position=RotarySpec()), mlp, norm)
  linear = [
    LayerSpec(
      LinearAttentionSpec(
        kind,
        heads,
        head_dim,
        head_dim + 2,
        position if kind == "retention" else None,
        conv=conv if kind == "delta" else 0,
      ),
      mlp,
      norm,
    )
    for kind in kinds
  ]
  layers = (*(linear[i % len(linear)] for i in range(every - 1)), softmax)
  return ModelSpec(vocab, d, repeated(*layers, count=count))
