"""Ctrl-C, SIGTERM and a lost terminal: noted, and obeyed where all processes can stop together."""

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax

from mesh.multihost import stop_point

_ticks = itertools.count(1)  # of all runs of a program, as processes agree on one of them


class Stop:
  """Whether a signal asked to stop."""

  def __init__(self):
    self.received: int | None = None
    self._agreed = False

  def asked(self) -> bool:
    """Whether to stop here. Several processes must ask at the same points, and get one answer."""
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
def stop_signal() -> Iterator[Stop]:
  """Note SIGINT, SIGTERM and a lost terminal instead of dying; a second Ctrl-C interrupts.

  With several processes JAX has SIGTERM, and tells all of them.
  """
  stop = Stop()
  several = jax.process_count() > 1

  def receive(number: int, _frame: Any) -> None:
    if stop.received is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    stop.received = number
    if several:
      os.kill(os.getpid(), signal.SIGTERM)

  with handling(receive, sigterm=not several):
    yield stop


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
