"""Instructions with their answers, for fine-tuning: prompts by template, rows packed of examples.

An example is the token that begins texts, if the tokenizer has one for that, a prompt, its response
and the end-of-document token; the loss is of the last two.
Prompt and response are encoded each by itself, as they are when the prompt is given to be answered.
A row holds whole examples, each a segment with positions from 0, so none sees another.

Dimension letters: T positions of a row.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..config import ConfigError, DataConfig
from . import files
from .sources import Skipped, records
from .tokenizer import Tokenizer

# Stanford Alpaca's (github.com/tatsu-lab/stanford_alpaca, train.py). Nothing follows the colon.
WITH_INPUT = """Below is an instruction that describes a task, paired with an input that provides \
further context. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:"""
WITHOUT_INPUT = """Below is an instruction that describes a task. Write a response that \
appropriately completes the request.

### Instruction:
{instruction}

### Response:"""

_PREAMBLE = WITHOUT_INPUT.partition("\n\n")[0]
# A conversation by the template without an input. Only its first turn is what a model learns here;
# later ones go on below the same preamble.
_CHAT = """\
{{- BEGIN }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{{- '\\n\\n### Instruction:\\n' + message['content'] }}
{%- elif message['role'] == 'assistant' %}
{{- '\\n\\n### Response:' + message['content'] }}
{%- else %}
{{- raise_exception("Alpaca's template has no place for a system prompt") }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '\\n\\n### Response:' }}
{%- endif %}"""


class Example(NamedTuple):
  """Token ids."""

  ids: np.ndarray  # int32: perhaps a begin, prompt, response, end
  prompt: int  # how many are the prompt's, with the begin


def prompt_of(instruction: str, context: str = "") -> str:
  """The prompt of an instruction, with or without an input."""
  if not context:
    return WITHOUT_INPUT.replace("{instruction}", instruction)
  before, after = WITH_INPUT.split("{input}")
  return before.replace("{instruction}", instruction) + context + after


def chat_template(tokenizer: Tokenizer) -> str:
  """The prompt of an instruction as a chat template in Jinja, with the ids that examples have."""
  words = {i: text for text, i in tokenizer.special.items()}
  begin = "" if tokenizer.bos is None else words.get(tokenizer.bos, "")
  expected = _begun(_PREAMBLE, tokenizer)
  same = lambda text: np.array_equal(tokenizer.encode_special(text), expected)
  # Some tokenizers put a blank before a text, but not behind a special token.
  texts = (begin + _PREAMBLE, f"{begin} {_PREAMBLE}")
  first = next((text for text in texts if same(text)), texts[0])
  return _CHAT.replace("BEGIN", json.dumps(first, ensure_ascii=False))


def _begun(text: str, tokenizer: Tokenizer) -> np.ndarray:
  """Ids of what begins an example."""
  begin = [] if tokenizer.bos is None else [tokenizer.bos]
  return np.concatenate([begin, tokenizer.encode(text)]).astype(np.int32)


def read_examples(pattern: str, skipped: Skipped | None = None) -> Iterator[tuple[str, str]]:
  """(prompt, response) of every line of the files that a path or a glob names.

  A line is an object with `instruction`, `output` and perhaps `input`, which the templates take, or
  with `prompt` and `response`, which are taken as they are. A `.json` file is a list of such.

  Args:
    skipped: told of lines that are wrong, which are left out.

  Raises:
    ConfigError: a file is missing, unreadable or empty; a line is wrong (file and line).
  """
  for path in files.find(pattern):
    empty = True
    for where, record in records(path, skipped):
      empty = False
      try:
        yield _example(where, record)
      except ConfigError as e:
        if skipped is None:
          raise
        skipped(e)
    if empty:
      raise ConfigError(f"{path} is empty: there is no example to learn from")


def _example(where: str, record: Any) -> tuple[str, str]:
  if not isinstance(record, dict):
    raise ConfigError(f"{where} is no object, but {type(record).__name__}")
  pair = ("instruction", "output") if "instruction" in record else ("prompt", "response")
  for name in (*pair, *(("input",) if "input" in record else ())):
    if not isinstance(record.get(name), str):
      has = ", ".join(sorted(record)) or "nothing"
      raise ConfigError(
        f"{where} has no text in field {name!r} (it has {has}): an example has instruction, output "
        "and perhaps input, or prompt and response"
      )
    try:
      record[name].encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair; UTF-8 can't
      raise ConfigError(f"{where} holds a lone surrogate, which is no character") from error
  first, response = (record[name] for name in pair)
  if not first.strip():
    raise ConfigError(f"{where} has an empty {pair[0]}")
  if pair[0] == "prompt":
    return first, response
  return prompt_of(first, record.get("input", "")), response


