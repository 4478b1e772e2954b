"""Memory of compiled programs by use: against counts by hand, and estimates against it."""

import sys

import pytest

from experiments import cli
from experiments.overrides import apply_overrides
from experiments.planning.buffers import at_peak, by_group
from experiments.planning.compiling import CompilerError, compile_apart, memory_apart
from experiments.planning.estimate import memory
from experiments.training.setup import build
from mesh.topology import describe_devices

pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu, which is Linux x86-64 only")


def flags(name: str, topology: str, text: str) -> list[str]:
  return [f"--config={name}", f"--topology={topology}", *(f"--config.{x}" for x in text.split())]


def test_groups_are_what_one_counts(tmp_path):
  """Half a batch of dense_1b on 16 chips: 8 rows of 4,096 tokens a device, 16 layers.

  Too much for a v5e, which the process says by itself, and the report is there all the same.
  """
  seen = []
  arguments = flags("dense_1b", "v5e:4x4", "train.remat=minimal train.microbatches=2")
  compiled = compile_apart(arguments, tmp_path, seen.append)
  assert "HBM" in compiled.refused and not compiled.text
  (peak,) = seen
  assert peak == at_peak(tmp_path)
  found = by_group(peak.buffers)
  layers, tokens, width, hidden, bf16 = 16, 8 * 4096, 2048, 8192, 2
  assert found["kept: layer inputs"] == layers * tokens * width * bf16
  assert found["kept: mlp"] == 2 * layers * tokens * hidden * bf16  # before and in the gate
  # Queries and what attention gives, twice, and its result: heads of 64 lie in tiles of 128.
  assert found["kept: attention"] == pytest.approx(
    layers * tokens * bf16 * (2 * 2 * width + 2 * width + (2 + 1) * 512), rel=0.01
  )
  parameters = 4 * 1_235_814_400 / 16  # Llama 3.2 1B, in float32
  assert found["parameters"] == pytest.approx(parameters, rel=1e-3)
  assert found["optimizer"] == pytest.approx(2 * parameters, rel=1e-3)
  # Those of one half and their sum; of the table, whose whole one is the loss's, the sum.
  table = 4 * 128_256 * width / 16
  assert found["gradients"] == pytest.approx(2 * parameters - table, rel=0.01)
  assert found["the loss and its gradient"] == pytest.approx(16 * table, rel=0.01)
  assert 0 <= peak.gaps < 0.02 * peak.total
  assert all("Block/" in b.where for b in peak.buffers if b.group.startswith("kept: mlp"))


PAIRS = [
  ("dense_1b", "v5p:2x4x4", "train.remat=full mesh.fsdp=-1"),
  ("dense_1b", "v5e:4x4", "train.remat=dots mesh.fsdp=-1 train.microbatches=4"),
  ("gpt3:1.3b", "v6e:4x4", "train.remat=minimal mesh.fsdp=-1"),
  ("moe_8x1b", "v5p:2x4x4", "train.remat=full"),
  ("dense_1b", "v5p:2x4x4", "train.remat=minimal mesh.fsdp=8 mesh.tensor=4"),
]
MORE_PAIRS = [
  ("dense_1b", "v5p:2x4x4", "train.remat=none mesh.fsdp=-1 data.batch_size=64"),
  ("gpt3:6.7b", "v5p:2x4x4", "train.remat=full mesh.fsdp=-1"),
  ("gemma3:4b", "v5p:2x4x4", "train.remat=full mesh.fsdp=-1"),
  ("palm:8b", "v5p:2x4x4", "mesh.fsdp=-1 data.batch_size=512"),
  ("llama3:8b", "v5p:2x4x4", "train.remat=minimal mesh.fsdp=-1 data.batch_size=64"),
  ("moe_8x1b", "v5p:2x4x4", "train.remat=minimal"),
  ("moe_70b", "v5p:4x4x4", ""),
]


@pytest.mark.parametrize(
  ("name", "topology", "text"),
  [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.full) for pair in MORE_PAIRS)],
)
def test_estimates_agree_with_the_compiler(name, topology, text, tmp_path):
  peak = memory_apart(flags(name, topology, text), tmp_path)
  overrides = [tuple(x.split("=")) for x in text.split()]
  config = apply_overrides(cli.named_config(name), overrides)
  mine = memory(build(config, describe_devices(topology)))
  found = by_group(peak.buffers)
  given = found["parameters"] + found["optimizer"] + found["batch"]
  assert mine.arguments == pytest.approx(given, rel=0.01)
  assert mine.total == pytest.approx(peak.total, rel=0.15)
  assert 0 <= peak.gaps < 0.12 * peak.total  # 10.2% for palm:8b


def test_a_compiler_that_dies_leaves_its_last_lines(tmp_path, monkeypatch):
  with pytest.raises(
    CompilerError, match=r"exit code 2; its last lines:\n.*no config named 'debut'"
  ):
    memory_apart(["--config=debut", "--topology=v5e:2x2"], tmp_path)
  fake = tmp_path / "python"
  fake.write_text("#!/bin/sh\necho 'Check failed: no such layout' >&2\nkill -6 $$\n")
  fake.chmod(0o755)
  monkeypatch.setattr(sys, "executable", str(fake))
  with pytest.raises(CompilerError, match="signal 6; its last lines:\nCheck failed: no such"):
    compile_apart([], tmp_path, lambda peak: None)
