"""Tasks of the harness, from files beside this one, with a model of ours: no network, no torch."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from experiments.evaluation.answers import Answers
from tests.experiments.programs import ONE, call, spawn

pytestmark = [
  pytest.mark.xdist_group("run"),
  pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="needs the extra `eval`: pip install 'meshyard[eval]'",
  ),
  pytest.mark.filterwarnings("ignore"),  # of theirs
]
HERE = Path(__file__).parent / "tasks"
HIDE = """
import sys
from importlib.machinery import PathFinder

class Hide(PathFinder):
  @classmethod
  def find_spec(cls, name, path=None, target=None):
    hidden = name.partition(".")[0] in ("torch", "transformers", "accelerate")
    return None if hidden else super().find_spec(name, path, target)

sys.meta_path[:] = [Hide if finder is PathFinder else finder for finder in sys.meta_path]
"""
CAPITALS = [json.loads(line) for line in (HERE / "capitals.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
  """The folder of tasks, each of which names its data from the folder that one works in."""
  folder = tmp_path_factory.mktemp("evaluation") / "tasks"
  shutil.copytree(HERE, folder)
  for path in folder.glob("*.yaml"):
    path.write_text(path.read_text().replace("tasks/", f"{folder}/"))
  return folder


@pytest.fixture
def asked(monkeypatch):
  """What the model is asked, and what it says."""
  seen = {}

  def spy(name, whole):
    def asked(self, requests):
      said = whole(self, requests)
      seen.setdefault(name, []).extend(zip(requests, said, strict=True))
      return said

    return asked

  for name in ("log_likelihoods", "rolling", "generate_until"):
    monkeypatch.setattr(Answers, name, spy(name, getattr(Answers, name)))
  return seen


def evaluate(trained, tasks, *arguments):
  file = tasks.parent / "found.json"
  result = call("evaluate", f"--workdir={trained}", ONE, f"--include_path={tasks}",
                f"--results={file}", *arguments)  # fmt: skip
  assert result.code == 0, result.err
  return result, json.loads(file.read_text())


def test_the_page_shows_this_task():
  page = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text()
  assert (HERE / "capitals.yaml").read_text() in page
  assert (HERE / "capitals.jsonl").read_text().splitlines()[0] in page


@pytest.mark.parametrize("shots", [0, 1, 3])
def test_capitals(trained, tasks, asked, shots):
  """Accuracies are those of the likelihoods, and prompts have so many examples."""
  result, found = evaluate(trained, tasks, "--tasks=capitals", f"--num_fewshot={shots}",
                           "--config.data.batch_size=48")  # fmt: skip
  said = asked["log_likelihoods"]
  assert len(said) == 4 * len(CAPITALS)
  right = right_norm = 0
  for i, question in enumerate(CAPITALS):
    four, country = said[4 * i : 4 * i + 4], question["country"]
    assert [pair[1] for pair, _ in four] == [f" {city}" for city in question["cities"]]
    prompt = four[0][0][0]
    *examples, last = prompt.split("\n\n")
    assert len(examples) == shots and last == f"The capital of {country} is"
    true = {f"The capital of {q['country']} is {q['cities'][q['answer']]}" for q in CAPITALS}
    assert set(examples) <= true and not any(country in example for example in examples)
    scores = [score.log_likelihood for _, score in four]
    by_length = [s / len(city) for s, city in zip(scores, question["cities"], strict=True)]
    right += scores.index(max(scores)) == question["answer"]
    right_norm += by_length.index(max(by_length)) == question["answer"]
  assert found["results"]["capitals"]["acc,none"] == right / len(CAPITALS)
  assert found["results"]["capitals"]["acc_norm,none"] == right_norm / len(CAPITALS)
  assert found["n-shot"] == {"capitals": shots}
  assert found["model"] == {"config": "debug", "step": 20}
  lines = [line.split() for line in result.out.splitlines()]
  assert ["config", "debug,", "step", "20"] in lines
  row = next(line for line in lines if line[:1] == ["capitals"])
  assert row[1:4] == [str(shots), "12", "acc"]
  assert row[-2] == f"{right / len(CAPITALS):.4f}"


def test_texts(trained, tasks, asked):
  _, found = evaluate(trained, tasks, "--tasks=sentences", "--limit=3")
  texts = [json.loads(line)["text"] for line in (HERE / "sentences.jsonl").read_text().splitlines()]
  assert [args for args, _ in asked["rolling"]] == texts
  total = sum(said for _, said in asked["rolling"])
  bits = -total / sum(len(text.encode()) for text in texts) / 0.6931471805599453
  assert found["results"]["sentences"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-9)
  assert found["limit"] == 3


@pytest.mark.full
def test_answers(trained, tasks, asked):
  result, found = evaluate(trained, tasks, "--tasks=sums", "--limit=3")
  answers = asked["generate_until"]
  assert [args[0] for args, _ in answers] == ["one plus one is", "two plus one is",
                                              "two plus two is"]  # fmt: skip
  assert all("\n" not in said and "." not in said for _, said in answers)
  assert found["n-samples"]["sums"] == {"original": 4, "effective": 3}
  assert "sums" in result.out and "exact_match" in result.out


def test_results_lie_in_the_run(trained, tasks, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(trained, folder)
  result = call("evaluate", f"--workdir={folder}", ONE, f"--include_path={tasks}",
                "--tasks=capitals", "--num_fewshot=9", "--config.data.batch_size=48")  # fmt: skip
  assert result.code == 0, result.err
  (file,) = (folder / "evaluations").iterdir()
  assert file.name.startswith("step_20_") and str(file) in result.out
  cut = json.loads(file.read_text())["cut"]
  assert cut["requests"] == 48 and cut["tokens"] > 48
  assert "48 texts were longer than the context of 256 tokens" in result.out


def test_bad_input(trained, tasks, tmp_path):
  def refused(*arguments):
    result = call("evaluate", f"--workdir={trained}", ONE, *arguments)
    assert result.code == 2 and result.err.count("\n") == 1, result.err
    return result.err

  assert "--limit goes with --tasks" in refused("--limit=3")
  assert "no such folder" in refused("--tasks=capitals", f"--include_path={tmp_path / 'none'}")
  (tmp_path / "far.yaml").write_text(
    "task: far\ndataset_path: nobody/nothing\noutput_type: multiple_choice\ntest_split: test\n"
    "doc_to_text: a\ndoc_to_target: b\ndoc_to_choice: [b, c]\n"
  )
  (tmp_path / "odd.yaml").write_text("task: odd\ndataset_path: json\nno_such_field: 1\n")
  (tmp_path / "none.yaml").write_text(
    "task: none\ndataset_path: json\ndataset_kwargs: {data_files: {test: nowhere.jsonl}}\n"
    "output_type: multiple_choice\ntest_split: test\ndoc_to_text: a\ndoc_to_target: b\n"
  )
  own = f"--include_path={tmp_path}"
  assert "the data of task far is not on this machine" in refused("--tasks=far", own)
  assert "the data of task none is not on this machine" in refused("--tasks=none", own)
  assert "task odd can't be loaded" in refused("--tasks=odd", own)


@pytest.mark.full
def test_names_of_the_harness(trained):
  """Its own tasks are known, and their data is not fetched."""
  result = call("evaluate", f"--workdir={trained}", ONE, "--tasks=arc_esay")
  assert result.code == 2 and "did you mean arc_easy" in result.err
  result = call("evaluate", f"--workdir={trained}", ONE, "--tasks=arc_easy")
  assert result.code == 2 and "the data of task arc_easy is not on this machine" in result.err


@pytest.mark.full
def test_without_torch(trained, tasks, tmp_path):
  """In a process that does not find torch and transformers."""
  file = tmp_path / "found.json"
  result = spawn(tmp_path, "evaluate", f"--workdir={trained}", ONE, f"--include_path={tasks}",
                 "--tasks=capitals,sums", f"--results={file}", script=HIDE)  # fmt: skip
  assert result.code == 0 and result.err == "", result.err
  assert json.loads(file.read_text())["results"].keys() == {"capitals", "sums"}
