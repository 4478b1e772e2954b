"""Huge pages for the CPU backend's buffers.

XLA's CPU client allocates the temporaries of a program anew at each call, and the kernel zeroes
them page by page: 92,000 page faults a step of a 20-million-parameter model, a seventh of its CPU
time. glibc asks for huge pages only if GLIBC_TUNABLES says so before the process starts, so a
program starts itself again with it, in place, within milliseconds.
"""

import os
import sys
from pathlib import Path

_TUNABLE = "glibc.malloc.hugetlb=1"  # madvise(MADV_HUGEPAGE) on what malloc maps
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def relaunch() -> None:
  """Replace `python -m experiments.X` by itself with the tunable set; returns if it is no use.

  That is: not such a command, the user has set GLIBC_TUNABLES (to anything, even nothing), or the
  kernel does not give huge pages on request.
  """
  command = sys.orig_argv[1:]
  module = command[command.index("-m") + 1] if "-m" in command[:-1] else ""
  if not module.startswith("experiments.") or "GLIBC_TUNABLES" in os.environ:
    return
  if not _KERNEL.is_file() or "[madvise]" not in _KERNEL.read_text():
    return
  os.environ["GLIBC_TUNABLES"] = _TUNABLE
  os.execv(sys.executable, [sys.executable, *command])
