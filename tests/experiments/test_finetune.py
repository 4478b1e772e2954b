"""Runs that start from weights made elsewhere and learn from instructions, as a user has them."""

import json
import math
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import cli
from experiments.restore import open_run, restore
from experiments.training.checkpoint import Checkpoints
from experiments.training.folder import read_config
from experiments.training.manifest import read_facts, saved_steps
from experiments.training.metrics import read_metrics
from experiments.training.setup import build
from tests.experiments.programs import ONE, call, state_hash, steps
from tests.experiments.tiny_weights import LENGTH, make_examples, make_weights

LORA = (
  "--config.lora.rank=2", "--config.lora.targets=query,down", "--config.train.microbatches=2",
  "--config.train.verify_every=2",
)  # fmt: skip
# Too fast for the last of eight steps to be the best.
ADAPTED = (
  *LORA,
  "--config.eval.every=1",
  "--config.checkpoint.keep=1",
  "--config.checkpoint.every=5",
)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
  """Weights and examples."""
  folder = tmp_path_factory.mktemp("given")
  return make_weights(folder / "weights"), make_examples(folder / "data.jsonl")


def tune(given, workdir, *more, config="alpaca", rate="1e-3"):
  weights, data = given
  return call(
    "run", f"--config={config}", f"--weights={weights}", f"--config.data.path={data}",
    f"--workdir={workdir}", ONE, "--config.data.batch_size=4", "--config.train.log_every=1",
    "--config.data.holdout=0.1", "--config.train.remat=none",
    "--config.optimizer.decay_steps=40", f"--config.optimizer.learning_rate={rate}", *more,
  )  # fmt: skip


@pytest.fixture(scope="module")
def adapted(given, tmp_path_factory):
  """A LoRA run in one go, of steps that are computed twice, in two parts."""
  folder = tmp_path_factory.mktemp("adapted") / "run"
  result = tune(given, folder, *ADAPTED, "--config.train.epochs=0.85", rate="2")
  assert result.code == 0, result.err
  return folder, result


def test_what_a_run_says_and_keeps(given, adapted):
  folder, result = adapted
  # Of 2 layers: rank times inputs and outputs of 32 x 32 and 48 x 32.
  assert "34,016 parameters, 576 of adapters trained" in result.out
  assert f"weights  {given[0]}\n" in result.out
  assert "examples 36 to train on, 1.0 a row (" in result.out and "4 held out\n" in result.out
  assert steps(folder) == list(range(1, 9))  # 0.85 times 36 rows, in batches of 4
  stored = json.loads((folder / "weights.json").read_text())
  file = given[0] / "model.safetensors"
  assert stored["name"] == str(given[0])
  assert stored["files"]["model.safetensors"]["bytes"] == file.stat().st_size
  assert (folder / "tokenizer.json").read_bytes() == (given[0] / "tokenizer.json").read_bytes()


