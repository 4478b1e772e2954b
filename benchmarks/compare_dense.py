"""Training throughput beside PyTorch, in one run: dense.py, torch.compile, torch eager, in turns.

python benchmarks/compare_dense.py [--torch=PYTHON] [--rounds=3] > table.md

`--torch` is a Python that has torch (default: this one, with the extra `bench`). Each round starts
every program anew; the table gives medians over rounds, so that a busy moment hits all alike.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


# What experiments.run sets for itself; given to both sides, since both may use it.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def measure(command: list[str], extra: dict[str, str]) -> dict:
  environment = os.environ | {"PYTHONPATH": str(HERE.parent), "JAX_PLATFORMS": "cpu"} | extra
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
  result = json.loads(done.stdout.splitlines()[-1])
  return result | {"name": result["name"] + (", huge pages" if extra else "")}


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--torch", default=sys.executable)
  parser.add_argument("--rounds", type=int, default=3)
  arguments = parser.parse_args()
  torch = [arguments.torch, str(HERE / "torch_dense.py")]
  ours = [sys.executable, str(HERE / "dense.py")]
  commands = [
    (command, extra)
    for extra in (HUGE_PAGES, {})
    for command in (ours, [*torch, "--compile"], torch)
  ]
  results: list[list[dict]] = [[] for _ in commands]
  for _ in range(arguments.rounds):
    for (command, extra), found in zip(commands, results, strict=True):
      found.append(measure(command, extra))
      print(found[-1]["name"], f"{statistics.median(found[-1]['seconds']):.3f} s", file=sys.stderr)
  rate = lambda r: r["tokens"] / statistics.median(r["seconds"])
  first = statistics.median(rate(r) for r in results[0])
  print(
    "| program | tokens/s (median, min to max of rounds) | first row is | warm-up | peak memory |"
  )
  print("|---|---|---|---|---|")
  for found in results:
    rates = sorted(map(rate, found))
    median = statistics.median(rates)
    print(
      f"| {found[0]['name']} | {median:,.0f} ({rates[0]:,.0f} to {rates[-1]:,.0f}) "
      f"| {first / median:.2f}x | {statistics.median(r['warm_up'] for r in found):.1f} s "
      f"| {max(r['peak_bytes'] for r in found) / 2**20:,.0f} MiB |"
    )
  print(f"\n{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")


if __name__ == "__main__":
  main()
