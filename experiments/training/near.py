"""Near copies: the state every few steps in a folder on each host, in its memory or on a disk of
its own, from which a run that died goes on without the steps since its last checkpoint.

    NEAR/RUN-HASH/ID/I-of-N/STEP/    what the devices of process I hold after STEP

Each process writes its pieces in a thread; training waits for the copy from the devices alone. A
step is sealed like a checkpoint (`manifest`), and used if every process has it whole, as cut by the
same mesh for the same model, and none of the run directory's checkpoints is newer.

ID is in the run directory (`near.json`). It is drawn anew whenever the run begins or goes on from
anything but a near copy, and where it goes back: what was copied before is then of another ID, and
is not found even on a host that was away meanwhile.
"""

import contextlib
import hashlib
import json
import math
import re
import secrets
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mesh.multihost import agree_in_turn

from .. import bucket
from ..config import Config
from ..overrides import change_class, flatten
from . import manifest
from .state import TrainState

FILE = "near.json"
KEPT = 2  # a process may end before its part of the newest is written
_DAMAGED = "refused: "
_NOT_OURS = "not used: "

_Bounds = tuple[tuple[int, int], ...]  # of a piece: first and end, in each dim of the array
_Pieces = list[tuple[str, list[np.ndarray]]]  # file and content


