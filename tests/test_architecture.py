"""The shape of the code, as `DESIGN.md` says: who imports whom, and how long things are.

The numbers are alarms, not targets. What is longer or later than the rule stands in a table here,
with its reason; an entry that is no longer needed fails too.
"""

import ast
import fnmatch
import graphlib
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mesh", "layers", "experiments")  # each may import those before it

TOP_LEVEL = {
  "mesh", "layers", "experiments", "tests", "tpu_setup", "docs", "benchmarks", ".ci",
  "README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "pyproject.toml",
  ".gitignore",
}  # fmt: skip
OPTIONAL = {".gitattributes", ".dockerignore", ".git"}

FILE_LINES = 400
KERNEL_FILE_LINES = 600
FUNCTION_LINES = 60  # without the docstring

LONG_FUNCTIONS = {}

# Imports inside functions: file, what is imported, why. A comment at the place says so too.
LATE_IMPORTS = {
  ("experiments/weights/gguf.py", "gguf"): "an extra",
  ("experiments/inference/template.py", "jinja2"): "an extra",
  ("experiments/inference/template.py", "jinja2.sandbox"): "an extra",
  ("experiments/inference/chat.py", "readline"): "not on every system, of use in terminals only",
  ("experiments/data/sentence_piece.py", "sentencepiece"): "an extra",
  ("experiments/data/tokenizer.py", "experiments.data.sentence_piece"): "of use with that extra",
  ("experiments/restore.py", "experiments.training.checkpoint"): "orbax, of no use to --weights",
  ("experiments/evaluation/harness.py", "lm_eval"): "an extra",
  ("experiments/evaluation/harness.py", "lm_eval.tasks"): "an extra",
  ("experiments/evaluation/harness.py", "lm_eval.evaluator"): "an extra",
  ("experiments/evaluation/harness.py", "lm_eval.api.model"): "an extra",
  ("experiments/training/record.py", "experiments.book.text"): "reads the whole run, now and then",
  ("experiments/training/record.py", "experiments.book.facts"): "the planner's prices, at the end",
  ("experiments/training/report.py", "matplotlib"): "a second to import, only to draw a report",
  ("experiments/training/report.py", "matplotlib.figure"): "the same",
  ("experiments/show.py", "experiments.show_mesh"): "drawing, which training never does",
  ("experiments/start.py", "experiments.planning.exhausted"): "only where memory runs out",
  ("experiments/show_mesh.py", "matplotlib"): "a second to import, only to draw",
  ("experiments/show_mesh.py", "matplotlib.collections"): "the same",
  ("experiments/show_mesh.py", "matplotlib.figure"): "the same",
  (
    "layers/kernels/grouped_matmul/__init__.py",
    "layers.kernels.grouped_matmul.pallas_tpu",
  ): "half a second to import, of no use on a CPU",
  (
    "layers/kernels/grouped_matmul/__init__.py",
    "layers.kernels.grouped_matmul.pallas_gpu",
  ): "the same",
  (
    "layers/kernels/attention/__init__.py",
    "layers.kernels.attention.pallas_tpu",
  ): "the same",
  (
    "layers/kernels/decode_attention/__init__.py",
    "layers.kernels.decode_attention.pallas_tpu",
  ): "the same",
  (
    "layers/kernels/decode_attention/__init__.py",
    "layers.kernels.decode_attention.pallas_gpu",
  ): "the same",
  (
    "layers/kernels/attention/__init__.py",
    "layers.kernels.attention.pallas_gpu",
  ): "the same",
  (
    "layers/kernels/attention/__init__.py",
    "layers.kernels.attention.mosaic_gpu",
  ): "the same",
  ("layers/kernels/attention/__init__.py", "layers.kernels.attention.cudnn"): "of no use on a CPU",
  (
    "layers/kernels/linear_attention/__init__.py",
    "layers.kernels.linear_attention.pallas_tpu",
  ): "the same",
  (
    "layers/kernels/linear_attention/__init__.py",
    "layers.kernels.linear_attention.pallas_gpu",
  ): "the same",
  ("experiments/data/load.py", "experiments.data.masking"): "of use to encoders only",
  ("experiments/data/load.py", "experiments.data.instructions"): "of use to fine-tuning only",
  ("experiments/start.py", "experiments.pretrained"): "families of weights, where one is the start",
  ("mesh/topology.py", "mesh.slices"): "names of machines that are not here, which no run needs",
  ("layers/params.py", "flax.nnx"): "a second module system, which most programs never load",
}

# Inside `layers`, imports go to a lower rank, or among the leaf functions of rank 1.
RANKS = {
  "attention": 2, "moe": 2,
  "latent_attention": 3, "linear_attention": 3,  # other kinds of attention
  "block": 4, "stack": 5, "losses": 5, "transformer": 6, "count": 7, "__init__": 8,
}  # fmt: skip
MESH_FOR_LAYERS = {
  "mesh.constrain", "mesh.collectives", "mesh.region", "mesh.pipeline",
}  # fmt: skip

