"""Run directories in a bucket, gs:// or s3://, whose files are neither appended to nor renamed.

The run then writes into a folder of this machine, the stage, and a thread copies what changed to
the bucket, whole files at a time; so a row of metrics is in the bucket some seconds after it was
written, or, of large files, after twenty times as long as copying them takes. Only checkpoints go
straight there: `home(folder)` is where. Other files that changed in the bucket, such as a person's
notes, come back into the stage once a minute and before a supervisor's next attempt.

The process that made the stage mirrors and removes it; its children share it. Without JAX, for the
supervisor.
"""

import contextlib
import functools
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from . import paths
from .exits import ConfigError
from .paths import Place

_STAGE = "MESHYARD_STAGE"  # of the parent, which mirrors it
_HOME = ".bucket"  # in a stage: the URL that it stands for
_STATE = ".bucket.json"  # and what a mirror knew that another one goes on with
_PUSH_SECONDS, _PULL_SECONDS = 2.0, 60.0
_SHARE = 20  # files are copied again after so many times as long as the last copy took
_LAST_SECONDS = 120.0  # to reach the bucket at the end
# Not brought into a stage: large, and nobody there reads them. Of attempts' logs only names count.
_LEFT = ("checkpoints", "tensorboard", "profile", "lock")
_EMPTY = "attempts"

_mirrors: list["Mirror"] = []  # of this process


def home(folder: Path) -> Place:
  """Where checkpoints of run directory `folder` are: in the bucket that it is a stage of, if so."""
  for above in (folder, *folder.parents):
    if url := _url(above):
      found = paths.place(url)
      return found / folder.relative_to(above) if above != folder else found
  return folder


@functools.cache
def _url(folder: Path) -> str:
  try:
    return (folder / _HOME).read_text().strip()
  except OSError:
    return ""


def checkpoints(folder: Path) -> Place:
  """The folder of a run's checkpoints."""
  return home(folder) / "checkpoints"


def stage(url: str) -> Path:
  """A folder of this machine that stands for a run directory in a bucket, with what it holds.

  Raises:
    ConfigError: the bucket can't be reached.
  """
  place = paths.place(url)
  shared = Path(os.environ.get(_STAGE, "/nowhere"))
  if _url(shared) == str(place):
    return shared
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what fails is raised, and answered
  folder = Path(tempfile.mkdtemp(prefix="meshyard-"))
  (folder / _HOME).write_text(str(place))
  mirror = Mirror(folder)
  try:
    mirror.pull()
  except Exception as e:
    shutil.rmtree(folder)
    raise ConfigError(f"can't read {place}: {paths.reason(e)}") from e
  mirror.store()
  os.environ[_STAGE] = str(folder)
  mirror.start()
  return folder


def adopt(folder: Path) -> "Mirror | None":
  """Go on with a stage that this process made before it became another program."""
  if not _url(folder):
    return None
  mirror = Mirror(folder)
  mirror.load()
  mirror.start()
  return mirror


def named(text: str) -> str:
  """`text` for a person, who knows the bucket and not its stage."""
  folder = os.environ.get(_STAGE, "")
  return text.replace(folder, _url(Path(folder))) if folder else text


def flush(seconds: float) -> None:
  """Copy what is new, before an end without a look back."""
  for mirror in _mirrors:
    with contextlib.suppress(OSError):
      mirror.flush(seconds)


def close() -> None:
  """Copy all that is new to the bucket, and remove the stage.

  Raises:
    OSError: the bucket takes it no more; names the stage, which stays.
  """
  while _mirrors:
    mirror = _mirrors.pop()
    mirror.stop()
    mirror.flush(_LAST_SECONDS)
    shutil.rmtree(mirror.folder, ignore_errors=True)


