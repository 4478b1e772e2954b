"""Our fit of the runs behind the default loss law, and the spread that its band is made of.

python benchmarks/loss_law.py svg_extracted_data.csv

The file is data/svg_extracted_data.csv of github.com/epoch-research/analyzing-chinchilla, read off
the plots of arXiv 2203.15556. As in arXiv 2404.10102 the five highest losses are left out.
"""

import csv
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.planning.law_fit import Run, fit_law
from experiments.planning.laws import EPOCH, TRAIN_FLOPS

RESAMPLES, LEFT_OUT = 2000, 5
CONSTANTS = ("E", "A", "B", "alpha", "beta")


def read(path: str) -> list[Run]:
  with open(path) as file:
    rows = [row for row in csv.DictReader(file) if row["loss"]]
  runs = []
  for i, row in enumerate(rows):
    params, flops = float(row["Model Size"]), float(row["Training FLOP"])
    runs.append(Run(f"row {i}", params, flops / (TRAIN_FLOPS * params), float(row["loss"])))
  return sorted(runs, key=lambda run: run.loss)[:-LEFT_OUT]


def main(path: str) -> None:
  runs = read(path)
  began = time.process_time()
  fit = fit_law(runs, resamples=RESAMPLES)
  print(f"{len(runs)} runs, {RESAMPLES} resamples, {time.process_time() - began:.0f} s of CPU")
  print("constant   published (error)      fitted     its spread")
  for i, name in enumerate(CONSTANTS):
    spread = np.std([getattr(law, name) for law in fit.resampled])
    published = f"{getattr(EPOCH, name)} ({EPOCH.errors[i]})"
    print(f"{name:<10} {published:<18} {getattr(fit.law, name):>10.4f} {spread:>14.4f}")
  # log N of the optimum is linear in log C: its scale and slope vary together.
  slope = np.array([law.exponent for law in fit.resampled])
  scale = np.log([law.optimum(TRAIN_FLOPS).params for law in fit.resampled])
  covariance = np.cov(scale, slope)
  pivot = TRAIN_FLOPS * np.exp(-covariance[0, 1] / covariance[1, 1])
  least = np.sqrt(covariance[0, 0] - covariance[0, 1] ** 2 / covariance[1, 1])
  print(f"spread of log N: {least:.4f} at {pivot:.3g} FLOPs, exponent {slope.std():.4f}")
  for compute in (1e19, 1e21, 5.76e23, 1e25):
    low, high = np.quantile([law.optimum(compute).params for law in fit.resampled], (0.1, 0.9))
    band = EPOCH.band(compute).params
    print(f"C {compute:<9.3g} N {low:.3g} to {high:.3g}; EPOCH.band {band[0]:.3g} to {band[1]:.3g}")


if __name__ == "__main__":
  main(sys.argv[1])
