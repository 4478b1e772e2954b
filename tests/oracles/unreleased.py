"""Decoders without released code, a function each, from their papers in numpy float64.

Nothing here reads a ModelSpec: a function states the paper's architecture and takes weights by the
paper's names, which `WEIGHTS` maps to ours. All take the tokens of one document, [T], and give
logits [T, V]. D width, N heads, H head size, F hidden units, V vocabulary.
"""

import math

import numpy as np

GPT2_LAYER = {
  "ln_1.g": "attention_norm/scale",
  "ln_1.b": "attention_norm/bias",
  "c_attn.q": "attention/query",
  "c_attn.k": "attention/key",
  "c_attn.v": "attention/value",
  "c_attn.q_bias": "attention/query_bias",
  "c_attn.k_bias": "attention/key_bias",
  "c_attn.v_bias": "attention/value_bias",
  "attn.c_proj": "attention/out",
  "attn.c_proj_bias": "attention/out_bias",
  "ln_2.g": "mlp_norm/scale",
  "ln_2.b": "mlp_norm/bias",
  "c_fc": "mlp/up",
  "c_fc_bias": "mlp/up_bias",
  "mlp.c_proj": "mlp/down",
  "mlp.c_proj_bias": "mlp/down_bias",
}
GPT2 = {
  "wte": "embedding/table",
  "wpe": "embedding/position_table",
  "ln_f.g": "final_norm/scale",
  "ln_f.b": "final_norm/bias",
}
GOPHER_LAYER = {
  "g_1": "attention_norm/scale",
  "W_q": "attention/query",
  "W_k,E": "attention/key",
  "W_v": "attention/value",
  "W_k,R": "attention/relative",
  "u": "attention/content_bias",
  "v": "attention/position_bias",
  "W_o": "attention/out",
  "b_o": "attention/out_bias",
  "g_2": "mlp_norm/scale",
  "W_1": "mlp/up",
  "b_1": "mlp/up_bias",
  "W_2": "mlp/down",
  "b_2": "mlp/down_bias",
}
GOPHER = {"E": "embedding/table", "g": "final_norm/scale", "b": "head_bias"}
PALM_LAYER = {
  "g": "norm/scale",
  "W_q": "attention/query",
  "W_k": "attention/key",
  "W_v": "attention/value",
  "W_o": "attention/out",
  "W": "mlp/gate",  # of SwiGLU, Swish(x W) * x V
  "V": "mlp/up",
  "W_2": "mlp/down",
}
PALM = {"E": "embedding/table", "g": "final_norm/scale"}
# (weights of a layer, weights of the rest).
WEIGHTS = {
  "gpt3": (GPT2_LAYER, GPT2),
  "mt_nlg": (GPT2_LAYER, GPT2),
  "gopher": (GOPHER_LAYER, GOPHER),
  "chinchilla": (GOPHER_LAYER, GOPHER),
  "palm": (PALM_LAYER, PALM),
}


def named(family, params):
  """(weights, [weights of layer 0, of layer 1, ...]) in float64, by the paper's names.

  Raises AssertionError when `params` holds other weights than the paper has.
  """
  layer_names, names = WEIGHTS[family]
  flat = {path: np.asarray(leaf, np.float64) for path, leaf in _leaves(params)}
  group = sorted({path.split("/")[1] for path in flat if path.startswith("segment_0/")})
  ours = set(names.values())
  ours |= {f"segment_0/{layer}/{path}" for layer in group for path in layer_names.values()}
  assert ours == set(flat), f"other weights: {sorted(ours ^ set(flat))}"
  take = lambda layer, r: {n: flat[f"segment_0/{layer}/{p}"][r] for n, p in layer_names.items()}
  repeats = len(flat[f"segment_0/{group[0]}/{next(iter(layer_names.values()))}"])
  layers = [take(layer, r) for r in range(repeats) for layer in group]
  return {name: flat[path] for name, path in names.items()}, layers


def _leaves(tree, path=""):
  if not isinstance(tree, dict):
    return [(path, tree)]
  return [leaf for k, v in tree.items() for leaf in _leaves(v, f"{path}/{k}" if path else k)]


def expect(shape, *weights):
  for w in weights:
    assert w.shape == shape, f"other weights: {w.shape} where the paper has {shape}"


def layer_norm(x, gain, bias, eps):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain + bias


def rms_norm(x, gain, eps):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain


def gelu(x):
  """As in GPT-2's code."""
  return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(logits):
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


def causal(T, band=None):
  """[T, T] of True where position i sees position j: itself and those before it, in `band`."""
  return np.array([[j <= i and (band is None or i - j < band) for j in range(T)] for i in range(T)])


def attend(q, k, v, visible, logits=0.0):
  """One head: q, k, v [T, H]; `logits` [T, T] are added to the products before scaling."""
  scores = (q @ k.T + logits) / math.sqrt(q.shape[-1])
  return softmax(np.where(visible, scores, -np.inf)) @ v