class Mirror:
  """Between a stage and its bucket, by a thread once it is started."""

  def __init__(self, folder: Path):
    self.folder = folder
    self._fs, self._root = paths.system(paths.place(_url(folder)))
    self._ours: dict[str, tuple[int, int]] = {}  # (mtime_ns, size) of stage files, as in the bucket
    self._theirs: dict[str, str] = {}  # what the bucket said of them then
    self._due: dict[str, float] = {}  # not to be copied again before
    self._lock = threading.Lock()
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._run, name="bucket", daemon=True)
    self._said = False

  def start(self) -> None:
    _mirrors.append(self)
    self._thread.start()

  def stop(self) -> None:
    self._ended.set()
    self._thread.join()

  def store(self) -> None:
    state = {"ours": self._ours, "theirs": self._theirs}
    (self.folder / _STATE).write_text(json.dumps(state))

  def load(self) -> None:
    state = json.loads((self.folder / _STATE).read_text())
    self._ours = {name: tuple(status) for name, status in state["ours"].items()}
    self._theirs = state["theirs"]

  def _run(self) -> None:
    pulled = time.monotonic()
    while not self._ended.wait(_PUSH_SECONDS):
      try:
        self.push()
        if time.monotonic() - pulled > _PULL_SECONDS:
          self.pull()
          self._touch()
          pulled = time.monotonic()
        self._said = False
      except Exception as e:  # whatever the network's libraries raise: the next round may succeed
        why = paths.reason(e)
        if not self._said:
          print(
            f"{self._root} takes nothing at the moment ({why}); trying on",
            file=sys.stderr,
          )
        self._said = True

  def push(self, *, all_due: bool = False) -> None:
    """Copy files of the stage that changed."""
    with self._lock:
      for name, status in self._staged().items():
        now = (status.st_mtime_ns, status.st_size)
        began = time.monotonic()
        if now == self._ours.get(name) or (not all_due and began < self._due.get(name, 0)):
          continue
        data = (self.folder / name).read_bytes()
        if name.endswith(".jsonl"):
          data = data[: data.rfind(b"\n") + 1]  # a line may be half written
        where = f"{self._root}/{name}"
        self._fs.pipe_file(where, data)
        self._ours[name], self._theirs[name] = now, _version(self._fs.info(where))
        self._due[name] = time.monotonic() + _SHARE * (time.monotonic() - began)

  def pull(self) -> None:
    """Bring files that changed in the bucket and not here."""
    with self._lock:
      staged = self._staged()
      for name, info in self._held("").items():
        version = _version(info)
        here = staged.get(name)
        now = (here.st_mtime_ns, here.st_size) if here is not None else None
        if version == self._theirs.get(name) or now != self._ours.get(name):
          continue
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.pulled")
        logs = path.parent.name == _EMPTY
        temporary.write_bytes(b"" if logs else self._fs.cat_file(f"{self._root}/{name}"))
        temporary.replace(path)
        status = path.stat()
        self._ours[name], self._theirs[name] = (status.st_mtime_ns, status.st_size), version

  def refresh(self) -> None:
    """`pull`, unless the bucket is out of reach."""
    with contextlib.suppress(Exception):
      self.pull()

  def flush(self, seconds: float) -> None:
    """Copy everything, for so long at most.

    Raises:
      OSError: not all of it is in the bucket.
    """
    until = time.monotonic() + seconds
    while True:
      try:
        self.push(all_due=True)
        return
      except Exception as e:
        why = paths.reason(e)
        if time.monotonic() > until:
          raise OSError(
            f"{self._root} does not take the last files ({why}); they stay in {self.folder}"
          ) from e
        time.sleep(_PUSH_SECONDS)

  def _touch(self) -> None:
    """Nothing here is left over, should something clear folders of what nobody uses for days."""
    for name, status in self._staged().items():
      os.utime(self.folder / name, ns=(time.time_ns(), status.st_mtime_ns))
    (self.folder / _HOME).touch()

  def _staged(self) -> dict[str, os.stat_result]:
    found = {}
    for top, folders, names in os.walk(self.folder):
      folders[:] = [name for name in folders if not name.startswith(".")]
      for name in names:
        if not name.startswith(".") and not name.endswith(".tmp"):
          path = Path(top, name)
          with contextlib.suppress(FileNotFoundError):
            found[str(path.relative_to(self.folder))] = path.stat()
    return found

  def _held(self, folder: str) -> dict[str, dict[str, Any]]:
    """What the bucket says of its files, by name."""
    try:
      listing = self._fs.ls(f"{self._root}/{folder}".rstrip("/"), detail=True)
    except FileNotFoundError:
      return {}
    found = {}
    for info in listing:
      name = info["name"].rstrip("/").removeprefix(f"{self._root}/")
      if info["type"] != "directory":
        found[name] = info
      elif name.rpartition("/")[2] not in _LEFT:
        found |= self._held(name)
    return found


def _version(info: dict[str, Any]) -> str:
  """Changes with the object."""
  tag = info.get("generation") or info.get("etag") or info.get("ETag") or info.get("LastModified")
  return f"{info['size']} {tag}"