class NearCopies:
  """The near copies of a run. Does nothing unless `checkpoint.near` is set.

  Use as a context manager: leaving it waits for the copy under way. All processes call all methods
  in the same order.

  Args:
    folder: the run directory.
    note: told what a person may want to know.
    refused: told of copies that are damaged.
  """

  def __init__(
    self,
    config: Config,
    folder: Path,
    *,
    note: Callable[[str], None] = print,
    refused: Callable[[str], None] = print,
  ):
    self.every, self._total = config.checkpoint.near_steps, config.train.steps
    self.restored: int | None = None  # the step whose copy this start goes on from
    self._note, self._refused = note, refused
    self._file, self._id, self._start = folder / FILE, "", ""
    where = str(bucket.home(folder.absolute()))
    digest = hashlib.sha256(where.encode()).hexdigest()
    near = Path(config.checkpoint.near).expanduser().absolute()
    self._run = near / f"{where.rpartition('/')[2]}-{digest[:12]}"
    self._process, self._count = jax.process_index(), jax.process_count()
    values = flatten(config).items()
    self._config = {path: repr(value) for path, value in values if change_class(path) != "free"}
    self._thread: threading.Thread | None = None
    self._failure: BaseException | None = None
    self._told: set[str] = set()

  def __enter__(self) -> "NearCopies":
    return self

  def __exit__(self, *_: Any) -> None:
    if self._thread is not None:
      self._thread.join()

  @property
  def _mine(self) -> Path:
    return self._run / self._id / f"{self._process}-of-{self._count}"

  def newest(self, saved: list[int], abstract: TrainState) -> int | None:
    """The newest step that all processes can restore, unless a checkpoint is newer.

    Args:
      saved: steps of the checkpoints in the run directory.
      abstract: the state to restore.
    """
    if not self.every:
      return None
    self._id = _agree(self._read_id() if self._process == 0 else "", lambda said: said[0])
    if not self._id:
      return None
    least, layout = max(saved, default=0), _layout(abstract)
    mine = [step for step in _steps(self._mine) if least <= step < self._total]
    for step in json.loads(_agree(json.dumps(mine), _union)):
      why = _agree(json.dumps(self._look(step, layout)), _judge)
      if not why:
        self.restored = step
        return step
      say = self._refused if why.startswith(_DAMAGED) else self._note
      say(f"near copy of step {step} {why}")
    counts = {path.name.rpartition("-")[2] for path in _listing(self._run / self._id)}
    if there := counts - {str(self._count)}:
      was = " or ".join(sorted(there))
      self._note(f"near copies {_NOT_OURS}number of processes was {was} and is {self._count}")
    return None

  def _read_id(self) -> str:
    try:
      found = json.loads(self._file.read_text())["id"]
    except (OSError, ValueError, KeyError, TypeError):
      return ""
    return found if isinstance(found, str) and re.fullmatch("[0-9a-f]{16}", found) else ""

  def _look(self, step: int, layout: list) -> tuple[str, str]:
    """Which start of the run made this process's part of a step, and why it can't be used."""
    path, who = self._mine / str(step), f"process {self._process}" if self._count > 1 else "it"
    if not manifest.is_sealed(path):
      return "", f"{_NOT_OURS}{who} has none"
    facts = manifest.read_facts(path)
    if facts:
      there, here = facts.get("config", {}), self._config
      for name in sorted(there.keys() | here.keys()):
        if (old := there.get(name, "absent")) != (new := here.get(name, "absent")):
          return "", f"{_NOT_OURS}{name} was {old} and is {new}"
      if facts["layout"] != layout:
        pairs = zip(facts["layout"], layout, strict=False)
        name = next((new[0] for old, new in pairs if old != new), "an array")
        return "", f"{_NOT_OURS}{name} was cut otherwise, by another mesh or model"
    try:
      damage = manifest.damage(path)
    except OSError as e:
      damage = f"{e.filename}: {e.strerror}"
    if damage:
      _remove(path)
      return "", f"{_DAMAGED}{f'{who}: ' if self._count > 1 else ''}{damage}"
    return facts["start"], ""

  def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The state on the mesh of `abstract`, and the data position, of what `newest` has found."""
    folder = self._mine / str(step)

    def read(file: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
      content, at, pieces = np.fromfile(folder / file, np.uint8), 0, {}
      for bounds in _cut(leaf):
        shape = [end - first for first, end in bounds]
        end = at + math.prod(shape) * leaf.dtype.itemsize
        pieces[bounds] = content[at:end].view(leaf.dtype).reshape(shape)
        at = end
      piece = lambda index: pieces[_bounds(index, leaf.shape)]
      return jax.make_array_from_callback(leaf.shape, leaf.sharding, piece)

    leaves, tree = jax.tree.flatten(abstract)
    state = jax.tree.unflatten(tree, map(read, _files(abstract), leaves))
    return state, manifest.read_facts(folder)["data"]

  def begin(self) -> None:
    """Before the run takes its first step: of what was copied, only what was restored stays."""
    if not self.every:
      if self._process == 0 and self._file.exists():
        # Or a later start could go on from copies of another past. Written over, not removed, since
        # of a run directory in a bucket only what is there is mirrored.
        self._file.write_text("{}")
      return
    self._start = _agree(secrets.token_hex(8), lambda said: said[0])
    if self.restored is not None:
      for path in _listing(self._mine):
        if path.name != str(self.restored):
          _remove(path)
      return
    self._id = self._start
    if self._process == 0:
      self._file.write_text(json.dumps({"id": self._id, "folder": str(self._run / self._id)}))
    for path in _listing(self._run):
      if path.name != self._id:
        shutil.rmtree(path, ignore_errors=True)

  def forget(self) -> None:
    """The run goes back, or stops for a reason that lies in its state: nothing copied counts."""
    self.wait()
    self.restored = None
    self.begin()

  def remove(self) -> None:
    """A checkpoint of the last step is there: none are needed any more."""
    self.wait()
    if not self.every:
      return
    if self._process == 0:
      self._file.unlink(missing_ok=True)
    shutil.rmtree(self._mine, ignore_errors=True)
    for folder in (self._mine.parent, self._run):
      with contextlib.suppress(OSError):  # another process's part is still there
        folder.rmdir()

  def save(self, step: int, state: TrainState, data: dict[str, Any]) -> None:
    """Start copying; returns once the arrays have left the devices. The copy before this one is
    waited for. One that can't be written is told, and no more comes of it."""
    self.wait()
    layout, pieces = _layout(state), _to_host(state)
    facts = {"start": self._start, "config": self._config, "layout": layout, "data": data}
    self._thread = threading.Thread(target=self._write, args=(step, pieces, facts))
    self._thread.start()

  def _write(self, step: int, pieces: _Pieces, facts: dict[str, Any]) -> None:
    path = self._mine / str(step)
    temporary = path.with_suffix(".tmp")
    try:
      self._run.mkdir(mode=0o700, parents=True, exist_ok=True)
      shutil.rmtree(temporary, ignore_errors=True)
      temporary.mkdir(parents=True)
      self._make_room(sum(array.nbytes for _, arrays in pieces for array in arrays))
      while pieces:  # each is freed when it is written
        name, arrays = pieces.pop()
        with (temporary / name).open("xb") as file:
          for array in arrays:
            file.write(array.reshape(-1).view(np.uint8).data)
      manifest.seal(temporary, **facts)
      temporary.rename(path)
      for old in _steps(self._mine)[:-KEPT]:
        _remove(self._mine / str(old))
    except BaseException as e:  # told, or raised, where the next copy would begin
      shutil.rmtree(temporary, ignore_errors=True)
      self._failure = e

  def _make_room(self, size: int) -> None:
    """Where there is none for three, the older one goes first."""
    if shutil.disk_usage(self._run).free < size:
      for old in _steps(self._mine)[: 1 - KEPT]:
        _remove(self._mine / str(old))

  def wait(self) -> None:
    """Until the copy under way has ended."""
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    failure, self._failure = self._failure, None
    if failure is None:
      return
    if not isinstance(failure, OSError):
      raise failure
    why = failure.strerror or str(failure)
    if why not in self._told:
      self._told.add(why)
      text = f"near copies can't be written to {self._run}: {why}; training goes on without them"
      if self._process:
        print(f"process {self._process}: {text}", file=sys.stderr)
      else:
        self._note(text)


