"""Low-rank adapters (LoRA, arXiv 2106.09685): trained beside weights that stay as they are.

A weight w [K..., F...] with an adapter acts as w + s a b, with a [K..., r], b [r, F...] and the
scale s = alpha / r; `linear.dense` computes x w + (x a) b and never the sum. Adapters lie in the
tree of parameters, beside `query` a `query_lora` with `a` and `b`, stacked over layers as it is;
whether a model has some, its parameters say.

Dims: K contracted, F results, r rank.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .params import SUFFIX, Weight, is_weight

Params = dict[str, Any]


def attach(boxed: Params, rank: int, targets: Sequence[str]) -> Params:
  """The shapes of a model's parameters with adapters, which alone are trained.

  Args:
    boxed: `Weight`s of ShapeDtypeStructs, as `jax.eval_shape` of `init` gives them.
    targets: last names of weights: query, up.

  Raises:
    ValueError: a name that no weight has which `dense` multiplies by; the names there are.
  """
  known = {path[-1] for path, w in _weights(boxed) if w.num_in}
  if missing := [name for name in targets if name not in known]:
    raise ValueError(
      f"no adapter can be added to {missing[0]!r}: the model has {', '.join(sorted(known))}"
    )

  def adapter(w: Weight) -> Params:
    shape, names, k = w.value.shape, w.names, 1 + w.num_in  # the first dim counts layers
    one = lambda shape, names: Weight(jax.ShapeDtypeStruct(shape, jnp.float32), names=names)
    return {
      "a": one((*shape[:k], rank), (*names[:k], None)),
      "b": one((shape[0], rank, *shape[k:]), (names[0], None, *names[k:])),
    }

  def walk(tree: Params) -> Params:
    found = {}
    for name, value in tree.items():
      if not is_weight(value):
        found[name] = walk(value)
        continue
      found[name] = value.replace(trainable=False)
      if value.num_in and name in targets:
        found[name + SUFFIX] = adapter(value)
    return found

  return walk(boxed)


def draw(shapes: Params, key: jax.Array) -> Params:
  """First values: a uniform in +-1 / sqrt(K) as the authors' code has it, b zero, so that the model
  is the one without.

  Args:
    shapes: of adapters alone, see `split`.
  """

  def one(path, leaf):
    if path[-1].key == "b":
      return jnp.zeros(leaf.shape, leaf.dtype)
    here = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
    bound = math.prod(leaf.shape[1:-1]) ** -0.5  # the first dim counts layers
    return jax.random.uniform(here, leaf.shape, leaf.dtype, -bound, bound)

  return jax.tree_util.tree_map_with_path(one, shapes)


def split(params: Params) -> tuple[Params, Params]:
  """(what is trained, what is not): adapters and the rest; everything and nothing without any."""
  adapters, rest = _split(params)
  return (adapters, rest) if adapters else (params, {})


def join(first: Params, second: Params) -> Params:
  """The tree that was `split`."""
  both = {**first, **second}
  for name in first.keys() & second.keys():
    both[name] = join(first[name], second[name])
  return both


def scaled(params: Params, scale: float) -> Params:
  """`params` with every `a` times alpha / r."""
  if scale == 1:
    return params
  adapters, rest = _split(params)
  times = lambda path, x: x * scale if path[-1].key == "a" else x
  return join(jax.tree_util.tree_map_with_path(times, adapters), rest)


def merge(params: Params, scale: float) -> Params:
  """Parameters without adapters: w + scale a b in place of each w. They are given away."""
  return {
    name: _sum(value, params.get(name + SUFFIX), scale)
    for name, value in params.items()
    if not name.endswith(SUFFIX)
  }


def _sum(value: Any, adapter: Params | None, scale: float) -> Any:
  if isinstance(value, dict):
    return merge(value, scale)
  if adapter is None:
    return value
  return _merged(value.sharding)(value, adapter["a"], adapter["b"], scale)


def _merged(sharding: Any) -> Callable[..., jax.Array]:
  def add(w, a, b, scale):
    a_LKR, b_LRF = a.reshape(a.shape[0], -1, a.shape[-1]), b.reshape(*b.shape[:2], -1)
    product = jnp.matmul(a_LKR, b_LRF, precision=jax.lax.Precision.HIGHEST)
    return w + scale * product.reshape(w.shape)

  return jax.jit(add, donate_argnums=0, out_shardings=sharding)


def beside(tree: Params, params: Params, of: Callable[[Any, jax.Array, jax.Array], Any]) -> Params:
  """`tree`, which has something for each weight of one layer, with `of(it, a, b)` for each adapter
  that `params` hold, a dict of `a` and `b`; those of `params` are stacked."""
  found = {}
  for name, value in params.items():
    if name.endswith(SUFFIX):
      found[name] = of(tree[name.removesuffix(SUFFIX)], value["a"], value["b"])
    else:
      found[name] = beside(tree[name], value, of) if isinstance(value, dict) else tree[name]
  return found


def _split(params: Params) -> tuple[Params, Params]:
  adapters, rest = {}, {}
  for name, value in params.items():
    if name.endswith(SUFFIX):
      adapters[name] = value
    elif isinstance(value, dict):
      inner, others = _split(value)
      adapters |= {name: inner} if inner else {}
      rest[name] = others
    else:
      rest[name] = value
  return adapters, rest


def _weights(boxed: Params, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Weight]]:
  for name, value in boxed.items():
    if is_weight(value):
      yield (*path, name), value
    else:
      yield from _weights(value, (*path, name))
