"""Runs a small program: flags in, exit code out (2 is the user's mistake, in one line)."""

import sys
from collections.abc import Callable, Sequence

from absl import flags

from ..config import ConfigError


def run(
  program: Callable[[flags.FlagValues], None], values: flags.FlagValues, argv: Sequence[str]
) -> int:
  """Parses `argv` into `values`, the program's own flags, and runs it. Returns the exit code."""
  if "--help" in argv:
    print(values.get_help())
    return 0
  try:
    extra = values(list(argv))[1:]
    if extra:
      raise ConfigError(f"{extra[0]!r} is not a flag; see --help")
    program(values)
  except (ConfigError, flags.Error) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    return 130
  return 0
