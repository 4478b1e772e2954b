"""Text to token ids and back: plain bytes, a `tokenizer.json`, or a SentencePiece `.model`.

Dimension letters: V vocabulary.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

import numpy as np
import tokenizers

from ..config import Config, ConfigError
from . import files

END_OF_DOCUMENT = "<|endoftext|>"
CHAT_TEMPLATE = "chat_template.jinja"  # beside a tokenizer: how a conversation is written
_END_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>")  # of tokenizers made elsewhere
_PIECE = 1 << 20  # characters encoded at once

HOW_TO_MAKE = """make them from your text with
  python -m experiments.data.train_tokenizer --input='TEXT/*.jsonl' --output={tokenizer}
  python -m experiments.data.prepare --input='TEXT/*.jsonl' --output={shards} \
--tokenizer={tokenizer}"""


class Tokenizer(Protocol):
  """What the rest of the program needs of a tokenizer."""

  eod: int  # id of the end-of-document token
  vocab_size: int  # ids are below it
  mask: int  # id that stands for a hidden token: `vocab_size`, if there is none among them
  fingerprint: str  # equal fingerprints, equal ids
  byte_lengths_V: np.ndarray  # int32: UTF-8 bytes of text each id stands for; eod counts 0
  special: dict[str, int]  # tokens that are no text, by how they are written
  bos: int | None  # id that the tokenizer's files put before every text; None if they put none

  def encode(self, text: str) -> np.ndarray: ...  # int32, without eod

  def encode_special(self, text: str) -> np.ndarray: ...  # special tokens in the text are them

  def decode(self, ids) -> str: ...  # special tokens and ids beyond the vocabulary are left out


class ByteTokenizer:
  """Each UTF-8 byte is its own id, 0 to 255; 256 ends a document."""

  eod = 256
  vocab_size = mask = 257
  fingerprint = "byte"
  byte_lengths_V = np.array([1] * 256 + [0], np.int32)
  special: ClassVar[dict[str, int]] = {}
  bos = None

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

  encode_special = encode

  def decode(self, ids) -> str:
    ids = np.asarray(ids)
    return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class BpeTokenizer:
  """A `tokenizer.json` read by Hugging Face `tokenizers`.

  Text is only text: a document that spells a special token's name gets no special token.

  Args:
    data: the file.
    path: its name, for messages.
    end: the token that ends a document, if none has one of the usual names.
    said: what a tokenizer_config.json beside it says: `add_bos_token`, `bos_token`.

  Raises:
    ConfigError: it is unusable.
  """

  def __init__(self, data: bytes, path: str, end: str = "", said: dict[str, Any] | None = None):
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # `tokenizers` raises bare Exception
      raise ConfigError(f"{path} is not a tokenizer that `tokenizers` reads: {error}") from error
    self._tokenizer.encode_special_tokens = True
    names = (*_END_NAMES, end)
    ids = [i for name in names if (i := self._tokenizer.token_to_id(name)) is not None]
    if not ids:
      raise ConfigError(f"{path} has no end-of-document token: one of {', '.join(_END_NAMES)}")
    self.eod = ids[0]
    self.data = data
    vocab = self._tokenizer.get_vocab()
    self.vocab_size = 1 + max(vocab.values())
    self.mask = next((vocab[m] for m in ("[MASK]", "<mask>") if m in vocab), self.vocab_size)
    added = self._tokenizer.get_added_tokens_decoder()
    self.special = {token.content: i for i, token in added.items() if token.special}
    self.fingerprint = hashlib.sha256(data).hexdigest()
    self.bos = self._begin(said or {})
    # Some tokenizers put a space before every text: theirs can't be encoded in pieces.
    cut = np.concatenate([self._ids("a"), self._ids("\na")])
    self._divisible = np.array_equal(self._ids("a\na"), cut)
    self.byte_lengths_V = self._byte_lengths()

  @classmethod
  def read(cls, path: str, end: str = "") -> "BpeTokenizer":
    """A tokenizer.json, or that of a folder; `end` as above.

    Raises:
      ConfigError: it is missing or unusable.
    """
    path = path if path.endswith(".json") else files.join(path, "tokenizer.json")
    if not files.exists(path):
      commands = HOW_TO_MAKE.format(tokenizer=path.rpartition("/")[0] or ".", shards="SHARDS")
      raise ConfigError(f"there is no tokenizer at {path}: {commands}")
    return cls(files.read_bytes(path), path, end, said_beside(path))

  def _begin(self, said: dict[str, Any]) -> int | None:
    """What the file puts before a text, unless `said` has a word on it."""
    adds, token = said.get("add_bos_token"), said.get("bos_token")
    if adds is None:
      plain, whole = (self._tokenizer.encode("a", add_special_tokens=x).ids for x in (False, True))
      return whole[0] if whole[:1] != plain[:1] else None
    text = token.get("content") if isinstance(token, dict) else token
    return self._tokenizer.token_to_id(text) if adds and isinstance(text, str) else None

  def _byte_lengths(self) -> np.ndarray:
    byte_level = type(self._tokenizer.decoder) is tokenizers.decoders.ByteLevel
    added = self._tokenizer.get_added_tokens_decoder()
    lengths_V = np.zeros(self.vocab_size, np.int32)
    for token, i in self._tokenizer.get_vocab().items():
      if i in added and added[i].special:
        lengths_V[i] = 0
      elif byte_level and i not in added:
        lengths_V[i] = len(token)  # this alphabet spells each byte as one character
      elif re.fullmatch("<0x[0-9A-F]{2}>", token):  # SentencePiece's byte fallback
        lengths_V[i] = 1
      else:
        lengths_V[i] = len(token.replace("▁", " ").encode("utf-8"))  # its mark for a space
    return lengths_V

  def _ids(self, text: str) -> np.ndarray:
    return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

  def encode(self, text: str) -> np.ndarray:
    parts = pieces(text) if self._divisible else [text]
    return np.concatenate([self._ids(part) for part in parts])

  def encode_special(self, text: str) -> np.ndarray:
    self._tokenizer.encode_special_tokens = False
    try:
      return self._ids(text)
    finally:
      self._tokenizer.encode_special_tokens = True

  def decode(self, ids) -> str:
    ids = np.asarray(ids)
    return self._tokenizer.decode(ids[ids < self.vocab_size].tolist(), skip_special_tokens=True)


_CUT = re.compile(r"(?<=[^\W_])(?=\s)")


def pieces(text: str, size: int = _PIECE) -> Iterator[str]:
  """Cuts a long text after about `size` characters, between a letter or digit and a blank.

  Byte-level pre-tokenizers (GPT-2, Llama 3) always cut there, so ids are those of the whole text,
  while memory stays bounded.
  """
  start = 0
  while (cut := _CUT.search(text, start + size)) is not None:
    yield text[start : cut.start()]
    start = cut.start()
  yield text[start:]


def said_beside(path: str) -> dict[str, Any]:
  """What the files beside a tokenizer say of it; empty without them.

  Raises:
    ConfigError: one is no JSON object.
  """
  said: dict[str, Any] = {}
  for name in ("special_tokens_map.json", "tokenizer_config.json"):
    beside = files.join(path.rpartition("/")[0] or ".", name)
    if not files.exists(beside):
      continue
    try:
      said |= json.loads(files.read_bytes(beside))
    except (ValueError, TypeError, RecursionError) as e:
      raise ConfigError(f"{beside} can't be read: {e}") from e
  return said


def load_tokenizer(name: str) -> Tokenizer:
  """`byte`, a tokenizer.json, a SentencePiece `.model`, or a folder with either.

  Raises:
    ConfigError: it is missing or unusable.
  """
  if name == "byte":
    return ByteTokenizer()
  if not name.endswith((".json", ".model")):
    inside = files.join(name, "tokenizer.model")
    if files.exists(inside) and not files.exists(files.join(name, "tokenizer.json")):
      name = inside
  if not name.endswith(".model"):
    return BpeTokenizer.read(name)
  if not files.exists(name):
    raise ConfigError(f"there is no tokenizer at {name}")
  from .sentence_piece import SentencePieceTokenizer  # needs an extra, and most need it not

  adds = said_beside(name).get("add_bos_token", True)
  return SentencePieceTokenizer(files.read_bytes(name), name, begins=bool(adds))


def begins_with(stored: Config, tokenizer: Tokenizer) -> int | None:
  """Id that begins prompts of a run: that of its tokenizer where the model learned with it.

  Weights from elsewhere did, and examples do. Texts that a model of its own was trained on follow
  each other with the token that ends them alone.
  """
  given = stored.train.weights or not stored.data.tokenizer  # which converted weights don't name
  return tokenizer.bos if given or stored.data.source == "instructions" else None


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
  """Raises ConfigError if the model has fewer ids than the tokenizer; more is fine (padding)."""
  if vocab_size < tokenizer.vocab_size:
    padded = -(-tokenizer.vocab_size // 128) * 128
    raise ConfigError(
      f"model.vocab_size={vocab_size} is below the tokenizer's {tokenizer.vocab_size} ids: "
      f"set --config.model.vocab_size={padded}"
    )
