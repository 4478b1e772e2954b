"""Weights as safetensors, written one tensor at a time.

A tensor is put together on the devices, by the same lines of the table that read it, comes to the
host, and goes to its file in pieces: on the host there is never more than one of them. The files'
form is a header (its length as 8 bytes, then JSON with type, shape and place of each tensor) and
then the bytes of the tensors (huggingface.co/docs/safetensors).
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layers.spec import ModelSpec

from .table import Piece, Rule, Table, grouped, pieces, their_shape, to_theirs

DTYPES = {"float32": "F32", "bfloat16": "BF16"}  # ours, theirs
_PART = 1 << 24  # values made contiguous at once


class Planned(NamedTuple):
  """A tensor that will be written."""

  name: str
  shape: tuple[int, ...]
  rule: Rule
  paths: tuple[str, ...]  # of the parameters that it is made of
  at: tuple[int, ...]

  @property
  def size(self) -> int:
    return math.prod(self.shape)


class Written(NamedTuple):
  tensors: int
  parameters: int
  bytes: int  # of the tensors
  files: list[str]


def item_bytes(dtype: str) -> int:
  return jnp.dtype(dtype).itemsize


def plan(table: Table, spec: ModelSpec, leaves: dict[str, Any]) -> list[Planned]:
  """Every tensor of a checkpoint, in the order of the layers.

  Args:
    leaves: parameters, or their shapes, by path.

  Raises:
    KeyError: no rule for a parameter.
  """
  shapes = {path: leaf.shape for path, leaf in leaves.items()}
  planned = []
  for name, own in grouped(pieces(table, spec, shapes)).items():
    first: Piece = own[0]
    paths = tuple(first.prefix + path for path in first.rule.ours)
    planned.append(Planned(name, their_shape(first.rule, first.shapes(leaves)), first.rule, paths,
                           first.at))  # fmt: skip
  return planned


def shards(planned: list[Planned], itemsize: int, largest: int) -> dict[str, list[Planned]]:
  """File name -> its tensors: as many in a row as `largest` bytes hold, and at least one."""
  parts: list[list[Planned]] = [[]]
  room = largest
  for tensor in planned:
    size = tensor.size * itemsize
    if parts[-1] and size > room:
      parts.append([])
      room = largest
    parts[-1].append(tensor)
    room -= size
  if len(parts) == 1:
    return {"model.safetensors": parts[0]}
  n = len(parts)
  return {f"model-{i:05}-of-{n:05}.safetensors": part for i, part in enumerate(parts, 1)}


def save(
  folder: Path,
  planned: list[Planned],
  leaves: dict[str, jax.Array],
  *,
  dtype: str = "float32",
  largest: int = 5 * 10**9,
  progress: Callable[[int, int], None] = lambda done, count: None,
) -> Written:
  """Write the tensors into `folder`, with an index if they take several files.

  Args:
    largest: bytes of a file; a tensor that is larger gets one of its own.

  Raises:
    OSError: the disk refuses.
  """
  kind = jnp.dtype(dtype)
  files = shards(planned, kind.itemsize, largest)
  done = 0
  for file, tensors in files.items():
    with (folder / file).open("wb") as out:
      out.write(_header(tensors, kind))
      for tensor in tensors:
        progress(done, len(planned))
        own = tuple(leaves[path] for path in tensor.paths)
        value = _gather(tensor.rule.unnamed, len(tensor.at), kind)(
          own, np.asarray(tensor.at, np.int32)
        )
        for part in _contiguous(np.asarray(value)):
          out.write(part.view(np.uint8))
        del value
        done += 1
      out.flush()
      os.fsync(out.fileno())
  count = sum(tensor.size for tensor in planned)
  if len(files) > 1:
    places = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
    index = {"metadata": {"total_size": count * kind.itemsize}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
  progress(done, len(planned))
  return Written(len(planned), count, count * kind.itemsize, list(files))


def _header(tensors: list[Planned], kind: np.dtype) -> bytes:
  said: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
  start = 0
  for tensor in tensors:
    end = start + tensor.size * kind.itemsize
    said[tensor.name] = {
      "dtype": DTYPES[kind.name], "shape": list(tensor.shape), "data_offsets": [start, end],
    }  # fmt: skip
    start = end
  text = json.dumps(said, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # so that tensors are aligned
  return struct.pack("<Q", len(text)) + text


@cache
def _gather(rule: Rule, depth: int, kind: np.dtype) -> Callable[..., jax.Array]:
  """From the parameters of a rule and a place on their first `depth` axes, the tensor."""

  @partial(jax.jit)
  def tensor(own: tuple[jax.Array, ...], at: jax.Array) -> jax.Array:
    index = tuple(at[i] for i in range(depth))
    return to_theirs(rule, [leaf[index] if depth else leaf for leaf in own]).astype(kind)

  return tensor


def _contiguous(value: np.ndarray) -> Iterable[np.ndarray]:
  """Its values in order, in parts; copied only where they lie otherwise."""
  if value.flags.c_contiguous:
    yield value.reshape(-1)
    return
  rows = max(1, _PART * len(value) // value.size)
  for first in range(0, len(value), rows):
    yield np.ascontiguousarray(value[first : first + rows]).reshape(-1)
