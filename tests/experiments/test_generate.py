"""`generate` and `evaluate` read what a run left."""

import json
import re
import shutil

import pytest

from tests.experiments.programs import ONE, call, spawn, steps

pytestmark = pytest.mark.xdist_group("run")


def generate(folder, *arguments):
  result = call("generate", f"--workdir={folder}", ONE, *arguments)
  assert result.code == 0, result.err
  return result


def test_prompt_is_continued(trained):
  greedy = ("--temperature=0", "--prompt=The ", "--max_tokens=24")
  result = generate(trained, *greedy)
  assert result.out.startswith("The ") and result.out.endswith("\n")
  assert 4 < len(result.out) <= 4 + 24 + 1 and result.err == ""
  assert generate(trained, *greedy).out == result.out
  longer = generate(trained, "--temperature=0", "--prompt=The ", "--max_tokens=40")
  assert longer.out.startswith(result.out.rstrip("\n").rstrip("\ufffd"))


def test_seed_and_top_k(trained):
  draws = ("--prompt=The ", "--max_tokens=32", "--temperature=1.5")
  first = generate(trained, *draws, "--seed=1").out
  assert generate(trained, *draws, "--seed=1").out == first
  assert generate(trained, *draws, "--seed=2").out != first
  one = generate(trained, *draws, "--top_k=1").out  # the likeliest alone: greedy
  assert one == generate(trained, "--prompt=The ", "--max_tokens=32", "--temperature=0").out


def test_context_that_fills_up_is_said(trained):
  result = generate(trained, "--prompt=" + "x" * 250, "--max_tokens=40", "--temperature=0")
  assert len(result.out.rstrip("\n")) <= 256
  assert "the context of 256 tokens is full" in result.err


def test_empty_prompt_starts_a_document(trained):
  assert len(generate(trained, "--max_tokens=8").out) > 1


def test_several_prompts_and_json_lines(trained, tmp_path):
  """A prompt's text is its own, whatever stands beside it and however many run at once."""
  file = tmp_path / "prompts.jsonl"
  file.write_text('{"prompt": "A b", "id": 7}\n\n{"prompt": "once "}\n')
  common = ("--max_tokens=12", "--temperature=1.2", "--top_p=0.9", "--json")
  three = ("--prompt=The ", f"--prompts={file}")
  lines = generate(trained, *three, *common, "--logprobs", "--batch=2").out.splitlines()
  found = [json.loads(line) for line in lines]
  assert [one["prompt"] for one in found] == ["The ", "A b", "once "] and found[1]["id"] == 7
  for one in found:
    assert one["finish_reason"] in ("stop", "length") and one["prompt_tokens"] > 0
    assert 0 < len(one["tokens"]) == len(one["logprobs"]) <= 12
    assert all(x <= 0 for x in one["logprobs"])
  (alone,) = generate(trained, "--prompt=The ", *common, "--batch=2").out.splitlines()
  assert json.loads(alone)["text"] == found[0]["text"]
  plain = generate(trained, *three, *common[:-1], "--batch=2").out
  assert plain == "".join(f"{one['prompt']}{one['text']}\n\n" for one in found)


def test_stop_strings_and_log_probabilities(trained):
  greedy = ("--temperature=0", "--prompt=The ", "--max_tokens=24")
  whole = generate(trained, *greedy).out[4:-1]
  stop = whole[6:8]
  cut = generate(trained, *greedy, f"--stop={stop}", "--stop=never there").out
  assert cut == f"The {whole[: whole.index(stop)]}\n"
  table = generate(trained, *greedy, "--logprobs").out.removeprefix(f"The {whole}\n").splitlines()
  assert len(table) == 24 + 1 and all(float(line.split()[0]) <= 0 for line in table[:-1])


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--top_p=1.5"], "--top_p=1.5: give a probability above 0"),
    (["--min_p=nan"], "--min_p=nan: give a share"),
    (["--temperature=-1"], "--temperature=-1.0: give 0 for greedy"),
    (["--repetition_penalty=0"], "--repetition_penalty=0.0: give a positive number"),
    (["--temperature=0", "--top_k=5"], "--temperature=0 takes the likeliest token, so --top_k=5"),
    (["--stop="], "--stop is empty"),
    (["--system=x"], "--system belongs to --chat"),
    (["--chat", "--json"], "--json needs prompts"),
    (["--prompts=/absent"], "--prompts=/absent can't be read"),
  ],
)
def test_flags_that_mean_nothing_are_named(arguments, message, tmp_path):
  result = call("generate", f"--workdir={tmp_path}", *arguments)
  assert (result.code, result.out) == (2, "") and result.err.startswith(f"error: {message}")


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("", "holds no prompt"),
    ("\n \n", "holds no prompt"),
    ('{"prompt": "a"}\n{"prompt": 3}', "line 2: its prompt is no text"),
    ('{"text": "a"}', 'line 1: give {"prompt": TEXT}'),
    ('{"messages": []}', "line 1: messages are a list"),
    ('{"messages": [{"role": "me", "content": "a"}]}', "system or user or assistant"),
    ("[", "line 1 is no JSON"),
  ],
)
def test_bad_files_of_prompts_are_refused(content, message, tmp_path):
  file = tmp_path / "a.jsonl"
  file.write_text(content)
  result = call("generate", f"--workdir={tmp_path}", f"--prompts={file}")
  assert result.code == 2 and message in result.err and result.err.count("\n") == 1


def test_a_prompt_over_the_context_is_named(trained):
  result = call("generate", f"--workdir={trained}", ONE, "--prompt=a", "--prompt=" + "b" * 400)
  assert result.code == 2 and "'" + "b" * 37 + "...' has 400 tokens" in result.err


def test_a_model_without_a_template_does_not_chat(trained):
  result = call("generate", f"--workdir={trained}", ONE, "--chat")
  assert result.code == 2 and "has no chat template" in result.err


def test_reads_without_writing(trained, tmp_path):
  """In a folder that another process may be writing: not a byte changes."""
  folder = tmp_path / "run"
  shutil.copytree(trained, folder)
  before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}
  generate(folder, "--max_tokens=4")
  assert call("evaluate", f"--workdir={folder}", ONE).code == 0
  assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")} == before


def test_evaluate_repeats_the_last_held_out_loss(trained):
  rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
  stored = [row for row in rows if "heldout_loss" in row][-1]
  result = call("evaluate", f"--workdir={trained}", ONE)
  assert result.code == 0 and result.err == "", result.err
  assert f"debug at step {steps(trained)[-1]}, 2,048 held-out tokens" in result.out
  assert f"loss          {stored['heldout_loss']:.6f} nats a token" in result.out
  assert f"bits a byte   {stored['heldout_bits_per_byte']:.4f}" in result.out
  part = call("evaluate", f"--workdir={trained}", ONE, "--config.eval.batches=1")
  assert re.search(r", 51\d held-out tokens", part.out)  # 8 rows of 64, less document starts


def test_a_process_of_its_own_is_quiet(trained, tmp_path):
  arguments = (f"--workdir={trained}", "--prompt=The ", "--max_tokens=16", "--temperature=0", ONE)
  result = spawn(tmp_path, "generate", *arguments)
  assert (result.code, result.err) == (0, "")
  assert result.out == generate(trained, *arguments[1:4]).out
