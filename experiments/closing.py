"""The last words of a run: how good it is, beside what, a sample, and what to do next."""

import shlex
from pathlib import Path

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from rich.console import Console
from rich.table import Table

from . import bucket
from .cli import harmless
from .data.tokenizer import CHAT_TEMPLATE, Tokenizer, begins_with
from .inference.draw import Draw
from .inference.sampling import generate
from .training.loop import Outcome
from .training.progress import duration


def print_closing(outcome: Outcome, folder: Path, baselines: dict[str, float]) -> None:
  """Held-out bits a byte beside the baselines, the files written, and the next commands."""
  config, heldout = outcome.setup.config, outcome.heldout
  console, home = Console(highlight=False, soft_wrap=True), bucket.home(folder)
  console.print()
  if outcome.start >= config.train.steps:
    console.print(f"{home} is finished at step {outcome.step:,}: nothing left to train\n")
  if heldout.bits_per_byte is None:
    console.print(f"Held out: {heldout.loss:.3f} nats a {config.data.target}")
  else:
    table = Table(box=None, pad_edge=False, show_header=False)
    rows = [(heldout.bits_per_byte, config.name), *((v, k) for k, v in baselines.items())]
    for value, name in sorted(rows, reverse=True):
      table.add_row(f"  {name}", f"{value:.3f}", style="bold" if name == config.name else None)
    console.print("Held-out text, bits a byte (less is better)")
    console.print(table)
  steps, run = config.train.steps, "python -m experiments.run"
  console.print()
  if outcome.start < steps:
    seconds = outcome.seconds
    took = duration(seconds) if seconds >= 10 else f"{seconds:.1f} s"
    console.print(f"{steps - outcome.start:,} steps in {took}")
  console.print(f"Loss curve, speed and expert load: {home / 'report.png'}", markup=False)
  console.print("\nNext")
  here = f"--workdir={shlex.quote(str(home))}"
  commands = [
    ("train longer", f"{run} {here} --config.train.steps={2 * steps}"),
    ("your own text", f"{run} --config={config.name} --config.data.path=FILE --workdir=runs/mine"),
    ("a bigger model", f"{run} --config=moe_small"),
    ("more samples", f"python -m experiments.generate {here} --prompt='The '"),
  ]
  if config.data.source == "instructions":
    how = "--chat" if (folder / CHAT_TEMPLATE).is_file() else "--prompt=..."
    ask = f"python -m experiments.generate {here} {how}"
    commands = [commands[0], ("an answer", ask), ("the best step", f"{ask} --checkpoint=best")]
  for what, command in commands if config.data.objective == "next_token" else commands[:-1]:
    console.print(f"  {what:<15} {command}", markup=False)


def print_sample(outcome: Outcome, tokenizer: Tokenizer, *, show: bool = True) -> None:
  """A continuation of the config's prompt; all processes draw it, and one is to `show` it."""
  settings, setup = outcome.setup.config.eval, outcome.setup
  begin = begins_with(outcome.setup.config, tokenizer)
  prompt = [] if begin is None else [begin]
  prompt += [int(i) for i in tokenizer.encode(settings.sample_prompt)]
  room = setup.config.model.max_length - len(prompt)
  if room < 1:
    return  # the prompt fills the context
  draw = Draw(tokenizer.vocab_size, settings.temperature)
  chunks = generate(
    setup.model,
    jax.tree.map(_placed_by_the_compiler, outcome.state.params),
    [prompt],
    num_tokens=min(settings.sample_tokens, room),
    draw=draw,
  )
  tokens = [int(t) for chunk in chunks for t in chunk[0]]
  if not show:
    return
  if tokenizer.eod in tokens:
    tokens = tokens[: tokens.index(tokenizer.eod)]
  print(f"\nSample (temperature {settings.temperature})\n")
  text = harmless(settings.sample_prompt + tokenizer.decode(tokens))
  print("\n".join("  | " + line for line in text.splitlines()))


def _placed_by_the_compiler(x: jax.Array) -> jax.Array:
  """The same array where it is; what is computed from it needs no sharding in its type."""
  if not isinstance(x.sharding, NamedSharding):
    return x
  mesh = x.sharding.mesh
  automatic = Mesh(
    mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names)
  )
  return jax.device_put(x, NamedSharding(automatic, x.sharding.spec))
