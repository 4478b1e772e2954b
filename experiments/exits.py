"""How a program ends: its exit code, a user's mistake, a signal, the end of its parent.

Imports no JAX, so that the supervisor, which lasts for weeks, is small and starts at once.
"""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# RESTART: saved, wants a restart. WATCHDOG: no step finished. GUARD: the guard gave up.
FINISHED, OUR_FAULT, USER_MISTAKE, RESTART, WATCHDOG, GUARD, INTERRUPTED = 0, 1, 2, 75, 76, 77, 130


class ConfigError(ValueError):
  """A user's mistake in a config, a flag or an input: one sentence, exit code 2."""


class HaltError(Exception):
  """The end of a run that is neither a mistake nor our fault: a sentence and an exit code."""

  def __init__(self, reason: str, code: int):
    super().__init__(reason)
    self.code = code


def tells(line: str) -> bool:
  """Whether a line of errors may say why: it is not empty, nor a frame of C++."""
  return bool(line.strip()) and not re.match(r"\s*@\s+0x", line)


_ATTEMPT = "MESHYARD_ATTEMPT"  # what the supervisor calls this start of the run


def attempt(environ: Mapping[str, str] = os.environ) -> int | None:
  """Which start of the run this is, from 1, among those of the supervisor; None without one."""
  text = environ.get(_ATTEMPT, "")
  return int(text) if text.isdecimal() else None


def numbered(number: int) -> dict[str, str]:
  """The environment that tells a program which `attempt` it is."""
  return {_ATTEMPT: str(number)}


def restarted() -> bool:
  """What is missing or in the way now is then about to come, or to go."""
  return (attempt() or 1) > 1


@contextlib.contextmanager
def handling(receive: Callable[[int, Any], None], *, sigterm: bool = True) -> Iterator[None]:
  """`receive(signal, frame)` for Ctrl-C, a lost terminal (not under nohup) and, if asked, SIGTERM;
  what was there before comes back."""
  numbers = [signal.SIGINT, signal.SIGTERM] if sigterm else [signal.SIGINT]
  if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
    numbers.append(signal.SIGHUP)
  previous = {number: signal.signal(number, receive) for number in numbers}
  try:
    yield
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


# Becomes a program that gets SIGTERM when its parent is gone, however that came about (Linux).
_WITH_PARENT = f"""
import ctypes, os, sys
if sys.platform == "linux":
  ctypes.CDLL(None).prctl(1, {signal.SIGTERM:d})  # PR_SET_PDEATHSIG
  if os.getppid() != int(sys.argv[1]):
    sys.exit({RESTART})
os.execv(sys.argv[2], sys.argv[2:])
"""


def with_parent(command: list[str], parent: int) -> list[str]:
  """A command that becomes `command`, which gets SIGTERM when process `parent` is gone (Linux).

  The thread that starts it must live as long as the parent.
  """
  return [sys.executable, "-S", "-c", _WITH_PARENT, str(parent), *command]
