"""Folders of weights that we write, read by others."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors import safe_open
from safetensors.numpy import load_file

from experiments.config import ConfigError
from experiments.data.tokenizer import BpeTokenizer, ByteTokenizer
from experiments.weights.landing import landing, refuse_filled, refuse_without_room
from experiments.weights.save import plan, save
from experiments.weights.table import Table, rule
from experiments.weights.tokenizer_files import Said, made
from layers.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, Segment

SPEC = ModelSpec(11, 4, (Segment((LayerSpec(AttentionSpec(2, 2), MlpSpec(3)),), 2),))
TABLE = Table(
  layer="h.{n}.",
  top=(rule("table", "wte"),),
  layers=(
    rule(("a", "b"), "ab", "d (p h k) -> p d h k"),  # beside each other
    rule(("short", "long"), "joined", "r d -> d r", join="r"),
    rule("experts", "e.{e}.w", "f d -> d f"),
  ),
)


def leaves():
  rng = np.random.default_rng(0)
  shapes = {
    "segment_0/layer_0/a": (2, 4, 2, 3), "segment_0/layer_0/b": (2, 4, 2, 3),
    "segment_0/layer_0/short": (2, 4, 1), "segment_0/layer_0/long": (2, 4, 5),
    "segment_0/layer_0/experts": (2, 3, 4, 6), "table": (11, 4),
  }  # fmt: skip
  return {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}


def expected():
  """By hand, in numpy."""
  ours = {k.rpartition("/")[2]: np.asarray(v) for k, v in leaves().items()}
  found = {"wte": ours["table"]}
  for n in range(2):
    sides = [ours[x][n].reshape(4, 6) for x in "ab"]
    found[f"h.{n}.ab"] = np.concatenate(sides, 1)
    found[f"h.{n}.joined"] = np.concatenate([ours["short"][n], ours["long"][n]], 1).T
    for e in range(3):
      found[f"h.{n}.e.{e}.w"] = ours["experts"][n, e].T
  return found


def test_one_file(tmp_path):
  told = []
  written = save(
    tmp_path, plan(TABLE, SPEC, leaves()), leaves(), progress=lambda *at: told.append(at)
  )
  assert written.files == ["model.safetensors"] == [p.name for p in tmp_path.iterdir()]
  found, want = load_file(tmp_path / "model.safetensors"), expected()
  assert found.keys() == want.keys()
  for name, tensor in want.items():
    np.testing.assert_array_equal(found[name], tensor, name)
  assert written.tensors == 11 and told[0] == (0, 11) and told[-1] == (11, 11)
  assert written.bytes == 4 * written.parameters == 4 * sum(t.size for t in want.values())
  with safe_open(tmp_path / "model.safetensors", "np") as file:
    assert file.metadata() == {"format": "pt"}


def test_shards_and_bfloat16(tmp_path):
  """At most 200 bytes a file, but for a tensor that has more."""
  written = save(tmp_path, plan(TABLE, SPEC, leaves()), leaves(), dtype="bfloat16", largest=100)
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  assert index["metadata"] == {"total_size": 2 * sum(t.size for t in expected().values())}
  n = len(written.files)
  assert n > 2 and written.files == [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
  found = {}
  for name in written.files:
    here = load_file(tmp_path / name)
    assert len(here) == 1 or sum(t.nbytes for t in here.values()) <= 100
    assert here.keys() == {k for k, file in index["weight_map"].items() if file == name}
    found |= here
  for name, tensor in expected().items():
    np.testing.assert_array_equal(found[name], tensor.astype(jnp.bfloat16), name)


def test_from_several_devices(tmp_path):
  """Parameters that lie in parts are written whole."""
  mesh = jax.make_mesh((2,), ("x",))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
  cut = {k: jax.device_put(v, place) if v.ndim > 2 and v.shape[1] == 4 else v
         for k, v in leaves().items()}  # fmt: skip
  save(tmp_path, plan(TABLE, SPEC, cut), cut)
  found = load_file(tmp_path / "model.safetensors")
  for name, tensor in expected().items():
    np.testing.assert_array_equal(found[name], tensor, name)


def test_there_whole_or_not_at_all(tmp_path):
  output = tmp_path / "new" / "model"
  with landing(output) as folder:
    (folder / "x").write_text("1")
    assert not output.exists()
  assert [p.name for p in output.iterdir()] == ["x"]
  assert [p.name for p in output.parent.iterdir()] == ["model"]
  with pytest.raises(ConfigError, match="not empty"):
    refuse_filled(str(output))
  failed = tmp_path / "failed"
  with pytest.raises(KeyboardInterrupt), landing(failed) as folder:
    (folder / "x").write_text("1")
    raise KeyboardInterrupt
  with (
    pytest.raises(ConfigError, match="No space left on device; nothing is left of it"),
    landing(failed),
  ):
    raise OSError(28, "x")
  assert not failed.exists() and not list(tmp_path.glob(".failed*"))


def test_what_a_killed_process_left(tmp_path):
  left = tmp_path / ".model.partial"
  (left / "checkpoints").mkdir(parents=True)
  (left / "old").write_text("1")
  with landing(tmp_path / "model") as folder:
    assert list(folder.iterdir()) == []
    with (
      pytest.raises(ConfigError, match="another process is writing"),
      landing(tmp_path / "model"),
    ):
      pass
  assert list((tmp_path / "model").iterdir()) == []


def test_places_that_are_refused(tmp_path):
  (tmp_path / "file").write_text("")
  for name, said in (("file", "is a file"), ("gs://bucket/x", "folder of this machine")):
    with pytest.raises(ConfigError, match=said):
      refuse_filled(name if "://" in name else str(tmp_path / name))
  with pytest.raises(ConfigError, match="GB left"):
    refuse_without_room(tmp_path, 1 << 60)
  with pytest.raises(ConfigError, match="can't write to"), landing(tmp_path / "file" / "x"):
    pass


TEXTS = ["The capital of France", "naïve \u2028 日本語 🙂\r\n\t  x", "\x00\x7f~\xad\xa0\xff", ""]


def theirs(folder, files):
  transformers = pytest.importorskip(
    "transformers", reason="needs the extra `parity`: pip install 'meshyard[parity]'"
  )
  for name, data in files.items():
    (folder / name).write_bytes(data)
  return transformers.AutoTokenizer.from_pretrained(folder)


def test_bytes_as_a_tokenizer_of_theirs(tmp_path):
  ours = ByteTokenizer()
  found = theirs(tmp_path, made(ours, Said(), 64))
  for text in TEXTS:
    ids = found(text)["input_ids"]
    assert ids == list(text.encode()) == ours.encode(text).tolist()
    assert found.decode(ids) == text
  assert found.eos_token_id == found.bos_token_id == 256 == ours.eod
  assert len(found) == 257 and found.model_max_length == 64


def test_a_tokenizer_of_ours_as_theirs(tmp_path):
  """With a token before every text, where a checkpoint puts one; and a template."""
  trained = tokenizers.Tokenizer(tokenizers.models.BPE())
  split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  trained.pre_tokenizer, trained.decoder = split, tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300, special_tokens=["<|endoftext|>", "<s>"], show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )  # fmt: skip
  trained.train_from_iterator(["the capital of the country, the cat and the hat"] * 3, trainer)
  ours = BpeTokenizer(trained.to_str().encode(), "x")
  plain = theirs(tmp_path, made(ours, Said(), 64))
  for text in TEXTS:
    assert plain(text)["input_ids"] == ours.encode(text).tolist()
    assert plain.decode(ours.encode(text)) == text
  assert plain.eos_token_id == ours.eod == 0
  begins = tmp_path / "begins"
  begins.mkdir()
  said = Said({}, "{% for m in messages %}[{{ m.content }}]{% endfor %}")
  trained.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)]
  )
  ours = BpeTokenizer(trained.to_str().encode(), "x")
  found = theirs(begins, made(ours, said, 64))
  assert found.bos_token_id == ours.bos == 1
  for text in TEXTS:
    assert found(text)["input_ids"] == [1, *ours.encode(text)]
  talk = [{"role": "user", "content": "the"}]
  assert found.apply_chat_template(talk, tokenize=False) == "[the]"
