"""An encoder trained on masked tokens: its loss, its run, and what it can't do."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cli import named_config
from experiments.config import Config, ConfigError, DataConfig, OptimizerConfig
from experiments.data.load import load
from experiments.data.loader import make_loader
from experiments.inference.sampling import Draw, generate
from experiments.training.step import make_eval_step
from layers.spec import AttentionSpec, HeadSpec, LayerSpec, MlpSpec, ModelSpec, RotarySpec, Segment
from layers.transformer import TransformerLM
from tests.experiments.programs import DEBUG, call, losses, metrics, random_params, state_hash
from tests.oracles import decoder

pytestmark = pytest.mark.xdist_group("run")

ATTENTION = AttentionSpec(2, 8, causal=False, mask="BigBird(4, 3, 0)", position=RotarySpec())
SPEC = ModelSpec(
  vocab_size=260,
  embed_dim=16,
  max_length=12,
  segments=(Segment((LayerSpec(ATTENTION, MlpSpec(24)),)),),
  head=HeadSpec(transform="gelu"),
)
DATA = DataConfig(objective="masked", row_length=12, batch_size=8)
ENCODER = (
  *DEBUG,
  "--config.data.objective=masked",
  "--config.model.segments.*.layers.*.attention.causal=false",
  "--config.model.segments.*.layers.*.attention.mask=BigBird(4, 16, 1)",
  "--config.eval.batches=2",
  "--config.eval.baselines=true",
)


def test_the_loss_is_of_the_masked_tokens_alone():
  """Against the float64 encoder, token by token over a batch that a step would see."""
  dataset = load(DATA, SPEC.vocab_size)
  loader = make_loader(dataset, DATA, "train")
  batch = next(loader)
  loader.close()
  model = TransformerLM(SPEC)
  params = random_params(model, 0.3)
  sums = jax.jit(make_eval_step(model, np.zeros(0)))(params, jax.tree.map(jnp.asarray, batch))
  logits = decoder.logits(
    SPEC, params, batch["tokens"], positions=batch["positions"], segments=batch["segments"]
  )
  nll, _ = decoder.losses(logits, batch["targets"])
  chosen = batch["weights"] > 0
  assert 4 < chosen.sum() < 40 and (batch["tokens"] != batch["targets"]).any()
  assert float(sums.tokens) == chosen.sum() and float(sums.bytes) == 0
  np.testing.assert_allclose(float(sums.nll), nll[chosen].sum(), rtol=1e-5)
  assert abs(nll[chosen].sum() / chosen.sum() / nll.mean() - 1) > 1e-3  # all tokens give another


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("encoder") / "run"
  result = call("run", *ENCODER, "--config.train.steps=8", f"--workdir={folder}")
  assert result.code == 0, result.err
  return folder, result


def test_a_run_reports_the_masked_loss_and_draws_no_sample(encoder):
  """Though `debug` asks for a sample and here for trigrams, which are of next tokens."""
  folder, result = encoder
  rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  rows = [row for row in rows if "heldout_loss" in row]
  assert rows[-1]["heldout_bits_per_byte"] is None
  assert f"Held out: {rows[-1]['heldout_loss']:.3f} nats a masked token" in result.out
  assert "Sample" not in result.out and "bits a byte" not in result.out
  assert "train longer" in result.out and "experiments.generate" not in result.out
  assert all(np.isfinite(row["loss"]) for row in metrics(folder))
  evaluated = call("evaluate", f"--workdir={folder}", DEBUG[1])
  assert evaluated.code == 0, evaluated.err
  assert f"{rows[-1]['heldout_loss']:.6f} nats a masked token" in evaluated.out
  assert "held-out masked tokens" in evaluated.out and "bits" not in evaluated.out


def test_a_resumed_run_is_bit_exact(encoder, tmp_path):
  whole, _ = encoder
  for steps in (3, 8):
    result = call("run", *ENCODER, f"--config.train.steps={steps}", f"--workdir={tmp_path}/run")
    assert result.code == 0, result.err
  assert state_hash(tmp_path / "run") == state_hash(whole)
  np.testing.assert_array_equal(losses(tmp_path / "run")[3:], losses(whole)[3:])


def test_an_encoder_can_t_generate(encoder):
  folder, _ = encoder
  result = call("generate", f"--workdir={folder}", DEBUG[1], "--prompt=The ")
  assert result.code == 2 and result.out == ""
  (line,) = result.err.splitlines()
  assert line.startswith("error: ") and "masked tokens" in line and "can't continue" in line
  model = TransformerLM(SPEC)
  with pytest.raises(ValueError, match="an encoder's tokens see later ones"):
    list(generate(model, {}, [[1]], num_tokens=1, draw=Draw(257)))


def test_the_objective_is_part_of_a_run_s_identity(encoder):
  folder, _ = encoder
  result = call(
    "run",
    f"--workdir={folder}",
    "--config.data.objective=next_token",
    "--config.model.segments.*.layers.*.attention.causal=true",
  )
  assert result.code == 2 and "data.objective" in result.err


def test_next_tokens_in_view_are_refused():
  config = named_config("encoder_tiny")
  with pytest.raises(ConfigError, match=r"attention.causal=false shows the next token"):
    replace(config, data=replace(config.data, objective="next_token"))
  one = replace(SPEC.layers[0], attention=replace(ATTENTION, causal=True))
  mixed = replace(SPEC, segments=(Segment((one, SPEC.layers[0])),))
  assert not mixed.causal and replace(SPEC, segments=(Segment((one,)),)).causal
  with pytest.raises(ConfigError, match=r"data.objective=masked"):
    Config("mixed", mixed, data=DataConfig(row_length=12), optimizer=OptimizerConfig())