THIRD_PARTY = {
  "mesh": {"jax", "numpy"},
  "layers": {"jax", "numpy", "flax", "einops"},
}
DISTRIBUTIONS = {
  "absl": "absl-py",
  "jaxlib": "jax",
  "orbax": "orbax-checkpoint",
}  # where the names differ

PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
NETWORK = {
  "requests", "urllib3", "httpx", "aiohttp", "http", "ftplib", "smtplib", "socket", "socketserver",
  "xmlrpc", "websockets", "huggingface_hub", "urllib.request",
}  # fmt: skip

MODULES_TO_TRAIN = 121
LINES_TO_TRAIN = 21_900


class Import(NamedTuple):
  module: str  # absolute name of what is imported, a submodule where there is one
  relative: bool
  line: int
  function: str | None  # the function it stands in


def source_files() -> list[str]:
  return [
    str(p.relative_to(ROOT)) for name in PACKAGES for p in sorted((ROOT / name).rglob("*.py"))
  ]


FILES = source_files()


@cache
def text_of(path: str) -> str:
  return (ROOT / path).read_text()


@cache
def tree_of(path: str) -> ast.Module:
  return ast.parse(text_of(path))


def module_of(path: str) -> str:
  return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


OURS = {module_of(path): path for path in FILES}


def absolute_name(node: ast.ImportFrom, path: str) -> str:
  if not node.level:
    return node.module
  package = path.split("/")[: -node.level]
  return ".".join([*package, node.module] if node.module else package)


