"""Tokenizers inside GGUF files: the ids of transformers' own classes, and special tokens."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from experiments.config import ConfigError
from experiments.data.tokenizer import load_tokenizer
from experiments.weights.gguf_tokenizer import read_tokenizer
from experiments.weights.source import Source
from experiments.weights.special import chat_template, special_tokens, stops
from experiments.weights.tokenizer_files import of_weights

TEXT = (Path(__file__).parents[3] / "README.md").read_text() * 2
TEXTS = [
  "It's 2026, and we'll SEE: 12345 tokens... don't PANIC, they'RE fine!",
  "def f(x):\n    return x ** 2\n\n\n\tpass  # 3.14159 \r\n /path//to",
  "Grüße aus Köln — naïve café, e\u0301clair; 你好，世界 123 Ωmega 🙂👍🏽 ٣٤",
  "  two spaces before, trailing   ",
  "McDonald's iPhone XMLHttpRequest don'T HELLOworld",
]
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6


def source(**values):
  named = {f"tokenizer.{name.replace('__', '.')}": value for name, value in values.items()}
  return Source(Path("x.gguf"), {}, {}, named)


@pytest.fixture(scope="module")
def byte_level():
  """Words and merges of a vocabulary with all bytes, learned without cutting at words."""
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  learn = trainers.BpeTrainer(
    vocab_size=700, initial_alphabet=alphabet, show_progress=False, special_tokens=["<|endoftext|>"]
  )
  made.train_from_iterator(TEXT.split("\n\n"), learn)
  model = json.loads(made.to_str())["model"]
  return list(model["vocab"]), [" ".join(pair) for pair in model["merges"]]


def of_bytes(byte_level, pre, **more):
  words, merges = byte_level
  kinds = np.array([CONTROL] + [NORMAL] * (len(words) - 1))
  return source(
    ggml__model="gpt2", ggml__pre=pre, ggml__tokens=words, ggml__token_type=kinds,
    ggml__merges=merges, **more,
  )  # fmt: skip


def theirs(byte_level, pre):
  """What transformers makes of such metadata; Qwen's class, which composes characters first."""
  transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")
  mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
  words, merges = byte_level
  said = {"tokens": words, "merges": merges, "pre_tokenizer_type": pre, "tokenizer_type": "gpt2"}
  if pre == "qwen2":
    vocab = {word: i for i, word in enumerate(words)}
    pairs = [tuple(pair.split(" ")) for pair in merges]
    return transformers.Qwen2Tokenizer(vocab=vocab, merges=pairs).backend_tokenizer
  return mapping.convert_gguf_tokenizer("llama", said)[0]


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "gpt-4o", "tekken"])
def test_byte_level(byte_level, pre):
  ours, expected = read_tokenizer(of_bytes(byte_level, pre)), theirs(byte_level, pre)
  if pre in ("llama-bpe", "tekken"):  # their tokenizer.json says so, a GGUF does not
    expected.model.ignore_merges = True
  for text in TEXTS:
    found = ours.encode(text)
    assert found.tolist() == expected.encode(text, add_special_tokens=False).ids, text
    composed = text.replace("e\u0301", "é") if pre == "qwen2" else text
    assert ours.decode(found) == composed


# Cut by hand, after the patterns' meaning: every digit alone in SmolLM; digits by threes, CJK apart
# and punctuation before letters with them in DeepSeek-V3; BLOOM's words end at punctuation.
@pytest.mark.parametrize(
  ("pre", "text", "parts"),
  [
    ("smollm", "In 1984 I'd", ["In", " ", "1", "9", "8", "4", " I", "'d"]),
    ("deepseek-v3", "x=12345 你好ab .py", ["x", "=", "123", "45", " ", "你好", "ab", " .", "py"]),
    ("bloom", "Hello, world (x)", ["Hello", ",", " world", " (", "x", ")"]),
    ("default", "a+b 12345", ["a", "+", "b", " ", "123", "45"]),
    ("llama-bpe", "I'LL 12345", ["I", "'LL", " ", "123", "45"]),
    ("qwen2", "I'll 12", ["I", "'ll", " ", "1", "2"]),
  ],
)
def test_where_text_is_cut(byte_level, pre, text, parts):
  made = tokenizers.Tokenizer.from_str(_json(read_tokenizer(of_bytes(byte_level, pre))))
  found = [text[a:b] for _, (a, b) in made.pre_tokenizer.pre_tokenize_str(text)]
  assert found == parts


