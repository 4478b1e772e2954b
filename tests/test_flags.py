"""The program flags are those of the table in DESIGN.md, and their programs are as it says."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def defined() -> dict[str, set[str]]:
  """Flag name -> programs whose module defines it; "all" for the shared ones."""
  found: dict[str, set[str]] = {}
  for path in (ROOT / "experiments").rglob("*.py"):
    program = ".".join(path.relative_to(ROOT / "experiments").with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and getattr(node.func, "attr", "").startswith("DEFINE_"):
        assert isinstance(node.args[0], ast.Constant), f"{path}: a flag needs a literal name"
        found.setdefault(node.args[0].value, set()).add("all" if program == "cli" else program)
  return found


def documented() -> dict[str, set[str]]:
  rows = re.findall(r"^\| `--(\w+)` \| ([^|]+) \|", (ROOT / "DESIGN.md").read_text(), re.MULTILINE)
  return {name: {p.strip() for p in programs.split(",")} for name, programs in rows}


def test_flags_are_those_of_the_table():
  assert defined() == documented()


def test_no_flags_outside_experiments():
  for package in ("mesh", "layers"):
    for path in (ROOT / package).rglob("*.py"):
      assert "absl" not in path.read_text(), path