def gpt2(weights, layers, tokens, bands):
  """GPT-2 (Radford et al. 2019; github.com/openai/gpt-2), with a band for each layer or None.

  Norms before each branch and at the end, learned positions, biases everywhere, heads of D / N,
  4 D hidden units, the table of tokens as head.
  """
  T, (_, D) = len(tokens), weights["wte"].shape
  x = weights["wte"][tokens] + weights["wpe"][np.arange(T)]
  for w, band in zip(layers, bands, strict=True):
    N = w["c_attn.q"].shape[1]
    expect((D, N, D // N), w["c_attn.q"], w["c_attn.k"], w["c_attn.v"])
    expect((D, 4 * D), w["c_fc"])
    h = layer_norm(x, w["ln_1.g"], w["ln_1.b"], 1e-5)
    for n in range(N):
      q, k, v = (h @ w[f"c_attn.{i}"][:, n] + w[f"c_attn.{i}_bias"][n] for i in "qkv")
      x = x + attend(q, k, v, causal(T, band)) @ w["attn.c_proj"][n]
    x = x + w["attn.c_proj_bias"]
    h = layer_norm(x, w["ln_2.g"], w["ln_2.b"], 1e-5)
    x = x + gelu(h @ w["c_fc"] + w["c_fc_bias"]) @ w["mlp.c_proj"] + w["mlp.c_proj_bias"]
  return layer_norm(x, weights["ln_f.g"], weights["ln_f.b"], 1e-5) @ weights["wte"].T


def gpt3(weights, layers, tokens, *, band):
  """arXiv 2005.14165, section 2.1: GPT-2 with layers in turn dense and locally banded.

  The width of the band, and which of the two comes first, were not published: dense here, as in
  EleutherAI's GPT-Neo.
  """
  return gpt2(weights, layers, tokens, [band if i % 2 else None for i in range(len(layers))])


def mt_nlg(weights, layers, tokens):
  """arXiv 2201.11990, section 3: the architecture of GPT-2, every layer dense."""
  return gpt2(weights, layers, tokens, [None] * len(layers))


def gopher(weights, layers, tokens):
  """arXiv 2112.11446, section 3.1: GPT-2 with RMSNorm, and positions as in arXiv 1901.02860.

  The score of Transformer-XL's section 3.3, of query i for key j, over sqrt(H) as in its code:
  (q_i + u) k_j + (q_i + v) W_k,R R_{i-j}, R being the sinusoids of arXiv 1706.03762, section 3.5.
  Biases where the counts of arXiv 2203.15556, table A9, have them; the eps of the norms is not
  published.
  """
  T, (_, D) = len(tokens), weights["E"].shape
  R = np.zeros((T, D))
  for distance in range(T):
    for i in range(D // 2):
      angle = distance / 10_000 ** (2 * i / D)
      R[distance, 2 * i], R[distance, 2 * i + 1] = math.sin(angle), math.cos(angle)
  # Ours has all sines before all cosines.
  order = np.arange(D).reshape(2, D // 2).T.reshape(-1)
  before = np.array([[max(i - j, 0) for j in range(T)] for i in range(T)])
  x = weights["E"][tokens]
  for w in layers:
    _, N, H = w["W_q"].shape
    expect((D, N, H), w["W_k,E"], w["W_v"], w["W_k,R"])
    expect((D, 4 * D), w["W_1"])
    h = rms_norm(x, w["g_1"], 1e-6)
    for n in range(N):
      q, k, v = (h @ w[name][:, n] for name in ("W_q", "W_k,E", "W_v"))
      by_distance = (q + w["v"][n]) @ (R @ w["W_k,R"][order, n]).T
      positions = np.take_along_axis(by_distance, before, axis=1)
      x = x + attend(q + w["u"][n], k, v, causal(T), positions) @ w["W_o"][n]
    x = x + w["b_o"]
    h = rms_norm(x, w["g_2"], 1e-6)
    x = x + gelu(h @ w["W_1"] + w["b_1"]) @ w["W_2"] + w["b_2"]
  return rms_norm(x, weights["g"], 1e-6) @ weights["E"].T + weights["b"]


def chinchilla(weights, layers, tokens):
  """arXiv 2203.15556, section 4.1: the architecture of Gopher."""
  return gopher(weights, layers, tokens)


def palm(weights, layers, tokens):
  """arXiv 2204.02311, section 2.

  y = x + MLP(LayerNorm(x)) + Attention(LayerNorm(x)); SwiGLU; one head of keys and values; rotary
  positions; no biases, in norms neither; the table of tokens as head, and logits over sqrt(D).
  """
  T, (_, D) = len(tokens), weights["E"].shape
  x = weights["E"][tokens]
  for w in layers:
    _, N, H = w["W_q"].shape
    expect((D, 1, H), w["W_k"], w["W_v"])
    expect((D, 4 * D), w["W"], w["V"])
    h = layer_norm(x, w["g"], 0.0, 1e-6)
    gate = h @ w["W"]
    x = x + gate / (1 + np.exp(-gate)) * (h @ w["V"]) @ w["W_2"]
    k, v = rope(h @ w["W_k"][:, 0]), h @ w["W_v"][:, 0]
    for n in range(N):
      x = x + attend(rope(h @ w["W_q"][:, n]), k, v, causal(T)) @ w["W_o"][n]
  return layer_norm(x, weights["g"], 0.0, 1e-6) @ weights["E"].T / math.sqrt(D)


def rope(x):
  """arXiv 2104.09864, equation 34, for [T, H]: pair i turned by position * 10000^(-2 i / H).

  The paper's pair is of neighbours; ours is a channel of the first half and one of the second.
  """
  T, H = x.shape
  pairs = x[:, : H // 2] + 1j * x[:, H // 2 :]
  turned = pairs * np.exp(1j * np.outer(np.arange(T), 10_000.0 ** (-2 * np.arange(H // 2) / H)))
  return np.concatenate([turned.real, turned.imag], axis=1)


def loss(logits, targets):
  """Summed negative log-likelihood of `targets` [T], nats."""
  largest = logits.max(-1)
  log_z = largest + np.log(np.exp(logits - largest[:, None]).sum(-1))
  return float((log_z - logits[np.arange(len(targets)), targets]).sum())
