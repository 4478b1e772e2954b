"""A segment of the model: a scan over its groups of layers, on one device or on a mesh.

B batch, T positions, D model width, L repeats of a segment.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mesh.collectives import GATHERED, vary
from mesh.constrain import constrain
from mesh.pipeline import pipeline, stage_order
from mesh.region import Region, gather

from .attention import Rows
from .block import Block, abstract_block
from .cache import KVCache, LinearState, into_stack, of_layer, place_stack
from .linear import take
from .lora import beside
from .moe import MoeStats
from .noise import fold
from .params import axes, exact
from .spec import Segment

# Full unrolling of short stacks is a third faster on CPU and compiles once a repeat.
_CPU_UNROLL = 8

# Tensors worth keeping so that backward repeats no matmul and no kernel.
MINIMAL_NAMES = (
  "query", "key", "value", "latent", "attention_out", "attention_lse",
  "attention_state", "gate",
  "attention_branch", "mlp_up", "mlp_gate", "mlp_branch",
  "router_logits", "expert_up", "expert_gate",
)  # fmt: skip

# Those of them that are products with dense weights.
_KERNELS = ("attention_out", "attention_lse", "attention_state", "expert_up", "expert_gate")
DOT_NAMES = tuple(name for name in MINIMAL_NAMES if name not in _KERNELS)


def remat_policy(remat: str | Sequence[str]):
  """The `jax.checkpoint` policy for a name, or None when nothing is recomputed.

  none: keep everything but weights gathered from other devices. full: keep only each layer's
  input. dots: keep matrix products with weights, experts' apart, and repeat kernels. minimal: keep
  every projection, so that only elementwise work is repeated. offload: the same, but in the host's
  memory (of no effect on CPU). Otherwise a tuple of tensor names (see `MINIMAL_NAMES`) to keep.

  Raises:
    ValueError: for an unknown policy or tensor name, listing the known ones.
  """
  policies = jax.checkpoint_policies
  if remat == "none":
    return None
  if remat == "offload":
    moved = {"offload_src": "device", "offload_dst": "pinned_host"}
    return policies.save_and_offload_only_these_names(
      names_which_can_be_saved=(), names_which_can_be_offloaded=MINIMAL_NAMES, **moved
    )
  if isinstance(remat, str):
    remat = {"full": (), "dots": DOT_NAMES, "minimal": MINIMAL_NAMES}.get(remat, (remat,))
  unknown = [name for name in remat if name not in MINIMAL_NAMES]
  if unknown:
    raise ValueError(
      f"unknown remat policy or tensor name {unknown[0]!r}: use none, full, dots, minimal, "
      f"offload, or names among {', '.join(MINIMAL_NAMES)}"
    )
  return policies.save_only_these_names(*remat)


# They only move or convert numbers. Were results kept, whole weights would be, by other names.
_FREE = frozenset({
  "broadcast_in_dim", "convert_element_type", "pcast", "pvary", "reshape", "squeeze", "transpose",
})  # fmt: skip


def _all_but_weights(primitive, *_, **params) -> bool:
  """The policy `none` where weights are gathered: they are gathered again."""
  called = params.get("call_jaxpr")  # of a custom_vjp, as `gather_weight` is
  gathers = called is not None and any(e.primitive.name == "all_gather" for e in called.jaxpr.eqns)
  return not gathers and primitive.name not in _FREE and params.get("name") != GATHERED


def apply_segment(
  blocks: Sequence[Block],
  params: dict[str, Any],
  x_BTD: jax.Array,
  rows: Rows,
  *,
  layers_L: jax.Array,
  caches: tuple[KVCache | LinearState, ...] | None = None,
  train: bool = False,
  remat: str | Sequence[str] = "none",
  unroll: int | None = None,
  gather: Callable[[str, Any], Any] | None = None,
) -> tuple[jax.Array, tuple[MoeStats, ...], tuple[KVCache | LinearState, ...] | None]:
  """Scan groups of layers over `params` (each leaf `[repeats, ...]`).

  Args:
    blocks: one shell a layer of the group.
    layers_L: for each repeat the index of its first layer, for the noise of each layer.
    caches: one cache a layer of the group, stacked over repeats; written in place.
    remat: see `remat_policy`.
    unroll: repeats a loop iteration; None is all of them on CPU up to eight, else 1.
    gather: makes the weights of the group's layer of that name whole; None where they are.
  """
  repeats = layers_L.shape[0]
  if unroll is None:
    unroll = repeats if jax.default_backend() == "cpu" and repeats <= _CPU_UNROLL else 1

  policy = remat_policy(remat)
  if policy is None and gather is not None:
    policy = _all_but_weights

  def run_layer(j, params, x_BTD, layer, cache) -> Any:
    if gather is not None:
      params = gather(f"layer_{j}", params)
    here = rows
    if rows.key_B is not None:
      here = rows._replace(key_B=fold(rows.key_B, layer + j))
    return blocks[j].apply({"params": params}, x_BTD, here, cache, train=train)

  if policy is not None:
    # Layer by layer: backward then holds what one of them needs, not what a group does. A lone
    # layer in a loop needs no barrier; others would be recomputed early, or not at all.
    barrier = unroll == repeats or len(blocks) > 1
    run_layer = jax.checkpoint(run_layer, policy=policy, prevent_cse=barrier, static_argnums=0)

  def group(carry, scanned):
    (x_BTD, stacks), (repeat, layer, group_params) = carry, scanned
    stats = []
    for j in range(len(blocks)):
      cache = None if stacks is None else of_layer(stacks[j], repeat)
      x_BTD, layer_stats, cache = run_layer(j, group_params[f"layer_{j}"], x_BTD, layer, cache)
      if layer_stats is not None:
        stats.append(layer_stats)
      if stacks is not None:
        stacks = (*stacks[:j], into_stack(stacks[j], cache, repeat), *stacks[j + 1 :])
    return (x_BTD, stacks), tuple(stats)

  x_BTD = constrain(x_BTD, "act_batch", "act_norm_seq", "act_embed")  # placed as blocks leave it
  if caches is not None:
    caches = tuple(map(place_stack, caches))
  xs = (jnp.arange(repeats, dtype=jnp.int32), layers_L, params)
  (x_BTD, caches), stats = jax.lax.scan(group, (x_BTD, caches), xs, length=repeats, unroll=unroll)
  return x_BTD, stats, caches


_ROW_AXES = {
  "positions_BT": ("act_batch", "act_seq"),
  "segments_BT": ("act_batch", "act_seq"),
  "key_B": ("act_batch",),
  "table_UN": (None, "act_heads"),
  "place_T": ("act_seq",),
  "tokens_BT": ("act_batch", "act_seq"),
}


def run_segment(
  segment: Segment,
  blocks: Sequence[Block],
  params: dict[str, Any],
  x_BTD: jax.Array,
  rows: Rows,
  *,
  region: Region | None,
  first_layer: int = 0,
  caches: tuple[KVCache | LinearState, ...] | None = None,
  train: bool = False,
  remat: str | Sequence[str] = "none",
  unroll: int | None = None,
  microbatches: int = 1,
  circular: int = 1,
) -> tuple[jax.Array, tuple[MoeStats, ...], tuple[KVCache | LinearState, ...] | None]:
  """`apply_segment`; in a region each device on its own rows, stage after stage.

  Args:
    segment: layers and repeats.
    blocks, params, caches, train, remat, unroll: see `apply_segment`.
    region: see `mesh.region`; None leaves placement to the compiler.
    first_layer: index of the segment's first layer.
    microbatches: parts of a device's rows that follow each other through the pipeline stages.
    circular: times a microbatch goes round the stages.

  Raises:
    ValueError: rows that do not divide into the microbatches.
  """
  layers_L = first_layer + len(segment.layers) * jnp.arange(segment.repeats, dtype=jnp.int32)
  run = functools.partial(apply_segment, blocks, train=train, remat=remat, unroll=unroll)
  if region is None:
    return run(params, x_BTD, rows, layers_L=layers_L, caches=caches)
  stages = region.sizes.get("stage", 1)
  staged = is_staged(segment.repeats, stages, circular)
  logical, whole = _axes_and_exact(tuple(blocks))
  logical = beside(logical, params, _adapter_axes)
  whole = beside(whole, params, lambda *_: {"a": False, "b": False})
  placed = jax.tree.map(
    lambda names: region.spec(("layers" if staged else None, *names)), logical, is_leaf=_is_names
  )
  given: Any = {name: x for name, x in rows._asdict().items() if x is not None}
  rows = rows._replace(**{name: constrain(x, *_ROW_AXES[name]) for name, x in given.items()})
  specs: Any = {name: region.spec(_ROW_AXES[name]) for name in given}
  row_specs = rows._replace(**specs)
  layer_spec = region.spec(("layers",)) if staged else region.spec((None,))
  order = stage_order(segment.repeats, stages, circular) if staged and circular > 1 else None

  def local(params, x_BTD, rows, layers_L):
    whole_weights = functools.partial(_whole, region, logical, whole, x_BTD.dtype)
    here = functools.partial(run, gather=whole_weights)
    if staged:
      x_BTD, stats = _through_stages(here, params, x_BTD, rows, layers_L, microbatches, circular)
    else:
      x_BTD, stats, _ = here(params, x_BTD, rows, layers_L=layers_L)
    total = lambda x: jax.lax.psum(vary(x, region.tokens), region.tokens)
    return x_BTD, jax.tree.map(total, stats)

  if order is not None:
    params, layers_L = jax.tree.map(lambda p: take(p, order, 0), (params, layers_L))
  if staged:
    layers_L = constrain(layers_L, "layers")
  x_BTD = constrain(x_BTD, "act_batch", "act_seq", "act_embed")
  x_spec = region.spec(("act_batch", "act_seq", None))
  sharded = region.run(
    local, in_specs=(placed, x_spec, row_specs, layer_spec), out_specs=(x_spec, layer_spec)
  )
  x_BTD, stats = sharded(params, x_BTD, rows, layers_L)
  if order is not None:
    stats = jax.tree.map(lambda s: take(s, order.argsort(), 0), stats)
  return x_BTD, stats, None


def _whole(region: Region, logical, exact, dtype, layer: str, weights):
  """Of one layer of a group, from this device's shards."""
  return gather(region, weights, logical[layer], exact[layer], dtype)


