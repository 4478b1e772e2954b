"""Linear attention layers: feature maps, gates and decays around `kernels.linear_attention`.

B batch, T positions, D model width, N heads, H head size of queries and keys, U that of values,
M random features, R width of a narrow projection, W tokens that a convolution sees, V = W - 1,
S = V + T.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from mesh.collectives import manual_size
from mesh.constrain import constrain

from .attention import Rows, rotate
from .cache import LinearState
from .kernels.linear_attention import linear_attention
from .linear import dense
from .norms import Norm
from .params import Initializer, declare, declare_projection, kernel_init
from .spec import InitSpec, LinearAttentionSpec

GATE_RANK = 16  # R of GLA's decays, and the root taken of them
GATE_ROOT = 16


def elu_plus_one(x: jax.Array) -> jax.Array:
  """x + 1 where x > 0, else exp(x) (arXiv 2006.16236, equation 7); positive."""
  # No exp of a large x: its gradient would be infinite, and zero times that no number.
  return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


def favor_projection(key: jax.Array, num_features: int, size: int) -> jax.Array:
  """[M, H], float32: rows drawn as if Gaussian, orthogonal within each run of H (FAVOR+)."""
  blocks = -(-num_features // size)
  directions, lengths = jax.random.split(key)
  q_BHH, r_BHH = jnp.linalg.qr(jax.random.normal(directions, (blocks, size, size)))
  # With the signs of R's diagonal in Q the directions are uniform.
  q_BHH *= jnp.sign(jnp.diagonal(r_BHH, axis1=1, axis2=2))[:, None]
  rows_MH = q_BHH.mT.reshape(blocks * size, size)[:num_features]
  norms_M1 = jnp.linalg.norm(jax.random.normal(lengths, rows_MH.shape), axis=1, keepdims=True)
  return norms_M1 * rows_MH


def favor_features(
  x_BTNH: jax.Array, projection_MH: jax.Array, *, queries: bool, eps: float = 1e-6
) -> jax.Array:
  """Positive random features of softmax attention (FAVOR+, arXiv 2009.14794, lemma 1).

  exp(w . y - |y|^2 / 2) / sqrt(M) for the rows w and y = x / H^(1/4): the mean of
  phi(q) . phi(k) over projections is exp(q . k / sqrt(H)), for eps = 0.

  Args:
    projection_MH: as `favor_projection` draws it.
    queries: divide each token's features by the largest, which `normalize` takes out again. Keys
      keep theirs: a maximum over the row would let later tokens change earlier ones.
    eps: added to each exponential.

  Returns:
    [B, T, N, M], float32.
  """
  M, H = projection_MH.shape
  y_BTNH = x_BTNH.astype(jnp.float32) * H**-0.25
  log = jnp.einsum("btnh,mh->btnm", y_BTNH, projection_MH, precision="highest")
  log -= jnp.sum(y_BTNH * y_BTNH, axis=-1, keepdims=True) / 2
  if queries:
    log -= jax.lax.stop_gradient(jnp.max(log, axis=-1, keepdims=True))
  return (jnp.exp(log) + eps) * M**-0.5


def retention_decays(num_heads: int) -> np.ndarray:
  """Log-decays of RetNet's heads, float64 [N]: log(1 - 2^(-5 - h)) (equation 8)."""
  return np.log1p(-(2.0 ** (-5 - np.arange(num_heads))))


def short_convolution(
  x_BTNH: jax.Array,
  w_WNH: jax.Array,
  segments_BT: jax.Array | None = None,
  before_BVNH: jax.Array | None = None,
) -> jax.Array:
  """The sum over W tokens of each channel's input times its weight: causal, depthwise.

  y_t = w_{W-1} x_t + w_{W-2} x_{t-1} + ..; what lies before a document's start is 0, and so is
  padding (segment 0), whatever it holds.

  Args:
    w_WNH: float32, the own token's last.
    segments_BT: as in `kernels.linear_attention`.
    before_BVNH: what stood before the first token, of its document; None: nothing.

  Returns:
    [B, T, N, H] in x.dtype, summed in float32.
  """
  T, W = x_BTNH.shape[1], w_WNH.shape[0]
  row, id_BS = _row(x_BTNH, segments_BT, W - 1, before_BVNH)
  taps = [row[:, v : v + T] for v in range(W)]
  if id_BS is not None:
    seen = _same_document([id_BS[:, v : v + T] for v in range(W)])
    taps = [_where(here, tap) for here, tap in zip(seen, taps, strict=True)]
  products = [w_WNH[v][None, None] * tap.astype(jnp.float32) for v, tap in enumerate(taps)]
  return sum(products[1:], products[0]).astype(x_BTNH.dtype)