def _json(tokenizer):
  return tokenizer._tokenizer.to_str()


@pytest.fixture(scope="module")
def pieces():
  """SentencePiece's words as LLaMA has them: unknown, two control tokens, bytes, then pieces by the
  order of their merges, and scores that fall."""
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
  made.train_from_iterator(
    TEXT.split("\n"), trainers.BpeTrainer(vocab_size=500, show_progress=False)
  )
  vocab = json.loads(made.to_str())["model"]["vocab"]
  long = [word for word in vocab if len(word) > 1]
  letters = sorted(word for word in vocab if len(word) == 1 and word.isascii()) + ["▁"]
  words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *long, *letters]
  kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(words) - 259)
  scores = [0.0] * 259 + [-float(i) for i in range(len(words) - 259)]
  return words, np.array(kinds, np.int32), np.array(scores, np.float32)


def of_pieces(pieces, **more):
  words, kinds, scores = pieces
  return source(ggml__model="llama", ggml__tokens=words, ggml__token_type=kinds,
                ggml__scores=scores, **more)  # fmt: skip


def sentencepiece(pieces, text, prefix=True):
  """By SentencePiece's own rule, written anew: join the two neighbours whose word scores best, the
  leftmost of equals, until none is a word; a letter without a word becomes its bytes."""
  words, _, scores = pieces
  ids = {word: i for i, word in enumerate(words)}
  parts = list(("▁" if prefix else "") + text.replace(" ", "▁"))
  while True:
    joined = [a + b for a, b in itertools.pairwise(parts)]
    pairs = [(scores[ids[word]], -i) for i, word in enumerate(joined) if word in ids]
    if not pairs:
      break
    i = -max(pairs)[1]
    parts[i : i + 2] = [parts[i] + parts[i + 1]]
  made = []
  for part in parts:
    made += [ids[part]] if part in ids else [3 + byte for byte in part.encode()]
  return made


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(pieces, prefix):
  tokenizer = read_tokenizer(of_pieces(pieces, ggml__add_space_prefix=prefix))
  for text in TEXTS:
    found = tokenizer.encode(text).tolist()
    assert found == sentencepiece(pieces, text, prefix), text
    assert tokenizer.decode(found) == text
  assert tokenizer.vocab_size == len(pieces[0]) and tokenizer.eod == 2


def test_sentencepiece_as_transformers_has_it(pieces):
  mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
  words, kinds, scores = pieces
  said = {"tokens": words, "scores": scores.tolist(), "tokenizer_type": "llama",
          "token_type": kinds.tolist()}  # fmt: skip
  expected, _ = mapping.convert_gguf_tokenizer("llama", said)
  ours = read_tokenizer(of_pieces(pieces))
  for text in TEXTS:
    if text[0] != " ":  # theirs then adds none before
      assert ours.encode(text).tolist() == expected.encode(text, add_special_tokens=False).ids


def test_tokens_that_users_defined(pieces):
  """Gemma's runs of spaces: whole before all else, and text, not special."""
  words, kinds, scores = pieces
  words_too = [*words, "  ", "   ", "<div>"]
  more = words_too, np.append(kinds, [USER] * 3), np.append(scores, [0.0] * 3)
  tokenizer = read_tokenizer(of_pieces(more, ggml__add_space_prefix=False))
  n = len(words)
  found = tokenizer.encode("a   b<div>").tolist()
  assert found[1] == n + 1 and found[-1] == n + 2 and len(found) == 4
  assert tokenizer.decode(found) == "a   b<div>"


