"""Held-out loss of a run: `python -m experiments.evaluate --workdir=PATH`.

Overrides choose other data or a part of it: `--config.eval.batches=10`.
"""

from mesh.constrain import use_mesh
from mesh.multihost import is_primary

from . import cli
from .data.load import load
from .restore import open_run, restore
from .training.evaluate import held_out, make_held_out_step
from .training.setup import batch_placer


def main() -> int:
  folder = cli.require_workdir()
  setup = open_run(folder, batch=True)
  dataset = load(setup.config.data, setup.config.model.vocab_size)
  trained = restore(setup, folder)
  with use_mesh(setup.mesh, setup.rules):
    step = make_held_out_step(setup, dataset)
    result = held_out(setup, dataset, step, trained.params, batch_placer(setup))
  if is_primary():
    target = setup.config.data.target
    print(f"{setup.config.name} at step {trained.step:,}, {result.tokens:,} held-out {target}s")
    print(f"loss          {result.loss:.6f} nats a {target}")
    if result.bits_per_byte is not None:
      print(f"bits a byte   {result.bits_per_byte:.4f}")
  return cli.FINISHED


if __name__ == "__main__":
  cli.run(main)