def last_inputs(
  x_BTNH: jax.Array, before_BVNH: jax.Array, segments_BT: jax.Array | None = None
) -> jax.Array:
  """`before_BVNH` for what follows these tokens: zeros where their last document is shorter.

  Padding behind a row's last token leaves no trace; a row of nothing else keeps what it had.
  """
  T, V = x_BTNH.shape[1], before_BVNH.shape[1]
  row, id_BS = _row(x_BTNH, segments_BT, V, before_BVNH)
  if id_BS is None:
    return row[:, T:]
  place_S = jnp.arange(V + T, dtype=jnp.int32)
  last_B = jnp.max(jnp.where(id_BS != 0, place_S[None], 0), axis=1)
  at_BV = last_B[:, None] + place_S[None, :V] - (V - 1)
  ids = jnp.split(jnp.take_along_axis(id_BS, at_BV, axis=1), V, axis=1)
  kept_BV = jnp.concatenate(_same_document(ids), axis=1)
  return _where(kept_BV, jnp.take_along_axis(row, at_BV[..., None, None], axis=1))


def _row(x_BTNH, segments_BT, V: int, before_BVNH):
  """(V inputs and x, their documents: -1 is of whatever document meets it)."""
  id_BS = segments_BT
  if id_BS is not None:
    id_BS = jnp.pad(id_BS, [(0, 0), (V, 0)], constant_values=-1)
  if before_BVNH is None:
    return jnp.pad(x_BTNH, [(0, 0), (V, 0), (0, 0), (0, 0)]), id_BS
  return jnp.concatenate([before_BVNH.astype(x_BTNH.dtype), x_BTNH], axis=1), id_BS


def _same_document(ids: list[jax.Array]) -> list[jax.Array]:
  """Which of a token's predecessors, in order up to itself, are of its document: no other stands
  between, and they are no padding (0)."""
  seen, near = [], True
  for there in reversed(ids):
    near = near & ((there == ids[-1]) | (there <= 0))
    seen.append(near & (there != 0))
  return seen[::-1]


def _where(kept_BT, x_BTNH):
  return jnp.where(jnp.expand_dims(kept_BT, (2, 3)), x_BTNH, 0)


