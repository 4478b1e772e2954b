"""Tasks of EleutherAI's lm-evaluation-harness, without torch and without a network."""

import contextlib
import difflib
import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import ConfigError
from .answers import Answers

# Nothing is asked of a network, and bars are ours. Read when the harness is imported.
_ENVIRONMENT = {
  "HF_DATASETS_OFFLINE": "1",
  "HF_HUB_OFFLINE": "1",
  "HF_HUB_DISABLE_TELEMETRY": "1",
  "TQDM_DISABLE": "1",
  "DISABLE_MULTIPROC": "1",  # processes forked from one with JAX's threads may hang
}
_BOOTSTRAP = 1000  # draws for the standard error of a metric that has no formula


def require_harness() -> None:
  """Raises ConfigError where the package is not installed."""
  os.environ.update(_ENVIRONMENT)
  try:
    import lm_eval.tasks  # noqa: F401 - an extra
  except ImportError as e:
    raise ConfigError(
      f"--tasks needs the lm-eval package: pip install 'meshyard[eval]' ({e})"
    ) from e
  logging.getLogger("lm_eval").setLevel(logging.ERROR)


def load_tasks(names: Sequence[str], *, num_fewshot: int | None, folder: str) -> dict[str, Any]:
  """The harness's tasks by these names, with their data.

  Args:
    num_fewshot: examples before each question; None is what each task says, or none.
    folder: of more tasks, yaml files; their names come before those of the harness.

  Raises:
    ConfigError: no task of that name, or its data is not on this machine.
  """
  if folder and not Path(folder).is_dir():
    raise ConfigError(f"--include_path={folder}: there is no such folder")
  manager = _manager(names, folder)
  found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
  for name in names:
    for kind, tasks in _load(manager, name).items():
      found[kind] |= tasks
  for name, task in found["tasks"].items():
    fixed = task.get_config("num_fewshot")
    if fixed == 0 and num_fewshot:
      raise ConfigError(f"{name} is a task without examples: leave out --num_fewshot")
    task.set_config(key="num_fewshot", value=fixed or 0 if num_fewshot is None else num_fewshot)
    task.set_fewshot_seed(seed=1234)
  return found


def run_tasks(tasks: dict[str, Any], answers: Answers, *, limit: int | None) -> dict[str, Any]:
  """What the harness finds: metrics, settings, versions and counts by task.

  Args:
    limit: questions a task at most.
  """
  from lm_eval.evaluator import evaluate  # an extra

  with contextlib.redirect_stdout(io.StringIO()):  # it tells of its own arithmetic
    return evaluate(
      _adapter(answers), tasks, limit=limit, bootstrap_iters=_BOOTSTRAP, log_samples=False
    )


def version() -> str:
  """Of the harness."""
  import lm_eval  # an extra

  return lm_eval.__version__


def _adapter(answers: Answers) -> Any:
  """A model as the harness knows them."""
  from lm_eval.api.model import LM  # an extra

  class Meshyard(LM):
    def loglikelihood(self, requests):
      return [tuple(s) for s in answers.log_likelihoods([r.args for r in requests])]

    def loglikelihood_rolling(self, requests):
      return answers.rolling([r.args[0] for r in requests])

    def generate_until(self, requests):
      return answers.generate_until([r.args for r in requests])

  return Meshyard()


def _manager(names: Sequence[str], folder: str) -> Any:
  from lm_eval.tasks import TaskManager  # an extra

  if folder:
    alone = TaskManager(include_path=folder, include_defaults=False)
    if set(names) <= set(alone.all_tasks):
      return alone  # reading the thousands that come with the harness takes seconds
  manager = TaskManager(include_path=folder or None)
  for name in names:
    if name not in manager.all_tasks and not Path(name).is_file():
      near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
      hint = f"did you mean {' or '.join(near)}?" if near else "--include_path=FOLDER adds your own"
      raise ConfigError(f"--tasks: the harness has no task {name!r}; {hint}")
  return manager


def _load(manager: Any, name: str) -> dict[str, Any]:
  try:
    return manager.load([name])
  except (ConnectionError, FileNotFoundError) as e:
    raise ConfigError(
      f"the data of task {name} is not on this machine, and nothing is downloaded here: fetch it "
      f"into the cache of Hugging Face datasets, or give files in a task of your own ({_line(e)})"
    ) from e
  except Exception as e:  # whatever its yaml, its functions and the libraries it names lead to
    raise ConfigError(f"task {name} can't be loaded: {type(e).__name__}: {_line(e)}") from e


def _line(error: Exception) -> str:
  return (str(error).splitlines() or [""])[0]
