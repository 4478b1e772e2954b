"""The recommended flags are accepted by the compilers they are meant for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("libtpu", reason="libtpu is not installed: pip install libtpu")

FLAGS = Path(__file__).parents[2] / "tpu_setup" / "flags.sh"
# TPU7x has the flags of v5p.
TOPOLOGIES = {"v4": "v4:2x2x1", "v5litepod": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
COMPILE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
if sys.argv[1]:
  devices = topologies.get_topology_desc(topology_name=sys.argv[1], platform="tpu").devices
  x = jax.ShapeDtypeStruct(
    (1024, 1024), jnp.bfloat16, sharding=NamedSharding(Mesh(np.array(devices), ("x",)), P("x")))
  jax.jit(lambda a: jnp.sum(a @ a)).lower(x).compile()
else:
  jnp.ones(3).sum().block_until_ready()
print("compiled")
"""


def recommended(chip: str, slices: int) -> dict[str, str]:
  command = f'. "{FLAGS}"; flag_env {chip} {slices}'
  done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
  return dict(line.split("=", 1) for line in done.stdout.splitlines())


def start(topology: str, **environment: str) -> subprocess.Popen:
  quiet = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  outer = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
  return subprocess.Popen(
    [sys.executable, "-c", COMPILE, topology],
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=outer | quiet | environment,
  )  # fmt: skip


def test_compilers_accept_them_and_refuse_others():
  """XLA_FLAGS of GPUs are read by XLA on every platform, so a CPU will do."""
  started = {chip: start(t, **recommended(chip, 2)) for chip, t in TOPOLOGIES.items()}
  started["gpu"] = start("", **recommended("gpu", 1))
  outputs = {chip: process.communicate(timeout=120)[0] for chip, process in started.items()}
  for chip, output in outputs.items():
    assert "compiled" in output, f"{chip}: {output}"
  assert recommended("tpu7x", 2) == recommended("v5p", 2)
  assert recommended("gpu", 1).keys() == {"XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION"}
  unknown = (
    start("v5p:2x2x1", LIBTPU_INIT_ARGS="--xla_tpu_no_such_flag=true"),
    start("", XLA_FLAGS="--xla_gpu_no_such_flag=true"),
  )
  for process in unknown:
    assert "compiled" not in process.communicate(timeout=120)[0]


def test_every_row_is_whole():
  """Chips, variable, setting, what it does, where it is published."""
  done = subprocess.run(
    ["bash", "-c", f'. "{FLAGS}"; flag_table'], capture_output=True, text=True, check=True
  )
  rows = [line.split("|") for line in done.stdout.splitlines()]
  assert len(rows) > 15
  for row in rows:
    assert len(row) == 5, row
    assert all(row), row
    assert row[0] in ("tpu", "slices", "gpu", *TOPOLOGIES), row
    assert row[2].startswith("--xla_") or row[1] == "XLA_PYTHON_CLIENT_MEM_FRACTION"
  assert len({tuple(row[:3]) for row in rows}) == len(rows)
