"""Weights that the hub keeps in 8 or 4 bits, as what they stand for, when they are read.

FP8 (DeepSeek-V3, arXiv 2412.19437): float8_e4m3fn, a factor for each block of 128 x 128 in a tensor
beside it. MXFP4 (gpt-oss; OCP Microscaling Formats 1.0): 32 values of 4 bits under one power of 2.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ..config import ConfigError

_PLAIN = {"F64", "F32", "F16", "BF16"}
_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"
# Sign, two bits of exponent, one of mantissa.
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


class Tensor(NamedTuple):
  """One that can be read."""

  shape: tuple[int, ...]
  read: Any  # () -> np.ndarray


class Stored(NamedTuple):
  """One as its file has it."""

  path: Path
  dtype: str  # in safetensors' words
  tensor: Tensor


def plain(stored: Mapping[str, Stored], config: Mapping[str, Any]) -> dict[str, Tensor]:
  """The tensors that a model is made of; quantized ones are float32 (FP8) or bfloat16 (MXFP4), both
  without loss.

  Raises:
    ConfigError: quantized in a way that is not read, or incompletely.
  """
  said = config.get("quantization_config") or {}
  method = said.get("quant_method") if isinstance(said, dict) else said
  if method == "fp8":
    found = _fp8(stored, said)
  elif method == "mxfp4":
    found = _mxfp4(stored)
  elif said:
    raise ConfigError(
      f"the weights are quantized by {method!r}; read are fp8 and mxfp4: take the model that was "
      "not quantized, or a GGUF, or dequantize() and save it with transformers"
    )
  else:
    found = {name: s.tensor for name, s in stored.items()}
  for name in found:
    if name in stored and found[name] is stored[name].tensor and stored[name].dtype not in _PLAIN:
      s = stored[name]
      raise ConfigError(f"{s.path}: {name} is {s.dtype}; only F32, F16, BF16, F64 are read")
  return found


def _fp8(stored: Mapping[str, Stored], said: Mapping[str, Any]) -> dict[str, Tensor]:
  block = said.get("weight_block_size")
  size = lambda n: isinstance(n, int) and n > 0
  if not isinstance(block, list) or len(block) != 2 or not all(map(size, block)):
    raise ConfigError(
      f"fp8 with weight_block_size={block} is not read, only two sizes, as [128, 128]"
    )
  found = {}
  for name, s in stored.items():
    if s.dtype != "F8_E4M3":
      if name.removesuffix(_SCALE) not in stored or not name.endswith(_SCALE):
        found[name] = s.tensor
      continue
    if name + _SCALE not in stored:
      raise ConfigError(f"{s.path}: {name} is F8_E4M3 but {name}{_SCALE} is missing")
    scale, shape = stored[name + _SCALE].tensor, s.tensor.shape
    want = (*shape[:-2], *(-(-n // b) for n, b in zip(shape[-2:], block, strict=True)))
    if len(shape) < 2 or scale.shape != want:
      raise ConfigError(
        f"{s.path}: {name}{_SCALE} is {list(scale.shape)}, {list(shape)} in blocks of {block} "
        f"needs {list(want)}"
      )
    found[name] = Tensor(shape, partial(_read_fp8, s.tensor, scale, block))
  return found


def _read_fp8(weight: Tensor, scale: Tensor, block: list[int]) -> np.ndarray:
  w, made = weight.read(), np.empty(weight.shape, np.float32)
  s = scale.read().astype(np.float32)
  rows, columns = block
  for at in np.ndindex(s.shape[:-1]):
    part = (*at[:-1], slice(at[-1] * rows, (at[-1] + 1) * rows))
    factors = np.repeat(s[at], columns)[: w.shape[-1]]
    np.multiply(w[part].astype(np.float32), factors, out=made[part])
  return made


def _mxfp4(stored: Mapping[str, Stored]) -> dict[str, Tensor]:
  found = {}
  for name, s in stored.items():
    base = name.removesuffix(_BLOCKS)
    if s.dtype != "U8":
      found[name] = s.tensor
    elif name.endswith(_BLOCKS) and base + _SCALES in stored:
      scales, shape = stored[base + _SCALES].tensor, s.tensor.shape
      if len(shape) < 3 or shape[-1] != 16 or scales.shape != shape[:-1]:
        raise ConfigError(
          f"{s.path}: {name} is {list(shape)} and its scales {list(scales.shape)}; 16 bytes a "
          "scale are needed"
        )
      whole = (*shape[:-3], 32 * shape[-2], shape[-3])
      found[base] = Tensor(whole, partial(_read_mxfp4, s.tensor, scales))
    elif not (name.endswith(_SCALES) and name.removesuffix(_SCALES) + _BLOCKS in stored):
      raise ConfigError(f"{s.path}: {name} is U8, without its other half")
  return found


def _read_mxfp4(blocks: Tensor, scales: Tensor) -> np.ndarray:
  """[..., rows, blocks, 16] as [..., 32 * blocks, rows]: transformers transposes these."""
  b, s = blocks.read(), scales.read()
  made = np.empty((*b.shape[:-2], 32 * b.shape[-2]), jnp.bfloat16)
  for at in np.ndindex(b.shape[:-3]):  # an expert at a time
    values = np.stack([_FP4[b[at] & 15], _FP4[b[at] >> 4]], -1).reshape(*b.shape[-3:-1], 32)
    made[at] = np.ldexp(values, s[at][..., None].astype(np.int32) - 127).reshape(made[at].shape)
  return made.swapaxes(-1, -2)
