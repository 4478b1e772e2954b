"""What every program shares: flags, dotted overrides, named configs, exit codes."""

import contextlib
import difflib
import errno
import importlib
import inspect
import io
import os
import pkgutil
import re
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags, logging

from mesh.topology import describe_devices

from . import bucket, configs, paths, platform
from .config import Config, ConfigError
from .exits import (  # noqa: F401 - programs name all of them
  FINISHED,
  GUARD,
  INTERRUPTED,
  OUR_FAULT,
  RESTART,
  USER_MISTAKE,
  WATCHDOG,
  HaltError,
)
from .overrides import apply_overrides

_CONFIG = flags.DEFINE_string("config", "moe_tiny", "A named config, or FAMILY:SIZE.")
_WORKDIR = flags.DEFINE_string(
  "workdir", "", "Run directory, a folder or gs://BUCKET/FOLDER; default runs/CONFIG."
)
_WEIGHTS = flags.DEFINE_string(
  "weights",
  "",
  "A model made elsewhere: safetensors folder, .gguf file, package:NAME. For run, what "
  "training starts from; for others in place of a run directory.",
)
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", "newest", "Of a run that is read: newest, best (least held-out loss), or a step."
)
_TOPOLOGY = flags.DEFINE_string(
  "topology", "", "For plan and --show_mesh, TPUs that are not here: v5p:4x4x4, or v5p-128. "
  "For plan also GPUs, h100:4x8 (4 nodes of 8), or here: the accelerators that are.",
)  # fmt: skip

_HELP_COLUMN = 28

# libtpu then neither asks a cloud what it runs on, nor complains that nobody told it.
_NO_TPU_HERE = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5p-8",
}

# --config.section.field=value, in the order given; filled when flags are parsed.
_overrides: list[tuple[str, str]] = []


def run(main: Callable[..., int | None], *, leave: Callable[[int], Any] = sys.exit) -> None:
  """Run a program as this process: `execute` the command line, and `leave` with its exit code."""
  if sys.stdout is not None:
    sys.stdout = _lasting(sys.stdout)
  code = execute(main, sys.argv)
  try:
    bucket.close()
  except OSError as e:
    print(f"error: {e}", file=sys.stderr)
    code = code or OUR_FAULT
  if sys.stdout is not None:
    sys.stdout.flush()
  leave(code)


def execute(main: Callable[..., int | None], argv: list[str]) -> int:
  """Parse flags, run `main`, and return the exit code.

  A `main` with a parameter gets the arguments that are no flags; elsewhere they are a mistake.

  A `ConfigError` (the user's mistake) is one line on stderr and exit code 2; anything else keeps
  its full trace and gives 1.
  """
  try:
    if {"--help", "-help", "-h"} & set(argv[1:]):
      print(_usage(main))
      return FINISHED
    rest = _parse(argv)[1:]
    given = [rest] if inspect.signature(main).parameters else []
    if rest and not given:
      raise ConfigError(f"unexpected argument {rest[0]!r}; flags start with -- (--help lists them)")
    if not flags.FLAGS["verbosity"].present:
      # Orbax and absl log failures at length that are raised, and answered, all the same.
      logging.set_verbosity(logging.FATAL)
    platform.prepare()
    return main(*given) or FINISHED
  except (ConfigError, flags.Error) as e:
    print(end="", flush=True)  # what was said before comes first
    print(f"error: {bucket.named(str(e))}", file=sys.stderr)
    return USER_MISTAKE
  except HaltError as e:
    print(end="", flush=True)
    print(f"stopped: {bucket.named(str(e))}", file=sys.stderr)
    return e.code
  except KeyboardInterrupt:
    print("\ninterrupted", file=sys.stderr)
    return INTERRUPTED
  except Exception:
    traceback.print_exc()
    return OUR_FAULT


def _parse(argv: list[str]) -> list[str]:
  """Take out the overrides, let absl parse the flags, and return what is left."""
  _overrides.clear()
  rest = [argv[0]]
  arguments = iter(argv[1:])
  for argument in arguments:
    if not argument.startswith(("--config.", "-config.")):
      rest.append(argument)
      continue
    path, equals, value = argument.lstrip("-").removeprefix("config.").partition("=")
    if not equals:
      value = next(arguments, "--")
      if value.startswith("--"):
        raise ConfigError(f"--config.{path} needs a value: --config.{path}=VALUE")
    _overrides.append((path, value))
  return flags.FLAGS(rest)


def _usage(main: Callable) -> str:
  """The program's docstring and its flags."""
  program = sys.modules[main.__module__]
  ours = {__name__, main.__module__, sys.argv[0]}  # the last is absl's name for `__main__`
  by_module = flags.FLAGS.flags_by_module_dict()
  lines = [(program.__doc__ or "").strip(), "", "Flags:"]
  for flag in (flag for name in by_module if name in ours for flag in by_module[name]):
    is_bool = flag.flag_type() == "bool"
    default = "" if flag.default in (None, []) else flag.default
    said = re.sub(r";\s+repeat this option .*", "", flag.help)  # absl's addition
    lines += _entry(f"--{flag.name}" + ("" if is_bool else f"={default}"), said)
  about = "Override any field of the config; `experiments.run --show` prints them all."
  lines += _entry("--config.SECTION.FIELD=VALUE", about)
  return "\n".join(lines)


def _entry(flag: str, said: str) -> list[str]:
  """A flag and, beside it, what it does."""
  indent = " " * _HELP_COLUMN
  lines = textwrap.wrap(said, 98, initial_indent=indent, subsequent_indent=indent)
  if len(flag) + 3 > _HELP_COLUMN:
    return [f"  {flag}", *lines]
  return [f"  {flag}".ljust(_HELP_COLUMN) + lines[0].lstrip(), *lines[1:]]


