"""The host's memory while a checkpoint of 1 GB is read, and while it is written."""

import json
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.experiments.programs import environment

V, D, F, L = 131_072, 1024, 4096, 7
LARGEST = V * D * 4
CONFIG = {
  "model_type": "llama", "vocab_size": V, "hidden_size": D, "intermediate_size": F,
  "num_hidden_layers": L, "num_attention_heads": 8, "max_position_embeddings": 128,
  "tie_word_embeddings": True,
}  # fmt: skip
# Reads FOLDER, writes OUTPUT, and says when each began and ended, and what it held at the start.
CHILD = """
import contextlib, json, re, sys, time
from pathlib import Path
import jax
from experiments import cli, restore
from experiments.weights import save
from experiments.weights.express import express
from experiments.weights.load import by_path
from experiments.weights.open import open_weights

def held():
  return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

cli._overrides.append(("mesh.data", "1"))
folder, output = map(Path, sys.argv[1:])
with contextlib.ExitStack() as stack:
  opened = open_weights(folder, stack)
  setup = restore.setup_of(opened)
  before, began = held(), time.monotonic()
  params = jax.block_until_ready(restore.fill(opened, setup))
  ended = time.monotonic()
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps([began, ended, before + size]))
before, began = held(), time.monotonic()
leaves = by_path(params)
written = save.save(output, save.plan(express(opened.spec).table, opened.spec, leaves), leaves,
                    dtype=DTYPE)
print(json.dumps([began, time.monotonic(), before]))
print(json.dumps([size, written.parameters]))
"""


def write_zeros(folder: Path) -> int:
  """The checkpoint, as a file with a hole for each tensor; its bytes."""
  layer = {
    "input_layernorm": (D,), "post_attention_layernorm": (D,), "mlp.gate_proj": (F, D),
    "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
    **{f"self_attn.{x}_proj": (D, D) for x in "qkvo"},
  }  # fmt: skip
  shapes = {f"model.layers.{n}.{k}.weight": s for n in range(L) for k, s in layer.items()}
  shapes |= {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
  header, end = {}, 0
  for name, shape in shapes.items():
    start = end
    end += 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
    header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
  text = json.dumps(header).encode()
  with (folder / "model.safetensors").open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    file.truncate(8 + len(text) + end)
  (folder / "config.json").write_text(json.dumps(CONFIG))
  return end


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_more_than_the_largest_tensor(tmp_path, dtype):
  """At most 1.2 times the largest tensor and 500 MB, above what the process held before, and, while
  reading, above the parameters themselves, which devices hold: here they are the host.

  Counted is memory of the process's own (RssAnon), not pages of the file that the system keeps as
  long as it has room; sampled from outside every millisecond.
  """
  folder, output = tmp_path / "in", tmp_path / "out"
  folder.mkdir()
  output.mkdir()
  assert write_zeros(folder) > 1e9
  child = subprocess.Popen(
    [sys.executable, "-c", CHILD.replace("DTYPE", repr(dtype)), folder, output],
    env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  samples = []
  while child.poll() is None:
    found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{child.pid}/status").read_text())
    if found:
      samples.append((time.monotonic(), int(found[1]) * 1024))
    time.sleep(0.001)
  out, err = child.communicate()
  assert child.returncode == 0, err
  reading, writing, (size, count) = map(json.loads, out.splitlines())
  assert size == 4 * count and size > 1e9
  for what, (began, ended, base) in (("reading", reading), ("writing", writing)):
    within = [held for at, held in samples if began <= at <= ended]
    assert len(within) > 20
    above = max(within) - base
    print(f"{what}: {above / 1e6:.0f} MB above, largest tensor {LARGEST / 1e6:.0f} MB")
    assert above <= 1.2 * LARGEST + 500e6, what
