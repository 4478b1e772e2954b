"""What a config becomes on the devices that are there."""

import pytest

from experiments import cli
from experiments.overrides import apply_overrides
from experiments.training.setup import build

_MOE = "model.segments.*.layers.*.mlp."


@pytest.mark.parametrize(
  ("overrides", "expert"),
  [
    ([], 4),  # slots travel: debug has four experts
    ([(_MOE + "dispatch", "dropless")], 1),  # room for the worst case: weights travel instead
    ([(_MOE + "dispatch", "dropless"), (_MOE + "exchange", "ring")], 4),  # asked for
    ([("mesh.rules", "fsdp")], 1),
  ],
  ids=["capacity", "dropless", "ring", "rules without experts"],
)
def test_default_mesh(overrides, expert):
  """Of the eight virtual CPU devices that tests have."""
  setup = build(apply_overrides(cli.named_config("debug"), overrides))
  assert setup.mesh.shape["expert"] == expert
  assert setup.mesh.shape["fsdp"] == 8 // expert