class _Lasting(io.FileIO):
  """Standard output that outlives its reader (`| head`, a `tee` that Ctrl-C ended first, a closed
  terminal): what nobody reads is dropped, and the run goes on to save."""

  def write(self, data) -> int:
    try:
      return super().write(data)
    except OSError as e:
      if e.errno not in (errno.EPIPE, errno.EIO):
        raise
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, self.fileno())
      os.close(nowhere)
      return len(data)


def _lasting(stdout) -> io.TextIOWrapper:
  try:
    descriptor = stdout.fileno()
  except (OSError, ValueError, AttributeError):  # not a file: an embedding program's own
    return stdout
  return io.TextIOWrapper(
    io.BufferedWriter(_Lasting(descriptor, "w", closefd=False)),
    encoding=stdout.encoding,
    errors="replace",  # a terminal that can't show a bar of the expert load
    line_buffering=stdout.isatty(),
  )


def config_names() -> list[str]:
  """All names `--config` takes: modules by name, and FAMILY:SIZE for modules with SIZES, in their
  order."""
  names = []
  for module in pkgutil.iter_modules(configs.__path__):
    sizes = getattr(importlib.import_module(f"{configs.__name__}.{module.name}"), "SIZES", None)
    names += [module.name] if sizes is None else [f"{module.name}:{size}" for size in sizes]
  return names


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
    if sizes is not None:
      offered = ", ".join(f"{module_name}:{s}" for s in sizes)
      raise ConfigError(f"no config named {name!r}; the family has {offered}")
  names = config_names()
  near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
  hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"
  raise ConfigError(f"no config named {name!r}; {hint} (--list shows all)")


def requested_config() -> Config:
  """The config `--config` names, with the command line's overrides."""
  return override_config(named_config(_CONFIG.value))


def override_config(config: Config) -> Config:
  """`config` with the command line's overrides."""
  return apply_overrides(config, _overrides)


def config_flag() -> tuple[str, bool]:
  """The value of `--config`, and whether the user gave it."""
  return _CONFIG.value, flags.FLAGS["config"].present > 0


def config_arguments(topology: str) -> list[str]:
  """Flags that give another program the same config, and this topology."""
  given = [f"--config.{path}={value}" for path, value in _overrides]
  return [f"--config={_CONFIG.value}", f"--topology={topology}", *given]


def topology_flag() -> str:
  """The value of `--topology`; empty without it."""
  return _TOPOLOGY.value


def described_devices(config: Config, topology: str = "") -> list[Any] | None:
  """Devices of `--topology`, as many slices of it as the config's mesh spans; None without it.

  Args:
    topology: in place of the flag.

  Raises:
    ConfigError: no such topology, or libtpu is not installed.
  """
  topology = topology or _TOPOLOGY.value
  if not topology:
    return None
  for name, value in _NO_TPU_HERE.items():
    os.environ.setdefault(name, value)
  slices = config.mesh.dcn_data * config.mesh.dcn_stage * config.mesh.dcn_fsdp
  try:
    return describe_devices(topology, num_slices=slices)
  except ModuleNotFoundError as e:
    raise ConfigError(
      "describing a TPU needs the package libtpu (Linux on x86-64): "
      "pip install 'meshyard[tpu]', or 'meshyard[test]' for the tests' too"
    ) from e
  except ValueError as e:
    raise ConfigError(str(e)) from e


def refuse_topology() -> None:
  """For programs that compute.

  Raises:
    ConfigError: `--topology` is given.
  """
  if _TOPOLOGY.value:
    raise ConfigError(
      f"--topology={_TOPOLOGY.value}: these devices are only described, so nothing can run on them;"
      " it goes with experiments.plan and with --show_mesh"
    )


def workdir(default_name: str) -> Path:
  """`--workdir`, or runs/<config>; of a run directory in a bucket, the stage (`bucket`).

  Raises:
    ConfigError: a bucket that can't be reached.
  """
  path = _WORKDIR.value or f"runs/{default_name.replace(':', '-')}"
  return bucket.stage(path) if paths.is_url(path) else Path(path).expanduser()


def weights() -> str:
  """`--weights`, of programs that take them.

  Raises:
    ConfigError: `--workdir` is given as well.
  """
  if _WEIGHTS.value and _WORKDIR.value:
    raise ConfigError("--weights and --workdir both name a model: give one of them")
  return _WEIGHTS.value


def checkpoint() -> str:
  """`--checkpoint`: newest, best or a number.

  Raises:
    ConfigError: something else.
  """
  which = _CHECKPOINT.value
  if which not in ("newest", "best") and not which.isdecimal():
    raise ConfigError(f"--checkpoint={which}: give newest, best, or a step")
  return which


def start_weights() -> str:
  """`--weights` of a program that trains, where it names what to start from."""
  return _WEIGHTS.value


def overridden(path: str) -> bool:
  """Whether the command line sets this field of the config."""
  return any(path == given for given, _ in _overrides)


def require_workdir() -> Path:
  """An existing run directory for programs that read one.

  Raises:
    ConfigError: there is none, or `--topology` is given.
  """
  refuse_topology()
  folder = workdir(_CONFIG.value)
  with contextlib.suppress(OSError, ValueError):
    if (folder / "config.json").is_file():
      return folder
  raise ConfigError(
    f"{folder} holds no run (no config.json); train one first: "
    f"python -m experiments.run --config={_CONFIG.value} --workdir={folder}"
  )


def harmless(text: str) -> str:
  """`text` without what a terminal would obey: a young model draws any byte."""
  return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "·", text)
