"""`generate --weights=` with what can't be a checkpoint: one line that says so, exit code 2."""

import json
import shutil

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from experiments import cli
from experiments.restore import load_weights
from tests.experiments.programs import ONE, call

CONFIG = {
  "model_type": "llama", "vocab_size": 31, "hidden_size": 8, "intermediate_size": 12,
  "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
  """A small LLaMA with a tokenizer of 31 words."""
  folder = tmp_path_factory.mktemp("good")
  d, f, v = 8, 12, 31
  shapes = {"model.embed_tokens": (v, d), "model.norm": (d,), "lm_head": (v, d)}
  for n in range(2):
    own = {"input_layernorm": (d,), "post_attention_layernorm": (d,), "mlp.down_proj": (d, f)}
    own |= {f"self_attn.{x}_proj": (d, d) for x in "qkvo"}
    own |= {f"mlp.{x}_proj": (f, d) for x in ("gate", "up")}
    shapes |= {f"model.layers.{n}.{name}": shape for name, shape in own.items()}
  rng = np.random.default_rng(0)
  tensors = {f"{k}.weight": rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
  save_file(tensors, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(CONFIG))
  vocabulary(folder, 31)
  return folder


def vocabulary(folder, count):
  words = ["</s>", *(chr(97 + i) for i in range(26)), *(f"w{i}" for i in range(count - 27))]
  made = tokenizers.Tokenizer(tokenizers.models.BPE({w: i for i, w in enumerate(words)}, []))
  made.save(str(folder / "tokenizer.json"))


@pytest.fixture
def folder(good, tmp_path):
  shutil.copytree(good, tmp_path / "model")
  return tmp_path / "model"


def refused(path, *more):
  result = call("generate", ONE, f"--weights={path}", "--prompt=ab", "--max_tokens=2", *more)
  said = result.err.strip()
  assert result.code == 2 and result.out == "", said
  assert "\n" not in said and "Traceback" not in said and len(said) < 500
  return said


def config(folder, **changed):
  kept = {k: v for k, v in (CONFIG | changed).items() if v != "drop"}
  (folder / "config.json").write_text(json.dumps(kept))


def change(folder, edit):
  tensors = load_file(folder / "model.safetensors")
  edit(tensors)
  save_file(tensors, folder / "model.safetensors")


def test_the_good_one_runs(good):
  result = call("generate", ONE, f"--weights={good}", "--prompt=ab", "--max_tokens=2")
  assert result.code == 0 and result.out.startswith("ab"), result.err


def test_unknown_family(folder):
  config(folder, model_type="mamba")
  assert "is of model_type 'mamba'; known are llama, " in refused(folder)
  config(folder, model_type=["llama"])
  assert "is of model_type ['llama']; known are" in refused(folder)


def test_missing_tensors(folder):
  change(folder, lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"))
  assert "lacks model.layers.1.self_attn.q_proj.weight" in refused(folder)


def test_extra_tensors(folder):
  change(folder, lambda t: t.update({"vision.weight": np.zeros(3, np.float32)}))
  assert "has vision.weight, which the model does not know" in refused(folder)


def test_wrong_shapes(folder):
  change(folder, lambda t: t.update({"lm_head.weight": np.zeros((31, 9), np.float32)}))
  assert "lm_head.weight is [31, 9], the model needs [31, 8]" in refused(folder)


def test_damaged_files(folder):
  path = folder / "model.safetensors"
  data = path.read_bytes()
  path.write_bytes(data[:-5])
  assert "model.safetensors is damaged" in refused(folder)
  (folder / "x.gguf").write_bytes(b"GGUF" + data)
  assert "x.gguf is damaged or no GGUF file" in refused(folder / "x.gguf")
  (folder / "notes.txt").write_text("no model")
  assert "notes.txt is damaged or no safetensors file" in refused(folder / "notes.txt")


def test_a_tokenizer_of_another_model(folder):
  vocabulary(folder, 40)
  said = refused(folder)
  assert "the tokenizer has 40 ids, but the model only 31: they do not belong together" in said
  (folder / "tokenizer.json").unlink()
  assert "has no tokenizer.json: give a tokenizer by --config.data.tokenizer" in refused(folder)


def test_special_tokens_beyond_the_model_are_left_out(folder):
  """As Gemma 3 1B's `<image_soft_token>`: no text has it."""
  path = str(folder / "tokenizer.json")
  made = tokenizers.Tokenizer.from_file(path)
  made.add_special_tokens(["<image>"])
  made.save(path)
  cli._overrides[:] = [("mesh.data", "1")]
  found = load_weights(str(folder))
  cli._overrides.clear()
  assert found.tokenizer.vocab_size == 32 and found.setup.config.model.vocab_size == 31


def test_a_prompt_over_the_context(good):
  result = call("generate", ONE, f"--weights={good}", "--prompt=" + "a" * 16)
  assert result.code == 2
  assert "the prompt has 16 tokens, but the model's context is 16" in result.err


def test_a_gguf_of_an_unsupported_type(tmp_path):
  gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")
  path = tmp_path / "x.gguf"
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tensor(
    "output.weight", np.zeros((4, 40), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_1
  )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  assert "output.weight is Q8_1, which gguf" in refused(path)


@pytest.mark.parametrize(
  "name", ["../model.safetensors", "..", "/etc/passwd", "a/b.safetensors", ""]
)
def test_index_that_leaves_the_folder(name, folder):
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
  assert f"names {name!r}, which is not a file beside it" in refused(folder)


def test_symbolic_links(folder, tmp_path):
  """As in the hub's cache they are followed; to nowhere, or in a circle, they are named."""
  moved = tmp_path / "blob"
  (folder / "model.safetensors").rename(moved)
  (folder / "model.safetensors").symlink_to(moved)
  result = call("generate", ONE, f"--weights={folder}", "--prompt=ab", "--max_tokens=2")
  assert result.code == 0, result.err
  moved.unlink()
  assert "model.safetensors" in refused(folder)
  (folder / "model.safetensors").unlink()
  (folder / "model.safetensors").symlink_to("model.safetensors")
  assert "model.safetensors" in refused(folder)


HUGE = 10**15


@pytest.mark.parametrize(
  ("changed", "words"),
  [
    ({"hidden_size": "8"}, "hidden_size is '8', not a whole number from 1"),
    ({"hidden_size": -8}, "hidden_size is -8, not a whole number"),
    ({"hidden_size": 8.5}, "hidden_size is 8.5, not a whole number"),
    ({"hidden_size": True}, "hidden_size is True, not a whole number"),
    ({"hidden_size": HUGE}, "hidden_size is 1000000000000000, not a whole number from 1 to 2,147"),
    ({"hidden_size": 1 << 30}, "hidden_size=1,073,741,824, but no tensor is longer than 31"),
    ({"hidden_size": 30}, "model.embed_tokens.weight is [31, 8], the model needs [31, 30]"),
    ({"max_position_embeddings": 1 << 30}, None),
    ({"num_hidden_layers": 10**9}, "=1,000,000,000, but there are only 21 tensors"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0, not a whole number"),
    ({"num_attention_heads": 3}, "k_proj.weight is [8, 8], the model needs [6, 8]"),
    ({"num_key_value_heads": [2]}, "num_key_value_heads is [2], not a whole number"),
    ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny', not a positive number"),
    ({"rope_theta": float("inf")}, "rope_theta is inf, not a positive number"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear', no object"),
    ({"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
    ({"rope_scaling": {"type": "magic"}}, "rope_type='magic'"),
    ({"layer_types": "full"}, "layer_types is 'full', no list of names"),
    ({"layer_types": []}, None),
    ({"layer_types": ["full_attention"]}, "the config of"),
    ({"hidden_act": {}}, "the config of"),
    ({"vocab_size": "drop"}, "lacks 'vocab_size'"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantized by 'gptq'"),
    ({"model_type": "gpt_neo", "attention_types": [[["global"], 10**12]]}, "attention_types is"),
    ({"model_type": "mixtral", "num_local_experts": 10**9}, "=1,000,000,000, but no tensor is"),
  ],
)  # fmt: skip
def test_configs_with_wrong_values(changed, words, folder):
  config(folder, **changed)
  if words is None:
    result = call("generate", ONE, f"--weights={folder}", "--prompt=ab", "--max_tokens=2")
    assert result.code == 0, result.err
  else:
    assert words in refused(folder)


def test_files_that_are_no_config(folder):
  for text in ["", "[]", "[" * 100_000, "\xff", '{"a": ' + "1" * 5000 + "}"]:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refused(folder)
  (folder / "config.json").unlink()
  assert "config.json is missing: a checkpoint needs it" in refused(folder)