class InstructionRows:
  """Random access to rows of whole examples, as `rows.Rows` gives them; `weights` is 1 where the
  target is of a response or ends one."""

  def __init__(self, examples: Sequence[Example], rows: Sequence[Sequence[int]], row_length: int):
    self._examples, self._rows, self.row_length = examples, rows, row_length

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, row: int) -> dict[str, np.ndarray]:
    ids = ("tokens", "targets", "segments", "positions")
    columns = {name: np.zeros(self.row_length, np.int32) for name in ids}
    columns["weights"] = np.zeros(self.row_length, np.float32)
    start = 0
    for segment, index in enumerate(self._rows[row], start=1):
      example = self._examples[index]
      size = len(example.ids) - 1
      here, place = slice(start, start + size), np.arange(size, dtype=np.int32)
      columns["tokens"][here] = example.ids[:-1]
      columns["targets"][here] = example.ids[1:]
      columns["segments"][here] = segment
      columns["positions"][here] = place
      columns["weights"][here] = place + 1 >= example.prompt
      start += size
    return columns


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
  """Which examples share a row: from the longest on, each where it leaves the least room."""
  order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
  rows: list[list[int]] = []
  by_room: list[list[int]] = [[] for _ in range(row_length + 1)]  # rows, by positions left
  for i in order:
    room = next((r for r in range(lengths[i], row_length + 1) if by_room[r]), None)
    if room is None:
      rows.append([])
      room = row_length
      by_room[room].append(len(rows) - 1)
    row = by_room[room].pop()
    rows[row].append(i)
    by_room[room - lengths[i]].append(row)
  return rows


class _Encoded(NamedTuple):
  examples: list[Example]
  asked: int  # examples that the templates made
  cut: int  # examples that lost the end of their response
  dropped: int  # that had no room for any of it


def _encode(pairs: Iterator[tuple[str, str]], tokenizer: Tokenizer, row_length: int) -> _Encoded:
  examples, asked, cut, dropped = [], 0, 0, 0
  for prompt, response in pairs:
    before, after = _begun(prompt, tokenizer), tokenizer.encode(response)
    whole = np.concatenate([before, after, [tokenizer.eod]]).astype(np.int32)
    if len(before) > row_length:
      dropped += 1
      continue
    asked += prompt.endswith("\n\n### Response:")
    cut += len(whole) > row_length + 1
    examples.append(Example(whole[: row_length + 1], max(len(before), 1)))
  return _Encoded(examples, asked, cut, dropped)


class Instructions(NamedTuple):
  """Two splits of rows, and what `load.Dataset` has besides."""

  train: InstructionRows
  heldout: InstructionRows
  fingerprint: dict[str, Any]
  skipped: tuple[str, ...]
  note: str
  template: str  # how to ask a model that learned them, as a chat template; empty: in no one way


def load_instructions(config: DataConfig, tokenizer: Tokenizer) -> Instructions:
  """Rows to fine-tune on, and those held out: those of `data.holdout_path`, or a share of the
  examples, drawn by `data.seed`.

  Raises:
    ConfigError: as `read_examples`; too few examples.
  """
  skipped: list[str] = []
  told = (lambda e: skipped.append(str(e))) if config.on_error == "skip" else None
  length = config.row_length
  read = lambda path: _encode(read_examples(path, told), tokenizer, length)
  train = read(config.path)
  template = chat_template(tokenizer) if 2 * train.asked > len(train.examples) else ""
  if config.holdout_path:
    heldout = read(config.holdout_path)
  else:
    train, heldout = _split(train, config.holdout, config.seed)
  for found, where in ((train, "to train on"), (heldout, "to hold out")):
    if not found.examples:
      raise ConfigError(
        f"{config.path} leaves no example {where} (data.holdout={config.holdout:g}, "
        f"{found.dropped} prompts over data.row_length={length}): give more, or raise row_length"
      )
  packed = [_rows(found.examples, config) for found in (train, heldout)]
  every = [example for found in (train, heldout) for example in found.examples]
  ids = np.concatenate([example.ids for example in every])
  bounds = [(len(example.ids), example.prompt) for example in every]
  digest = hashlib.sha256(ids.astype("<i4").tobytes())
  digest.update(np.asarray(bounds, "<i8").tobytes())
  fingerprint = {
    "source": "instructions", "digest": digest.hexdigest(), "tokens": len(ids),
    "tokenizer": tokenizer.fingerprint, "row_length": length, "packing": config.packing,
    "heldout": len(heldout.examples), "seed": config.seed,
  }  # fmt: skip
  note = _describe(train, heldout, len(packed[0]), length)
  return Instructions(packed[0], packed[1], fingerprint, tuple(skipped), note, template)


def _split(found: _Encoded, share: float, seed: int) -> tuple[_Encoded, _Encoded]:
  """What is cut and dropped is told of the first."""
  count = len(found.examples)
  order = np.random.default_rng((seed, 4)).permutation(count)  # 0 to 3: see `masking`
  out = set(order[: max(1, round(share * count))].tolist())
  kept = [example for i, example in enumerate(found.examples) if i not in out]
  held = [example for i, example in enumerate(found.examples) if i in out]
  return found._replace(examples=kept), _Encoded(held, 0, 0, 0)


def _rows(examples: list[Example], config: DataConfig) -> InstructionRows:
  lengths = [len(example.ids) - 1 for example in examples]
  rows = pack(lengths, config.row_length) if config.packing else [[i] for i in range(len(lengths))]
  return InstructionRows(examples, rows, config.row_length)


def _describe(train: _Encoded, heldout: _Encoded, rows: int, length: int) -> str:
  count, used = len(train.examples), sum(len(example.ids) - 1 for example in train.examples)
  text = f"{count:,} to train on, {count / rows:.1f} a row ({used / (rows * length):.0%} filled), "
  text += f"{len(heldout.examples):,} held out"
  if cut := train.cut + heldout.cut:
    text += f"; {cut:,} cut at {length} tokens"
  if dropped := train.dropped + heldout.dropped:
    text += f"; {dropped:,} left out, whose prompt alone is longer"
  return text
