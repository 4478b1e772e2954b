"""Held-out loss of a run: `python -m experiments.evaluate --workdir=PATH`.

Overrides choose other data or a part of it: `--config.eval.batches=10`.
"""

import jax

from mesh.constrain import use_mesh

from . import cli
from .data.load import load
from .restore import restore
from .training.loop import batch_placer, held_out, make_held_out_step


def main() -> int:
  folder = cli.require_workdir()
  trained = restore(folder)
  setup = trained.setup
  dataset = load(setup.config.data, setup.config.model.vocab_size)
  with use_mesh(setup.mesh, setup.rules):
    step = make_held_out_step(setup, dataset)
    result = held_out(setup, dataset, step, trained.params, batch_placer(setup))
  if jax.process_index() == 0:
    print(f"{setup.config.name} at step {trained.step}, {result.tokens:,} held-out tokens")
    print(f"loss          {result.loss:.6f} nats a token")
    print(f"bits a byte   {result.bits_per_byte:.4f}")
  return cli.FINISHED


if __name__ == "__main__":
  cli.run(main)
