"""One writer a run directory in a bucket, which has no locks: a lease that its holder renews.

Leases are numbered objects, `lock/000001.json` and so on; the highest number has the word. Whoever
wants it creates the next one, which of several who try one can, once the last was given back, its
process is dead as far as this host can tell, or it was not renewed while somebody watched. A holder
that could not renew its lease in time and finds a higher number has lost it, and must end.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .. import paths
from ..exits import ConfigError
from ..paths import Place
from .lock import signature, words

RENEW_SECONDS = 10.0
DEAD_SECONDS = 60.0  # without a renewal, as watched; clocks of hosts are not compared
_POLL_SECONDS = 1.0


@contextlib.contextmanager
def hold(
  folder: Place,
  what: str,
  *,
  lost: Callable[[str], Any],
  patience: float = 0.0,
  note: Callable[[str], Any] = print,
) -> Iterator[None]:
  """Hold the lease of the `lock/` folder `folder`.

  Args:
    what: is written there, for the message.
    lost: called, in another thread, with the reason if somebody else took it.
    patience: seconds to wait for a holder that is about to end.

  Raises:
    ConfigError: another process holds it, by host, process and start.
  """
  mine = signature() | {"boot": _boot(), "begun": _began(os.getpid())}
  number = _take(folder, what, mine, patience, note)
  ended = threading.Event()
  renewing = threading.Thread(
    target=_renew, args=(folder, number, mine, ended, lost), name="lease", daemon=True
  )
  renewing.start()
  try:
    yield
  finally:
    ended.set()
    renewing.join()
    with contextlib.suppress(Exception):  # a bucket out of reach: the lease runs out by itself
      if _newest(folder) == number:
        _write(folder, number, mine | {"released": True})


def _take(
  folder: Place, what: str, mine: dict[str, Any], patience: float, note: Callable[[str], Any]
) -> int:
  """Get the next number, of a lease that is free or becomes so."""
  seen, since = "", time.monotonic()  # the holder's last renewal, and when it was first seen
  until, said = time.monotonic() + patience, False
  while True:
    newest = _newest(folder)
    text = _read(folder, newest)
    who = _parse(text)
    if not newest or _is_free(text, mine):
      if _create(folder, newest + 1, mine):
        return newest + 1
      continue  # somebody was quicker: look again
    now = time.monotonic()
    renewed = bool(seen) and text != seen
    if text != seen:
      seen, since = text, now
    if now - since > DEAD_SECONDS:
      note(f"{words(who)} has not been heard of for {DEAD_SECONDS:g} s: taking over {what}")
      if _create(folder, newest + 1, mine):
        return newest + 1
      continue
    if renewed and now > until:
      raise ConfigError(f"{what} is in use by {words(who)}: end that first")
    if not said and now > until:
      note(f"{what} is, or was, in use by {words(who)}: watching for up to {DEAD_SECONDS:g} s")
      said = True
    time.sleep(_POLL_SECONDS)


def _create(folder: Place, number: int, mine: dict[str, Any]) -> bool:
  """Whether we were the first; those before are then of no more use."""
  if not paths.create(_path(folder, number), _text(mine)):
    return False
  for older in _numbers(folder):
    if older < number:
      paths.remove(_path(folder, older))
  return True


def _renew(
  folder: Place,
  number: int,
  mine: dict[str, Any],
  ended: threading.Event,
  lost: Callable[[str], Any],
) -> None:
  renewals = 0
  while not ended.wait(RENEW_SECONDS):
    try:
      newest = _newest(folder)
      if newest != number:
        lost(f"taken over by {words(_parse(_read(folder, newest)))}")
        return
      renewals += 1
      _write(folder, number, mine | {"renewals": renewals})
    except Exception:  # out of reach: who takes it over is found once it is in reach again
      continue


def _is_free(text: str, mine: dict[str, Any]) -> bool:
  who = _parse(text)
  if who.get("released"):
    return True
  here = mine["boot"] is not None and who.get("boot") == mine["boot"]
  return here and isinstance(who.get("pid"), int) and _began(who["pid"]) != who.get("begun")


def _boot() -> str | None:
  """Which start of which host this is (Linux)."""
  try:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(
      os.readlink("/proc/self/ns/pid")
    )
  except OSError:
    return None


def _began(pid: int) -> str | None:
  """When a process of this host began, by which it is told from a later one of the same number;
  None if there is none."""
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
  except (OSError, IndexError):
    return None


def _numbers(folder: Place) -> list[int]:
  found = (name.removesuffix(".json") for name in paths.names(folder))
  return sorted(int(name) for name in found if name.isdecimal())


def _newest(folder: Place) -> int:
  return max(_numbers(folder), default=0)


def _path(folder: Place, number: int) -> Place:
  return folder / f"{number:06d}.json"


def _read(folder: Place, number: int) -> str:
  try:
    with paths.open_read(_path(folder, number)) as file:
      return file.read().decode("utf-8", "replace")
  except FileNotFoundError:
    return ""


def _write(folder: Place, number: int, who: dict[str, Any]) -> None:
  paths.write_whole(_path(folder, number), _text(who))


def _text(who: dict[str, Any]) -> bytes:
  return f"{json.dumps(who)}\n".encode()


def _parse(text: str) -> dict[str, Any]:
  try:
    found = json.loads(text)
  except ValueError:
    return {}
  return found if isinstance(found, dict) else {}
