"""`plan` compiles for a TPU that is not here; its mistakes are in `test_bad_input`."""

import re

import jax
import pytest

from experiments import plan
from tests.experiments.programs import call, spawn


def test_debug_fits_four_v5e(tmp_path):
  """In a process of its own: libtpu speaks to stderr, and is asked not to."""
  result = spawn(tmp_path, "plan", "--config=debug", "--topology=v5litepod-4")
  assert result.code == 0, result.err
  assert result.err == ""
  assert "debug on 4 x v5e, mesh expert=4" in result.out
  assert re.search(r"^peak +[\d.]+ MB a device of 17.2 GB: fits$", result.out, re.MULTILINE)


@pytest.mark.parametrize(("status", "code"), (("RESOURCE_EXHAUSTED", 2), ("INTERNAL", 1)))
def test_a_model_that_does_not_fit_is_said_in_one_line(status, code, monkeypatch):
  def lower_step(setup):
    raise jax.errors.JaxRuntimeError(f"{status}: Ran out of memory in hbm.\nmore\nlines")

  monkeypatch.setattr(plan, "lower_step", lower_step)
  cached = jax.config.jax_enable_compilation_cache
  result = call("plan", "--config=debug", "--topology=v5e:2x2")
  jax.config.update("jax_enable_compilation_cache", cached)
  assert result.code == code
  if code == 2:
    line = "error: debug does not fit 4 x v5e: Ran out of memory in hbm. Try more --config.train"
    assert result.err.startswith(line) and result.err.count("\n") == 1
