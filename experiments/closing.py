"""The last words of a run: how good it is, beside what, a sample, and what to do next."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from .data.tokenizer import Tokenizer
from .inference.sampling import Draw, generate
from .training.loop import Outcome
from .training.progress import duration


def print_closing(outcome: Outcome, folder: Path, baselines: dict[str, float]) -> None:
  """Held-out bits a byte beside the baselines, the files written, and the next commands."""
  config = outcome.setup.config
  console = Console(highlight=False, soft_wrap=True)
  table = Table(box=None, pad_edge=False, title_justify="left")
  table.add_column("held out, bits a byte", justify="left")
  table.add_column("", justify="right")
  mine = outcome.heldout.bits_per_byte
  rows = sorted([(mine, config.name), *((v, k) for k, v in baselines.items())], reverse=True)
  for value, name in rows:
    style = "bold" if name == config.name else None
    table.add_row(name, f"{value:.3f}", style=style)
  console.print()
  console.print(table)
  steps, run = config.train.steps, "python -m experiments.run"
  console.print(
    f"\n{steps:,} steps in {duration(outcome.seconds)}; loss curve, speed and expert load: "
    f"{folder / 'report.png'}"
  )
  console.print("\nNext")
  here = f"--workdir={folder}"
  for what, command in (
    ("train longer", f"{run} --config={config.name} {here} --config.train.steps={2 * steps}"),
    ("your own text", f"{run} --config={config.name} --config.data.path=FILE --workdir=runs/mine"),
    ("a bigger model", f"{run} --config=moe_small"),
    ("more samples", f"python -m experiments.generate {here} --prompt='The '"),
  ):
    console.print(f"  {what:<15} {command}", markup=False)


def print_sample(outcome: Outcome, tokenizer: Tokenizer) -> None:
  """A continuation of the config's prompt."""
  settings, setup = outcome.setup.config.eval, outcome.setup
  prompt = [int(i) for i in tokenizer.encode(settings.sample_prompt)]
  draw = Draw(settings.temperature, 0, tokenizer.vocab_size)
  chunks = generate(
    setup.model, outcome.state.params, [prompt], num_tokens=settings.sample_tokens, draw=draw
  )
  tokens = [int(t) for chunk in chunks for t in chunk[0]]
  if tokenizer.eod in tokens:
    tokens = tokens[: tokens.index(tokenizer.eod)]
  print(f"\nSample (temperature {settings.temperature})\n")
  text = settings.sample_prompt + tokenizer.decode(tokens)
  print("\n".join("  | " + line for line in text.splitlines()))
