"""Linear attention layers: feature maps, gates and decays around `kernels.linear_attention`.

B batch, T positions, D model width, N heads, H head size of queries and keys, U that of values,
M random features, R width of a narrow projection.
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
from .params import Initializer, declare, kernel_init
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
    decay, beta_BTN, scale = None, None, H**-0.5
    if spec.kind == "elu":
      q, k, scale = elu_plus_one(q), elu_plus_one(k), 1.0
    elif spec.kind == "retention":
      decay = jnp.asarray(retention_decays(spec.num_heads), jnp.float32)[None, None]
      if spec.position is not None:
        q, k = (rotate(x, rows.positions_BT, spec.position) for x in (q, k))
    elif spec.kind == "gla":
      decay = self._channel_decays(x_BTD)
    else:
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
    w_NUD = declare(self, "out", (spec.num_heads, U, self.embed_dim), axes, init)
    if cache is not None:
      cache = LinearState(constrain(state_BNHU, "cache_batch", "cache_heads", None, None))
    return dense(o_BTNU, w_NUD, num_in=2), cache

  def _heads(self, x_BTD, name: str, size: int):
    D, N = self.embed_dim, self.spec.num_heads
    axes = ("embed", "heads", "head_dim")
    w_DNH = declare(self, name, (D, N, size), axes, kernel_init(self.init_spec, D))
    y_BTNH = constrain(dense(x_BTD, w_DNH), "act_batch", "act_seq", "act_heads", None)
    return checkpoint_name(y_BTNH, name)

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
