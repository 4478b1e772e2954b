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

from ..partition import free_axes, vary_with
from ..select import anywhere, current_platform, select
from . import reference, xla

__all__ = ["gated_matmul", "grouped_matmul"]

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


def gated_matmul(
  x_RD: jax.Array,
  w_gate_EDF: jax.Array,
  w_up_EDF: jax.Array,
  group_sizes_E: jax.Array,
  activation: Activation,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """activation(x w_gate, x w_up) of each group, in one pass over the rows.

  Args:
    activation: elementwise (gate, up) -> hidden; give the same object at each call, since it is
      part of what is compiled.
    others: see `grouped_matmul`.

  Returns:
    [R, F] in the dtype of x. What backward needs, gate and up in the dtype of x, carries the
    checkpoint names `expert_gate` and `expert_up`.
  """
  _check(x_RD, (w_gate_EDF, w_up_EDF), group_sizes_E, False)
  chosen = _select(implementation, x_RD, w_up_EDF, weights=2)
  args = (x_RD, w_gate_EDF, w_up_EDF, group_sizes_E)
  return _gated(*vary_with(args, args), activation, chosen)


def _select(implementation: str | None, x_RD, w_EDF, weights: int = 1) -> str:
  def spread() -> str | None:
    free = ", ".join(free_axes())
    return f"no compiler spreads it over {free}: call it in a shard_map" if free else None

  def tpu(platform: str) -> str | None:
    if platform != "tpu":
      return f"the kernel is for TPUs, not for {platform}"
    return spread() or _module("pallas_tpu").supports(x_RD, w_EDF, platform, weights=weights)

  def gpu(platform: str) -> str | None:
    if platform not in ("gpu", "cuda"):
      return f"the kernel is for GPUs, not for {platform}"
    return spread() or _module("pallas_gpu").supports(x_RD, w_EDF, platform)

  candidates = {"pallas_tpu": tpu, "xla": anywhere, "pallas_gpu": gpu, "reference": anywhere}
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


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(x_RD, w_EDF, group_sizes_E, transposed, chosen):
  run = _module(chosen).product
  return run(x_RD, w_EDF.astype(x_RD.dtype), group_sizes_E, transposed=transposed)


def _product_fwd(x_RD, w_EDF, group_sizes_E, transposed, chosen):
  saved = (x_RD, w_EDF, group_sizes_E)
  return _product(x_RD, w_EDF, group_sizes_E, transposed, chosen), saved


def _product_bwd(transposed, chosen, saved, dy_RF):
  x_RD, w_EDF, group_sizes_E = saved
  module = _module(chosen)
  dx_RD = module.product(dy_RF, w_EDF.astype(dy_RF.dtype), group_sizes_E, transposed=not transposed)
  pair = (dy_RF, x_RD) if transposed else (x_RD, dy_RF)
  return dx_RD, module.outer(*pair, group_sizes_E, dtype=w_EDF.dtype), None


_product.defvjp(_product_fwd, _product_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _gated(x_RD, w_gate_EDF, w_up_EDF, group_sizes_E, activation, chosen):
  return _gated_fwd(x_RD, w_gate_EDF, w_up_EDF, group_sizes_E, activation, chosen)[0]


def _gated_fwd(x_RD, w_gate_EDF, w_up_EDF, group_sizes_E, activation, chosen):
  gate_up = (w.astype(x_RD.dtype) for w in (w_gate_EDF, w_up_EDF))
  run = _module(chosen).gated
  hidden_RF, gate_RF, up_RF = run(x_RD, *gate_up, group_sizes_E, activation)
  gate_RF = checkpoint_name(gate_RF, "expert_gate")
  up_RF = checkpoint_name(up_RF, "expert_up")
  return hidden_RF, (x_RD, w_gate_EDF, w_up_EDF, group_sizes_E, gate_RF, up_RF)


def _gated_bwd(activation, chosen, saved, d_hidden_RF):
  x_RD, w_gate_EDF, w_up_EDF, group_sizes_E, gate_RF, up_RF = saved
  module = _module(chosen)
  wide = (y.astype(jnp.float32) for y in (gate_RF, up_RF))
  d_gate_RF, d_up_RF = jax.vjp(activation, *wide)[1](d_hidden_RF.astype(jnp.float32))
  dx_RD = jnp.zeros(x_RD.shape, jnp.float32)
  dws = []
  for w_EDF, d_RF in ((w_gate_EDF, d_gate_RF), (w_up_EDF, d_up_RF)):
    d_RF = d_RF.astype(x_RD.dtype)
    dx_RD += module.product(d_RF, w_EDF.astype(d_RF.dtype), group_sizes_E, transposed=True)
    dws.append(module.outer(x_RD, d_RF, group_sizes_E, dtype=w_EDF.dtype))
  return dx_RD.astype(x_RD.dtype), *dws, None


_gated.defvjp(_gated_fwd, _gated_bwd)
