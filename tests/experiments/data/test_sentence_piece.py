"""SentencePiece models: ids and text are those of the package itself."""

import dataclasses
import io
import json
import shutil

import numpy as np
import pytest

from experiments.cli import named_config
from experiments.config import ConfigError
from experiments.data.tokenizer import load_tokenizer
from experiments.inference.text import TextStream
from experiments.training.folder import own_tokenizer
from experiments.weights.source import Source
from experiments.weights.tokenizer_files import of_weights

sentencepiece = pytest.importorskip("sentencepiece", reason="needs the extra sentencepiece")

WORDS = [
  "the",
  "quick",
  "brown",
  "fox",
  "jumps",
  "over",
  "a",
  "lazy",
  "dog",
  "and",
  "runs",
  "away",
  "from",
  "it",
  "naïvely",
]
TEXTS = [
  "the quick brown fox", " two  blanks ", "", "\u4f60\u597d \U0001f600 caf\u00e9", "a\nb\tc",
  "<s>the</s> <unk> <fim>", "0123 the!",
]  # fmt: skip


def train(model_type: str, **options) -> bytes:
  rng = np.random.default_rng(0)
  lines = [" ".join(rng.choice(WORDS, 8)) for _ in range(400)]
  written = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_writer=written, vocab_size=340, model_type=model_type,
    byte_fallback=True, user_defined_symbols=["<fim>"], num_threads=1, minloglevel=2,
    hard_vocab_limit=False, **options,
  )  # fmt: skip
  return written.getvalue()


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def folder(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp("sentencepiece")
  (folder / "tokenizer.model").write_bytes(train(request.param))
  return folder


@pytest.fixture(scope="module")
def theirs(folder):
  return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def ours(folder):
  return load_tokenizer(str(folder))


def test_ids_and_text_are_those_of_the_package(ours, theirs):
  for text in TEXTS:
    ids = ours.encode(text)
    assert ids.dtype == np.int32 and ids.tolist() == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(theirs.encode(text))
  assert ours.decode([ours.bos, *ours.encode("fox"), ours.eod, ours.vocab_size + 3]) == "fox"


def test_what_the_model_says_of_itself(ours, theirs):
  assert (ours.bos, ours.eod) == (theirs.bos_id(), theirs.eos_id()) == (1, 2)
  assert ours.vocab_size == theirs.get_piece_size() == ours.mask
  assert ours.special == {"<s>": 1, "</s>": 2}
  for text in TEXTS[:4]:
    plain = theirs.decode(theirs.encode(text))
    length = len(plain.encode()) + 1 if plain else 0  # the package puts a blank before every text
    assert ours.byte_lengths_V[ours.encode(text)].sum() == length


def test_control_tokens_come_from_templates_alone(ours):
  assert not {ours.bos, ours.eod} & set(ours.encode("<s>the</s>").tolist())
  found = ours.encode_special("<s>the fox</s><s>").tolist()
  assert found == [ours.bos, *ours.encode("the fox").tolist(), ours.eod, ours.bos]
  assert ours.encode_special("fox").tolist() == ours.encode("fox").tolist()


def test_text_streams(ours):
  for text in TEXTS:
    ids = ours.encode(text).tolist()
    stream = TextStream(ours)
    assert "".join([*(stream.feed([i]) for i in ids), stream.finish()]) == ours.decode(ids)
  before = ours.encode("the quick").tolist()
  assert TextStream(ours, before=before).feed(ours.encode("brown").tolist()) == " brown"


def test_a_path_is_taken_and_bad_files_are_refused(ours, folder, tmp_path):
  assert load_tokenizer(str(folder / "tokenizer.model")).fingerprint == ours.fingerprint
  (tmp_path / "a.model").write_bytes(b"\x00not one")
  with pytest.raises(ConfigError, match="is no SentencePiece model"):
    load_tokenizer(str(tmp_path / "a.model"))
  with pytest.raises(ConfigError, match=r"there is no tokenizer at .*b\.model"):
    load_tokenizer(str(tmp_path / "b.model"))
  (tmp_path / "c.model").write_bytes(train("bpe", eos_id=-1))
  with pytest.raises(ConfigError, match="has no end-of-document token"):
    load_tokenizer(str(tmp_path / "c.model"))


def test_without_the_package_it_is_named(folder, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
  with pytest.raises(ConfigError, match=r"needs sentencepiece: pip install 'meshyard\[sent"):
    load_tokenizer(str(folder))


def test_what_a_run_directory_keeps(folder, theirs, tmp_path):
  """The model itself, and whether texts begin with its first token."""
  weights, run = shutil.copytree(folder, tmp_path / "weights"), tmp_path / "run"
  source = Source(weights, {}, {})
  for adds, begin in ((None, theirs.bos_id()), (False, None), (True, theirs.bos_id())):
    if adds is not None:
      (weights / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": adds}))
    tokenizer = load_tokenizer(str(weights))
    assert tokenizer.bos == begin
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    for name, data in of_weights(source, tokenizer, "", 64).items():
      (run / name).write_bytes(data)
    debug = named_config("debug")
    unnamed = dataclasses.replace(debug, data=dataclasses.replace(debug.data, tokenizer=""))
    config = own_tokenizer(unnamed, run)
    again = load_tokenizer(config.data.tokenizer)
    assert again.fingerprint == tokenizer.fingerprint and again.bos == begin
