"""The same model on a mesh of eight devices, through the program."""

import shutil

import numpy as np
import pytest

from tests.experiments.programs import QUICK, call, losses, steps

pytestmark = pytest.mark.xdist_group("devices")


@pytest.fixture(scope="module")
def meshed(finished, tmp_path_factory):
  """Config `debug` on eight devices, to step 15."""
  folder = tmp_path_factory.mktemp("meshed") / "run"
  mesh = ("--config.mesh.fsdp=4", "--config.mesh.expert=2")
  return folder, call("run", *QUICK, *mesh, "--config.train.steps=15", f"--workdir={folder}")


def test_fsdp_and_experts_give_the_same_losses(meshed, trained):
  folder, result = meshed
  assert result.code == 0, result.err
  assert "8 x cpu, mesh fsdp=4 x expert=2" in result.out
  np.testing.assert_allclose(losses(folder), losses(trained)[:15], rtol=1e-4)


def test_data_parallel_microbatches_give_the_same_losses(trained, tmp_path):
  """Two copies of the finished run go on, one of them on four devices in two microbatches."""
  found = {}
  parallel = ("--config.mesh.data=4", "--config.train.microbatches=2", "--reason=test")
  for name, arguments in (("one", ()), ("four", parallel)):
    folder = tmp_path / name
    shutil.copytree(trained, folder)
    quick = ("--config.train.steps=26", "--config.eval.batches=1", "--config.eval.sample_prompt=")
    result = call("run", f"--workdir={folder}", *quick, *arguments)
    assert result.code == 0, result.err
    found[name] = losses(folder)
  assert len(found["one"]) == 26
  np.testing.assert_allclose(found["four"], found["one"], rtol=1e-5)


def test_a_run_goes_on_with_another_mesh_and_generates_on_all(meshed, trained):
  folder, _ = meshed
  one = ("--config.mesh.fsdp=none", "--config.mesh.expert=none", "--config.mesh.data=1")
  result = call("run", f"--workdir={folder}", *one, "--config.train.steps=20")
  assert result.code == 0, result.err
  assert "resuming after step 15" in result.out
  assert steps(folder) == list(range(1, 21))
  np.testing.assert_allclose(losses(folder), losses(trained), rtol=1e-4)
  arguments = (f"--workdir={folder}", "--temperature=0", "--max_tokens=20", "--prompt=The ")
  all_devices = call("generate", *arguments)
  one_device = call("generate", *arguments, "--config.mesh.data=1")
  assert all_devices.code == 0, all_devices.err
  assert all_devices.out == one_device.out and len(all_devices.out) > 20


def test_a_run_with_explicit_axes_ends_with_a_sample(tmp_path):
  mesh = ("--config.mesh.fsdp=4", "--config.mesh.tensor=2", "--config.mesh.axis_types=explicit")
  short = ("--config.train.steps=2", "--config.optimizer.warmup_steps=1")
  result = call("run", "--config=debug", *mesh, *short, f"--workdir={tmp_path / 'run'}")
  assert result.code == 0, result.err
  assert "Sample (temperature" in result.out