@cache
def imports_of(path: str) -> tuple[Import, ...]:
  found = []

  def visit(node: ast.AST, function: str | None) -> None:
    if isinstance(node, ast.Import):
      found.extend(Import(alias.name, False, node.lineno, function) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = absolute_name(node, path)
      for alias in node.names:
        name = f"{base}.{alias.name}"
        # `from package import submodule` imports the submodule.
        is_module = name in OURS or (base, alias.name) in {("flax", "nnx"), ("urllib", "request")}
        found.append(Import(name if is_module else base, node.level > 0, node.lineno, function))
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      function = node.name
    for child in ast.iter_child_nodes(node):
      visit(child, function)

  visit(tree_of(path), None)
  return tuple(found)


def offenders(allowed, paths=FILES) -> list[str]:
  """Imports for which `allowed(path, import)` is false."""
  return [
    f"{path}:{i.line} imports {i.module}"
    for path in paths
    for i in imports_of(path)
    if not allowed(path, i)
  ]


def top(name: str) -> str:
  return name.split(".")[0]


def is_third_party(name: str) -> bool:
  return top(name) not in sys.stdlib_module_names and top(name) not in PACKAGES


def test_the_files_are_found():
  for package in PACKAGES:
    assert f"{package}/__init__.py" in FILES
  assert "mesh.constrain" in {i.module for i in imports_of("layers/moe.py")}
  assert "layers.kernels.select" in {
    i.module for i in imports_of("layers/kernels/attention/xla.py")
  } | {i.module for i in imports_of("layers/kernels/attention/__init__.py")}


def test_top_level_folders():
  ignored = [line.strip("/") for line in text_of(".gitignore").split()]
  present = {
    p.name
    for p in ROOT.iterdir()
    if not any(fnmatch.fnmatch(p.name, pattern) for pattern in ignored)
  }
  assert present - OPTIONAL == TOP_LEVEL


def test_packages_import_downwards_only():
  def allowed(path, i):
    name = top(i.module)
    return name not in PACKAGES or PACKAGES.index(name) <= PACKAGES.index(
      top(path.replace("/", "."))
    )

  assert offenders(allowed) == []


def test_across_packages_absolute_within_relative():
  # Configs are written as one writes them elsewhere: absolute throughout. The recipe that vendors
  # mesh and layers rewrites `from mesh.x import y` and nothing else.
  paths = [path for path in FILES if not path.startswith("experiments/configs/")]
  same = lambda path, i: top(i.module) == path.split("/")[0]
  assert offenders(lambda path, i: i.relative or not same(path, i), paths) == []
  for path in paths:
    assert not re.search(r"^\s*import (mesh|layers|experiments)\b", text_of(path), re.MULTILINE), (
      path
    )


def test_no_import_cycles():
  graph = {
    name: {i.module for i in imports_of(path) if i.module in OURS} for name, path in OURS.items()
  }
  graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the cycle


def test_kernels_import_jax_and_their_siblings():
  def allowed(path, i):
    if top(i.module) in PACKAGES:
      return i.module.startswith("layers.kernels")
    return not is_third_party(i.module) or top(i.module) in {"jax", "numpy"}

  paths = [path for path in FILES if path.startswith("layers/kernels/")]
  assert offenders(allowed, paths) == []


def rank(module: str) -> int:
  parts = module.split(".")
  if len(parts) == 1:
    return RANKS["__init__"]
  return 0 if parts[1] == "kernels" else RANKS.get(parts[1], 1)


def test_order_inside_layers():
  def allowed(path, i):
    if top(i.module) != "layers":
      return True
    mine, theirs = rank(module_of(path)), rank(i.module)
    return theirs < mine or (theirs == mine and mine <= 1)

  assert offenders(allowed, [path for path in FILES if path.startswith("layers/")]) == []


def test_layers_need_of_mesh_only_placement():
  allowed = lambda path, i: top(i.module) != "mesh" or i.module in MESH_FOR_LAYERS
  assert offenders(allowed, [path for path in FILES if path.startswith("layers/")]) == []


def test_configs_import_specs_only():
  def allowed(path, i):
    if top(i.module) in PACKAGES:
      named = i.module in {"experiments.config", "layers.spec"}
      return named or i.module.startswith("experiments.configs.")
    return not is_third_party(i.module)

  paths = [path for path in FILES if path.startswith("experiments/configs/")]
  assert len(paths) > 1
  assert offenders(allowed, paths) == []


@pytest.mark.parametrize("package", THIRD_PARTY)
def test_libraries_import_few_packages(package):
  allowed = lambda path, i: not is_third_party(i.module) or top(i.module) in THIRD_PARTY[package]
  assert offenders(allowed, [path for path in FILES if path.startswith(f"{package}/")]) == []


def requirement_names(lines: list[str]) -> set[str]:
  return {re.match(r"[\w.-]+", line).group().lower().replace("_", "-") for line in lines}


def test_experiments_import_what_the_project_declares():
  project = tomllib.loads(text_of("pyproject.toml"))["project"]
  core = requirement_names(project["dependencies"])
  extra = {name for v in project["optional-dependencies"].values() for name in requirement_names(v)}

  def allowed(path, i):
    if not is_third_party(i.module):
      return True
    name = DISTRIBUTIONS.get(top(i.module), top(i.module)).lower().replace("_", "-")
    return name in core or (name in extra and i.function is not None)

  assert offenders(allowed) == []


def comment_at(path: str, line: int) -> bool:
  """Is there a comment on the import of this line, or above the imports it stands among?"""
  lines = text_of(path).splitlines()
  if "#" in lines[line - 1]:
    return True
  above = line - 2
  while re.match(r"\s*(from|import) ", lines[above]):
    above -= 1
  return lines[above].lstrip().startswith("#")


def test_imports_inside_functions_are_few_and_explained():
  late = {(path, i.module): i.line for path in FILES for i in imports_of(path) if i.function}
  assert late.keys() == LATE_IMPORTS.keys()
  assert [place for place, line in late.items() if not comment_at(place[0], line)] == []


def test_file_length():
  def limit(path):
    return KERNEL_FILE_LINES if path.startswith("layers/kernels/") else FILE_LINES

  lengths = {path: len(text_of(path).splitlines()) for path in FILES}
  assert {path: n for path, n in lengths.items() if n > limit(path)} == {}


def function_lengths(path: str):
  """Every function with its number of lines, its docstring not counted."""
  for node in ast.walk(tree_of(path)):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      length = node.end_lineno - node.lineno + 1
      if ast.get_docstring(node) is not None:
        length -= node.body[0].end_lineno - node.body[0].lineno + 1
      yield f"{path} {node.name}", length


def test_function_length():
  long = {name: n for path in FILES for name, n in function_lengths(path) if n > FUNCTION_LINES}
  assert {name: n for name, n in long.items() if n > LONG_FUNCTIONS.get(name, 0)} == {}
  assert LONG_FUNCTIONS.keys() <= long.keys(), "an exception that is no longer needed"


def test_flags_live_in_experiments():
  flags = {"absl", "argparse", "optparse", "getopt", "click"}
  paths = [path for path in FILES if not path.startswith("experiments/")]
  assert offenders(lambda path, i: top(i.module) not in flags, paths) == []
  assert [path for path in paths if "sys.argv" in text_of(path)] == []


def test_no_pickle():
  assert offenders(lambda path, i: top(i.module) not in PICKLES) == []
  assert [
    path for path in FILES if re.search(r"allow_pickle\s*=\s*True|torch\.load", text_of(path))
  ] == []


def test_no_network():
  assert offenders(lambda path, i: not {top(i.module), i.module} & NETWORK) == []


def test_what_must_load_to_train_is_small(tmp_path):
  script = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import experiments.run, experiments.configs.moe_70b
ours = [m for n, m in sys.modules.items() if n.split(".")[0] in {PACKAGES!r} and m.__file__]
print(json.dumps([m.__file__ for m in ours]))
"""
  command = [sys.executable, "-c", script]
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  # The one line that marks a folder as a package is no module to read.
  paths = (Path(name) for name in json.loads(done.stdout))
  files = {path for path in paths if len(path.read_text().splitlines()) > 1}
  assert ROOT / "layers" / "moe.py" in files
  assert ROOT / "experiments" / "training" / "loop.py" in files
  lines = sum(len(path.read_text().splitlines()) for path in files)
  assert len(files) <= MODULES_TO_TRAIN
  assert lines <= LINES_TO_TRAIN, f"{len(files)} modules"
