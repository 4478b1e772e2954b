"""The parent of `experiments.run --supervise`: starts the run, and again whenever it ends early.

It imports no JAX. Each start is an attempt: its output is passed on and kept in
`attempts/001.log`, how it ended goes into the logbook. It is started again when it was preempted
(75), its watchdog fired (76), it crashed or a signal killed it; not when it is finished (0), for a
mistake (2), after the guard's stop (77) or Ctrl-C (130). There is no pause after an attempt that
left a new checkpoint, and a longer one after each that did not; attempts that come no further end
it. Signals are passed on, and end it with the run. Should it be killed itself, the run saves and
ends too (Linux).

`experiments.run` becomes this program: FOLDER HOURS NUMBER COMMAND..., HOURS may be empty, and
NUMBER (of the process among several) where only JAX can tell.
"""

import contextlib
import os
import platform
import selectors
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import IO

from . import bucket
from .attempt import Ended, duration, progress, stamp, write_events
from .exits import (
  FINISHED,
  GUARD,
  INTERRUPTED,
  RESTART,
  USER_MISTAKE,
  ConfigError,
  handling,
  numbered,
  tells,
  with_parent,
)
from .training import lock
from .training.goodput import process_age
from .training.logbook import Logbook

FINAL = (FINISHED, USER_MISTAKE, GUARD, INTERRUPTED)
SAME_STEP = 3  # attempts in a row that end at the same step, without a new checkpoint
BARREN = 10  # attempts in a row without a new checkpoint
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 300.0  # seconds; doubled from one to the other
STOP_SECONDS = 600.0  # to save after a signal
STOPPED_SECONDS = 60.0  # that a child may be in state T; its peers have long given up

_POLL_SECONDS = 0.2
_LAST_LINES = 10
_REASONS = {
  FINISHED: "finished", USER_MISTAKE: "human", RESTART: "preempted", GUARD: "policy",
  INTERRUPTED: "human",
}  # fmt: skip


