"""Train: `python -m experiments.run --config=NAME [--workdir=PATH] [--config.section.field=value]`.

The same command with the same work directory resumes. `--list` prints the configs, `--show` what a
config resolves to.
"""

import signal

from absl import flags

from . import cli, show, start
from .config import ConfigError
from .training.loop import Profile

_LIST = flags.DEFINE_bool("list", False, "Print all configs with their sizes, and stop.")
_SHOW = flags.DEFINE_bool("show", False, "Print the resolved config and what was changed; stop.")
_PROFILE = flags.DEFINE_string("profile", "", "START:STOP: an xprof trace of these steps.")
_REASON = flags.DEFINE_string("reason", "", "Why a resumed run changes optimizer, schedule, batch.")
_ALLOW = flags.DEFINE_bool(
  "allow_config_change", False, "Resume though the run's identity changed."
)


def main() -> int:
  if _LIST.value:
    show.print_list()
    return cli.FINISHED
  if _SHOW.value:
    config = start.resolve(check=False).config
    show.print_config(cli.named_config(config.name), config)
    return cli.FINISHED
  profile = _profile()
  request = start.resolve(reason=_REASON.value, allow=_ALLOW.value)
  stopped_by = start.run(request, profile=profile)
  if stopped_by is None:
    return cli.FINISHED
  return cli.INTERRUPTED if stopped_by == signal.SIGINT else cli.RESTART


def _profile() -> Profile | None:
  if not _PROFILE.value:
    return None
  start, _, stop = _PROFILE.value.partition(":")
  if not (start.isdecimal() and stop.isdecimal() and 0 < int(start) < int(stop)):
    raise ConfigError(f"--profile={_PROFILE.value}: give steps as START:STOP, e.g. --profile=20:25")
  return Profile(int(start), int(stop))


if __name__ == "__main__":
  cli.run(main)
