"""Matrix products of rows sorted by expert, each with its own expert's weights.

R rows sorted by expert, E experts, D contracted width, F width of the result.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from ..partition import vary_with
from ..select import GPU, TPU, anywhere, current_platform, kernel_on, select
from . import reference, xla

__all__ = ["grouped_matmul", "grouped_mlp"]

# (gate, up) -> hidden, elementwise.
Activation = Callable[[jax.Array, jax.Array], jax.Array]


def grouped_matmul(
  x_RD: jax.Array,
  w_EDF: jax.Array,
  group_sizes_E: jax.Array,
  *,
  transposed: bool = False,
  implementation: str | None = None,
) -> jax.Array:
  """Rows of group e times w[e]; work is that of the rows, however they are spread over groups.

  Args:
    x_RD: rows, group after group.
    w_EDF: a matrix a group, cast to the dtype of x; its gradient is not rounded to that.
    group_sizes_E: int32 rows of each group. Rows after the last group give zeros and have no
      gradient, whatever they hold; an empty group has a gradient of exact zeros.
    transposed: w is [E, F, D].
    implementation: "pallas_tpu", "xla" (tiles of rows, any platform), "pallas_gpu" (Triton, never
      timed so far) or "reference" (a loop over experts); None is the TPU kernel where it can run,
      else "xla".

  Returns:
    [R, F] in the dtype of x; sums are float32. Differentiable once, in reverse mode, by x and w:
    both gradients are grouped products too.

  Raises:
    ValueError: shapes that do not fit, more rows in groups than there are (not seen under jit,
      where the rows that do not exist are left out), or an unknown implementation.
    NotImplementedError: the named implementation cannot run here.
  """
  _check(x_RD, (w_EDF,), group_sizes_E, transposed)
  chosen = _select(implementation, x_RD, w_EDF.mT if transposed else w_EDF)
  x_RD, w_EDF, group_sizes_E = vary_with((x_RD, w_EDF, group_sizes_E), (x_RD, w_EDF, group_sizes_E))
  return _product(x_RD, w_EDF, group_sizes_E, transposed, chosen)


def grouped_mlp(
  x_RD: jax.Array,
  w_gate_EDF: jax.Array,
  w_up_EDF: jax.Array,
  w_down_EFD: jax.Array,
  group_sizes_E: jax.Array,
  activation: Activation,
  *,
  weight_R: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """weight * (activation(x w_gate, x w_up) w_down) of each group: a gated MLP an expert.

  One pass over the rows makes both products and the hidden units. Backward needs gate and up
  alone, in the dtype of x: they carry the checkpoint names `expert_gate` and `expert_up`, and where
  a policy keeps them no product is repeated.

  Args:
    activation: elementwise (gate, up) -> hidden; give the same object at each call, since it is
      part of what is compiled.
    weight_R: float32; None is 1.
    others: see `grouped_matmul`.

  Returns:
    [R, D] in the dtype of x.
  """
  _check(x_RD, (w_gate_EDF, w_up_EDF), group_sizes_E, False)
  if w_down_EFD.shape != w_up_EDF.mT.shape or w_gate_EDF.shape != w_up_EDF.shape:
    raise ValueError(
      f"a grouped MLP needs gate and up [E, D, F] and down [E, F, D], got {w_gate_EDF.shape}, "
      f"{w_up_EDF.shape} and {w_down_EFD.shape}"
    )
  chosen = _select(implementation, x_RD, w_up_EDF, weights=2)
  args = (x_RD, (w_gate_EDF, w_up_EDF, w_down_EFD), group_sizes_E, weight_R)
  return _mlp(*vary_with(args, args), activation, chosen)


def _select(implementation: str | None, x_RD, w_EDF, weights: int = 1) -> str:
  tpu = lambda platform: _module("pallas_tpu").supports(x_RD, w_EDF, platform, weights=weights)
  gpu = lambda platform: _module("pallas_gpu").supports(x_RD, w_EDF, platform)
  candidates = {
    "pallas_tpu": kernel_on(TPU, tpu),
    "xla": anywhere,
    "pallas_gpu": kernel_on(GPU, gpu),
    "reference": anywhere,
  }
  return select(implementation, current_platform(), candidates)


def _module(name: str) -> Any:
  """An implementation by its name."""
  if name == "pallas_tpu":
    # Pallas takes half a second to import and is of no use on a CPU.
    from . import pallas_tpu

    return pallas_tpu
  if name == "pallas_gpu":
    # The same.
    from . import pallas_gpu

    return pallas_gpu
  return {"xla": xla, "reference": reference}[name]


def _check(x_RD, weights, group_sizes_E, transposed) -> None:
  for w in weights:
    if x_RD.ndim != 2 or w.ndim != 3 or w.shape[2 if transposed else 1] != x_RD.shape[1]:
      layout = "[E, F, D]" if transposed else "[E, D, F]"
      raise ValueError(
        f"a grouped product needs x [R, D] and w {layout} of one width D, "
        f"got {x_RD.shape} and {w.shape}"
      )
    if group_sizes_E.shape != w.shape[:1]:
      raise ValueError(f"w has {w.shape[0]} groups, group_sizes the shape {group_sizes_E.shape}")
  if not isinstance(group_sizes_E, jax.core.Tracer):
    total = int(np.sum(np.asarray(group_sizes_E), dtype=np.int64))
    if total > x_RD.shape[0]:
      raise ValueError(f"the groups hold {total} rows, x has only {x_RD.shape[0]}")


def _one(y_RF):
  return (y_RF,)


def _run(chosen, x_RD, w_EDF, group_sizes_E, transposed=False):
  """The product of one weight."""
  run = _module(chosen).row_products
  (y_RF,) = run(x_RD, (w_EDF.astype(x_RD.dtype),), group_sizes_E, _one, transposed=transposed)
  return y_RF


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(x_RD, w_EDF, group_sizes_E, transposed, chosen):
  return _run(chosen, x_RD, w_EDF, group_sizes_E, transposed)


def _product_fwd(x_RD, w_EDF, group_sizes_E, transposed, chosen):
  saved = (x_RD, w_EDF, group_sizes_E)
  return _product(x_RD, w_EDF, group_sizes_E, transposed, chosen), saved


def _product_bwd(transposed, chosen, saved, dy_RF):
  x_RD, w_EDF, group_sizes_E = saved
  dx_RD = _run(chosen, dy_RF, w_EDF, group_sizes_E, not transposed)
  pair = (dy_RF, x_RD) if transposed else (x_RD, dy_RF)
  return dx_RD, _module(chosen).outer(*pair, group_sizes_E, dtype=w_EDF.dtype), None


_product.defvjp(_product_fwd, _product_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _mlp(x_RD, weights, group_sizes_E, weight_R, activation, chosen):
  return _mlp_fwd(x_RD, weights, group_sizes_E, weight_R, activation, chosen)[0]


def _mlp_fwd(x_RD, weights, group_sizes_E, weight_R, activation, chosen):
  *gate_up, w_down_EFD = (w.astype(x_RD.dtype) for w in weights)
  finish = lambda gate, up: (activation(gate, up), gate, up)
  run = _module(chosen).row_products
  hidden_RF, gate_RF, up_RF = run(x_RD, tuple(gate_up), group_sizes_E, finish)
  gate_RF = checkpoint_name(gate_RF, "expert_gate")
  up_RF = checkpoint_name(up_RF, "expert_up")
  out_RD = _run(chosen, hidden_RF, w_down_EFD, group_sizes_E)
  if weight_R is not None:
    out_RD = (out_RD * weight_R[:, None]).astype(out_RD.dtype)
  return out_RD, (x_RD, weights, group_sizes_E, weight_R, gate_RF, up_RF)


def _mlp_bwd(activation, chosen, saved, d_out_RD):
  x_RD, weights, group_sizes_E, weight_R, gate_RF, up_RF = saved
  dtype = x_RD.dtype
  back = lambda d, w: _run(chosen, d, w, group_sizes_E, transposed=True)
  outer = lambda x, d, w: _module(chosen).outer(x, d, group_sizes_E, dtype=w.dtype)
  w_gate_EDF, w_up_EDF, w_down_EFD = weights
  wide = (y.astype(jnp.float32) for y in (gate_RF, up_RF))
  hidden_RF, vjp = jax.vjp(activation, *wide)
  d_hidden_RF = back(d_out_RD, w_down_EFD).astype(jnp.float32)
  d_weight_R = None
  if weight_R is not None:  # of weight * hidden: the result itself is not needed
    d_weight_R = jnp.sum(hidden_RF * d_hidden_RF, axis=1)
    hidden_RF, d_hidden_RF = (y * weight_R[:, None] for y in (hidden_RF, d_hidden_RF))
  d_gate_RF, d_up_RF = (d.astype(dtype) for d in vjp(d_hidden_RF))
  dx_RD = back(d_gate_RF, w_gate_EDF).astype(jnp.float32) + back(d_up_RF, w_up_EDF)
  d_weights = (
    outer(x_RD, d_gate_RF, w_gate_EDF),
    outer(x_RD, d_up_RF, w_up_EDF),
    outer(hidden_RF.astype(dtype), d_out_RD, w_down_EFD),
  )
  return dx_RD.astype(dtype), d_weights, None, d_weight_R


_mlp.defvjp(_mlp_fwd, _mlp_bwd)
