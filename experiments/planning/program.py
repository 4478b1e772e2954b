"""What a compiled program does, line by line, read from its optimized text."""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax


class Line(NamedTuple):
  """One instruction of a program."""

  text: str
  computation: str  # the one it stands in
  times: int  # how often a run of the program executes it


def compile_into(lowered: jax.stages.Lowered, folder: Path) -> jax.stages.Compiled:
  """Compile, and have XLA write what it knows of the program to a folder."""
  return lowered.compile({"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True})


def optimized_text(folder: Path) -> str:
  """The program that `compile_into` left, with the compiler's estimates; empty if it did not fit.

  The text is the compiler's own dump: jaxlib 0.10.2 cannot print the asynchronous operations of
  libtpu 0.0.42 (`Compiled.as_text` raises on them).
  """
  return "".join(path.read_text() for path in folder.glob("*after_codegen.txt"))


def compile_with_text(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
  """The compiled program for TPUs and its optimized text."""
  with tempfile.TemporaryDirectory() as folder:
    compiled = compile_into(lowered, Path(folder))
    text = optimized_text(Path(folder))
  assert text, "the compiler wrote no program"
  return compiled, text


def lines(text: str) -> Iterator[Line]:
  """Every instruction that runs, those inside of fusions, loops and branches too.

  Loops count as often as the constant in their condition says; both branches of a conditional
  count once.
  """
  bodies, entry = computations(text)

  def walk(name: str, times: int) -> Iterator[Line]:
    for line in bodies[name]:
      yield Line(line, name, times)
      if " while(" in line:
        condition, body = (re.search(rf"{k}=%([\w.\-]+)", line)[1] for k in ("condition", "body"))
        yield from walk(body, times * _trips(bodies[condition]))
        continue
      called = re.findall(r"(?:calls|_computation)=%([\w.\-]+)", line)
      for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
        called += re.findall(r"%([\w.\-]+)", group)
      for inner in called:
        yield from walk(inner, times)

  yield from walk(entry, 1)


_RESULT = re.compile(r"^(?:ROOT )?%([\w.\-]+) = \(?(\w+)\[([\d,]*)\]")


def result(line: str) -> tuple[str, str, tuple[int, ...]] | None:
  """Name, dtype and shape of an instruction's (first) result."""
  match = _RESULT.match(line)
  return match and (match[1], match[2], tuple(map(int, filter(None, match[3].split(",")))))


def op_name(line: str) -> str:
  """Where in the model an instruction comes from; empty if unknown."""
  found = re.search(r'op_name="([^"]*)"', line)
  return found[1] if found else ""


def computations(text: str) -> tuple[dict[str, list[str]], str]:
  bodies: dict[str, list[str]] = {}
  name = entry = ""
  for line in text.splitlines():
    if match := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
      name = match[2]
      entry = name if match[1] else entry
      bodies[name] = []
    elif line.startswith("  ") and name:
      bodies[name].append(line.strip())
  return bodies, entry


def _trips(condition: list[str]) -> int:
  bounds = [int(k) for line in condition for k in re.findall(r"s32\[\]\S* constant\((\d+)\)", line)]
  return max(bounds, default=1)
