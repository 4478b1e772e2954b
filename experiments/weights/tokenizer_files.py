"""Files by which `transformers` and others know a model's tokenizer."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import tokenizers

from ..data.tokenizer import END_OF_DOCUMENT, BpeTokenizer, ByteTokenizer, Tokenizer
from .source import Source
from .special import bos, chat_template, special_tokens

# What a folder of the hub may have.
NAMES = (
  "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
  "vocab.json", "merges.txt", "tokenizer.model", "vocab.txt", "chat_template.jinja",
  "chat_template.json", "generation_config.json",
)  # fmt: skip


class Said(NamedTuple):
  """What is known of a tokenizer beside itself."""

  first: int | None = None  # id put before every text
  texts: Mapping[str, str] = MappingProxyType({})  # special tokens: bos_token, ...
  template: str | None = None  # of a conversation


def said_by(source: Source) -> Said:
  return Said(bos(source), special_tokens(source), chat_template(source))


def copied(folder: Path) -> dict[str, bytes]:
  """The files of a folder that has them for `transformers`; empty if it has not."""
  if not (folder / "tokenizer_config.json").is_file():
    return {}
  return {name: (folder / name).read_bytes() for name in NAMES if (folder / name).is_file()}


def made(tokenizer: Tokenizer, said: Said, length: int) -> dict[str, bytes]:
  """Files of a tokenizer that has none; empty if it is of a kind that can't have any.

  Args:
    length: the model's context.
  """
  if isinstance(tokenizer, ByteTokenizer):
    data, ends = _bytes_as_json(), END_OF_DOCUMENT
  elif isinstance(tokenizer, BpeTokenizer):
    data = tokenizer.data
    ends = tokenizers.Tokenizer.from_str(data.decode()).id_to_token(tokenizer.eod)
  else:
    return {}
  texts = {"bos_token": ends, "eos_token": ends, **said.texts}
  if said.first is not None:
    data = _beginning_with(data, said.first, texts["bos_token"])
  config: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": length,
    "clean_up_tokenization_spaces": False,
    **texts,
  }
  if said.template is not None:
    config["chat_template"] = said.template
  return {
    "tokenizer.json": data,
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


def _beginning_with(data: bytes, first: int, text: str) -> bytes:
  """The tokenizer.json with a token put before every text, unless it puts something there."""
  parsed = json.loads(data)
  if parsed.get("post_processor"):
    return data
  token = {"SpecialToken": {"id": text, "type_id": 0}}
  one, two = ({"Sequence": {"id": x, "type_id": 0}} for x in "AB")
  parsed["post_processor"] = {
    "type": "TemplateProcessing",
    "single": [token, one],
    "pair": [token, one, two],
    "special_tokens": {text: {"id": text, "ids": [first], "tokens": [text]}},
  }
  return json.dumps(parsed, ensure_ascii=False).encode()
