"""A device whose memory runs out: the trainer's words."""

import re
from types import SimpleNamespace

import jax
import pytest

from experiments import cli
from experiments.overrides import apply_overrides
from experiments.planning.exhausted import explain
from experiments.planning.search import abstract_mesh
from experiments.training import compiled_step
from experiments.training.setup import build_on
from tests.experiments.programs import call

ERROR = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 37.20G.\nmore\nlines"


def test_the_words_name_what_fills_it_and_what_would_fit():
  """dense_1b on 16 v5e, in one part and with little recomputed."""
  changed = [("train.remat", "minimal"), ("train.microbatches", "1"), ("mesh.fsdp", "16")]
  config = apply_overrides(cli.named_config("dense_1b"), changed)
  setup = build_on(config, abstract_mesh({"fsdp": 16}), "tpu")
  tpu = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
  devices = SimpleNamespace(flat=[tpu])
  numbers = setup.mesh
  mesh = SimpleNamespace(devices=devices, shape=numbers.shape, size=16)
  words = explain(setup._replace(mesh=mesh), jax.errors.JaxRuntimeError(ERROR)).splitlines()
  assert words[0] == (
    "dense_1b ran out of memory on 16 x TPU v5 lite: Out of memory while trying to allocate 37.20G."
  )
  # 16 rows of 4,096 tokens in 16 layers, before and in the gate: 8,192 numbers of 2 bytes each.
  kept = 2 * 16 * 16 * 4096 * 8192 * 2
  assert re.search(rf"kept: mlp {kept / 1e9:.1f} GB", words[1]) and "of 17.2 GB" in words[1]
  assert words[2] == "Changes that save memory, by estimate:"
  enough = [line for line in words[3:] if "not enough" not in line]
  assert any("--config.train.microbatches=" in line for line in enough)
  assert all(" saves " in line for line in words[3:])


@pytest.mark.parametrize(("status", "code"), [("RESOURCE_EXHAUSTED", 2), ("INTERNAL", 1)])
def test_a_run_says_them_in_place_of_a_trace(status, code, tmp_path, monkeypatch):
  def make_train_step(*_, **__):
    raise jax.errors.JaxRuntimeError(ERROR.replace("RESOURCE_EXHAUSTED", status))

  monkeypatch.setattr(compiled_step, "make_train_step", make_train_step)
  result = call("run", "--config=debug", f"--workdir={tmp_path / 'run'}")
  assert result.code == code
  if code == 2:
    assert "Traceback" not in result.err
    assert result.err.startswith("error: debug ran out of memory on")
    assert "Try --config.train.remat=full or more --config.train.microbatches." in result.err
  else:
    assert "Traceback" in result.err
