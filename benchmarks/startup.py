"""Seconds from typing the command to the first finished step, cold and with the compilation cache.

python benchmarks/startup.py [--config=moe_tiny] [--runs=3]

Each run is a new process in a new work directory. Cold: an empty cache folder. Warm: the one that
the cold run filled.
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


def first_step(config: str, cache: str, workdir: str) -> float:
  """Start a run, wait for the line of its first step, stop it."""
  command = [sys.executable, "-m", "experiments.run", f"--config={config}", f"--workdir={workdir}"]
  environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONUNBUFFERED": "1"}
  began = time.monotonic()
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
    assert process.stdout is not None
    for line in process.stdout:
      if " step 1/" in line:
        seconds = time.monotonic() - began
        process.kill()
        return seconds
  raise RuntimeError(f"{' '.join(command)} ended before its first step")


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--config", default="moe_tiny")
  parser.add_argument("--runs", type=int, default=3)
  arguments = parser.parse_args()
  cold, warm = [], []
  with tempfile.TemporaryDirectory() as folder:
    for i in range(arguments.runs):
      cache = f"{folder}/cache{i}"
      cold.append(first_step(arguments.config, cache, f"{folder}/cold{i}"))
      warm.append(first_step(arguments.config, cache, f"{folder}/warm{i}"))
  peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
  summary = lambda x: {"min": min(x), "median": statistics.median(x), "max": max(x)}
  result = {"config": arguments.config, "cold_s": summary(cold), "warm_s": summary(warm)}
  print(json.dumps(result | {"peak_bytes": peak, "cores": os.cpu_count(),
                             "python": platform.python_version()}, indent=1))  # fmt: skip


if __name__ == "__main__":
  main()
