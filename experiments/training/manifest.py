"""Digests of a saved step, by which a damaged checkpoint is known from a whole one.

Orbax restores flipped bits without a word. Each process leaves `digests.I-of-N.json` in a finished
step's folder: size and SHA-256 of the files that it wrote, behind a SHA-256 of that list. A step is
finished when all N are there, and intact when its files are exactly those that are listed.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from .. import paths
from ..paths import Place, Url

_DIGESTS = re.compile(r"digests\.(\d+)-of-(\d+)\.json")
_OCDBT = re.compile(r"ocdbt\.process_(\d+)")  # where TensorStore keeps what a process wrote
REFUSED = ".refused"  # behind the number of a step that was set aside
_THREADS = 4  # SHA-256 leaves Python's lock
_BLOCK = 1 << 20  # bytes read at once
_LARGEST_LIST = 1 << 28  # bytes of a list of digests


class Seal(NamedTuple):
  """What a process says of the files it wrote."""

  bytes: int
  files: int
  sha256: str  # of the list


def seal(step: Place, process: int = 0, count: int = 1, **facts: Any) -> Seal:
  """Write this process's digests, the last thing that happens to a step.

  Args:
    step: folder of a step that all processes have written.
    facts: kept with them; see `read_facts`.
  """
  mine = [name for name in _saved(paths.files(step)) if _writer(name) % count == process]
  listed = dict(zip(mine, _digests(step, mine), strict=True))
  body = json.dumps({"files": listed, **facts}, separators=(",", ":"))
  digest = hashlib.sha256(body.encode()).hexdigest()
  path = step / f"digests.{process}-of-{count}.json"
  paths.write_whole(path, f"{digest}\n{body}".encode())
  return Seal(sum(size for size, _ in listed.values()), len(listed), digest)


def saved_steps(folder: Place) -> list[int]:
  """Steps of the finished checkpoints in a `checkpoints/` folder, oldest first."""
  return [step for step in steps(folder) if is_sealed(folder / str(step))]


def steps(folder: Place) -> list[int]:
  """The same, and those that are being saved, or were never finished."""
  names = set(paths.names(folder))
  if isinstance(folder, Url):  # nothing is renamed there: a mark beside a step sets it aside
    names -= {name.removesuffix(REFUSED) for name in names if name.endswith(REFUSED)}
  return sorted(int(name) for name in names if name.isdecimal())


def is_sealed(step: Place) -> bool:
  """Whether all processes left their digests."""
  found = [match for name in paths.names(step) if (match := _DIGESTS.fullmatch(name))]
  return bool(found) and len(found) == max(int(match[2]) for match in found)


def sealed_at(step: Place) -> float:
  """When the last process left them, in seconds since 1970.

  Raises:
    OSError: the step is just being removed.
  """
  digests = [name for name in paths.names(step) if _DIGESTS.fullmatch(name)]
  return max((paths.modified(step / name) for name in digests), default=0.0)


def read_facts(step: Place) -> dict[str, Any]:
  """What process 0 wrote down of a sealed step; empty if that is damaged."""
  for name in paths.names(step):
    if name.startswith("digests.0-of-"):
      found = _read(step / name, paths.size(step / name))
      return {} if isinstance(found, str) else found
  return {}


def unseal(step: Place) -> None:
  """Make a step unfinished again, before it is removed."""
  for name in paths.names(step):
    if _DIGESTS.fullmatch(name):
      paths.remove(step / name)


def damage(
  step: Place, *, part: int = 0, parts: int = 1, items: tuple[str, ...] = ()
) -> str | None:
  """Why a step is not what was saved, naming the file; None if it is, as far as was looked.

  Args:
    part, parts: which share of the files to read, for processes that share the work; names and
      sizes are compared by all.
    items: top-level folders to read; empty: everything.
  """
  if not is_sealed(step):
    return "the list of digests is not there, so saving it was never finished"
  listed: dict[str, tuple[int, str]] = {}
  counts, sizes = set(), paths.files(step)
  for name in sorted(sizes):
    if match := _DIGESTS.fullmatch(name):
      found = _read(step / name, sizes[name])
      if isinstance(found, str):
        return f"{name} {found}"
      listed |= {name: tuple(entry) for name, entry in found["files"].items()}
      counts.add(match[2])
  if len(counts) > 1:
    return "it holds digests of different numbers of processes"
  there = list(_saved(sizes))
  for name in there:
    if sizes[name] == paths.LINK:
      return f"{name} is a symbolic link"
  if missing := sorted(listed.keys() - set(there)):
    return f"{missing[0]} is missing"
  if extra := sorted(set(there) - listed.keys()):
    return f"{extra[0]} does not belong to it"
  for name, (size, _) in sorted(listed.items()):
    if sizes[name] != size:
      return f"{name} has {sizes[name]:,} bytes, not {size:,}"
  mine = [n for n in sorted(listed) if not items or n.split("/")[0] in items][part::parts]
  for name, (_, digest) in zip(mine, _digests(step, mine), strict=True):
    if digest != listed[name][1]:
      return f"{name} is damaged (its SHA-256 is not that of the file that was saved)"
  return None


def _writer(name: str) -> int:
  match = _OCDBT.search(name)
  return int(match[1]) if match else 0


def _saved(sizes: dict[str, int]) -> Iterator[str]:
  """Names of a step's files, but for digests."""
  return (name for name in sizes if not _DIGESTS.fullmatch(name.removesuffix(".tmp")))


def _digests(step: Place, names: list[str]) -> Iterator[tuple[int, str]]:
  """(size, SHA-256) of each file."""

  def digest(name: str) -> tuple[int, str]:
    found, size = hashlib.sha256(), 0
    with paths.open_read(step / name) as file:
      while block := file.read(_BLOCK):
        found.update(block)
        size += len(block)
    return size, found.hexdigest()

  with ThreadPoolExecutor(_THREADS) as pool:
    yield from pool.map(digest, names)


def _read(path: Place, size: int) -> dict[str, Any] | str:
  """A process's list, or what is wrong with it."""
  if size == paths.LINK:
    return "is a symbolic link"
  if size > _LARGEST_LIST:
    return f"has {size:,} bytes, too many for a list of digests"
  with paths.open_read(path) as file:
    digest, _, body = file.read().partition(b"\n")
  if hashlib.sha256(body).hexdigest().encode() != digest:
    return "is damaged"
  return json.loads(body)
