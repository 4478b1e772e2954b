"""How well a model does: `python -m experiments.evaluate --workdir=PATH`, or `--weights=PATH` in
place of a run directory: safetensors and GGUF from elsewhere.

Alone it tells the held-out loss of a run, or the loss of weights on the text of
`--config.data.path=FILE`. Overrides choose other data or a part: `--config.eval.batches=10`.

With `--tasks=NAME,NAME` it does tasks of EleutherAI's lm-evaluation-harness.
"""

import datetime
from pathlib import Path
from typing import Any

from absl import flags

from mesh.constrain import use_mesh
from mesh.multihost import is_primary

from . import cli
from .config import ConfigError
from .data.load import Dataset, load
from .evaluation import report
from .evaluation.answers import Answers
from .evaluation.harness import load_tasks, require_harness, run_tasks, version
from .evaluation.requests import Documents
from .evaluation.subject import subject_of
from .restore import Loaded, load_run, load_weights, open_run, restore
from .training.evaluate import HeldOut, held_out, make_held_out_step
from .training.setup import Setup, batch_placer

_TASKS = flags.DEFINE_list("tasks", [], "Tasks of the lm-evaluation-harness: NAME,NAME.")
_FEWSHOT = flags.DEFINE_integer(
  "num_fewshot", None, "Examples before each question; default is what the task says.",
  lower_bound=0,
)  # fmt: skip
_LIMIT = flags.DEFINE_integer("limit", None, "Questions a task at most.", lower_bound=1)
_INCLUDE = flags.DEFINE_string("include_path", "", "Folder of tasks of your own, as yaml files.")
_RESULTS = flags.DEFINE_string(
  "results", "", "With --tasks, the JSON file to write; default is in evaluations/ of --workdir."
)


def main() -> int:
  names = [name.strip() for name in _TASKS.value if name.strip()]
  if names:
    return _tasks(names)
  for flag in (_FEWSHOT, _LIMIT, _INCLUDE, _RESULTS):
    if flag.present:
      raise ConfigError(f"--{flag.name} goes with --tasks=NAME")
  return _loss_of_weights() if cli.weights() else _loss_of_run()


def _loss_of_run() -> int:
  folder = cli.require_workdir()
  setup = open_run(folder, batch=True)
  dataset = load(setup.config.data, setup.config.model.vocab_size)
  trained = restore(setup, folder)
  result = _held_out(setup, dataset, trained.params)
  target = setup.config.data.target
  _say(f"{setup.config.name} at step {trained.step:,}, {result.tokens:,} held-out {target}s")
  return _say_loss(result, target)


def _loss_of_weights() -> int:
  cli.refuse_topology()
  found = load_weights(cli.weights(), batch=True)
  config = found.setup.config
  if config.data.source == "pydoc" and not config.data.path:
    raise ConfigError("give the text to read, or shards: --config.data.path=FILE")
  tokenizer = Documents(found.tokenizer, found.begin, config.model.vocab_size)
  dataset = load(config.data, config.model.vocab_size, tokenizer)
  result = _held_out(found.setup, dataset, found.params)
  part = "" if config.data.holdout == 1 else "held-out "
  _say(f"{config.name}, {result.tokens:,} {part}tokens of {config.data.path or config.data.source}")
  return _say_loss(result, config.data.target)


def _held_out(setup: Setup, dataset: Dataset, params: Any) -> HeldOut:
  with use_mesh(setup.mesh, setup.rules):
    step = make_held_out_step(setup, dataset)
    return held_out(setup, dataset, step, params, batch_placer(setup))


def _say_loss(result: HeldOut, target: str) -> int:
  _say(f"loss          {result.loss:.6f} nats a {target}")
  if result.bits_per_byte is not None:
    _say(f"bits a byte   {result.bits_per_byte:.4f}")
  return cli.FINISHED


def _say(line: str) -> None:
  if is_primary():
    print(line)


def _tasks(names: list[str]) -> int:
  cli.refuse_topology()
  require_harness()
  tasks = load_tasks(names, num_fewshot=_FEWSHOT.value, folder=_INCLUDE.value)
  if cli.weights():
    loaded, whose, file = load_weights(cli.weights()), {"weights": cli.weights()}, None
  else:
    loaded, whose, file = _of_run()
  subject = subject_of(loaded)
  file = Path(_RESULTS.value).expanduser() if _RESULTS.value else file
  with use_mesh(subject.setup.mesh, subject.setup.rules):
    answers = Answers(subject)
    found = run_tasks(tasks, answers, limit=_LIMIT.value)
  _say(f"{', '.join(f'{k} {v}' for k, v in whose.items())}\n")
  _say(report.table(found))
  if answers.cut_requests:
    _say(
      f"\n{answers.cut_requests:,} texts were longer than the context of "
      f"{subject.setup.config.model.max_length:,} tokens and lost their beginning "
      f"({answers.cut_tokens:,} tokens)"
    )
  if file is not None and is_primary():
    cut = {"requests": answers.cut_requests, "tokens": answers.cut_tokens}
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = {"model": whose, "date": date, "lm_eval": version(), "limit": _LIMIT.value, "cut": cut}
    report.write(file, about | found)
    _say(f"\nresults are in {file}")
  return cli.FINISHED


def _of_run() -> tuple[Loaded, dict[str, Any], Path]:
  """The model of `--workdir`, what to call it, and where its results go."""
  folder = cli.require_workdir()
  setup = open_run(folder, batch=False)
  if setup.config.data.objective != "next_token":
    raise ConfigError(f"{folder} learned to tell masked tokens: it can't do tasks")
  trained = restore(setup, folder)
  name = f"step_{trained.step}_{datetime.datetime.now(datetime.UTC):%Y%m%d_%H%M%S}.json"
  whose = {"config": setup.config.name, "step": trained.step}
  return load_run(trained, folder), whose, folder / "evaluations" / name


if __name__ == "__main__":
  cli.run(main)