class Supervisor:
  """Starts `command` until it ends for good.

  Args:
    hours: all attempts together may take so long.
    number: of this process among several; None where only JAX can tell.
  """

  def __init__(self, folder: Path, command: list[str], hours: float | None, number: int | None):
    self._folder, self._command = folder, command
    self._number = number
    self._label = f"-process{number}" if number else "" if number == 0 else f"-{platform.node()}"
    began = time.monotonic() - process_age()
    self._deadline = None if hours is None else began + 3600 * hours
    self._child: subprocess.Popen | None = None
    self._received: int | None = None
    self._over = False  # the hours are
    self._kill_at: float | None = None
    self._stopped, self._looked = 0.0, 0.0
    self._deaf: set[int] = set()  # descriptors of ours that nobody reads
    self._same, self._barren = 0, 0

  def run(self) -> int:
    """Until the end of the run; its exit code.

    Raises:
      ConfigError: another supervisor is at work here, or nothing can be written.
    """
    with contextlib.ExitStack() as stack:
      try:
        (self._folder / "attempts").mkdir(parents=True, exist_ok=True)
        path = self._folder / f".lock.supervisor{self._label}"
        stack.enter_context(lock.hold(path, f"the work directory {self._folder}"))
      except OSError as e:
        why = f"can't write to the work directory {self._folder}: {e.strerror}"
        raise ConfigError(why) from e
      stack.enter_context(handling(self._signal))
      mirror = bucket.adopt(self._folder)
      stack.callback(bucket.close)
      last: Ended | None = None
      while True:
        if mirror is not None:
          mirror.refresh()
        ended = self._attempt()
        verdict = self._judge(ended, last)
        self._record(ended, verdict)
        if verdict is not None:
          return verdict
        last = ended
        if not self._pause(ended):
          return INTERRUPTED if self._received == signal.SIGINT else RESTART

  def _signal(self, number: int, _frame=None) -> None:
    self._received = number
    self._pass_on(number)

  def _pass_on(self, number: int) -> None:
    if self._kill_at is None:
      self._kill_at = time.monotonic() + STOP_SECONDS
    if self._child is not None and self._child.poll() is None:
      self._child.send_signal(number)

  def _attempt(self) -> Ended:
    number, log = self._open_log()
    before, began, start = progress(self._folder), time.time(), time.monotonic()
    lines: deque[str] = deque(maxlen=_LAST_LINES)
    with log:
      _keep(log, f"# attempt {number} on {platform.node()}, {stamp(began)}\n")
      _keep(log, f"# {shlex.join(self._command)}\n")
      with subprocess.Popen(
        with_parent(self._command, os.getpid()),
        env=os.environ | numbered(number),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in the terminal is to reach it once, through us
      ) as self._child:
        try:
          if self._received is not None:
            self._pass_on(self._received)
          lines.extend(self._follow(self._child, log))
        except BaseException:
          self._child.kill()
          raise
      seconds = time.monotonic() - start
      path = Path(log.name)
      ended = Ended(
        number, began, seconds, self._child.returncode, before, progress(self._folder),
        list(lines), path,
      )  # fmt: skip
      _keep(log, f"# {ended.how} after {duration(seconds)}, {stamp(time.time())}\n")
    return ended

  def _open_log(self) -> tuple[int, IO[bytes]]:
    """The number of the next attempt, and its file; one that keeps nothing on a full disk."""
    folder, names = self._folder / "attempts", f"{self._label}.log"
    taken = [p.name.removesuffix(names) for p in folder.glob(f"*{names}")]
    number = max((int(name) for name in taken if name.isdecimal()), default=0) + 1
    try:
      return number, (folder / f"{number:03d}{names}").open("xb", buffering=0)
    except OSError as e:
      self._say(f"attempt {number} is not logged: {e.strerror}")
      return number, open(os.devnull, "wb", buffering=0)

  def _follow(self, child: subprocess.Popen, log: IO[bytes]) -> list[str]:
    """Pass on what it says until it has ended; the last lines, of errors if there are any."""
    tails = {1: b"", 2: b""}
    with selectors.DefaultSelector() as selector:
      for descriptor, stream in ((1, child.stdout), (2, child.stderr)):
        assert stream is not None
        selector.register(stream, selectors.EVENT_READ, descriptor)
      running = True
      while running or selector.select(0):
        running = child.poll() is None
        for key, _ in selector.select(_POLL_SECONDS if running else 0):
          data = os.read(key.fd, 1 << 16)
          if not data:
            selector.unregister(key.fileobj)
            continue
          self._write(key.data, data)
          _keep(log, data)
          tails[key.data] = (tails[key.data] + data)[-(1 << 14) :]
        if running:
          self._look_after(child)
    texts = (tails[d].decode(errors="replace").splitlines() for d in (2, 1))
    return next(filter(None, ([line for line in text if tells(line)] for text in texts)), [])

  def _write(self, descriptor: int, data: bytes) -> None:
    """What nobody reads any more is dropped, and the run goes on."""
    left = memoryview(data)
    try:
      while left and descriptor not in self._deaf:
        left = left[os.write(descriptor, left) :]
    except OSError:
      self._deaf.add(descriptor)

  def _look_after(self, child: subprocess.Popen) -> None:
    """End it when the hours are over, it does not stop, or it was stopped and can't go on."""
    now = time.monotonic()
    if self._deadline is not None and now >= self._deadline and not self._over:
      self._over = True
      self._say("the hours of --max_hours are over: stopping")
      self._pass_on(signal.SIGTERM)
    # Counted by looks: what stops the whole machine is no fault of the child.
    look, self._looked = min(now - self._looked, 2 * _POLL_SECONDS), now
    self._stopped = self._stopped + look if _is_stopped(child.pid) else 0.0
    if self._stopped > STOPPED_SECONDS:
      self._say(f"process {child.pid} has been stopped for {STOPPED_SECONDS:g} s: killing it")
      child.kill()
    elif self._kill_at is not None and now > self._kill_at:
      self._say(f"it did not end within {STOP_SECONDS:g} s of the signal: killing it")
      child.kill()

  def _judge(self, ended: Ended, last: Ended | None) -> int | None:
    """Why, and with which exit code, not to start again; None to do it."""
    if ended.code in FINAL:
      return ended.code
    if self._received is not None or self._over:
      if ended.returncode == -(self._received or signal.SIGTERM):  # it had not begun to listen
        return INTERRUPTED if self._received == signal.SIGINT else RESTART
      return ended.code
    step = ended.after.step
    if ended.advanced:
      self._same = self._barren = 0
    else:
      same = last is not None and self._same and last.after.step == step
      self._same, self._barren = self._same + 1 if same else 1, self._barren + 1
    for count, limit, where in ((self._same, SAME_STEP, f" at step {step:,}"),
                                (self._barren, BARREN, "")):  # fmt: skip
      if count >= limit:
        self._say(
          f"attempt {ended.number} {ended.how}; that makes {count} attempts in a row that ended"
          f"{where} without a new checkpoint: giving up. Its last lines:"
        )
        self._write(2, "".join(f"  {line}\n" for line in ended.lines).encode())
        self._say(f"all it said is in {bucket.named(str(ended.log))}")
        return ended.code
    return None

  def _pause(self, ended: Ended) -> bool:
    """Say what is next and wait; False if a signal or the end of the hours came instead."""
    seconds = 0.0
    if self._barren:
      seconds = min(FIRST_PAUSE * 2 ** (self._barren - 1), LONGEST_PAUSE)
    at = ended.after.checkpoint
    self._say(
      f"attempt {ended.number} {ended.how} after {duration(ended.seconds)}, at step "
      f"{ended.after.step:,}; going on from {f'step {at:,}' if at else 'the beginning'}"
      + (f" in {seconds:g} s" if seconds else "")
    )
    until = time.monotonic() + seconds
    while self._received is None:
      now = time.monotonic()
      if self._deadline is not None and now >= self._deadline:
        self._say("the hours of --max_hours are over")
        return False
      if now >= until:
        return True
      time.sleep(min(until - now, _POLL_SECONDS))
    return False

  def _say(self, text: str) -> None:
    self._write(2, f"supervisor: {text}\n".encode())

  def _record(self, ended: Ended, verdict: int | None) -> None:
    """Into the logbook: how the attempt ended, and whether another follows."""
    if self._number is None:  # that of the process which writes in the run directory is asked to
      mine = lock.holder(self._folder / ".lock").get("host") == platform.node()
    else:
      mine = self._number == 0
    if mine:
      try:
        with contextlib.closing(Logbook(self._folder, "supervisor")) as book:
          reason = self._reason(ended.code if verdict is None else verdict)
          write_events(book, ended, reason, self._folder, again=verdict is None)
      except OSError as e:
        self._say(f"no entry in the logbook: {e.strerror}")

  def _reason(self, code: int) -> str:
    """Of a `stop` event."""
    if self._over and code == RESTART:
      return "policy"
    return _REASONS.get(code, "crash")


def _keep(log: IO[bytes], data: bytes | str) -> None:
  with contextlib.suppress(OSError):  # a full disk
    log.write(data.encode() if isinstance(data, str) else data)


def _is_stopped(pid: int) -> bool:
  """By SIGSTOP (Linux); not by a debugger."""
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
  except (OSError, IndexError):
    return False


def main(arguments: list[str]) -> int:
  folder, hours, number, *command = arguments
  supervisor = Supervisor(
    Path(folder), command, float(hours) if hours else None, int(number) if number else None
  )
  try:
    return supervisor.run()
  except ConfigError as e:
    print(f"error: {e}", file=sys.stderr)
    return USER_MISTAKE


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