def test_special_tokens(pieces, byte_level):
  said = of_pieces(pieces, chat_template="{{ messages }}", ggml__eos_token_id=2,
                   ggml__eot_token_id=300)  # fmt: skip
  bos = lambda source: read_tokenizer(source).bos
  assert bos(said) == 1 and stops(said) == {2, 300} and chat_template(said) == "{{ messages }}"
  assert bos(of_pieces(pieces, ggml__add_bos_token=False)) is None
  with pytest.raises(ConfigError, match="texts begin with token 9999, of"):
    bos(of_pieces(pieces, ggml__bos_token_id=9999))
  begin = {"ggml__bos_token_id": 5}
  assert bos(of_bytes(byte_level, "gpt-2", **begin)) is None
  assert bos(of_bytes(byte_level, "gpt-2", ggml__add_bos_token=True, **begin)) == 5
  assert bos(of_bytes(byte_level, "llama-bpe", **begin)) == 5
  assert special_tokens(of_bytes(byte_level, "gpt-2", ggml__eos_token_id=0)) == {
    "eos_token": "<|endoftext|>"
  }
  # Text that spells a control token is text.
  assert 2 not in read_tokenizer(said).encode("</s>")


def test_as_files_of_transformers(pieces, tmp_path):
  """Its ids, what begins a text among them, its special tokens and template; and again ours."""
  transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")
  said = of_pieces(pieces, chat_template="{{ bos_token }}", ggml__bos_token_id=1)
  ours = read_tokenizer(said)
  for name, data in of_weights(said, ours, "", 64).items():
    (tmp_path / name).write_bytes(data)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for text in TEXTS:
    assert theirs(text)["input_ids"] == [1, *ours.encode(text)]
  assert (theirs.bos_token, theirs.chat_template) == ("<s>", "{{ bos_token }}")
  again = load_tokenizer(str(tmp_path))
  assert again.fingerprint == ours.fingerprint and again.bos == ours.bos == 1


def test_an_end_of_another_name(byte_level):
  """DeepSeek's: known by its id."""
  words, merges = ["<｜end▁of▁sentence｜>", *byte_level[0][1:]], byte_level[1]
  found = read_tokenizer(of_bytes((words, merges), "deepseek-v3", ggml__eos_token_id=0))
  assert found.eod == 0


def test_what_is_refused(byte_level, pieces):
  words, merges = byte_level
  types = lambda n: np.ones(n, np.int32)
  cases = [
    (source(), "has no tokenizer inside"),
    (source(ggml__model="t5", ggml__tokens=["a"]), "its tokenizer is of kind 't5'"),
    (of_bytes(byte_level, "kimi-k2"), "cuts text as 'kimi-k2'; read are gpt-2, smollm"),
    (of_bytes(byte_level, None), "cuts text as None"),
    (of_bytes((words, [*merges, "zz qq"]), "gpt-2"), r"a merge of \('zz', 'qq'\)"),
    (of_bytes((words, [*merges, "nospace"]), "gpt-2"), "damaged: a merge of"),
    (of_bytes((words, [*merges, "! !"]), "gpt-2"), r"a merge of \('!', '!'\), of which one is no"),
    (of_bytes((["a", "a"], []), "gpt-2"), "has a token twice"),
    (source(ggml__model="gpt2", ggml__pre="gpt-2", ggml__tokens=["a"], ggml__token_type=types(3)),
     "not as many types"),
    (source(ggml__model="llama", ggml__tokens=["a"]), "not as many scores"),
  ]  # fmt: skip
  for said, words in cases:
    with pytest.raises(ConfigError, match=words) as error:
      read_tokenizer(said)
    assert "\n" not in str(error.value)
