"""GGUF files: numbers of every quantized type, and files that are not what they should be."""

import struct
import tracemalloc

import numpy as np
import pytest

from experiments.config import ConfigError
from experiments.weights.gguf import open_gguf

gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")
blocks = pytest.importorskip("tests.experiments.weights.gguf_blocks")
Type = gguf.GGMLQuantizationType


def write(path, tensors, arch="llama", **values):
  """Tensors as {name: (array, type or None)}; an array of bytes if there is a type."""
  writer = gguf.GGUFWriter(path, arch)
  for name, value in {"context_length": 8, "embedding_length": 8, "block_count": 1,
                      "attention.head_count": 1}.items():  # fmt: skip
    writer.add_uint32(f"{arch}.{name}", value)
  for name, value in values.items():
    writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
  for name, (array, kind) in tensors.items():
    writer.add_tensor(name, array, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def random_blocks(name, rows, columns):
  """Random bytes, with factors that are finite; and what they stand for."""
  one, factors, size, numbers = blocks.BLOCKS[name]
  rng = np.random.default_rng(0)
  made = rng.integers(0, 256, (rows * columns, size)).astype(np.uint8)
  for at in factors:
    made[:, at : at + 2] = rng.standard_normal((len(made), 1)).astype(np.float16).view(np.uint8)
  if name == "MXFP4":
    made[:, 0] = rng.integers(100, 150, len(made))
  expected = np.array([one(block) for block in made])
  return made.reshape(rows, -1), expected.reshape(rows, columns * numbers)


@pytest.mark.parametrize("name", blocks.BLOCKS)
def test_numbers_of_a_type(name, tmp_path):
  data, expected = random_blocks(name, 17, 2)
  source = open_gguf(write(tmp_path / "x.gguf", {"x": (data, Type[name])}))
  assert source.tensors["x"].shape == expected.shape
  found = source.tensors["x"].read()
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_numbers_that_are_not_quantized(tmp_path):
  x = np.random.default_rng(0).standard_normal((3, 2, 4))
  for dtype, kind in [(np.float64, None), (np.float32, None), (np.float16, None)]:
    source = open_gguf(write(tmp_path / "x.gguf", {"x": (x.astype(dtype), kind)}))
    np.testing.assert_array_equal(source.tensors["x"].read(), x.astype(dtype))
  upper = (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
  source = open_gguf(write(tmp_path / "x.gguf", {"x": (upper.view(np.uint8), Type.BF16)}))
  found = source.tensors["x"].read().astype(np.float32)
  np.testing.assert_array_equal(found.view(np.uint32), upper.astype(np.uint32) << 16)


# The largest error of a number, in steps of its block, where the step is what the quantizer takes:
# the range over the number of levels. Types without an offset lose a step at one end.
@pytest.mark.parametrize(
  ("name", "levels", "signed", "most"),
  [("Q4_0", 16, True, 1), ("Q4_1", 15, False, 0.5), ("Q5_0", 32, True, 1),
   ("Q5_1", 31, False, 0.5), ("Q8_0", 254, True, 0.5)],
)  # fmt: skip
def test_error_of_a_quantization(name, levels, signed, most, tmp_path):
  x = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
  data = gguf.quantize(x, Type[name])
  found = open_gguf(write(tmp_path / "x.gguf", {"x": (data, Type[name])})).tensors["x"].read()
  each = x.reshape(-1, 32)
  span = 2 * np.abs(each).max(1) if signed else np.ptp(each, axis=1)
  rounding = np.abs(each).max(1) * 2.0**-10  # of the factors, to float16
  bound = most * span / levels + rounding
  assert (np.abs(found.reshape(-1, 32) - each).max(1) <= bound).all()


def test_other_types_of_the_package(tmp_path):
  """Their codebooks are long: only that rows come out where the package puts them."""
  rng = np.random.default_rng(0)
  for name in ("IQ2_XXS", "IQ3_S", "IQ1_S", "TQ1_0"):
    numbers, size = gguf.GGML_QUANT_SIZES[Type[name]]
    data = rng.integers(0, 60, (5, 2 * size)).astype(np.uint8)
    found = open_gguf(write(tmp_path / "x.gguf", {"x": (data, Type[name])})).tensors["x"].read()
    assert found.shape == (5, 2 * numbers)
    for row in range(5):
      np.testing.assert_array_equal(found[row], gguf.dequantize(data[row], Type[name]))


def refused(path):
  with pytest.raises(ConfigError) as error:
    open_gguf(path)
  said = str(error.value)
  assert "\n" not in said and len(said) < 400
  return said


def test_types_that_are_not_read(tmp_path):
  good, bad = (np.zeros((2, 8), "f4"), None), (np.zeros((2, 40), np.uint8), Type.Q8_1)
  said = refused(write(tmp_path / "x.gguf", {"good": good, "blk.0.bad": bad}))
  assert "blk.0.bad is Q8_1, which gguf" in said and "take a file in Q8_0" in said
  path = write(tmp_path / "x.gguf", {"steps": (np.zeros(8, np.int32), None)})
  assert "steps is I32, which gguf" in refused(path)


class File:
  """A GGUF made byte by byte."""

  def __init__(self, version=3, tensors=0, values=0):
    self.data = b"GGUF" + struct.pack("<IQQ", version, tensors, values)

  def text(self, value, length=None):
    raw = value.encode() if isinstance(value, str) else value
    self.data += struct.pack("<Q", len(raw) if length is None else length) + raw
    return self

  def pack(self, form, *values):
    self.data += struct.pack("<" + form, *values)
    return self

  def save(self, path):
    path.write_bytes(self.data)
    return path


def test_hostile_heads(tmp_path):
  """Absurd numbers are compared with the file before anything is made of them."""
  huge = 1 << 62
  arch = lambda **k: File(values=1, **k).text("general.architecture").pack("I", 8).text("llama")
  tensor = lambda dims, kind=0, at=0: (
    arch(tensors=1).text("x").pack("I", len(dims)).pack(f"{len(dims)}Q", *dims).pack("IQ", kind, at)
  )
  many = File(values=1).text("a").pack("IIQ", 9, 8, (1 << 22) + 1)
  cases = {
    "nothing": b"", "another format": b"PK\3\4" + b"\0" * 40, "no more than the name": b"GGUF",
    "values without end": File(values=huge).data,
    "tensors without end": File(tensors=huge).data,
    "text": File(values=1).text(b"", huge).data,
    "text of a value": File(values=1).text("a").pack("IQ", 8, huge).data,
    "a list": File(values=1).text("a").pack("IIQ", 9, 4, huge).data,
    "a list of texts": File(values=1).text("a").pack("IIQ", 9, 8, huge).data,
    "lists of lists": File(values=1).text("a").pack("IIQ", 9, 9, huge).data,
    "too many empty texts": many.data + bytes(8 * ((1 << 22) + 1)),
    "an unknown kind of value": File(values=1).text("a").pack("IQ", 77, 0).data,
    "no UTF-8": File(values=1).text(b"\xff\xfe").pack("IQ", 4, 0).data,
    "a name twice": File(values=2).text("a").pack("II", 4, 0).text("a").pack("II", 4, 0).data,
    "version 1": File(version=1).data, "big-endian": File(version=3 << 24).data,
    "dimensions": arch(tensors=1).text("x").pack("I", 1 << 31).data + bytes(64),
    "a shape that overflows": tensor([1 << 40, 1 << 40]).data,
    "a shape of 2^64 + 32": tensor([(1 << 63) // 31, 62]).data,
    "a shape with 0": tensor([0, 8]).data,
    "a part of a block": tensor([31], 2).data + bytes(64),
    "an offset": tensor([8], at=huge).data,
    "a type": tensor([8], 1 << 30).data,
    "alignment": File(values=2).text("general.alignment").pack("II", 4, 3)
    .text("general.architecture").pack("I", 8).text("llama").data,
    "alignment 0": File(values=1).text("general.alignment").pack("II", 4, 0).data,
    "no architecture": File().data,
  }  # fmt: skip
  path = tmp_path / "x.gguf"
  for name, data in cases.items():
    path.write_bytes(data)
    tracemalloc.start()
    try:
      said = refused(path)
      assert str(path) in said, name
      assert tracemalloc.get_traced_memory()[1] < len(data) + (1 << 20), name
    finally:
      tracemalloc.stop()


def test_cut_anywhere(tmp_path):
  """Of a file that ends too soon nothing is read."""
  x = np.arange(64, dtype=np.float32)
  path = write(tmp_path / "x.gguf", {"x": (x, None), "y": (x, None)}, **{"a.list": ["b", "cd"]})
  assert set(open_gguf(path).tensors) == {"x", "y"}
  data = path.read_bytes()
  for size in [*range(0, len(data) - 4 * 64, 7), len(data) - 4]:
    path.write_bytes(data[:size])
    assert "damaged" in refused(path) or "can't be read" in refused(path)


def test_bytes_that_flipped(tmp_path):
  """Each byte of the head in turn: an error of one sentence, or the same tensors."""
  x = np.arange(8, dtype=np.float32)
  path = write(tmp_path / "x.gguf", {"x": (x, None)}, **{"a.list": [1, 2, 3]})
  data = path.read_bytes()
  for at in range(len(data) - 32):
    path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
    try:
      found = open_gguf(path)
    except ConfigError as error:
      assert "\n" not in str(error)
    else:
      assert all(t.read().size <= 8 for t in found.tensors.values())
