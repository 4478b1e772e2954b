"""Files by which `transformers` and others know a model's tokenizer."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import tokenizers

from ..data.sentence_piece import SentencePieceTokenizer
from ..data.tokenizer import CHAT_TEMPLATE, END_OF_DOCUMENT, BpeTokenizer, ByteTokenizer, Tokenizer
from .source import Source
from .special import chat_template, special_tokens

# What a folder of the hub may have.
NAMES = (
  "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
  "vocab.json", "merges.txt", "tokenizer.model", "vocab.txt", CHAT_TEMPLATE,
  "chat_template.json", "generation_config.json",
)  # fmt: skip


class Said(NamedTuple):
  """What is known of a tokenizer beside itself."""

  texts: Mapping[str, str] = MappingProxyType({})  # special tokens: bos_token, ...
  template: str | None = None  # of a conversation


def said_by(source: Source) -> Said:
  return Said(special_tokens(source), chat_template(source))


def copied(folder: Path) -> dict[str, bytes]:
  """The files of a folder that has them for `transformers`; empty if it has not."""
  if not (folder / "tokenizer_config.json").is_file():
    return {}
  return {name: (folder / name).read_bytes() for name in NAMES if (folder / name).is_file()}


def of_weights(source: Source, tokenizer: Tokenizer, named: str, length: int) -> dict[str, bytes]:
  """The files of a checkpoint's tokenizer, or of the one called `named`, if that is not empty."""
  if named:
    return of_named(named, tokenizer, length)
  folder = source.path if source.path.is_dir() else source.path.parent
  files = {} if source.gguf is not None else copied(folder)
  return files or made(tokenizer, said_by(source), length)


def of_named(name: str, tokenizer: Tokenizer, length: int) -> dict[str, bytes]:
  """The files of the tokenizer that `load_tokenizer` found by a name."""
  path = Path(name)
  folder = path.parent if path.suffix in (".json", ".model") else path
  return copied(folder) or made(tokenizer, Said(), length)


def made(tokenizer: Tokenizer, said: Said, length: int) -> dict[str, bytes]:
  """Files of a tokenizer that has none.

  Args:
    length: the model's context.
  """
  name, words = "tokenizer.json", {i: text for text, i in tokenizer.special.items()}
  if isinstance(tokenizer, ByteTokenizer):
    data, ends = _bytes_as_json(), END_OF_DOCUMENT
  elif isinstance(tokenizer, BpeTokenizer):
    data = tokenizer.data
    ends = tokenizers.Tokenizer.from_str(data.decode()).id_to_token(tokenizer.eod)
  elif isinstance(tokenizer, SentencePieceTokenizer):
    name, data, ends = "tokenizer.model", tokenizer.data, words[tokenizer.eod]
  else:
    return {}
  first = ends if tokenizer.bos is None else words.get(tokenizer.bos, ends)
  texts = {"bos_token": first, "eos_token": ends, **said.texts}
  config: dict[str, Any] = {
    **({"tokenizer_class": "PreTrainedTokenizerFast"} if name == "tokenizer.json" else {}),
    "model_max_length": length,
    "clean_up_tokenization_spaces": False,
    **texts,
  }
  if said.template is not None:
    config["chat_template"] = said.template
  return {
    name: data,
    "tokenizer_config.json": (json.dumps(config, indent=1, ensure_ascii=False) + "\n").encode(),
  }


def _bytes_as_json() -> bytes:
  """A tokenizer.json with the ids of `ByteTokenizer`: a vocabulary of bytes, without a merge."""
  letters = _letters()
  byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  built = tokenizers.Tokenizer(tokenizers.models.BPE({c: b for b, c in enumerate(letters)}, []))
  built.pre_tokenizer, built.decoder = byte_level, tokenizers.decoders.ByteLevel()
  built.add_special_tokens([tokenizers.AddedToken(END_OF_DOCUMENT, special=True, normalized=False)])
  return built.to_str().encode()


def _letters() -> list[str]:
  """How byte-level tokenizers spell each byte: as itself where it can be printed, and the others in
  their order from U+0100 on (openai/gpt-2, `bytes_to_unicode`)."""
  shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)}
  others = [b for b in range(256) if b not in shown]
  return [chr(b) if b in shown else chr(256 + others.index(b)) for b in range(256)]
