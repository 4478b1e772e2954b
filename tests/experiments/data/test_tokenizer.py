"""Round trips, byte counts, special tokens as text, and the refusals."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers

from experiments.config import ConfigError
from experiments.data import command, train_tokenizer
from experiments.data.tokenizer import (
  BpeTokenizer,
  ByteTokenizer,
  check_vocab,
  load_tokenizer,
  pieces,
)

TEXT = "The quick brown fox; the lazy dog's 1234 na\u00efve \u4f60\u597d \U0001f600\n\n  the end.\n"
some_text = st.text(st.characters(codec="utf-8"), max_size=60)
settings = hypothesis.settings(max_examples=100, deadline=None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  path = tmp_path_factory.mktemp("corpus") / "a.txt"
  path.write_text(TEXT * 30, encoding="utf-8")
  return path


@pytest.fixture(scope="module")
def bpe(corpus, tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  train_tokenizer.train_tokenizer(str(corpus), str(folder), vocab_size=300)
  return BpeTokenizer.read(str(folder))


@settings
@hypothesis.given(some_text)
def test_byte_round_trip(text):
  tokenizer = ByteTokenizer()
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert ids.tolist() == list(text.encode())
  assert tokenizer.decode(ids) == text


def test_byte_decoding_takes_any_ids():
  ids = [72, 105, 256, 300, 0xE4, 33]
  assert ByteTokenizer().decode(ids) == "Hi\ufffd!"


@settings
@hypothesis.given(some_text)
def test_bpe_round_trip_and_byte_lengths(bpe, text):
  ids = bpe.encode(text)
  assert ids.dtype == np.int32
  assert bpe.decode(ids) == text
  assert bpe.byte_lengths_V[ids].sum() == len(text.encode())
  assert bpe.eod not in ids


def test_bpe_is_shorter_and_ignores_ids_beyond_the_vocabulary(bpe):
  ids = bpe.encode(TEXT)
  assert len(ids) < 0.8 * len(TEXT.encode())
  assert bpe.decode([*ids, bpe.eod, bpe.vocab_size + 5]) == TEXT
  assert (bpe.eod, bpe.vocab_size, bpe.byte_lengths_V.shape) == (0, 300, (300,))
  assert bpe.byte_lengths_V[bpe.eod] == 0


def test_text_that_names_the_special_token_stays_text(bpe):
  text = "a<|endoftext|>b"
  ids = bpe.encode(text)
  assert bpe.eod not in ids
  assert bpe.decode(ids) == text


@settings
@hypothesis.example("abcd\n\n  the end.")  # a cut amid blanks would part what one token joins
@hypothesis.given(st.text(st.sampled_from("ab1'\u00e9 .,\n\t_\u4f60"), max_size=60))
def test_pieces_join_and_encode_as_the_whole(bpe, text):
  parts = list(pieces(text, size=5))
  assert "".join(parts) == text
  whole = bpe._tokenizer.encode(text).ids
  assert [i for part in parts for i in bpe._tokenizer.encode(part).ids] == whole


def test_long_words_make_several_pieces():
  parts = list(pieces("abc def " * 100, size=10))
  assert len(parts) > 50
  assert max(map(len, parts)) <= 16


def test_training_is_reproducible(corpus, bpe, tmp_path):
  train_tokenizer.train_tokenizer(str(corpus), str(tmp_path), vocab_size=300)
  assert BpeTokenizer.read(str(tmp_path / "tokenizer.json")).fingerprint == bpe.fingerprint
  train_tokenizer.train_tokenizer(str(corpus), str(tmp_path / "other"), vocab_size=290)
  assert BpeTokenizer.read(str(tmp_path / "other")).fingerprint != bpe.fingerprint


def test_sentencepiece_style_bytes_are_counted(tmp_path):
  vocab = {"<unk>": 0, "</s>": 1, "<0x0A>": 2, "\u2581": 3, "a": 4, "\u2581a": 5, "\u00e9": 6}
  model = tokenizers.models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True)
  made = tokenizers.Tokenizer(model)
  made.normalizer = tokenizers.normalizers.Sequence(
    [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
  )
  made.decoder = tokenizers.decoders.Sequence(
    [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback()]
  )
  made.add_special_tokens(["<unk>", "</s>"])
  made.save(str(tmp_path / "tokenizer.json"))
  tokenizer = load_tokenizer(str(tmp_path))
  assert tokenizer.eod == 1
  assert tokenizer.byte_lengths_V.tolist() == [0, 0, 1, 1, 1, 2, 2]
  long = "a " * ((1 << 19) + 50)  # in pieces, each would get a space of its own
  assert tokenizer.encode(long).tolist() == made.encode(long).ids


def test_unusable_tokenizers_are_refused(tmp_path):
  with pytest.raises(ConfigError, match="no tokenizer at") as caught:
    load_tokenizer(str(tmp_path / "absent"))
  for program in ("train_tokenizer", "prepare"):
    assert f"python -m experiments.data.{program} --input=" in str(caught.value)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(ConfigError, match="is not a tokenizer that `tokenizers` reads"):
    load_tokenizer(str(tmp_path))
  tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(ConfigError, match="has no end-of-document token"):
    load_tokenizer(str(tmp_path))


def test_model_needs_as_many_ids_as_the_tokenizer():
  check_vocab(ByteTokenizer(), 257)
  check_vocab(ByteTokenizer(), 384)
  with pytest.raises(ConfigError, match=r"vocab_size=256 .* 257 ids: .*model.vocab_size=384"):
    check_vocab(ByteTokenizer(), 256)


def run_program(*arguments):
  argv = ["train_tokenizer", *arguments]
  return command.run(train_tokenizer._program, train_tokenizer._flags(), argv)


def test_program_writes_and_says_what_is_next(corpus, tmp_path, capsys):
  arguments = [f"--input={corpus}", f"--output={tmp_path}/t", "--vocab_size=270"]
  assert run_program(*arguments) == 0
  said = capsys.readouterr().out
  assert "wrote 270 tokens" in said
  assert f"--tokenizer={tmp_path}/t" in said
  assert run_program(*arguments) == 2  # never over a tokenizer that shards may depend on
  assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--input=/absent/*", "--output=x"], "no file matches"),
    (["--input=a", "--output=x", "--vocab_size=256"], "at least 257"),
    (["--input=a"], "--output must have a value"),
    (["--inputs=a", "--output=x"], "Unknown command line flag 'inputs'"),
    (["--input=a", "--output=x", "stray"], "'stray' is not a flag"),
    (["--input=a", "--output=x", "--vocab_size=many"], "vocab_size"),
  ],
)
def test_program_mistakes_exit_with_2_and_one_line(arguments, message, capsys):
  assert run_program(*arguments) == 2
  said = capsys.readouterr().err
  assert message in said
  assert said.startswith("error: ")
  assert said.count("\n") == 1


def test_program_help(capsys):
  assert run_program("--help") == 0
  assert "--vocab_size" in capsys.readouterr().out


def test_a_tokenizer_s_own_mask_token_is_used(bpe, tmp_path):
  assert bpe.mask == bpe.vocab_size  # it has none: the first id beyond
  ids = {"[UNK]": 0, "a": 1, "</s>": 2, "[MASK]": 3}
  own = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
  own.save(str(tmp_path / "tokenizer.json"))
  tokenizer = BpeTokenizer.read(str(tmp_path))
  assert (tokenizer.mask, tokenizer.vocab_size) == (3, 4)