def test_adapters_beside_the_weights(given, adapted):
  """What is saved is what the file held, and adapters; what is read is their sum."""
  folder, _ = adapted
  tensors = load_file(given[0] / "model.safetensors")
  with Checkpoints(folder / "checkpoints", read_only=True) as saved:
    config = read_config(folder)
    abstract = build(config, jax.devices()[:1], batch=False).abstract.params
    params = saved.restore_params(8, abstract)["segment_0"]["layer_0"]
  key, query = (np.asarray(params["attention"][name]) for name in ("key", "query"))
  a, b = (np.asarray(params["attention"]["query_lora"][name], np.float64) for name in "ab")
  merged = restore(open_run(folder, batch=False), folder).params
  merged = merged["segment_0"]["layer_0"]["attention"]
  assert set(merged) == {"query", "key", "value", "out"}
  for n in range(2):
    theirs = tensors[f"model.layers.{n}.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(key[n].reshape(32, 32), theirs.T)
    sum_of = query[n] + 16 / 2 * np.einsum("dr,rnh->dnh", a[n], b[n])  # lora.alpha is 16
    np.testing.assert_allclose(merged["query"][n], sum_of, rtol=1e-5, atol=1e-5)
    assert np.abs(merged["query"][n] - query[n]).max() > 1e-3


def test_the_best_checkpoint(adapted):
  """And evaluating merged weights gives the loss that the run had with adapters."""
  folder, _ = adapted
  heldout = {r["step"]: r["heldout_loss"] for r in read_metrics(folder) if "heldout_loss" in r}
  assert sorted(heldout) == list(range(1, 9))
  best = min(heldout, key=heldout.get)
  assert best != 8, "the test needs a run that gets worse"
  assert saved_steps(folder / "checkpoints") == [best, 8]
  assert read_facts(folder / "checkpoints" / str(best))["loss"] == heldout[best]
  for which, step in (("best", best), ("newest", 8)):
    found = call("evaluate", f"--workdir={folder}", f"--checkpoint={which}", ONE)
    assert found.code == 0, found.err
    loss = float(re.search(r"loss +([\d.]+)", found.out)[1])
    assert f"at step {step}," in found.out and loss == pytest.approx(heldout[step], rel=1e-5)


def test_choices_that_are_not_there(adapted):
  for which, says in (("7.5", "give newest, best, or a step"), ("999", "no intact checkpoint of")):
    found = call("evaluate", f"--workdir={adapted[0]}", f"--checkpoint={which}", ONE)
    assert found.code == 2 and says in found.err


def test_resumed_without_the_weights(given, adapted, tmp_path):
  """To the bit, with the best checkpoint of all attempts."""
  parts = tmp_path / "parts"
  copies = shutil.copytree(given[0], tmp_path / "copy"), given[1]
  assert tune(copies, parts, *ADAPTED, "--config.train.steps=5", rate="2").code == 0
  shutil.rmtree(copies[0])
  other = tune(given, parts, *ADAPTED, "--config.train.steps=8", rate="2")
  assert other.code == 2 and "train.weights" in other.err and "another run" in other.err
  wider = tune(copies, parts, *ADAPTED[1:], "--config.lora.rank=4", rate="2")
  assert wider.code == 2 and "lora.rank from 2 to 4" in wider.err
  same = tune(copies, parts, *ADAPTED, "--config.train.steps=8", rate="2")
  assert same.code == 0, same.err
  assert steps(parts) == list(range(1, 9))
  ours, theirs = state_hash(adapted[0]), state_hash(parts)
  assert ours[:2] == theirs[:2] and ours[2]["position"] == theirs[2]["position"]
  saved = [saved_steps(folder / "checkpoints") for folder in (adapted[0], parts)]
  assert saved[0] == saved[1]


@pytest.mark.full
def test_all_weights(given, tmp_path):
  """One step of next to no size, against the tensors of the file; then on without them."""
  copies = shutil.copytree(given[0], tmp_path / "copy"), given[1]
  run = tmp_path / "run"
  made = tune(copies, run, "--config.train.steps=1", rate="1e-12")
  assert made.code == 0, made.err
  tensors = load_file(given[0] / "model.safetensors")
  params = restore(open_run(run, batch=False), run).params
  down = np.asarray(params["segment_0"]["layer_0"]["mlp"]["down"])
  for n in range(2):
    theirs = tensors[f"model.layers.{n}.mlp.down_proj.weight"].T
    np.testing.assert_allclose(down[n], theirs, atol=1e-9)
  shutil.rmtree(copies[0])
  assert tune(copies, run, "--config.train.steps=3", rate="1e-12").code == 0
  assert steps(run) == [1, 2, 3]


@pytest.mark.full
def test_generate_has_the_tokenizer(adapted):
  found = call(
    "generate", f"--workdir={adapted[0]}", "--prompt=Add 1", "--max_tokens=4", "--temperature=0",
    "--checkpoint=best", ONE,
  )  # fmt: skip
  assert found.code == 0, found.err
  assert found.out.startswith("Add 1")


def test_any_config_takes_the_model_of_the_weights(given, tmp_path):
  shown = tune(given, tmp_path, "--show", config="debug")
  assert (
    "34,016 parameters" in shown.out and "model.embed_dim = 32    # changed, was 64" in shown.out
  )


@pytest.mark.full
def test_continued_pre_training(given, tmp_path):
  text = tmp_path / "text.txt"
  text.write_text("All that a machine may read, again and again. " * 200)
  more = ("--config.train.steps=2", "--config.eval.sample_prompt=")
  found = tune((given[0], text), tmp_path / "run", *more, config="debug")
  assert found.code == 0, found.err
  assert "debug: 34,016 parameters, 2 layers" in found.out


def test_the_recipe_is_the_published_one():
  """Of the authors' README: batches of 128, 3 epochs, 2e-5, 512 tokens, 3 % warm-up, no decay."""
  config = cli.named_config("alpaca")
  chosen = config.optimizer
  assert (chosen.name, chosen.learning_rate, chosen.schedule) == ("adamw", 2e-5, "cosine")
  assert (chosen.weight_decay, chosen.warmup_fraction, chosen.final_fraction) == (0.0, 0.03, 0.0)
  assert (config.data.row_length, config.train.epochs) == (512, 3.0)
  assert config.train.steps == math.ceil(3 * 52_002 / 128) == 1219
  assert config.model == cli.named_config("llama:7b").model


def test_mistakes(given, tmp_path):
  both = tune(given, tmp_path, "--config.train.steps=2", "--config.train.epochs=1")
  assert both.code == 2 and "train.steps and train.epochs both" in both.err
  other = tune(given, tmp_path, "--config.train.weights=elsewhere")
  assert other.code == 2 and "train.weights is set by --weights" in other.err
  absent = tune((tmp_path / "absent", given[1]), tmp_path / "run")
  assert absent.code == 2 and "there is no such file or folder" in absent.err
  path = f"--config.data.path={given[1]}"
  alone = call("run", "--config=alpaca", path, f"--workdir={tmp_path}/a")
  assert alone.code == 2 and "data.tokenizer" in alone.err and "--weights" in alone.err
  assert not (tmp_path / "a").exists()
  wrong = tune(given, tmp_path, "--config.lora.rank=2", "--config.lora.targets=q_proj")
  assert wrong.code == 2
  assert "no adapter can be added to 'q_proj': the model has down, gate, key, out" in wrong.err


def test_show_counts_what_is_trained(given, tmp_path):
  shown = tune(given, tmp_path, *LORA, "--show")
  assert f"data.row_length = {LENGTH}" in shown.out  # the config's is 512
  assert "34,016 parameters, 34,016 active, 576 trained" in shown.out


@pytest.mark.full
def test_plan_counts_what_is_trained():
  """Adapters of rank 2 for queries of 64 x 64 in two layers, in place of all weights' gradients."""
  arguments = ("plan", "--config=debug", "--topology=v5e:1x1")
  plain = call(*arguments)
  planned = call(*arguments, "--config.lora.rank=2", "--config.lora.targets=query")
  assert (plain.code, planned.code) == (0, 0), planned.err
  listed = call("plan", "--config=debug", "--config.lora.rank=2", "--config.lora.targets=query")
  assert f"{2 * 2 * (64 + 64)} trained" in listed.out, listed.out
