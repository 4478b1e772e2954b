"""What `plan` predicts, beside what others published and what the TPU's compiler says.

python benchmarks/planning.py calibration   MFU beside that of published runs; seconds
python benchmarks/planning.py memory [N ...] [groups]  beside the compiler's; seconds each
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

from experiments import cli
from experiments.overrides import apply_overrides
from experiments.planning.buffers import by_group
from experiments.planning.compiled import print_groups
from experiments.planning.compiling import memory_apart
from experiments.planning.estimate import memory
from experiments.planning.search import abstract_mesh, move, search, start
from experiments.planning.speed import mfu, step_time
from experiments.training.setup import build
from mesh.hardware import CHIPS, device_memory_bytes
from mesh.topology import describe_devices

MAXTEXT = "MaxText docs/reference/models/tiering.md"
# config, chips, positions of a row, published MFU, whether constants were fitted on it, the layout
# if it is known (else the one that `plan` finds best for batches of 2^22 tokens), source.
FUJI = {"data.batch_size": "1024", "mesh.data": "4", "mesh.dcn_data": "4", "mesh.fsdp": "256"}
PUBLISHED = [
  ("llama2:70b", "v6e", 256, 4096, 0.438, True, {}, MAXTEXT),
  ("llama3:70b", "v6e", 256, 8192, 0.5033, False, {}, MAXTEXT),
  ("llama3:8b", "v6e", 256, 8192, 0.4546, False, {}, MAXTEXT),
  ("mixtral:8x7b", "v6e", 256, 4096, 0.3523, True, {}, MAXTEXT),
  ("mixtral:8x22b", "v6e", 256, 4096, 0.362, False, {}, MAXTEXT),
  ("llama2:70b", "v5p", 512, 4096, 0.654, True, {}, MAXTEXT),
  ("mixtral:8x7b", "v5p", 256, 4096, 0.5256, False, {}, MAXTEXT),
  ("palm:540b", "v4", 6144, 2048, 0.462, False,
   {"mesh.data": "2", "mesh.fsdp": "256", "mesh.tensor": "12", "train.remat": "full",
    "mesh.rules": "all,kv_heads=,act_kv_heads=,vocab=,act_vocab="}, "arXiv 2204.02311"),
  ("opt:175b", "a100", 1024, 2048, 0.35, True,
   {"mesh.fsdp": "128", "mesh.tensor": "8", "train.remat": "full"},
   "arXiv 2205.01068: 147 TFLOP/s of hardware FLOP on 992"),
  ("llama3:8b", "h100", 8, 8192, 0.391, False, {"data.batch_size": "8", "mesh.fsdp": "8",
   "train.remat": "full"}, "torchtitan, 6,667 tokens/s on GPUs of 500 W"),
  ("llama2:7b", "h100", 256, 4096, 0.39, False, {}, "AXLearn fuji.py"),
  ("llama2:7b", "v5e", 1024, 4096, 0.46, False, FUJI | {"train.remat": "dots"}, "AXLearn fuji.py"),
  ("llama2:70b", "v5e", 1024, 4096, 0.5987, True, FUJI | {"train.remat": "offload"},
   "AXLearn fuji.py"),
]  # fmt: skip


def calibration() -> None:
  print("| model | chips | layout | published MFU | predicted | off | fitted on | source |")
  print("|---|---|---|---|---|---|---|---|")
  errors: dict[bool, list[float]] = {True: [], False: []}
  for name, kind, chips, length, published, fitted, layout, source in PUBLISHED:
    own = {"data.row_length": str(length)}
    if not layout:
      own["data.batch_size"] = str(2**22 // length)
    config = apply_overrides(cli.named_config(name), list((own | layout).items()))
    chip = CHIPS[kind]
    if layout:
      sizes = {axis: getattr(config.mesh, axis) or 1 for axis in ("data", "fsdp", "tensor")}
      setup = move(start(config), config, abstract_mesh(sizes))
      seconds, label = step_time(setup, chip).total, " x ".join(layout.values())
    else:
      best = search(start(config), chip, chips)[0]
      assert best.fits, name
      setup, seconds, label = best.setup, best.step.total, best.name
    predicted = mfu(setup, chip, seconds)
    off = predicted / published - 1
    errors[fitted].append(abs(off))
    cells = (name, f"{chips} {kind}", label, f"{published:.1%}", f"{predicted:.1%}", f"{off:+.0%}")
    print("|", " | ".join((*cells, "yes" if fitted else "no", source)), "|", flush=True)
  for fitted, title in ((True, "fitted on"), (False, "held out")):
    each = errors[fitted]
    print(f"\n{title}: median {statistics.median(each):.0%}, worst {max(each):.0%} of {len(each)}")


# config, topology, overrides.
CASES = [
  ("dense_1b", "v5p:2x4x4", "train.remat=minimal mesh.fsdp=-1"),
  ("dense_1b", "v5p:2x4x4", "train.remat=full mesh.fsdp=-1"),
  ("dense_1b", "v5p:2x4x4", "train.remat=dots mesh.fsdp=-1"),
  ("dense_1b", "v5p:2x4x4", "train.remat=none mesh.fsdp=-1 data.batch_size=64"),
  ("dense_1b", "v5p:2x4x4", "train.remat=minimal mesh.fsdp=8 mesh.tensor=4"),
  ("dense_1b", "v5p:2x4x4", "train.remat=minimal mesh.fsdp=-1 train.microbatches=4"),
  ("dense_1b", "v5p:2x4x4", "train.remat=full mesh.fsdp=-1 train.microbatches=4"),
  ("gpt3:1.3b", "v5e:4x4", "train.remat=full mesh.fsdp=-1"),
  ("gpt3:1.3b", "v5p:2x4x4", "train.remat=minimal mesh.fsdp=-1"),
  ("gpt3:6.7b", "v5p:2x4x4", "train.remat=full mesh.fsdp=-1"),
  ("opt:1.3b", "v5p:2x4x4", "train.remat=full mesh.fsdp=-1"),
  ("gemma3:4b", "v5p:2x4x4", "train.remat=full mesh.fsdp=-1"),
  ("palm:8b", "v5p:2x4x4", "mesh.fsdp=-1 data.batch_size=512"),
  ("llama3:8b", "v5p:2x4x4", "train.remat=minimal mesh.fsdp=-1 data.batch_size=64"),
  ("moe_8x1b", "v5p:2x4x4", "train.remat=minimal"),
  ("moe_8x1b", "v5p:2x4x4", "train.remat=full"),
  ("moe_70b", "v5p:4x4x4", ""),
  ("moe_70b", "v5p:4x4x4", "train.remat=minimal train.microbatches=4"),
  ("mixtral:8x7b", "v5p:4x4x8", ""),
  ("llama2:70b", "v5p:4x4x8", "mesh.fsdp=-1"),
  ("opt:175b", "v5p:4x8x8", "mesh.fsdp=-1"),
]


def memory_table() -> None:
  chosen = [CASES[int(n)] for n in sys.argv[2:] if n.isdecimal()] or CASES
  print("| config | topology | changed | arguments GB: compiled, estimate | all GB | off | s |")
  print("|---|---|---|---|---|---|---|")
  for name, topology, text in chosen:
    overrides = [(path, value) for path, _, value in (x.partition("=") for x in text.split())]
    setup = build(apply_overrides(cli.named_config(name), overrides), describe_devices(topology))
    arguments = [f"--config={name}", f"--topology={topology}"]
    arguments += [f"--config.{path}={value}" for path, value in overrides]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
      peak = memory_apart(arguments, Path(folder))
    took, ours, theirs = time.monotonic() - began, memory(setup), by_group(peak.buffers)
    given = sum(theirs[group] for group in ("parameters", "optimizer", "batch"))
    pairs = ((given, ours.arguments), (peak.total, ours.total))
    cells = [f"{theirs / 1e9:.2f}, {mine / 1e9:.2f}" for theirs, mine in pairs]
    off = f"{ours.total / peak.total - 1:+.0%}"
    print("|", " | ".join((name, topology, text, *cells, off, f"{took:.0f}")), "|", flush=True)
    if "groups" in sys.argv[2:]:
      print_groups(ours, peak, device_memory_bytes(setup.mesh.devices.flat[0]))


if __name__ == "__main__":
  {"calibration": calibration, "memory": memory_table}[sys.argv[1]]()
