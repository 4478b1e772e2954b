"""What every program shares: flags, dotted overrides, named configs, exit codes."""

import difflib
import importlib
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging

from . import configs, platform
from .config import Config, ConfigError
from .overrides import apply_overrides

FINISHED, OUR_FAULT, USER_MISTAKE, RESTART, INTERRUPTED = 0, 1, 2, 75, 130

_CONFIG = flags.DEFINE_string("config", "moe_tiny", "Named config, or FAMILY:SIZE.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Run directory; default runs/<config>.")

# --config.section.field=value, in the order given; filled when flags are parsed.
_overrides: list[tuple[str, str]] = []


def run(main: Callable[[], int | None]) -> None:
  """Parse flags, run `main`, and exit with its code.

  A `ConfigError` (the user's mistake) is one line on stderr and exit code 2; anything else keeps
  its full trace and exits with 1.
  """

  def guarded(argv: list[str]) -> int:
    if len(argv) > 1:
      return _mistake(f"unexpected argument {argv[1]!r}; flags start with --")
    try:
      if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells twenty lines a checkpoint
      platform.prepare()
      return main() or FINISHED
    except ConfigError as e:
      return _mistake(str(e))
    except KeyboardInterrupt:
      print("\ninterrupted", file=sys.stderr)
      return INTERRUPTED
    except Exception:
      traceback.print_exc()
      return OUR_FAULT

  def finish(argv: list[str]) -> None:
    code = guarded(argv)
    sys.stdout.flush()
    sys.exit(code)

  app.run(finish, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
  rest = [argv[0]]
  arguments = iter(argv[1:])
  for argument in arguments:
    if not argument.startswith(("--config.", "-config.")):
      rest.append(argument)
      continue
    path, equals, value = argument.lstrip("-").removeprefix("config.").partition("=")
    if not equals:
      value = next(arguments, None)
      if value is None:
        sys.exit(_mistake(f"--config.{path} needs a value: --config.{path}=VALUE"))
    _overrides.append((path, value))
  try:
    return flags.FLAGS(rest)
  except flags.Error as e:
    sys.exit(_mistake(str(e).replace("FATAL Flags parsing error:", "").strip()))


def _mistake(message: str) -> int:
  print(f"error: {message}", file=sys.stderr)
  return USER_MISTAKE


def config_names() -> list[str]:
  """All names `--config` takes: modules, and FAMILY:SIZE for modules with SIZES."""
  names = []
  for module in pkgutil.iter_modules(configs.__path__):
    sizes = getattr(importlib.import_module(f"{configs.__name__}.{module.name}"), "SIZES", None)
    names += [module.name] if sizes is None else [f"{module.name}:{size}" for size in sizes]
  return sorted(names)


def named_config(name: str) -> Config:
  """The config called `name`.

  Raises:
    ConfigError: no such name; the nearest ones are offered.
  """
  module_name, _, size = name.partition(":")
  known = {module.name for module in pkgutil.iter_modules(configs.__path__)}
  if module_name in known:
    module = importlib.import_module(f"{configs.__name__}.{module_name}")
    sizes = getattr(module, "SIZES", None)
    if sizes is None and not size:
      return module.config()
    if sizes is not None and size in sizes:
      return module.config(size)
  names = config_names()
  near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
  hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
  raise ConfigError(f"no config named {name!r}; {hint} (--list shows all)")


def requested_config() -> tuple[Config, Config]:
  """The config `--config` names, and the same with the command line's overrides."""
  base = named_config(_CONFIG.value)
  return base, apply_overrides(base, _overrides)


def override_config(config: Config) -> Config:
  """`config` (read from a run directory) with the command line's overrides."""
  return apply_overrides(config, _overrides)


def config_flag() -> tuple[str, bool]:
  """The value of `--config`, and whether the user gave it."""
  return _CONFIG.value, flags.FLAGS["config"].present > 0


def workdir(default_name: str) -> Path:
  """`--workdir`, or runs/<config>."""
  return Path(os.path.expanduser(_WORKDIR.value or f"runs/{default_name.replace(':', '-')}"))


def require_workdir() -> Path:
  """An existing run directory for programs that read one."""
  folder = workdir(_CONFIG.value)
  if not (folder / "config.json").is_file():
    raise ConfigError(
      f"{folder} holds no run (no config.json); train one first: "
      f"python -m experiments.run --config={_CONFIG.value} --workdir={folder}"
    )
  return folder
