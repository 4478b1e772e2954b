"""The training step compiled for TPUs that are not there, in a process of its own.

The compiler can take all memory or abort, and `plan` survives that. As a program it takes --config,
--topology, overrides, and as --workdir the folder for what XLA writes and for `SUMMARY`:
`python -m experiments.planning.compiling --workdir=FOLDER ...`.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from mesh.constrain import use_mesh
from mesh.rules import spec_for

from .. import cli
from ..training.compiled_step import jit_step
from ..training.setup import Setup, build
from .buffers import READS, Peak, at_peak
from .program import compile_into, optimized_text

SUMMARY, _WORDS = "summary.json", "words.txt"
_LAST_LINES = 12
_POLL_SECONDS = 0.5


class CompilerError(RuntimeError):
  """The process that compiled ended without a word; its last lines are the message."""


class Compiled(NamedTuple):
  """What a compiler says of a program for one device."""

  refused: str  # why it does not fit; empty if it does
  text: str  # the optimized program; empty where it does not fit
  code: int  # bytes; 0 where it does not fit
  seconds: float
  cpu_seconds: float
  host_bytes: int  # the most that the process had


def compile_apart(
  arguments: list[str],
  folder: Path,
  on_memory: Callable[[Peak], None],
  program: str = __name__,
) -> Compiled:
  """Run this file, or another such program, with flags for config and topology.

  Args:
    folder: an empty one.
    on_memory: called with the layout of memory as soon as that is known, long before there is code.

  Raises:
    CompilerError: the process did not finish.
  """
  with _start(arguments, folder, program) as process:
    try:
      _wait_for_memory(process, folder)
      if _laid_out(folder):
        on_memory(at_peak(folder))
      process.wait()
    finally:
      process.kill()
  summary = folder / SUMMARY
  if process.returncode or not summary.exists():
    raise _how_it_ended(process.returncode, folder)
  return Compiled(text=optimized_text(folder), **json.loads(summary.read_text()))


def memory_apart(arguments: list[str], folder: Path) -> Peak:
  """The layout of memory only: the process is ended before it generates code.

  Raises:
    CompilerError: it ended by itself, without one.
  """
  with _start(arguments, folder) as process:
    _wait_for_memory(process, folder)
    process.kill()
  if not _laid_out(folder):
    raise _how_it_ended(process.returncode, folder)
  return at_peak(folder)


def _start(arguments: list[str], folder: Path, program: str = __name__) -> subprocess.Popen:
  """The process, whose words go to a file in the folder."""
  command = [sys.executable, "-m", program, f"--workdir={folder}", *arguments]
  with (folder / _WORDS).open("wb") as words:
    return subprocess.Popen(command, stderr=words)


def _wait_for_memory(process: subprocess.Popen, folder: Path) -> None:
  """Until XLA has written the layout of memory, or the process ended."""
  last: list[int] = []
  while process.poll() is None:
    sizes = [path.stat().st_size for path in _laid_out(folder)]
    if sizes and sizes == last:
      return
    last = sizes
    time.sleep(_POLL_SECONDS)


def _laid_out(folder: Path) -> list[Path]:
  """The files that `at_peak` reads, if all are there."""
  found = [list(folder.glob(f"*{name}")) for name in READS]
  return [path for paths in found for path in paths] if all(found) else []


def _how_it_ended(code: int, folder: Path) -> CompilerError:
  lines = (folder / _WORDS).read_text(errors="replace").strip().splitlines()
  how = f"signal {-code}" if code < 0 else f"exit code {code}"
  last = "\n".join(lines[-_LAST_LINES:])
  return CompilerError(f"the compiler's process ended with {how}; its last lines:\n{last}")


def lower_step(setup: Setup) -> jax.stages.Lowered:
  """The train step lowered for the setup's (described) devices, to be compiled."""
  config = setup.config
  placed = NamedSharding(setup.mesh, spec_for(("act_batch", "act_seq"), setup.rules, setup.mesh))
  shape = (config.data.batch_size, config.data.row_length)
  array = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
  names = ("tokens", "targets", "segments", "positions")
  batch = {name: array(jnp.int32) for name in names} | {"weights": array(jnp.float32)}
  everywhere = NamedSharding(setup.mesh, PartitionSpec())
  limit = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
  with use_mesh(setup.mesh, setup.rules):
    return jit_step(setup).lower(setup.abstract, batch, limit)


def compile_here(lowered: jax.stages.Lowered, folder: Path) -> None:
  """Leave a summary and XLA's dump."""
  jax.config.update("jax_enable_compilation_cache", False)  # it can't be read back without a TPU
  began, refused, code = time.monotonic(), "", 0
  try:
    stated = compile_into(lowered, folder).memory_analysis()
    assert stated is not None
    code = stated.generated_code_size_in_bytes
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    refused = str(e).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
  used = resource.getrusage(resource.RUSAGE_SELF)
  summary = {
    "refused": refused,
    "code": code,
    "seconds": time.monotonic() - began,
    "cpu_seconds": used.ru_utime + used.ru_stime,
    "host_bytes": 1024 * used.ru_maxrss,
  }
  (folder / SUMMARY).write_text(json.dumps(summary))


def main() -> None:
  """Compile the training step."""
  config = cli.requested_config()
  compile_here(lower_step(build(config, cli.described_devices(config))), cli.workdir(""))


if __name__ == "__main__":
  cli.run(main)
