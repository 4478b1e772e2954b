"""Prompts from a file: lines of text, or JSON lines with `prompt`, `messages` or `instruction`."""

import json
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..data.instructions import prompt_of

_ROLES = ("system", "user", "assistant")


def read_prompts(name: str) -> list[dict[str, Any]]:
  """One dictionary a prompt, with `prompt` or `messages` and what else its line says.

  Of a text file each line that is not blank is a prompt. An `instruction`, perhaps with an `input`,
  is put into the template that examples have.

  Raises:
    ConfigError: the file can't be read, has no prompt, or a line is none.
  """
  try:
    lines = Path(name).expanduser().read_text(encoding="utf-8").splitlines()
  except (OSError, ValueError) as e:
    raise ConfigError(f"--prompts={name} can't be read: {e}") from e
  numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
  if not numbered:
    raise ConfigError(f"--prompts={name} holds no prompt")
  if not name.endswith(".jsonl"):
    return [{"prompt": line} for _, line in numbered]
  return [_prompt(line, f"{name}, line {i}") for i, line in numbered]


def _prompt(line: str, where: str) -> dict[str, Any]:
  try:
    found = json.loads(line)
  except ValueError as e:
    raise ConfigError(f"{where} is no JSON: {e}") from e
  kinds = ("prompt", "messages", "instruction")
  if not isinstance(found, dict) or sum(kind in found for kind in kinds) != 1:
    raise ConfigError(
      f'{where}: give {{"prompt": TEXT}}, {{"messages": [...]}} or {{"instruction": TEXT}}'
    )
  if "instruction" in found:
    asked = found["instruction"], found.get("input", "")
    if not all(isinstance(text, str) for text in asked):
      raise ConfigError(f"{where}: its instruction or input is no text")
    return found | {"prompt": prompt_of(*asked)}
  if "prompt" in found:
    if not isinstance(found["prompt"], str):
      raise ConfigError(f"{where}: its prompt is no text")
    return found
  said = found["messages"]
  fits = isinstance(said, list) and said and all(map(_is_message, said))
  if not fits:
    raise ConfigError(
      f'{where}: messages are a list of {{"role": {" or ".join(_ROLES)}, "content": TEXT}}'
    )
  return found


def _is_message(message: Any) -> bool:
  return (
    isinstance(message, dict)
    and message.get("role") in _ROLES
    and isinstance(message.get("content"), str)
  )
