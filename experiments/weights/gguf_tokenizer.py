"""The tokenizer inside a GGUF file, built anew for the `tokenizers` package.

GGUF has its words and merges, or scores, and the name of what cuts a text before them; the patterns
are those that the models' own tokenizer.json have.
"""

import json

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from ..config import ConfigError
from ..data.tokenizer import BpeTokenizer
from .gguf import metadata
from .source import Source
from .special import gguf_bos

_UNKNOWN, _CONTROL, _USER = 2, 3, 4  # types of tokens that are no parts of words

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_CASED = (rf"{_BEFORE}{_UPPER}*{_LOWER}+", rf"{_BEFORE}{_UPPER}+{_LOWER}*")
_DEEPSEEK = (
  r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
  r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Patterns by the name that GGUF has for them; each cuts what those before it left.
_PATTERNS = {
  "gpt-2": [_GPT_2],
  "smollm": [r"\p{N}", _GPT_2],
  "llama-bpe": [rf"{_ENDINGS}|{_BEFORE}\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"],
  "qwen2": [rf"{_ENDINGS}|{_BEFORE}\p{{L}}+|\p{{N}}|{_REST}"],
  "gpt-4o": ["|".join([*(f"{part}{_ENDINGS}?" for part in _CASED), rf"\p{{N}}{{1,3}}|{_SLASH}"])],
  "tekken": ["|".join([*_CASED, rf"\p{{N}}|{_SLASH}"])],
  "deepseek-v3": [r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK],
  "bloom": [r" ?[^(\s|.,!?…。，、।۔،)]+"],
  "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT_2, r"\p{N}+", "[0-9][0-9][0-9]"],
}
_SAME = {
  "llama3": "llama-bpe", "llama-v3": "llama-bpe", "pixtral": "llama-bpe",
  "deepseek-r1-qwen": "qwen2", "phi-2": "gpt-2",
}  # fmt: skip
_WHOLE_WORDS = ("llama-bpe", "tekken")  # a word of the vocabulary is taken whole, without merges
_COMPOSED = ("qwen2",)  # text is normalized to NFC first


def read_tokenizer(source: Source) -> BpeTokenizer:
  """The tokenizer inside the file.

  Raises:
    ConfigError: there is none, it is damaged, or of a kind that is not read.
  """
  kind = metadata(source, "tokenizer.ggml.model")
  words, kinds = _words(source)
  if kind == "gpt2":
    made = _byte_level(source, words)
  elif kind == "llama":
    made = _sentencepiece(source, words, kinds)
  else:
    raise ConfigError(f"{source.path}: its tokenizer is of kind {kind!r}; {_ELSE}")
  control = [w for w, k in zip(words, kinds, strict=True) if k in (_UNKNOWN, _CONTROL)]
  made.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in control])
  users = [w for w, k in zip(words, kinds, strict=True) if k == _USER]
  made.add_tokens([AddedToken(w, special=False, normalized=False) for w in users])
  end = metadata(source, "tokenizer.ggml.eos_token_id")
  named = words[end] if isinstance(end, int) and 0 <= end < len(words) else ""
  data = made.to_str().encode()
  if (first := gguf_bos(source)) is not None:
    data = _beginning_with(data, first, words, str(source.path))
  return BpeTokenizer(data, str(source.path), end=named)


def _beginning_with(data: bytes, first: int, words: list[str], path: str) -> bytes:
  """The tokenizer.json with a token put before every text."""
  if not 0 <= first < len(words):
    raise ConfigError(f"{path}: texts begin with token {first}, of {len(words):,}")
  token = {"SpecialToken": {"id": words[first], "type_id": 0}}
  one, two = ({"Sequence": {"id": x, "type_id": 0}} for x in "AB")
  parsed = json.loads(data)
  parsed["post_processor"] = {
    "type": "TemplateProcessing",
    "single": [token, one],
    "pair": [token, one, two],
    "special_tokens": {
      words[first]: {"id": words[first], "ids": [first], "tokens": [words[first]]}
    },
  }
  return json.dumps(parsed, ensure_ascii=False).encode()


_ELSE = "put a tokenizer.json beside it and give its path as --config.data.tokenizer"


def _words(source: Source) -> tuple[list[str], np.ndarray]:
  """All tokens, and their types."""
  words = metadata(source, "tokenizer.ggml.tokens")
  if not isinstance(words, list) or not words:
    raise ConfigError(f"{source.path} has no tokenizer inside; {_ELSE}")
  if len(set(words)) != len(words):
    raise ConfigError(f"{source.path} is damaged: its tokenizer has a token twice")
  kinds = metadata(source, "tokenizer.ggml.token_type")
  kinds = np.ones(len(words), np.int32) if kinds is None else kinds
  if not isinstance(kinds, np.ndarray) or len(kinds) != len(words):
    raise ConfigError(
      f"{source.path} is damaged: it has {len(words):,} tokens, but not as many types"
    )
  return words, kinds


def _byte_level(source: Source, words: list[str]) -> tokenizers.Tokenizer:
  """GPT-2's: bytes spelled as letters, merged by a list."""
  name = metadata(source, "tokenizer.ggml.pre")
  name = _SAME.get(name, name)
  if name not in _PATTERNS:
    raise ConfigError(
      f"{source.path}: its tokenizer cuts text as {name!r}; read are {', '.join(_PATTERNS)}: "
      + _ELSE
    )
  merges = metadata(source, "tokenizer.ggml.merges")
  if not isinstance(merges, list):
    raise ConfigError(f"{source.path} is damaged: its tokenizer has no merges")
  pairs = [(pair[: (cut := pair.find(" ", 1))], pair[cut + 1 :]) for pair in merges]
  vocab = {word: i for i, word in enumerate(words)}
  known = lambda a, b: a in vocab and b in vocab and a + b in vocab
  if lost := next((pair for pair in pairs if not known(*pair)), None):
    raise ConfigError(f"{source.path} is damaged: a merge of {lost}, of which one is no token")
  made = tokenizers.Tokenizer(models.BPE(vocab, pairs, ignore_merges=name in _WHOLE_WORDS))
  if name in _COMPOSED:
    made.normalizer = normalizers.NFC()
  cuts = [pre_tokenizers.Split(Regex(p), "isolated") for p in _PATTERNS[name]]
  last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  made.pre_tokenizer = pre_tokenizers.Sequence([*cuts, last])
  made.decoder = decoders.ByteLevel()
  return made


def _sentencepiece(source: Source, words: list[str], kinds: np.ndarray) -> tokenizers.Tokenizer:
  """SentencePiece's BPE: two pieces become one if that is a word, the one of the best score first;
  characters without a word become bytes."""
  scores = metadata(source, "tokenizer.ggml.scores")
  if not isinstance(scores, np.ndarray) or len(scores) != len(words):
    raise ConfigError(
      f"{source.path} is damaged: it has {len(words):,} tokens, but not as many scores"
    )
  vocab = {word: i for i, word in enumerate(words)}
  order = sorted(range(len(words)), key=lambda i: (-float(scores[i]), i))
  merges = []
  for i in order:
    word = words[i]
    if kinds[i] == 1:
      pairs = [(word[:n], word[n:]) for n in range(1, len(word))]
      known = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
      merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
  unknown = next((w for w, k in zip(words, kinds, strict=True) if k == _UNKNOWN), None)
  made = tokenizers.Tokenizer(
    models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
  )
  prefix = metadata(source, "tokenizer.ggml.add_space_prefix")
  prefix = True if prefix is None else bool(prefix)
  first = [normalizers.Prepend("▁")] if prefix else []
  made.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
  steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  made.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
  return made
