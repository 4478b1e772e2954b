"""From a config to a dataset: what each source gives, and what each mistake is told."""

import json

import numpy as np
import pytest

from experiments.config import ConfigError, DataConfig
from experiments.data.load import load
from experiments.data.prepare import prepare
from experiments.data.train_tokenizer import train_tokenizer

DOCUMENTS = [f"document {i} " + "words and more words " * (i % 5) for i in range(40)]
SMALL = {"row_length": 16, "batch_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """text.jsonl, its tokenizer, and its shards by bytes and by that tokenizer."""
  folder = tmp_path_factory.mktemp("data")
  text = folder / "text.jsonl"
  text.write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS))
  train_tokenizer(str(text), str(folder / "tokenizer"), vocab_size=280)
  quiet = {"workers": 1, "report": lambda line: None, "shard_tokens": 700}
  prepare(str(text), str(folder / "bytes"), "byte", **quiet)
  prepare(str(text), str(folder / "shards"), str(folder / "tokenizer"), **quiet)
  return folder


def all_tokens(dataset):
  return np.concatenate([s.read(0, len(s)) for s in (dataset.train.stream, dataset.heldout.stream)])


def check_same_rows(one, two):
  for rows, others in ((one.train, two.train), (one.heldout, two.heldout)):
    assert len(rows) == len(others) > 0
    for r in range(len(rows)):
      for name, x_T in rows[r].items():
        np.testing.assert_array_equal(x_T, others[r][name], err_msg=f"{name} of row {r}")


def test_default_is_the_built_in_text():
  dataset = load(DataConfig(), 257)
  assert dataset.fingerprint["source"] == "pydoc"
  assert dataset.fingerprint["tokens"] == len(all_tokens(dataset)) > 400_000
  heldout = len(dataset.heldout.stream)
  assert heldout == int(0.05 * dataset.fingerprint["tokens"])
  assert dataset.tokenizer.decode(all_tokens(dataset)).startswith('The "assert" statement')
  assert load(DataConfig(), 257).fingerprint == dataset.fingerprint


def test_path_alone_means_text_or_shards(folder):
  text = load(DataConfig(path=f"{folder}/text.jsonl", **SMALL), 257)
  shards = load(DataConfig(path=f"{folder}/bytes", **SMALL), 257)
  assert text.fingerprint["source"] == "text"
  assert shards.fingerprint["source"] == "shards"
  joined = "".join(DOCUMENTS)
  assert text.tokenizer.decode(all_tokens(text)) == joined
  check_same_rows(text, shards)


def test_bpe_shards_equal_bpe_text(folder):
  bpe = {"tokenizer": f"{folder}/tokenizer", **SMALL}
  text = load(DataConfig(path=f"{folder}/text.jsonl", **bpe), 384)
  shards = load(DataConfig(source="shards", path=f"{folder}/shards", **bpe), 384)
  check_same_rows(text, shards)
  assert text.fingerprint["tokenizer"] == shards.fingerprint["tokenizer"]


def test_synthetic_stays_in_the_vocabulary():
  dataset = load(DataConfig(source="synthetic", **SMALL), 11)
  assert dataset.tokenizer is None
  assert max(dataset.train[r]["targets"].max() for r in range(20)) == 10
  assert not np.array_equal(dataset.train[0]["tokens"], dataset.heldout[0]["tokens"])
  other = load(DataConfig(source="synthetic", seed=1, **SMALL), 11)
  assert not np.array_equal(dataset.train[0]["tokens"], other.train[0]["tokens"])


def both_commands(message):
  programs = ("train_tokenizer", "prepare")
  return all(f"python -m experiments.data.{name} --" in message for name in programs)


@pytest.mark.parametrize("source", ["pydoc", "text", "shards"])
def test_missing_data_is_answered_with_the_commands(source, tmp_path):
  with pytest.raises(ConfigError, match="no shards and no text at") as caught:
    load(DataConfig(source=source, path=f"{tmp_path}/absent", **SMALL), 257)
  assert both_commands(str(caught.value))
  assert f"--output={tmp_path}/absent" in str(caught.value)


@pytest.mark.parametrize("source", ["text", "shards"])
def test_source_without_a_path_is_answered_with_the_commands(source):
  with pytest.raises(ConfigError, match=r"needs data\.path") as caught:
    load(DataConfig(source=source), 257)
  assert both_commands(str(caught.value))


def test_missing_tokenizer_is_answered_with_the_commands(tmp_path):
  with pytest.raises(ConfigError, match="no tokenizer at") as caught:
    load(DataConfig(tokenizer=f"{tmp_path}/mine"), 257)
  assert both_commands(str(caught.value))
  assert f"--output={tmp_path}/mine" in str(caught.value)


def test_folder_without_manifest_asks_for_a_glob(tmp_path):
  (tmp_path / "a.jsonl").write_text("{}")
  with pytest.raises(ConfigError, match=r"is a folder without manifest\.json: .*\*\.jsonl"):
    load(DataConfig(path=str(tmp_path), **SMALL), 257)


def test_shards_of_another_tokenizer_name_theirs(folder):
  with pytest.raises(ConfigError, match=f"--config.data.tokenizer={folder}/tokenizer "):
    load(DataConfig(path=f"{folder}/shards", **SMALL), 257)
  with pytest.raises(ConfigError, match=r"--config.data.tokenizer=byte "):
    load(DataConfig(path=f"{folder}/bytes", tokenizer=f"{folder}/tokenizer", **SMALL), 384)


def test_small_vocabulary_and_short_text_are_refused(folder):
  with pytest.raises(ConfigError, match=r"model.vocab_size=200"):
    load(DataConfig(), 200)
  with pytest.raises(ConfigError, match=r"the data has \d+ tokens, but a batch of 16 rows of 256"):
    load(DataConfig(path=f"{folder}/text.jsonl"), 257)


def test_wrong_field_is_refused(folder):
  with pytest.raises(ConfigError, match="line 1 has no text in field 'body'"):
    load(DataConfig(path=f"{folder}/text.jsonl", text_field="body", **SMALL), 257)


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    ("cut", r"00000-00000.tokens has \d+ bytes, not \d+"),
    ("absent", "00000-00000.index does not exist"),
    ("value", "00000-00000.tokens is damaged between tokens 0 and 17"),
    ("manifest", "manifest.json is damaged"),
  ],
)
def test_damaged_shards_are_refused_by_name(damage, message, tmp_path):
  text = tmp_path / "text.jsonl"
  text.write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS))
  prepare(str(text), str(tmp_path / "shards"), "byte", workers=1, report=lambda line: None)
  tokens = tmp_path / "shards" / "00000-00000.tokens"
  if damage == "cut":
    tokens.write_bytes(tokens.read_bytes()[:-2])
  elif damage == "absent":
    tokens.with_suffix(".index").unlink()
  elif damage == "value":
    tokens.write_bytes(b"\xff\xff" + tokens.read_bytes()[2:])
  else:
    (tmp_path / "shards" / "manifest.json").write_text("{")
  with pytest.raises(ConfigError, match=message):
    dataset = load(DataConfig(path=f"{tmp_path}/shards", **SMALL), 257)
    dataset.train[1]  # reads tokens 16 to 32: not the damaged one
    dataset.train[0]
