"""Turns text into token shards (`shards.py` has the format).

    python -m experiments.data.prepare --input='text/*.jsonl' --output=shards --tokenizer=tokenizer

Files are grouped into units, each made by one process from start to end, so the result does not
depend on the number of workers. Run again after an interruption, it checks what is finished by
digest and makes the rest.
"""

import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from ..config import ConfigError
from . import command, files, shards
from .sources import file_documents
from .tokenizer import Tokenizer, load_tokenizer

_SHARD_TOKENS = 1 << 28


class Unit(NamedTuple):
  """A run of input files that one worker turns into shards."""

  name: str
  paths: tuple[str, ...]


class Job(NamedTuple):
  """What every worker needs to know."""

  output: str
  tokenizer: str
  text_field: str
  shard_tokens: int


def prepare(
  pattern: str,
  output: str,
  tokenizer: str,
  *,
  text_field: str = "text",
  workers: int | None = None,
  shard_tokens: int = _SHARD_TOKENS,
  report: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Tokenizes every document of `pattern` into shards of about `shard_tokens` in `output`.

  A shard ends with the first document that reaches `shard_tokens`. Returns the manifest.

  Raises:
    ConfigError: unreadable input or tokenizer, or `output` holds the work of other input, another
      tokenizer or other settings.
  """
  if shard_tokens < 1 or (workers is not None and workers < 1):
    raise ConfigError("--shard_tokens and --workers must be at least 1")
  loaded = load_tokenizer(tokenizer)
  inputs = [[path, *files.version(path)] for path in files.find(pattern)]
  units = _plan_units([(path, size) for path, size, _ in inputs], shard_tokens)
  plan = {
    "format": shards.FORMAT,
    "tokenizer": loaded.fingerprint,
    "text_field": text_field,
    "shard_tokens": shard_tokens,
    "inputs": inputs,
  }
  files.make_folder(output)
  _check_plan(output, plan)
  files.remove(files.join(output, "*.tmp"))  # of a run that was killed
  job = Job(output, tokenizer, text_field, shard_tokens)
  found = _run_units(job, units, min(workers or os.cpu_count() or 1, len(units)), report)
  return shards.write_manifest(
    output,
    [shard for unit in units for shard in found[unit.name]],
    {"fingerprint": loaded.fingerprint, "path": tokenizer},
    shards.token_dtype(loaded.vocab_size),
  )


def _plan_units(sizes: Sequence[tuple[str, int]], unit_bytes: int) -> list[Unit]:
  """Groups of consecutive files that reach `unit_bytes`: small files need not each be a shard."""
  groups: list[list[str]] = []
  room = 0
  for path, size in sizes:
    if room <= 0:
      groups.append([])
      room = unit_bytes
    groups[-1].append(path)
    room -= size
  return [Unit(f"{i:05d}", tuple(paths)) for i, paths in enumerate(groups)]


def _check_plan(output: str, plan: dict[str, Any]) -> None:
  path = files.join(output, shards.PLAN)
  if not files.exists(path):
    shards.write_json(path, plan)
    return
  before = shards.read_json(path)
  for field in plan:
    if before.get(field) != plan[field]:
      raise ConfigError(
        f"{output} was begun with other {field}: choose another --output, or delete that folder"
      )


def _run_units(
  job: Job, units: Sequence[Unit], workers: int, report: Callable[[str], None]
) -> dict[str, list[shards.Shard]]:
  if workers == 1:
    tokenizer = load_tokenizer(job.tokenizer)
    return _collect((_make_unit(job, tokenizer, unit) for unit in units), len(units), report)
  context = multiprocessing.get_context("spawn")
  with futures.ProcessPoolExecutor(workers, context, _start_worker, (job,)) as pool:
    pending = [pool.submit(_work, unit) for unit in units]
    try:
      finished = (future.result() for future in futures.as_completed(pending))
      return _collect(finished, len(units), report)
    except BrokenProcessPool as error:
      raise ConfigError(
        "a worker was killed, perhaps out of memory: run again with fewer --workers; finished "
        "shards are kept"
      ) from error
    finally:
      pool.shutdown(cancel_futures=True)


def _collect(
  finished: Iterator[tuple[str, list[shards.Shard], bool]],
  num_units: int,
  report: Callable[[str], None],
) -> dict[str, list[shards.Shard]]:
  found: dict[str, list[shards.Shard]] = {}
  new_tokens, kept, start, last = 0, 0, time.monotonic(), 0.0
  for name, made, was_kept in finished:
    found[name] = made
    new_tokens += 0 if was_kept else sum(shard.tokens for shard in made)
    kept += was_kept
    now = time.monotonic()
    if now - last > 1 or len(found) == num_units:
      last = now
      report(
        f"{len(found)}/{num_units} units ({kept} found finished), {new_tokens:,} new tokens, "
        f"{new_tokens / max(now - start, 1e-3):,.0f} tokens/s"
      )
  return found


_worker: tuple[Job, Tokenizer]


def _start_worker(job: Job) -> None:
  global _worker
  _worker = job, load_tokenizer(job.tokenizer)
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: the parent alone reports it
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  """A killed parent leaves its workers waiting for ever; they end themselves."""
  multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
  os._exit(1)


def _work(unit: Unit) -> tuple[str, list[shards.Shard], bool]:
  return _make_unit(*_worker, unit)


def _make_unit(job: Job, tokenizer: Tokenizer, unit: Unit) -> tuple[str, list[shards.Shard], bool]:
  """The unit's name, its shards, and whether they were found finished and intact."""
  path = files.join(job.output, f"{unit.name}.unit.json")
  if files.exists(path):
    made = [shards.Shard(**record) for record in shards.read_json(path)]
    if all(shards.is_intact(job.output, shard) for shard in made):
      return unit.name, made, True
  documents = _tokenized(job, tokenizer, unit)
  dtype = shards.token_dtype(tokenizer.vocab_size)
  made = []
  for number in itertools.count():
    name = f"{unit.name}-{number:05d}"
    shard = shards.write_shard(job.output, name, documents, dtype, job.shard_tokens)
    if shard is None:
      break
    made.append(shard)
  shards.write_json(path, [shard._asdict() for shard in made])
  return unit.name, made, False


def _tokenized(job: Job, tokenizer: Tokenizer, unit: Unit) -> Iterator[tuple[np.ndarray, int]]:
  for path in unit.paths:
    for text in file_documents(path, job.text_field):
      yield np.append(tokenizer.encode(text), np.int32(tokenizer.eod)), len(text.encode("utf-8"))


def _program(values: flags.FlagValues) -> None:
  manifest = prepare(
    values.input,
    values.output,
    values.tokenizer,
    text_field=values.text_field,
    workers=values.workers,
    shard_tokens=values.shard_tokens,
  )
  print(
    f"{values.output}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, "
    f"{manifest['bytes']:,} bytes of text; shards: {len(manifest['shards']):,}"
  )
  print(f"digest {manifest['digest']}")


def _flags() -> flags.FlagValues:
  values = flags.FlagValues()
  flags.DEFINE_string(
    "input", None, "Path or glob of text or JSONL, plain or .gz.", required=True, flag_values=values
  )
  flags.DEFINE_string("output", None, "Folder to write.", required=True, flag_values=values)
  flags.DEFINE_string(
    "tokenizer", None, "'byte', or what train_tokenizer wrote.", required=True, flag_values=values
  )
  flags.DEFINE_string("text_field", "text", "Field of a JSONL line.", flag_values=values)
  flags.DEFINE_integer("workers", None, "Processes; default one a core.", flag_values=values)
  flags.DEFINE_integer(
    "shard_tokens", _SHARD_TOKENS, "Tokens at which a shard ends.", flag_values=values
  )
  return values


if __name__ == "__main__":
  sys.exit(command.run(_program, _flags(), sys.argv))