class LinearAttention(nn.Module):
  """Linen shell: projections, what the kind makes of them, gate; `x -> (y, state)`.

  As a cache it takes and gives a `LinearState`, whatever the length. Padding (segment 0) does not
  enter the state.

  Attributes:
    spec: kind and sizes (`layers.spec.LinearAttentionSpec`).
    embed_dim: model width D.
    init_spec: initialisers.
    gain: factor on the initial output projection (depth scaling).
  """

  spec: LinearAttentionSpec
  embed_dim: int
  init_spec: InitSpec = InitSpec()  # not `init`: every Linen module has that method
  gain: float = 1.0

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, rows: Rows, cache: LinearState | None = None
  ) -> tuple[jax.Array, LinearState | None]:
    if manual_size("context") > 1:
      raise NotImplementedError(
        "linear attention hands a state from token to token, which context > 1 puts on different "
        "devices: use context=1"
      )
    spec, H, U = self.spec, self.spec.head_dim, self.spec.value_size
    q = self._heads(x_BTD, "query", H)
    k = self._heads(x_BTD, "key", H)
    v_BTNU = self._heads(x_BTD, "value", U)
    decay, beta_BTN, scale, inputs = None, None, H**-0.5, ()
    if spec.kind == "elu":
      q, k, scale = elu_plus_one(q), elu_plus_one(k), 1.0
    elif spec.kind == "retention":
      decay = jnp.asarray(retention_decays(spec.num_heads), jnp.float32)[None, None]
      if spec.position is not None:
        q, k = (rotate(x, rows.positions_BT, spec.position) for x in (q, k))
    elif spec.kind == "gla":
      decay = self._channel_decays(x_BTD)
    else:
      if spec.conv:
        (q, k, v_BTNU), inputs = self._convolved((q, k, v_BTNU), rows, cache)
      q, k, v_BTNU = unit(jax.nn.silu(q)), unit(jax.nn.silu(k)), jax.nn.silu(v_BTNU)
      decay, beta_BTN = self._head_decays(x_BTD), jax.nn.sigmoid(self._by_head(x_BTD, "beta"))
    o_BTNU, state_BNHU = linear_attention(
      q,
      k,
      v_BTNU,
      decay=decay,
      beta_BTN=beta_BTN,
      normalize=spec.kind == "elu",
      scale=scale,
      state_BNHU=None if cache is None else cache.state_BNHU,
      segments_BT=rows.segments_BT,
      implementation=spec.implementation,
    )
    o_BTNU = constrain(o_BTNU, "act_batch", "act_seq", "act_heads", None)
    if spec.kind != "elu":
      gate_BTNU = self._heads(x_BTD, "gate", U)
      o_BTNU = Norm(spec.norm, U, axis=None, name="out_norm")(o_BTNU) * jax.nn.silu(gate_BTNU)
    init = kernel_init(self.init_spec, spec.num_heads * U, self.gain)
    axes = ("heads", "head_dim", "embed")
    shape = (spec.num_heads, U, self.embed_dim)
    w_NUD = declare_projection(self, "out", shape, axes, init, num_in=2)
    if cache is not None:
      place = lambda x: constrain(x.astype(jnp.float32), "cache_batch", None, "cache_heads", None)
      state_BNHU = constrain(state_BNHU, "cache_batch", "cache_heads", None, None)
      cache = LinearState(state_BNHU, tuple(map(place, inputs)))
    return dense(o_BTNU, w_NUD, num_in=2), cache

  def _heads(self, x_BTD, name: str, size: int):
    D, N = self.embed_dim, self.spec.num_heads
    axes = ("embed", "heads", "head_dim")
    w_DNH = declare_projection(self, name, (D, N, size), axes, kernel_init(self.init_spec, D))
    y_BTNH = constrain(dense(x_BTD, w_DNH), "act_batch", "act_seq", "act_heads", None)
    return checkpoint_name(y_BTNH, name)

  def _convolved(self, qkv: tuple[jax.Array, ...], rows: Rows, cache: LinearState | None):
    """(q, k, v behind their short convolutions, the inputs that the next tokens need)."""
    out, inputs, W = [], [], self.spec.conv
    for i, (x_BTNH, name) in enumerate(zip(qkv, ("query", "key", "value"), strict=True)):
      init = kernel_init(self.init_spec, W)
      w_WNH = self._exact(f"{name}_conv", (W, *x_BTNH.shape[2:]), (None, "heads", "head_dim"), init)
      before_BVNH = None if cache is None else cache.inputs[i]
      out.append(short_convolution(x_BTNH, w_WNH, rows.segments_BT, before_BVNH))
      if before_BVNH is not None:
        inputs.append(last_inputs(x_BTNH, before_BVNH, rows.segments_BT))
    return tuple(out), inputs

  def _exact(self, name: str, shape: tuple[int, ...], axes: tuple, init: Initializer):
    """Decays and writing strengths: float32 throughout, as their weights."""
    return declare(self, name, shape, axes, init, exact=True)

  def _by_head(self, x_BTD, name: str):
    """One number a head, float32."""
    D, N = self.embed_dim, self.spec.num_heads
    w_DN = self._exact(name, (D, N), ("embed", "heads"), kernel_init(self.init_spec, D))
    return checkpoint_name(dense(x_BTD.astype(jnp.float32), w_DN), "gate")

  def _head_decays(self, x_BTD):
    """-exp(rate) softplus(x W + bias), [B, T, N]: Mamba-2's, with its initial values."""
    N = self.spec.num_heads
    rate_N = self._exact("decay_rate", (N,), ("heads",), _log_uniform_up_to_16)
    bias_N = self._exact("decay_bias", (N,), ("heads",), _softplus_of_milliseconds)
    step_BTN = jax.nn.softplus(self._by_head(x_BTD, "decay") + jnp.expand_dims(bias_N, (0, 1)))
    return -jnp.expand_dims(jnp.exp(rate_N), (0, 1)) * step_BTN

  def _channel_decays(self, x_BTD):
    """log sigmoid(x W W' + bias) / 16, [B, T, N, H]."""
    D, R, (N, H, _) = self.embed_dim, GATE_RANK, self.spec.state
    init = kernel_init(self.init_spec, D)
    w_DR = self._exact("decay_down", (D, R), ("embed", None), init)
    axes = (None, "heads", "head_dim")
    w_RNH = self._exact("decay_up", (R, N, H), axes, kernel_init(self.init_spec, R))
    bias_NH = self._exact("decay_bias", (N, H), axes[1:], nn.initializers.zeros)
    narrow_BTR = checkpoint_name(dense(x_BTD.astype(jnp.float32), w_DR), "gate")
    logit_BTNH = checkpoint_name(dense(narrow_BTR, w_RNH), "gate")
    logit_BTNH = logit_BTNH + jnp.expand_dims(bias_NH, (0, 1))
    return jax.nn.log_sigmoid(logit_BTNH) / GATE_ROOT


def unit(x: jax.Array, eps: float = 1e-6) -> jax.Array:
  """x over its length in the last dim, float32 inside."""
  y = x.astype(jnp.float32)
  return (y * jax.lax.rsqrt(jnp.sum(y * y, axis=-1, keepdims=True) + eps)).astype(x.dtype)


def _log_uniform_up_to_16(key, shape, dtype):
  return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


def _softplus_of_milliseconds(key, shape, dtype):
  """softplus of it is drawn from 0.001..0.1, evenly in its logarithm."""
  low, high = math.log(1e-3), math.log(1e-1)
  step = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
  return step + jnp.log(-jnp.expm1(-step))