def _agree(mine: str, judge: Callable[[list[str]], str]) -> str:
  return agree_in_turn(mine, judge) if jax.process_count() > 1 else judge([mine])


def _union(said: list[str]) -> str:
  return json.dumps(sorted({step for steps in map(json.loads, said) for step in steps})[::-1])


def _judge(said: list[str]) -> str:
  """Why a step can't be used, of what the processes have of it; empty if it can."""
  starts, problems = zip(*map(json.loads, said), strict=True)
  if wrong := sorted(filter(None, problems), key=lambda why: not why.startswith(_DAMAGED)):
    return wrong[0]
  return "" if len(set(starts)) == 1 else f"{_NOT_OURS}its parts are of different starts"


def _listing(folder: Path) -> list[Path]:
  try:
    return list(folder.iterdir())
  except OSError:
    return []


def _steps(folder: Path) -> list[int]:
  """Those that are whole, as far as names tell, oldest first."""
  paths = (path for path in _listing(folder) if path.name.isdecimal() and manifest.is_sealed(path))
  return sorted(int(path.name) for path in paths)


def _remove(path: Path) -> None:
  with contextlib.suppress(OSError):
    manifest.unseal(path)  # first: half a step must not look like a whole
  shutil.rmtree(path, ignore_errors=True)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> _Bounds:
  return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def _cut(leaf: Any) -> list[_Bounds]:
  """The pieces of an array that this process's devices hold, each once."""
  indices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
  return sorted({_bounds(index, leaf.shape) for index in indices})


def _files(state: TrainState) -> list[str]:
  """A name for each array."""
  paths = (path for path, _ in jax.tree.leaves_with_path(state))
  names = (jax.tree_util.keystr(path, simple=True, separator=".") for path in paths)
  return [f"{i:04d}.{name[:200]}" for i, name in enumerate(names)]


def _layout(state: TrainState) -> list:
  """Name, dtype, shape and pieces of each array, as JSON has them."""
  named = zip(_files(state), jax.tree.leaves(state), strict=True)
  return json.loads(json.dumps([(n, str(x.dtype), x.shape, _cut(x)) for n, x in named]))


def _to_host(state: TrainState) -> _Pieces:
  """Pieces of this process's devices, none of which the next step can overwrite."""
  shards = [
    {_bounds(shard.index, leaf.shape): shard.data for shard in leaf.addressable_shards}
    for leaf in jax.tree.leaves(state)
  ]
  for pieces in shards:
    for piece in pieces.values():
      piece.copy_to_host_async()
  found = [[_own(pieces[bounds]) for bounds in sorted(pieces)] for pieces in shards]
  return list(zip(_files(state), found, strict=True))


def _own(piece: jax.Array) -> np.ndarray:
  host = np.asarray(piece)
  on_cpu = next(iter(piece.devices())).platform == "cpu"  # its memory is the device's
  return host.copy() if on_cpu else np.ascontiguousarray(host)
