"""Conversations as the text that a model was trained on, by its Jinja template, and as tokens."""

import datetime
import json
import re
from collections.abc import Sequence
from typing import Any

from ..config import ConfigError
from ..data.tokenizer import Tokenizer

Message = dict[str, str]  # role: system, user, assistant; content


class ChatTemplate:
  """A model's chat template, rendered as `transformers` documents it: in a sandbox, blocks trimmed,
  with `raise_exception`, `strftime_now`, loop controls and `tojson` that leaves characters alone.

  Args:
    source: Jinja.
    special: texts of special tokens by the names that templates have for them, `bos_token`, ...

  Raises:
    ConfigError: jinja2 is missing, or `source` is no template.
  """

  def __init__(self, source: str, special: dict[str, str]):
    try:
      import jinja2  # an extra
      import jinja2.sandbox  # the same
    except ImportError as e:
      raise ConfigError("a chat template needs jinja2: pip install 'meshyard[chat]'") from e
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    self._special = special
    # What a program in Jinja can raise besides Jinja's own.
    python = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
    self._mistakes = (jinja2.TemplateError, *python)
    try:
      self._template = environment.from_string(_without_generation(source))
    except jinja2.TemplateError as e:
      raise ConfigError(f"the model's chat template can't be read: {e}") from e

  def render(self, messages: Sequence[Message], *, answer: bool = True) -> str:
    """The text of a conversation; with `answer`, up to where the model is to speak.

    Raises:
      ConfigError: the template refuses it: roles that do not take turns, or no system prompt.
    """
    try:
      return self._template.render(
        messages=[dict(m) for m in messages], add_generation_prompt=answer, tools=None,
        documents=None, **self._special,
      )  # fmt: skip
    except self._mistakes as e:
      raise ConfigError(f"the model's chat template refuses the conversation: {e}") from e

  def encode(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Token ids of a conversation, up to where the model is to speak.

    Special tokens are those that the template writes. What a message spells like one is text.

    Raises:
      ConfigError: the template refuses it, or a message is not text.
    """
    spelled = [t for t in tokenizer.special if any(t in m["content"] for m in messages)]
    if not spelled:
      return [int(i) for i in tokenizer.encode_special(self.render(messages))]
    # The template gets a character that occurs nowhere in place of each such spelling.
    said = "".join(m["content"] for m in messages)
    unused = (chr(i) for i in range(0xF0000, 0xFFFFD) if chr(i) not in said)
    stand_in = dict(zip(sorted(spelled, key=len, reverse=True), unused, strict=False))
    hidden = []
    for message in messages:
      content = message["content"]
      for text, character in stand_in.items():
        content = content.replace(text, character)
      hidden.append(message | {"content": content})
    return [int(i) for i in _encode_with(self.render(hidden), stand_in, tokenizer)]


def _encode_with(text: str, stand_in: dict[str, str], tokenizer: Tokenizer) -> list[int]:
  """Text with special tokens, of which `stand_in` characters stand for spellings that are none."""
  ids: list[int] = []
  start = 0

  def add(part: str) -> None:
    if not any(character in part for character in stand_in.values()):
      ids.extend(tokenizer.encode_special(part))
      return
    for spelling, character in stand_in.items():
      part = part.replace(character, spelling)
    ids.extend(tokenizer.encode(part))

  while True:
    at, token = min(
      ((i, -len(t)) for t in tokenizer.special if (i := text.find(t, start)) >= 0),
      default=(len(text), 0),
    )
    if start < at:
      add(text[start:at])
    if not token:
      return ids
    ids.extend(tokenizer.encode_special(text[at : at - token]))
    start = at - token


def _without_generation(source: str) -> str:
  """Without the marks round what an assistant said, which are of use in training alone."""
  source = re.sub(r"{%(-?)\s*generation\s*(-?)%}", r"{%\1 if true \2%}", source)
  return re.sub(r"{%(-?)\s*endgeneration\s*(-?)%}", r"{%\1 endif \2%}", source)


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  """Jinja's own escapes what HTML would read."""
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def _now(form: str) -> str:
  return datetime.datetime.now().strftime(form)


def _raise(message: str) -> None:
  raise ValueError(message)
