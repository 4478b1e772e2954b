"""Ctrl-C, SIGTERM, a lost terminal and the end of the time: noted, and obeyed where all processes
can stop together."""

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax

from mesh.multihost import stop_point

from ..exits import handling

_ticks = itertools.count(1)  # of all runs of a program, as processes agree on one of them


class Stop:
  """Whether a signal asked to stop.

  Args:
    deadline: a `time.monotonic` from which on process 0 sends itself SIGTERM.
  """

  def __init__(self, deadline: float | None = None):
    self.received: int | None = None
    self._agreed = False
    self._deadline = deadline if jax.process_index() == 0 else None

  def asked(self) -> bool:
    """Whether to stop here. Several processes must ask at the same points, and get one answer."""
    if self._deadline is not None and time.monotonic() >= self._deadline:
      self._deadline = None
      os.kill(os.getpid(), signal.SIGTERM)
    if jax.process_count() > 1:
      self._agreed = self._agreed or stop_point(next(_ticks))
    return self.by is not None

  @property
  def by(self) -> int | None:
    """The signal that stops the run; SIGTERM if another process got it. None: it goes on."""
    if jax.process_count() == 1:
      return self.received
    return (self.received or signal.SIGTERM) if self._agreed else None


@contextlib.contextmanager
def stop_signal(deadline: float | None = None) -> Iterator[Stop]:
  """Note SIGINT, SIGTERM and a lost terminal instead of dying; a second Ctrl-C interrupts.

  With several processes JAX has SIGTERM, and tells all of them.

  Args:
    deadline: stop then, as by SIGTERM.
  """
  stop = Stop(deadline)
  several = jax.process_count() > 1

  def receive(number: int, _frame: Any) -> None:
    if stop.received is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    stop.received = number
    if several:
      os.kill(os.getpid(), signal.SIGTERM)

  with handling(receive, sigterm=not several):
    yield stop
