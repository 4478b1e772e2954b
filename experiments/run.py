"""Train: `python -m experiments.run --config=NAME [--workdir=PATH] [--config.section.field=value]`.

The same command with the same work directory resumes. `--supervise` does so by itself until the run
is finished. `--list` prints the configs, `--show` what a config resolves to.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from absl import flags

from mesh.multihost import is_primary

from . import cli, joining, processes, show, start
from .config import ConfigError
from .training.goodput import process_age
from .training.timing import Profile

_LIST = flags.DEFINE_bool("list", False, "Print all configs with their sizes, and stop.")
_SHOW = flags.DEFINE_bool("show", False, "Print the resolved config and what was changed; stop.")
_SHOW_MESH = flags.DEFINE_string(
  "show_mesh", "", "PARAM: draw which device holds which part of it, and of the batch; stop."
)
_PROFILE = flags.DEFINE_string("profile", "", "START:STOP: an xprof trace of these steps.")
_REASON = flags.DEFINE_string("reason", "", "Why a resumed run changes optimizer, schedule, batch.")
_ALLOW = flags.DEFINE_bool(
  "allow_config_change", False, "Resume though the run's identity changed."
)
_SUPERVISE = flags.DEFINE_bool(
  "supervise", False, "Start it again whenever it ends early, but for mistakes and Ctrl-C."
)
_MAX_HOURS = flags.DEFINE_float(
  "max_hours", None, "Save and end with 75 after so long; with --supervise, of all starts in sum."
)
_PROCESSES = flags.DEFINE_integer("processes", 1, "Start this many processes on this machine.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0 of several.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are, on all hosts.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_JOIN_SECONDS = flags.DEFINE_float("join_seconds", 300.0, "How long to wait for the others.")


def main() -> int:
  if _LIST.value:
    show.print_list()
    return cli.FINISHED
  if _SHOW.value:
    config = start.resolve(check=False).config
    show.print_config(cli.named_config(config.name), config)
    return cli.FINISHED
  look = flags.FLAGS["show_mesh"].present
  if not look:
    cli.refuse_topology()
  profile, place, deadline = _profile(), _place(), _deadline()
  request = start.resolve(reason=_REASON.value, allow=_ALLOW.value, check=not look)
  if _SUPERVISE.value and not look:
    _become_supervisor(request.folder, place)
  if _PROCESSES.value > 1:
    command = [sys.executable, "-m", "experiments.run", *sys.argv[1:], "--processes=1"]
    return processes.launch(command, _PROCESSES.value)
  if look:
    show.print_mesh(request, _SHOW_MESH.value, place)
    return cli.FINISHED
  stopped_by = start.run(request, profile=profile, place=place, deadline=deadline)
  if stopped_by is None:
    return cli.FINISHED
  if deadline is not None and time.monotonic() >= deadline and is_primary():
    print(f"--max_hours={_MAX_HOURS.value:g} are over")
  return cli.INTERRUPTED if stopped_by == signal.SIGINT else cli.RESTART


def _profile() -> Profile | None:
  if not _PROFILE.value:
    return None
  start, _, stop = _PROFILE.value.partition(":")
  if not (start.isdecimal() and stop.isdecimal() and 0 < int(start) < int(stop)):
    raise ConfigError(f"--profile={_PROFILE.value}: give steps as START:STOP, e.g. --profile=20:25")
  return Profile(int(start), int(stop))


def _deadline() -> float | None:
  if _MAX_HOURS.value is None:
    return None
  if not _MAX_HOURS.value > 0:
    raise ConfigError(f"--max_hours={_MAX_HOURS.value:g}: must be above 0")
  return time.monotonic() - process_age() + 3600 * _MAX_HOURS.value


def _become_supervisor(folder: Path, place: joining.Place) -> NoReturn:
  """Replace this process by one that holds no JAX, and starts this command for as long as it takes.

  Raises:
    ConfigError: an incomplete announcement of processes.
  """
  command = [sys.executable, "-m", "experiments.run", *sys.argv[1:], "--nosupervise"]
  hours = "" if _MAX_HOURS.value is None else str(_MAX_HOURS.value)
  words = [str(folder), hours, joining.number(place), *command]
  sys.stdout.flush()
  os.execv(sys.executable, [sys.executable, "-m", "experiments.supervise", *words])


def _place() -> joining.Place:
  """This process among several, if flags say so."""
  place = joining.Place(
    _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _JOIN_SECONDS.value
  )
  if _JOIN_SECONDS.value <= 0:
    raise ConfigError(f"--join_seconds={_JOIN_SECONDS.value:g}: must be above 0")
  processes.check(_PROCESSES.value)
  if _PROCESSES.value > 1 and place[:3] != joining.Place()[:3]:
    raise ConfigError(
      f"--processes={_PROCESSES.value} starts its own coordinator on this machine; leave out "
      "--coordinator, --num_processes and --process_id, or --processes"
    )
  return place


if __name__ == "__main__":
  cli.run(main, leave=joining.leave)
