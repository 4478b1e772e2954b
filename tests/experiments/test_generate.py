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
