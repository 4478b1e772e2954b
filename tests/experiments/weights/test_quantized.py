"""FP8 and MXFP4 as the hub has them, against their bits read by hand."""

import json
import math
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config import ConfigError
from experiments.weights.source import open_source

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [2, 3]}


def write(folder, tensors, quantization=None):
  """Safetensors byte by byte: {name: (dtype, shape, bytes)}; numpy has no words for all types."""
  header, data = {}, b""
  for name, (dtype, shape, raw) in tensors.items():
    header[name] = {
      "dtype": dtype,
      "shape": shape,
      "data_offsets": [len(data), len(data) + len(raw)],
    }
    data += raw
  head = json.dumps(header).encode()
  (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
  said = {} if quantization is None else {"quantization_config": quantization}
  (folder / "config.json").write_text(json.dumps(said))
  return folder


def e4m3(code):
  """Sign, four bits of exponent with bias 7, three of mantissa; no infinity (arXiv 2209.05433)."""
  sign = -1.0 if code >> 7 else 1.0
  exponent, mantissa = code >> 3 & 15, code & 7
  if exponent == 15 and mantissa == 7:
    return math.nan
  if exponent == 0:
    return sign * mantissa / 8 * 2.0**-6
  return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def test_fp8(tmp_path):
  """All 256 codes, in blocks that do not fit the shape."""
  codes = np.random.default_rng(0).permutation(256).astype(np.uint8)
  codes = np.concatenate([codes, codes[:3]]).reshape(37, 7)
  scales = np.random.default_rng(1).random((19, 3)).astype(np.float32)
  write(tmp_path, {
    "a.weight": ("F8_E4M3", [37, 7], codes.tobytes()),
    "a.weight_scale_inv": ("F32", [19, 3], scales.tobytes()),
    "norm.weight": ("BF16", [2], b"\x80\x3f\x00\xc0"),
  }, FP8)  # fmt: skip
  tensors = open_source(tmp_path, None).tensors
  assert set(tensors) == {"a.weight", "norm.weight"} and tensors["a.weight"].shape == (37, 7)
  found = tensors["a.weight"].read()
  expected = np.array(
    [[e4m3(int(codes[i, j])) * scales[i // 2, j // 3] for j in range(7)] for i in range(37)]
  )
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, expected.astype(np.float32))
  norm = tensors["norm.weight"].read()
  assert norm.dtype == jnp.bfloat16 and norm.astype(np.float32).tolist() == [1.0, -2.0]


def test_mxfp4(tmp_path):
  """Two experts of three rows, 64 numbers each: low halves of bytes first, then transposed."""
  rng = np.random.default_rng(0)
  packed = rng.integers(0, 256, (2, 3, 2, 16)).astype(np.uint8)
  scales = rng.integers(0, 255, (2, 3, 2)).astype(np.uint8)
  name = "model.layers.0.mlp.experts.gate_up_proj"
  write(tmp_path, {
    f"{name}_blocks": ("U8", [2, 3, 2, 16], packed.tobytes()),
    f"{name}_scales": ("U8", [2, 3, 2], scales.tobytes()),
  }, {"quant_method": "mxfp4"})  # fmt: skip
  tensors = open_source(tmp_path, None).tensors
  assert list(tensors) == [name] and tensors[name].shape == (2, 64, 3)
  found = tensors[name].read()
  e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
  for e, column, row in np.ndindex(2, 64, 3):
    byte = int(packed[e, row, column // 32, column % 32 // 2])
    code = byte >> 4 if column % 2 else byte & 15
    value = (-1 if code >> 3 else 1) * e2m1[code & 7]
    power = 2.0 ** (int(scales[e, row, column // 32]) - 127)
    assert float(found[e, column, row]) == value * power
  assert found.dtype == jnp.bfloat16

  torch = pytest.importorskip("torch", reason="needs the extra `parity`")
  mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
  theirs = mxfp4.convert_moe_packed_tensors(torch.tensor(packed), torch.tensor(scales))
  np.testing.assert_array_equal(found.astype(np.float32), theirs.float().numpy())


W = ("F8_E4M3", [2, 3], bytes(6))


@pytest.mark.parametrize(
  ("tensors", "said", "words"),
  [
    ({}, {"quant_method": "gptq", "bits": 4}, "quantized by 'gptq'; read are fp8 and mxfp4: take"),
    ({}, {"quant_method": "awq"}, "quantized by 'awq'"),
    ({}, {"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantized by 'bitsandbytes'"),
    ({}, {"bits": 4}, "quantized by None"),
    ({}, "int8", "quantized by 'int8'"),
    ({}, FP8 | {"weight_block_size": None}, "weight_block_size=None is not read"),
    ({}, FP8 | {"weight_block_size": [0, 128]}, r"weight_block_size=\[0, 128\] is not read"),
    ({"a": W}, FP8, "a is F8_E4M3 but a_scale_inv is missing"),
    ({"a": W, "a_scale_inv": ("F32", [2, 2], bytes(16))}, FP8,
     r"a_scale_inv is \[2, 2\], \[2, 3\] in blocks of \[2, 3\] needs \[1, 1\]"),
    ({"a": W}, None, "a is F8_E4M3; only F32, F16, BF16, F64 are read"),
    ({"a_blocks": ("U8", [2, 16], bytes(32))}, {"quant_method": "mxfp4"}, "a_blocks is U8, wi"),
    ({"a_blocks": ("U8", [1, 1, 8], bytes(8)), "a_scales": ("U8", [1, 1], bytes(1))},
     {"quant_method": "mxfp4"}, r"a_blocks is \[1, 1, 8\] and its scales \[1, 1\]; 16 bytes"),
    ({"a": ("I64", [1], bytes(8))}, None, "a is I64; only F32"),
  ],
)  # fmt: skip
def test_what_is_refused(tensors, said, words, tmp_path):
  write(tmp_path, tensors, said)
  with pytest.raises(ConfigError, match=words) as error:
    open_source(tmp_path, None)
  assert "\n" not in str(error.value)
