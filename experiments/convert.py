"""Weights from one form into another:
`python -m experiments.convert --input=PATH --output=FOLDER --format=hf`.

The input is a run directory, a folder or file of safetensors, a .gguf file, or package:NAME.
`--format=hf` writes a folder for `transformers` (safetensors, config.json, tokenizer),
`--format=native` a run directory for `generate`, `evaluate` and `run`. `--check` reads the output
back and compares logits.
"""

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from mesh.constrain import use_mesh

from . import cli
from .config import Config, ConfigError, MeshConfig
from .data.tokenizer import CHAT_TEMPLATE, ByteTokenizer, Tokenizer, load_tokenizer
from .planning.memory import gigabytes
from .restore import fill, holds_run, open_run, progress, restore, setup_of
from .training.setup import Setup
from .weights import hub, native
from .weights.express import express
from .weights.landing import landing, refuse_filled
from .weights.load import by_path
from .weights.open import check_tokenizer, locate, open_weights, read_tokenizer
from .weights.save import DTYPES, Written
from .weights.source import Source
from .weights.special import chat_template, stops
from .weights.tokenizer_files import of_named, of_weights

_INPUT = flags.DEFINE_string(
  "input", "", "Run directory, folder or file of safetensors, .gguf file, or package:NAME."
)
_OUTPUT = flags.DEFINE_string("output", "", "Folder to write, which must be new or empty.")
_FORMAT = flags.DEFINE_enum(
  "format", "hf", ["hf", "native"], "hf: a folder for transformers; native: a run directory."
)
_FAMILY = flags.DEFINE_string("family", "auto", "With hf: the model_type to write it as.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", list(DTYPES), "With hf: of the tensors.")
_SHARD_GB = flags.DEFINE_float(
  "shard_gb", 5.0, "With hf: gigabytes of a file, beyond which another begins.", lower_bound=1e-6
)
_CHECK = flags.DEFINE_bool("check", False, "Read the output back and compare logits.")

_PROMPT = "The capital of France is"
_TOLERANCE = 1e-5  # of the largest logit


class Given(NamedTuple):
  """The input, before its weights are read."""

  setup: Setup
  fill: Callable[[], Any]  # reads the parameters
  tokenizer: Tokenizer | None
  why: str  # there is no tokenizer
  ids: hub.Ids
  files: dict[str, bytes]  # of the tokenizer

  @property
  def for_a_run(self) -> dict[str, bytes]:
    """Those that a run directory keeps."""
    if isinstance(self.tokenizer, ByteTokenizer):
      return {}  # which is built in
    return hub.beside_a_run(self.files, self.ids)


class Before(NamedTuple):
  """What the input says to a prompt."""

  tokens: np.ndarray
  logits: np.ndarray  # of its weights in the type in which they are written
  rounding: float  # what that type changed


def main() -> int:
  cli.refuse_topology()
  output = _check_flags()
  hf = _FORMAT.value == "hf"
  with contextlib.ExitStack() as stack:
    given = _open(_INPUT.value, stack)
    spec = given.setup.config.model
    expressed = express(spec, _FAMILY.value) if hf else None  # before anything large is read
    params = given.fill()
  with landing(output) as folder, progress(f"writing {output.name}") as told:
    if expressed is not None:
      written = hub.write(
        folder, expressed, spec, by_path(params), ids=given.ids, files=given.files,
        dtype=_DTYPE.value, largest=round(_SHARD_GB.value * 1e9), progress=told,
      )  # fmt: skip
    else:
      written = native.write(folder, _of_a_run(given), params, given.for_a_run, told)
  _tell(output, written, given, "a run directory" if expressed is None else expressed.kind)
  before = _say(given, params) if _CHECK.value else None
  del params  # before those of the output come
  same = before is None or _check(given, before, output)
  print("\nNext")
  for what, command in _next(hf):
    print(f"  {what:<18} {command}")
  return cli.FINISHED if same else cli.OUR_FAULT


def _check_flags() -> Path:
  """The folder to write. Raises ConfigError for flags that are missing or mean nothing here."""
  if not _INPUT.value or not _OUTPUT.value:
    raise ConfigError("give --input=PATH and --output=FOLDER (--help says what they may be)")
  for name in ("family", "dtype", "shard_gb"):
    if _FORMAT.value == "native" and flags.FLAGS[name].present:
      raise ConfigError(f"--{name} belongs to --format=hf: a run directory has one form")
  return refuse_filled(_OUTPUT.value)


def _open(name: str, stack: contextlib.ExitStack) -> Given:
  path = locate(name, "--input")
  return _open_run(path) if holds_run(path) else _open_weights(path, stack)


def _open_run(folder: Path) -> Given:
  setup = open_run(folder, batch=False)
  name = setup.config.data.tokenizer
  tokenizer, why = _unless_missing(lambda: load_tokenizer(name))
  length = setup.config.model.max_length
  files = {} if tokenizer is None else of_named(name, tokenizer, length)
  if files and (template := chat_template(Source(folder, {}, {}))) is not None:
    files |= {CHAT_TEMPLATE: template.encode()}  # also where the tokenizer is kept elsewhere
  ids = hub.read_ids(folder)
  if ids is None:
    ids = hub.Ids() if tokenizer is None else hub.Ids(tokenizer.eod, tokenizer.eod)
  return Given(setup, lambda: restore(setup, folder).params, tokenizer, why, ids, files)


