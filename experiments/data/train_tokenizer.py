"""Learns a byte-level BPE vocabulary from text and writes it as `tokenizer.json`.

python -m experiments.data.train_tokenizer --input='text/*.jsonl' --output=tokenizer
"""

import sys

from absl import flags
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..config import ConfigError
from . import command, files
from .sources import text_documents
from .tokenizer import END_OF_DOCUMENT, pieces

_SMALLEST = 257  # 256 bytes and the end of document


def train_tokenizer(
  pattern: str, output: str, *, vocab_size: int = 32768, text_field: str = "text"
) -> Tokenizer:
  """Trains on all documents of `pattern` and writes OUTPUT/tokenizer.json.

  Any text can be encoded: the 256 bytes are part of the vocabulary. Id 0 ends a document. Text
  with too few repeated pairs gives a smaller vocabulary than asked for.

  Raises:
    ConfigError: unreadable input, a vocabulary below 257, or a tokenizer already there (shards
      made with it would no longer be readable).
  """
  if vocab_size < _SMALLEST:
    raise ConfigError(f"--vocab_size={vocab_size}: must be at least {_SMALLEST}")
  path = files.join(output, "tokenizer.json")
  if files.exists(path):
    raise ConfigError(f"{path} exists: choose another --output, or delete it")
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[END_OF_DOCUMENT],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=sys.stderr.isatty(),
  )
  documents = text_documents(pattern, text_field)
  tokenizer.train_from_iterator((part for text in documents for part in pieces(text)), trainer)
  files.make_folder(output)
  files.write_atomic(path, tokenizer.to_str().encode("utf-8"))
  return tokenizer


def _program(values: flags.FlagValues) -> None:
  tokenizer = train_tokenizer(
    values.input, values.output, vocab_size=values.vocab_size, text_field=values.text_field
  )
  print(
    f"wrote {tokenizer.get_vocab_size():,} tokens to {files.join(values.output, 'tokenizer.json')}"
  )
  print(
    "next: python -m experiments.data.prepare "
    f"--input='{values.input}' --output=SHARDS --tokenizer={values.output}"
  )


def _flags() -> flags.FlagValues:
  values = flags.FlagValues()
  flags.DEFINE_string(
    "input", None, "Path or glob of text or JSONL, plain or .gz.", required=True, flag_values=values
  )
  flags.DEFINE_string("output", None, "Folder to write.", required=True, flag_values=values)
  flags.DEFINE_integer("vocab_size", 32768, "Tokens to learn.", flag_values=values)
  flags.DEFINE_string("text_field", "text", "Field of a JSONL line.", flag_values=values)
  return values


if __name__ == "__main__":
  sys.exit(command.run(_program, _flags(), sys.argv))