def is_staged(repeats: int, stages: int, circular: int) -> bool:
  """Whether a segment of so many repeats is spread over the pipeline stages.

  Otherwise every stage computes all of it: a prefix or suffix of a few layers.
  """
  return stages > 1 and repeats % (stages * circular) == 0


def _through_stages(here, params, x_BTD, rows, layers_L, microbatches, circular):
  """This device's layers, in `circular` chunks, as one stage of the pipeline."""
  if x_BTD.shape[0] % microbatches:
    raise ValueError(
      f"{x_BTD.shape[0]} rows a device do not divide into {microbatches} microbatches"
    )
  split = lambda x: x.reshape(microbatches, -1, *x.shape[1:])
  by_row = rows._replace(table_UN=None, place_T=None)
  rows_M = jax.tree.map(split, by_row)
  params, layers_L = vary((params, layers_L), ("stage",))
  chunks = jax.tree.map(
    lambda p: p.reshape(circular, p.shape[0] // circular, *p.shape[1:]), (params, layers_L)
  )

  def stage(chunk, microbatch, x_BTD):
    at = lambda tree, i: jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree
    )
    weights, layers = at(chunks, chunk)
    mine = at(rows_M, microbatch)._replace(table_UN=rows.table_UN, place_T=rows.place_T)
    x_BTD, stats, _ = here(weights, x_BTD, mine, layers_L=layers)
    return x_BTD, stats

  out_MBTD, stats = pipeline(stage, split(x_BTD), repeats=circular)
  flat = lambda s: s.reshape(-1, *s.shape[2:])
  return out_MBTD.reshape(x_BTD.shape), jax.tree.map(flat, stats)


def _adapter_axes(names: tuple, a: jax.Array, b: jax.Array) -> dict[str, tuple]:
  """Of one layer, from those of the weight; the arrays are stacked."""
  k = a.ndim - 2
  return {"a": (*names[:k], None), "b": (None, *names[k:])}


def _is_names(x: Any) -> bool:
  return isinstance(x, tuple)


@functools.lru_cache(maxsize=64)
def _axes_and_exact(blocks: tuple[Block, ...]) -> tuple[Any, Any]:
  """For each weight of a group its logical axes, and whether it must stay exact."""
  boxed = {f"layer_{j}": abstract_block(b.spec, b.embed_dim) for j, b in enumerate(blocks)}
  return axes(boxed), exact(boxed)