def _open_weights(path: Path, stack: contextlib.ExitStack) -> Given:
  opened = open_weights(path, stack)
  source, setup = opened.source, setup_of(opened)
  named, length = setup.config.data.tokenizer, opened.spec.max_length
  read = lambda: read_tokenizer(source, named)
  tokenizer, why = (read(), "") if named else _unless_missing(read)
  if tokenizer is not None:
    check_tokenizer(tokenizer, opened)
  files = {} if tokenizer is None else of_weights(source, tokenizer, named, length)
  ends = stops(source) | ({tokenizer.eod} if tokenizer is not None else set())
  ids = hub.ids_of(source, tuple(sorted(ends)))
  return Given(setup, lambda: fill(opened, setup), tokenizer, why, ids, files)


def _unless_missing(read: Callable[[], Tokenizer]) -> tuple[Tokenizer | None, str]:
  """A tokenizer, or why there is none: weights without one are still weights."""
  try:
    return read(), ""
  except ConfigError as e:
    return None, str(e)


def _of_a_run(given: Given) -> Config:
  """The config to store: of no particular mesh, its tokenizer that of the folder."""
  config = given.setup.config
  data = config.data
  if {"tokenizer.json", "tokenizer.model"} & given.for_a_run.keys():
    data = dataclasses.replace(data, tokenizer="")
  return dataclasses.replace(config, data=data, mesh=MeshConfig(rules=config.mesh.rules))


def _tell(output: Path, written: Written, given: Given, kind: str) -> None:
  layers = given.setup.config.model.num_layers
  print(f"{_OUTPUT.value}: {kind}, {written.parameters:,} parameters, {layers} layers")
  print(f"  {gigabytes(written.bytes)} in {written.tensors:,} tensors")
  for path in sorted(output.iterdir()):
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    shown = path.name if path.is_file() else f"{path.name}/"
    print(f"  {shown:<34} {gigabytes(size):>10}")
  if not given.files:
    print(f"  no tokenizer: {given.why}")


def _say(given: Given, params: Any) -> Before:
  spec, tokenizer = given.setup.config.model, given.tokenizer
  ids = np.arange(8) % spec.vocab_size if tokenizer is None else tokenizer.encode(_PROMPT)
  tokens = ids[None, : spec.max_length].astype(np.int32)
  exact = _logits(given.setup, params, tokens)
  if _FORMAT.value == "native" or _DTYPE.value == "float32":
    return Before(tokens, exact, 0.0)
  kind = jnp.dtype(_DTYPE.value)
  rounded = jax.tree.map(lambda x: x.astype(kind).astype(x.dtype), params)
  logits = _logits(given.setup, rounded, tokens)
  return Before(tokens, logits, float(np.abs(logits - exact).max()))


def _check(given: Given, before: Before, output: Path) -> bool:
  """Read the output, compare it with the input, and say how they differ; whether it is the same."""
  with contextlib.ExitStack() as stack:
    again = _open(str(output), stack)
    found = _logits(again.setup, again.fill(), before.tokens)
  worst = float(np.abs(found - before.logits).max())
  allowed = _TOLERANCE * float(np.abs(before.logits).max())
  what = f"logits of {_PROMPT!r}" if given.tokenizer else f"logits of {before.tokens.size} tokens"
  print(
    f"\nCheck: {what} differ by {worst:.2g} at most; allowed are {allowed:.2g}, {_TOLERANCE:g} of "
    "the largest"
  )
  if before.rounding:
    print(f"  and rounding to {_DTYPE.value} had changed them by {before.rounding:.2g}")
  ids = None if again.tokenizer is None else again.tokenizer.encode(_PROMPT)
  same = given.tokenizer is None or np.array_equal(ids, given.tokenizer.encode(_PROMPT))
  if not worst <= allowed or not same:  # NaN as well
    what = "weights are" if same else "tokenizer is"
    print(f"error: {output}: its {what} not what was to be written", file=sys.stderr)
    return False
  return True


def _logits(setup: Setup, params: Any, tokens: np.ndarray) -> np.ndarray:
  model = setup.model.clone(dtype=jnp.float32)
  with use_mesh(setup.mesh, setup.rules):
    out = jax.jit(lambda params: model.apply({"params": params}, tokens).logits_BTV)(params)
  return np.asarray(out)


def _next(hf: bool) -> list[tuple[str, str]]:
  here = shlex.quote(_OUTPUT.value)
  if hf:
    return [
      ("continue a prompt", f"python -m experiments.generate --weights={here} --prompt='The '"),
      ("in Python", f"transformers.AutoModelForCausalLM.from_pretrained({_OUTPUT.value!r})"),
    ]
  run = f"--workdir={here}"
  return [
    ("continue a prompt", f"python -m experiments.generate {run} --prompt='The '"),
    ("train on", f"python -m experiments.run {run} --config.data.path=FILE"),
  ]


if __name__ == "__main__":
  cli.run(main)
