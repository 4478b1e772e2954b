"""A decoder or encoder in numpy float64, layer by layer from the papers, driven by a ModelSpec.

Weights are the nested dict of arrays of `TransformerLM`, by its names. Rows are batched where the
definition is one matrix product; attention, routing and positions go token by token.
"""

import math

import numpy as np

from layers.spec import (
  AlibiSpec,
  BucketedSpec,
  LatentAttentionSpec,
  LinearAttentionSpec,
  LinearScaling,
  Llama3Scaling,
  MoeSpec,
  TransformerXLSpec,
  YarnScaling,
)
from tests.oracles import masks as mask_oracle
from tests.oracles import moe as moe_oracle
from tests.oracles import positions as position_oracle
from tests.oracles.attention import attention as attend
from tests.oracles.linear_attention import convolution, recurrent
from tests.oracles.mlp import activate, mlp
from tests.oracles.norms import layer_norm, rms_norm


def norm(spec, w, x):
  gain = w["scale"] + 1.0 if spec.unit_offset else w["scale"]
  if spec.kind == "rms":
    return rms_norm(x, gain, spec.eps)
  return layer_norm(x, gain, w.get("bias", np.zeros_like(gain)), spec.eps)


def rotate(spec, x, positions):
  dims = spec.dims or x.shape[-1]
  frequencies = [position_oracle.frequency(k, dims, spec.theta) for k in range(dims // 2)]
  s, factor = spec.scaling, 1.0
  if isinstance(s, LinearScaling):
    frequencies = [f / s.factor for f in frequencies]
  if isinstance(s, Llama3Scaling):
    low, high = s.low_freq_factor, s.high_freq_factor
    frequencies = [
      position_oracle.llama3_frequency(f, s.factor, low, high, s.original_length)
      for f in frequencies
    ]
  if isinstance(s, YarnScaling):
    frequencies = position_oracle.yarn_frequencies(
      dims, spec.theta, s.factor, s.original_length, s.beta_fast, s.beta_slow, s.truncate
    )
    factor = s.attention_factor
    if factor is None:
      factor = 0.1 * math.log(s.factor) + 1.0
  return position_oracle.rotate(x, positions, frequencies, spec.interleaved, factor)


# The masks, beside windows and chunks, that tests give to layers.
RULES = {
  None: mask_oracle.full,
  "SparseTransformer(4)": mask_oracle.either(mask_oracle.local(4), mask_oracle.strided(4)),
  "Local(2) | Global(1)": mask_oracle.either(mask_oracle.local(2), mask_oracle.global_tokens(1)),
  "BigBird(4, 3, 0)": mask_oracle.either(
    mask_oracle.block_local(3, 1, 1), mask_oracle.global_tokens(3), mask_oracle.global_tokens(3, 9)
  ),
}


def visibility(spec, positions, segments):
  """Within a document, by position; causal, local, chunked or sparse where the layer is."""
  window, chunk = getattr(spec, "window", None), getattr(spec, "chunk", None)
  rule, causal = RULES[getattr(spec, "mask", None)], getattr(spec, "causal", True)

  def visible(b, i, j):
    if segments[b, i] == 0 or segments[b, i] != segments[b, j]:
      return False
    pi, pj = positions[b, i], positions[b, j]
    if (causal and pj > pi) or (window is not None and pi - pj >= window):
      return False
    return (chunk is None or pi // chunk == pj // chunk) and rule(pi, pj)

  return visible


def position_bias(spec, w, q, positions, scale, shared_table):
  """(queries for the content, bias(b, n, i, j)) of ALiBi, T5 buckets or Transformer-XL."""
  p = spec.position
  distance = lambda b, i, j: int(positions[b, i] - positions[b, j])
  if isinstance(p, AlibiSpec):
    slopes = position_oracle.alibi_slopes(spec.num_heads)
    return q, lambda b, n, i, j: -slopes[n] * distance(b, i, j)
  if isinstance(p, BucketedSpec):
    table = shared_table if p.shared else w["bucket_table"]

    def bucketed(b, n, i, j):
      relative = -distance(b, i, j)
      bucket = position_oracle.t5_bucket(relative, p.num_buckets, p.max_distance, p.bidirectional)
      return table[bucket, n]

    return q, bucketed
  if isinstance(p, TransformerXLSpec):
    # Terms (a) + (c) and (b) + (d) of arXiv 1901.02860, section 3.3.
    r = position_oracle.sinusoids(int(positions.max()) + 1, w["relative"].shape[0])
    r = np.einsum("pd,dnh->pnh", r, w["relative"])
    u, v = (w[name] if p.biases else 0.0 for name in ("content_bias", "position_bias"))
    q_position = q + v
    return q + u, lambda b, n, i, j: scale * q_position[b, i, n] @ r[distance(b, i, j), n]
  return q, None


def attention(spec, w, x, positions, segments, shared_table):
  project = lambda name: (
    np.einsum("btd,dnh->btnh", x, w[name]) + (w[f"{name}_bias"] if spec.qkv_bias else 0.0)
  )
  q, k, v = project("query"), project("key"), project("value")
  if spec.qk_norm is not None:
    q, k = norm(spec.qk_norm, w["query_norm"], q), norm(spec.qk_norm, w["key_norm"], k)
  if hasattr(spec.position, "theta"):
    q, k = rotate(spec.position, q, positions), rotate(spec.position, k, positions)
  scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
  q, bias = position_bias(spec, w, q, positions, scale, shared_table)
  o = attend(
    q,
    k,
    v,
    visible=visibility(spec, positions, segments),
    scale=scale,
    softcap=spec.softcap,
    bias=bias,
    sink=w["sink"] if spec.sink else None,
  )
  return np.einsum("btnh,nhd->btd", o, w["out"]) + (w["out_bias"] if spec.out_bias else 0.0)


def latent_attention(spec, w, x, positions, segments):
  """DeepSeek-V2, arXiv 2405.04434, equations 9 to 19, every head's key and value written out."""
  H, P = spec.nope_dim, spec.rope_dim
  c_q = x
  if spec.q_lora is not None:
    c_q = norm(spec.norm, w["query_norm"], x @ w["query_down"])
  q = np.einsum("btc,cnh->btnh", c_q, w["query"])
  q_rotated = rotate(spec.position, q[..., H:], positions)
  c_kv = norm(spec.norm, w["latent_norm"], x @ w["latent_down"])
  shared = rotate(spec.position, (x @ w["rotary_key"])[:, :, None], positions)
  keys = np.einsum("btc,cnh->btnh", c_kv, w["key"])
  keys = np.concatenate([keys, np.repeat(shared, spec.num_heads, axis=2)], axis=-1)
  o = attend(
    np.concatenate([q[..., :H], q_rotated], axis=-1),
    keys,
    np.einsum("btc,cnh->btnh", c_kv, w["value"]),
    visible=visibility(spec, positions, segments),
    scale=1 / math.sqrt(H + P) if spec.scale is None else spec.scale,
  )
  return np.einsum("btnh,nhd->btd", o, w["out"])


def linear_attention(spec, w, x, positions, segments):
  """Katharopoulos et al., RetNet, GLA and the gated delta rule, token by token."""
  N, H = spec.num_heads, spec.head_dim
  project = lambda name: np.einsum("btd,dnh->btnh", x, w[name])
  sigmoid = lambda y: 1 / (1 + np.exp(-y))
  silu = lambda y: y * sigmoid(y)
  length = lambda y: y / np.sqrt((y * y).sum(-1, keepdims=True) + 1e-6)
  q, k, v = project("query"), project("key"), project("value")
  more = {"scale": 1 / math.sqrt(H)}
  if spec.kind == "elu":
    feature = lambda y: np.where(y > 0, y + 1, np.exp(y))
    q, k, more = feature(q), feature(k), {"normalize": True}
  elif spec.kind == "retention":
    gamma = [1 - 2.0 ** (-5 - h) for h in range(N)]
    more["decay"] = np.broadcast_to(np.log(gamma), x.shape[:2] + (N,))
    if spec.position is not None:
      q, k = rotate(spec.position, q, positions), rotate(spec.position, k, positions)
  elif spec.kind == "gla":
    logits = np.einsum("btr,rnh->btnh", x @ w["decay_down"], w["decay_up"]) + w["decay_bias"]
    more["decay"] = np.log(sigmoid(logits) ** (1 / 16))
  else:
    if spec.conv:
      of = lambda y, name: convolution(y, w[f"{name}_conv"], segments=segments)[0]
      q, k, v = of(q, "query"), of(k, "key"), of(v, "value")
    q, k, v = length(silu(q)), length(silu(k)), silu(v)
    step = np.log(1 + np.exp(x @ w["decay"] + w["decay_bias"]))
    more |= {"decay": -np.exp(w["decay_rate"]) * step, "beta": sigmoid(x @ w["beta"])}
  o, _ = recurrent(q, k, v, segments=segments, **more)
  if spec.kind != "elu":
    o = norm(spec.norm, w["out_norm"], o) * silu(project("gate"))
  return np.einsum("btnh,nhd->btd", o, w["out"])


def feed_forward(spec, w, x):
  clamp = math.inf if spec.clamp is None else spec.clamp
  return mlp(x, w, spec.activation, clamp, spec.up_offset)


def mixture(spec, w, x, valid, train):
  """Expert by chosen expert; what finds no slot adds nothing, and dropless has slots for all."""
  B, T, _ = x.shape
  S = T if spec.group_size is None else spec.group_size
  factor = spec.capacity_factor if train else spec.eval_capacity_factor
  slots = moe_oracle.capacity(
    S, spec.num_experts, spec.experts_per_token, factor, spec.min_capacity
  )
  slots = S if spec.dispatch == "dropless" else slots
  shells = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")
  expert = lambda e: {name: w[name][e] for name in shells if name in w}
  y = np.zeros_like(x)
  for b in range(B):
    for start in range(0, T, S):
      rows = slice(start, start + S)
      logits = x[b, rows] @ w["router"] + w.get("router_bias", 0.0)
      routed = moe_oracle.route_scores(
        logits,
        spec.experts_per_token,
        normalize=spec.normalize,
        sigmoid=spec.scores == "sigmoid",
        scale=spec.routed_scale,
        groups=spec.num_groups,
        keep=spec.keep_groups,
        bias_E=w.get("selection_bias"),
      )
      kept = moe_oracle.place(routed.order_SX, spec.num_experts, slots, valid[b, rows])
      for s, choice in zip(*np.nonzero(kept), strict=True):
        e = routed.order_SX[s, choice]
        weight, h = routed.weight_SE[s, e], x[b, start + s]
        if spec.scale_input:
          y[b, start + s] += feed_forward(spec.expert, expert(e), weight * h)
        else:
          y[b, start + s] += weight * feed_forward(spec.expert, expert(e), h)
  if spec.shared is not None:
    y = y + feed_forward(spec.shared, w["shared"], x)
  return y


def layer(spec, w, x, positions, segments, shared_table, train):
  if isinstance(spec.attention, LatentAttentionSpec):
    attend_to = lambda h: latent_attention(spec.attention, w["attention"], h, positions, segments)
  elif isinstance(spec.attention, LinearAttentionSpec):
    attend_to = lambda h: linear_attention(spec.attention, w["attention"], h, positions, segments)
  else:
    attend_to = lambda h: attention(
      spec.attention, w["attention"], h, positions, segments, shared_table
    )
  if isinstance(spec.mlp, MoeSpec):
    think = lambda h: mixture(spec.mlp, w["moe"], h, segments > 0, train)
  else:
    think = lambda h: feed_forward(spec.mlp, w["mlp"], h)
  normed = lambda name, h: norm(spec.norm, w[name], h)
  if spec.parallel:
    h = normed("norm", x)
    return x + attend_to(h) + think(h)
  for branch, name in ((attend_to, "attention"), (think, "mlp")):
    if spec.norm_placement == "pre":
      x = x + branch(normed(f"{name}_norm", x))
    elif spec.norm_placement == "post":
      x = normed(f"{name}_norm", x + branch(x))
    else:
      x = x + normed(f"{name}_post_norm", branch(normed(f"{name}_norm", x)))
  return x


def embed(spec, w, tokens, positions):
  x = w["table"][tokens]
  if spec.embedding.scale_by_sqrt_dim:
    x = x * math.sqrt(spec.embed_dim)
  if spec.embedding.width is not None:
    x = x @ w["project_in"]
  if spec.embedding.position is not None:
    x = x + w["position_table"][positions + spec.embedding.position.offset]
  return x if spec.embedding.norm is None else norm(spec.embedding.norm, w["norm"], x)


def transform(spec, w, x):
  """What BERT's head does before its norm and its decoder."""
  return activate(spec.head.transform, x @ w["transform"] + w["transform_bias"])


def head(spec, w, x):
  if spec.head.tied:
    if spec.embedding.width is not None:
      x = x @ w["embedding"]["project_out"]
    logits = x @ w["embedding"]["table"].T
  else:
    logits = x @ w["head"]
  logits = spec.head.scale * (logits + w.get("head_bias", 0.0))
  c = spec.head.softcap
  return logits if c is None else c * np.tanh(logits / c)


def logits(spec, params, tokens, *, positions=None, segments=None, train=False):
  """[B, T, V] in float64."""
  w = _float64(params)
  B, T = tokens.shape
  positions = np.tile(np.arange(T), (B, 1)) if positions is None else positions
  segments = np.ones((B, T), int) if segments is None else segments
  x = embed(spec, w["embedding"], tokens, positions)
  for i, segment in enumerate(spec.segments):
    for repeat in range(segment.repeats):
      for j, layer_spec in enumerate(segment.layers):
        weights = _take(w[f"segment_{i}"][f"layer_{j}"], repeat)
        x = layer(layer_spec, weights, x, positions, segments, w.get("bucket_table"), train)
  if spec.head.transform is not None:
    x = transform(spec, w, x)
  if spec.final_norm is not None:
    x = norm(spec.final_norm, w["final_norm"], x)
  return head(spec, w, x)


def losses(logits_BTV, targets):
  """(negative log-likelihood of each target, log of the softmax denominator), nats."""
  nll, log_z = np.zeros(targets.shape), np.zeros(targets.shape)
  for b, t in np.ndindex(targets.shape):
    row = logits_BTV[b, t]
    log_z[b, t] = math.log(np.sum(np.exp(row)))
    nll[b, t] = log_z[b, t] - row[targets[b, t]]
  return nll, log_z


def _float64(tree):
  if isinstance(tree, dict):
    return {name: _float64(value) for name, value in tree.items()}
  return np.asarray(tree, np.float64)


def _take(tree, index):
  if isinstance(tree, dict):
    return {name: _take(value, index) for name, value in tree.items()}
  return tree[index]
