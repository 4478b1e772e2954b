"""What a checkpoint says of its tokenizer beside the tokenizer: the tokens that end an answer, the
template of a conversation, and of a GGUF the token that begins a text."""

from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..data.tokenizer import CHAT_TEMPLATE
from .gguf import metadata
from .source import Source, read_json

# Kinds of GGUF tokenizers that begin a text with a token unless they say otherwise, and its id
# unless they give one, as llama.cpp has them.
_BEGINS = {"llama": 1}
_BEGINS_BPE = ("llama-bpe", "llama3", "llama-v3", "tekken")


def gguf_bos(source: Source) -> int | None:
  """Id of the token that a GGUF's tokenizer puts before every text; None if it puts none."""
  kind = metadata(source, "tokenizer.ggml.model")
  adds = metadata(source, "tokenizer.ggml.add_bos_token")
  if adds is None:
    adds = kind in _BEGINS or metadata(source, "tokenizer.ggml.pre") in _BEGINS_BPE
  found = metadata(source, "tokenizer.ggml.bos_token_id")
  found = _BEGINS.get(kind) if found is None else found
  return found if adds and isinstance(found, int) else None


def special_tokens(source: Source) -> dict[str, str]:
  """The texts of special tokens, by the names that templates have for them: `bos_token`, ..."""
  names = ("bos_token", "eos_token", "unk_token", "pad_token")
  if source.gguf is not None:
    words = metadata(source, "tokenizer.ggml.tokens") or []
    found = {}
    for name in names:
      key = {"unk_token": "unknown_token", "pad_token": "padding_token"}.get(name, name)
      i = metadata(source, f"tokenizer.ggml.{key}_id")
      if isinstance(i, int) and 0 <= i < len(words):
        found[name] = words[i]
    return found
  said = _optional(source, "special_tokens_map.json") | _optional(source, "tokenizer_config.json")
  texts = {name: said[name] for name in names if said.get(name)}
  return {name: x["content"] if isinstance(x, dict) else str(x) for name, x in texts.items()}


def stops(source: Source) -> frozenset[int]:
  """Ids that end an answer."""
  found = []
  if source.gguf is not None:
    names = ("eos", "eot", "eom")
    found = [metadata(source, f"tokenizer.ggml.{name}_token_id") for name in names]
  else:
    for said in (source.config, _optional(source, "generation_config.json")):
      ids = said.get("eos_token_id")
      found += ids if isinstance(ids, list) else [ids]
  return frozenset(i for i in found if isinstance(i, int))


def chat_template(source: Source) -> str | None:
  """The Jinja template of a conversation; of several the one called `default`.

  Raises:
    ConfigError: there are some, none of which is the default.
  """
  if source.gguf is not None:
    found = metadata(source, "tokenizer.chat_template")
    return found if isinstance(found, str) else None
  alone = _folder(source) / CHAT_TEMPLATE
  if alone.is_file():
    try:
      return alone.read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
      raise ConfigError(f"{alone} can't be read: {e}") from e
  for name in ("tokenizer_config.json", "chat_template.json"):
    found = _optional(source, name).get("chat_template")
    if isinstance(found, str):
      return found
    if isinstance(found, list):
      named = {x["name"]: x["template"] for x in found if {"name", "template"} <= x.keys()}
      if "default" in named:
        return named["default"]
      raise ConfigError(f"{_folder(source) / name} has chat templates, but none called default")
  return None


def _folder(source: Source) -> Path:
  return source.path if source.path.is_dir() else source.path.parent


def _optional(source: Source, name: str) -> dict[str, Any]:
  path = _folder(source) / name
  return read_json(path) if path.is_file() else {}
