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
def tuned(given, tmp_path_factory):
  """A run with too high a learning rate for the last step to be its best."""
  folder = tmp_path_factory.mktemp("tuned") / "run"
  result = tune(
    given, folder, "--config.train.steps=8", "--config.eval.every=1", "--config.checkpoint.keep=1",
    "--config.optimizer.warmup_fraction=0.2", rate="0.3",
  )  # fmt: skip
  assert result.code == 0, result.err
  return folder, result


def test_it_starts_from_the_weights(given, tmp_path):
  """One step of next to no size, against the tensors of the file."""
  made = tune(
    given, tmp_path, "--config.train.epochs=0.1", rate="1e-12"
  )  # fmt: skip
  assert made.code == 0, made.err
  assert steps(tmp_path) == [1]  # a tenth of 36 rows, in batches of 4
  tensors = load_file(given[0] / "model.safetensors")
  assert f"weights  {given[0]}" in made.out and "alpaca: " in made.out
  stored = json.loads((tmp_path / "weights.json").read_text())
  size = (given[0] / "model.safetensors").stat().st_size
  assert stored["name"] == str(given[0])
  assert stored["files"]["model.safetensors"]["bytes"] == size
  params = restore(open_run(tmp_path, batch=False), tmp_path).params
  down = np.asarray(params["segment_0"]["layer_0"]["mlp"]["down"])
  for n in range(2):
    theirs = tensors[f"model.layers.{n}.mlp.down_proj.weight"].T
    np.testing.assert_allclose(down[n], theirs, atol=1e-9)


def test_resumed_without_the_weights(given, tmp_path):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  copies = shutil.copytree(given[0], tmp_path / "copy"), given[1]
  assert tune(given, whole, "--config.train.steps=4").code == 0
  assert tune(copies, parts, "--config.train.steps=2").code == 0
  shutil.rmtree(copies[0])
  other = tune(given, parts, "--config.train.steps=4")
  assert other.code == 2 and "train.weights" in other.err and "another run" in other.err
  same = tune(copies, parts, "--config.train.steps=4")
  assert same.code == 0, same.err
  assert steps(parts) == [1, 2, 3, 4]
  ours, theirs = state_hash(whole), state_hash(parts)
  assert ours[:2] == theirs[:2] and ours[2]["position"] == theirs[2]["position"]


def test_the_best_checkpoint(tuned):
  folder, _ = tuned
  heldout = {r["step"]: r["heldout_loss"] for r in read_metrics(folder) if "heldout_loss" in r}
  assert sorted(heldout) == list(range(1, 9))
  best = min(heldout, key=heldout.get)
  assert best != 8, "the test needs a run that gets worse"
  assert saved_steps(folder / "checkpoints") == sorted({best, 8})
  assert read_facts(folder / "checkpoints" / str(best))["loss"] == heldout[best]
  for which, step in (("best", best), ("newest", 8), (str(best), best)):
    found = call("evaluate", f"--workdir={folder}", f"--checkpoint={which}", ONE)
    assert found.code == 0, found.err
    loss = float(re.search(r"loss +([\d.]+)", found.out)[1])
    assert f"at step {step}," in found.out and loss == pytest.approx(heldout[step], abs=1e-5)


def test_choices_that_are_not_there(tuned):
  folder, _ = tuned
  for which, says in (("7.5", "give newest, best, or a step"), ("999", "no intact checkpoint of")):
    found = call("evaluate", f"--workdir={folder}", f"--checkpoint={which}", ONE)
    assert found.code == 2 and says in found.err


def test_generate_has_the_tokenizer(tuned, given):
  found = call(
    "generate", f"--workdir={tuned[0]}", "--prompt=Add 1", "--max_tokens=4", "--temperature=0", ONE
  )
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
  alone = call(
    "run", "--config=alpaca", f"--config.data.path={given[1]}", f"--workdir={tmp_path}/a"
  )
  assert alone.code == 2 and "data.tokenizer" in alone.err and "--weights" in alone.err
  assert not (tmp_path / "a").exists()


def test_long_rows_are_those_of_the_model(given, tmp_path):
  shown = tune(given, tmp_path, "--show")
  assert f"data.row_length = {LENGTH}" in shown.out  # the config's is 512


@pytest.fixture(scope="module")
def adapted(given, tmp_path_factory):
  """A LoRA run in one go, of steps that are computed twice, in two parts."""
  folder = tmp_path_factory.mktemp("adapted") / "run"
  result = tune(given, folder, *LORA, "--config.train.steps=4")
  assert result.code == 0, result.err
  return folder, result


def test_adapters_beside_the_weights(given, adapted):
  folder, result = adapted
  # Of 2 layers: rank times inputs and outputs of 32 x 32 and 48 x 32.
  assert "34,016 parameters, 576 of adapters trained" in result.out
  tensors = load_file(given[0] / "model.safetensors")
  with Checkpoints(folder / "checkpoints", read_only=True) as saved:
    config = read_config(folder)
    abstract = build(config, jax.devices()[:1], batch=False).abstract.params
    params = saved.restore_params(4, abstract)["segment_0"]["layer_0"]
  key, query = (np.asarray(params["attention"][name]) for name in ("key", "query"))
  a, b = (np.asarray(params["attention"]["query_lora"][name], np.float64) for name in "ab")
  merged = restore(open_run(folder, batch=False), folder).params["segment_0"]["layer_0"][
    "attention"
  ]
  assert set(merged) == {"query", "key", "value", "out"}
  for n in range(2):
    theirs = tensors[f"model.layers.{n}.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(key[n].reshape(32, 32), theirs.T)
    sum_of = query[n] + 16 / 2 * np.einsum("dr,rnh->dnh", a[n], b[n])  # lora.alpha is 16
    np.testing.assert_allclose(merged["query"][n], sum_of, rtol=1e-5, atol=1e-6)
    assert np.abs(merged["query"][n] - query[n]).max() > 1e-5


def test_evaluating_merged_weights_gives_the_loss_of_the_run(adapted):
  folder, _ = adapted
  last = [row["heldout_loss"] for row in read_metrics(folder) if "heldout_loss" in row][-1]
  found = call("evaluate", f"--workdir={folder}", ONE)
  assert found.code == 0, found.err
  loss = float(re.search(r"loss +([\d.]+)", found.out)[1])
  assert loss == pytest.approx(last, rel=1e-5)


def test_adapters_resumed(given, adapted, tmp_path):
  assert tune(given, tmp_path, *LORA, "--config.train.steps=2").code == 0
  resumed = tune(given, tmp_path, *LORA, "--config.train.steps=4")
  assert resumed.code == 0, resumed.err
  assert state_hash(tmp_path)[:2] == state_hash(adapted[0])[:2]
  other = tune(given, tmp_path, *LORA, "--config.lora.rank=4", "--config.train.steps=6")
  assert other.code == 2 and "lora.rank from 2 to 4" in other.err


def test_what_can_be_adapted(given, tmp_path):
  wrong = tune(given, tmp_path, "--config.lora.rank=2", "--config.lora.targets=q_proj")
  assert wrong.code == 2
  assert "no adapter can be added to 'q_proj': the model has down, gate, key, out" in wrong.err
  shown = tune(given, tmp_path, *LORA, "--show")
  assert "34,016 parameters, 34,016 active, 576 trained" in shown.out
  planned = call("plan", "--config=debug", "--topology=v5e:1x1", *LORA[:2])
  assert planned.code == 0, planned.err
