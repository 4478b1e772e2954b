"""Digests of a saved step, by which a damaged checkpoint is known from a whole one.

Orbax restores flipped bits without a word. Each process leaves `digests.I-of-N.json` in a finished
step's folder: size and SHA-256 of the files that it wrote, behind a SHA-256 of that list. A step is
finished when all N are there, and intact when its files are exactly those that are listed.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

_DIGESTS = re.compile(r"digests\.(\d+)-of-(\d+)\.json")
_OCDBT = re.compile(r"ocdbt\.process_(\d+)")  # where TensorStore keeps what a process wrote
_THREADS = 4  # SHA-256 leaves Python's lock
_LARGEST_LIST = 1 << 28  # bytes of a list of digests


class Seal(NamedTuple):
  """What a process says of the files it wrote."""

  bytes: int
  files: int
  sha256: str  # of the list


def seal(step: Path, process: int = 0, count: int = 1, **facts: Any) -> Seal:
  """Write this process's digests, the last thing that happens to a step.

  Args:
    step: folder of a step that all processes have written.
    facts: kept with them; see `read_facts`.
  """
  mine = [name for name in _files(step) if _writer(name) % count == process]
  listed = dict(zip(mine, _digests(step, mine), strict=True))
  body = json.dumps({"files": listed, **facts}, separators=(",", ":"))
  digest = hashlib.sha256(body.encode()).hexdigest()
  path = step / f"digests.{process}-of-{count}.json"
  _write_whole(path, f"{digest}\n{body}")
  return Seal(sum(size for size, _ in listed.values()), len(listed), digest)


def is_sealed(step: Path) -> bool:
  """Whether all processes left their digests."""
  found = [match for path in _listing(step) if (match := _DIGESTS.fullmatch(path.name))]
  return bool(found) and len(found) == max(int(match[2]) for match in found)


def read_facts(step: Path) -> dict[str, Any]:
  """What process 0 wrote down of a sealed step; empty if that is damaged."""
  for path in _listing(step):
    if path.name.startswith("digests.0-of-"):
      found = _read(path)
      return {} if isinstance(found, str) else found
  return {}


def unseal(step: Path) -> None:
  """Make a step unfinished again, before it is removed."""
  for path in _listing(step):
    if _DIGESTS.fullmatch(path.name):
      path.unlink()


def damage(step: Path, *, part: int = 0, parts: int = 1, items: tuple[str, ...] = ()) -> str | None:
  """Why a step is not what was saved, naming the file; None if it is, as far as was looked.

  Args:
    part, parts: which share of the files to read, for processes that share the work; names and
      sizes are compared by all.
    items: top-level folders to read; empty: everything.
  """
  if not is_sealed(step):
    return "the list of digests is not there, so saving it was never finished"
  listed: dict[str, tuple[int, str]] = {}
  counts = set()
  for path in _listing(step):
    if match := _DIGESTS.fullmatch(path.name):
      found = _read(path)
      if isinstance(found, str):
        return f"{path.name} {found}"
      listed |= {name: tuple(entry) for name, entry in found["files"].items()}
      counts.add(match[2])
  if len(counts) > 1:
    return "it holds digests of different numbers of processes"
  there = list(_files(step, refuse_links=True))
  for name in there:
    if (step / name).is_symlink():
      return f"{name} is a symbolic link"
  if missing := sorted(listed.keys() - set(there)):
    return f"{missing[0]} is missing"
  if extra := sorted(set(there) - listed.keys()):
    return f"{extra[0]} does not belong to it"
  for name, (size, _) in sorted(listed.items()):
    if (now := (step / name).stat().st_size) != size:
      return f"{name} has {now:,} bytes, not {size:,}"
  mine = [n for n in sorted(listed) if not items or n.split("/")[0] in items][part::parts]
  for name, (_, digest) in zip(mine, _digests(step, mine), strict=True):
    if digest != listed[name][1]:
      return f"{name} is damaged (its SHA-256 is not that of the file that was saved)"
  return None


def _writer(name: str) -> int:
  match = _OCDBT.search(name)
  return int(match[1]) if match else 0


def _listing(folder: Path) -> list[Path]:
  try:
    return sorted(folder.iterdir(), key=lambda path: path.name)
  except (FileNotFoundError, NotADirectoryError):
    return []


def _files(step: Path, *, refuse_links: bool = False) -> Iterator[str]:
  """Names under `step`, but for digests; a link is named and not followed."""
  waiting = [""]
  while waiting:
    prefix = waiting.pop()
    for path in _listing(step / prefix if prefix else step):
      name = f"{prefix}/{path.name}" if prefix else path.name
      if not (refuse_links and path.is_symlink()) and path.is_dir():
        waiting.append(name)
      elif prefix or not _DIGESTS.fullmatch(path.name.removesuffix(".tmp")):
        yield name


def _digests(step: Path, names: list[str]) -> Iterator[tuple[int, str]]:
  """(size, SHA-256) of each file."""

  def digest(name: str) -> tuple[int, str]:
    with (step / name).open("rb") as file:
      found = hashlib.file_digest(file, "sha256")
      return file.tell(), found.hexdigest()

  with ThreadPoolExecutor(_THREADS) as pool:
    yield from pool.map(digest, names)


def _read(path: Path) -> dict[str, Any] | str:
  """A process's list, or what is wrong with it."""
  if path.is_symlink():
    return "is a symbolic link"
  if path.stat().st_size > _LARGEST_LIST:
    return f"has {path.stat().st_size:,} bytes, too many for a list of digests"
  digest, _, body = path.read_bytes().partition(b"\n")
  if hashlib.sha256(body).hexdigest().encode() != digest:
    return "is damaged"
  return json.loads(body)


def _write_whole(path: Path, text: str) -> None:
  temporary = path.with_name(f"{path.name}.tmp")
  with temporary.open("w") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)
