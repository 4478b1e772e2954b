"""The logbook of a run: look into it, add to it, show it around.

python -m experiments.logbook show --workdir=PATH          totals, time, every event
python -m experiments.logbook note "TEXT" --workdir=PATH   a note of yours, while it trains too
python -m experiments.logbook report --workdir=PATH        logbook.html, a page for any browser

All three make LOGBOOK.md anew, and say so where a line is not as it was written.
"""

import contextlib
import getpass
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.table import Table

from . import bucket, cli
from .book.facts import Facts, gather, state
from .book.page import write_page
from .book.text import by_class, time_line, times, totals, write_book
from .config import ConfigError
from .training.logbook import Logbook

_ABOUT = flags.DEFINE_string(
  "about", "", "With note: the event that it explains, by the last digits of its id."
)

_COMMANDS = "show, note TEXT or report"


def main(arguments: list[str]) -> int:
  command, *rest = arguments or [""]
  if command not in ("show", "note", "report"):
    what = f"unknown command {command!r}" if command else "which part of it"
    raise ConfigError(f"{what}: give {_COMMANDS} (--help says more)")
  if command == "note" and (len(rest) != 1 or not rest[0].strip()):
    raise ConfigError('a note is one argument, in quotes: note "TEXT"')
  if command != "note" and rest:
    raise ConfigError(f"unexpected argument {rest[0]!r} after {command}")
  if _ABOUT.value and command != "note":
    raise ConfigError("--about goes with note")
  folder = cli.require_workdir()
  if command == "note":
    add_note(folder, rest[0].strip())
  facts = gather(folder)
  written = write_book(folder)
  if command == "show":
    show(facts)
  elif command == "report":
    with _writing(folder):
      print(f"report: {bucket.home(write_page(facts))}")
  elif written:
    print(f"noted in {bucket.home(written)}")
  if facts.problems:
    raise ConfigError("; ".join(facts.problems))
  return cli.FINISHED


def add_note(folder: Path, text: str) -> None:
  """Into the notes' own file, by this user.

  Raises:
    ConfigError: no event, or several, with the id of `--about`; the folder can't be written.
  """
  refs = []
  if _ABOUT.value:
    ids = [event["id"] for event in gather(folder).events]
    refs = [name for name in ids if name.endswith(_ABOUT.value)]
    if len(refs) != 1:
      many = "no event's id ends" if not refs else f"the ids of {len(refs)} events end"
      raise ConfigError(
        f"--about={_ABOUT.value}: {many} so; LOGBOOK.md and logbook.jsonl have them"
      )
  owner = None
  with contextlib.suppress(OSError, KeyError):  # a user without a name
    owner = getpass.getuser()
  with _writing(folder):
    book = Logbook(folder, "human", owner=owner)
    book.event("note", text.splitlines()[0], refs=refs, text=text, tags=[])
    book.close()


@contextlib.contextmanager
def _writing(folder: Path):
  try:
    yield
  except OSError as e:
    raise ConfigError(f"can't write to {folder}: {e.strerror or e}") from e


def show(facts: Facts) -> None:
  """Print the whole book."""
  console = Console(highlight=False, soft_wrap=True)
  console.print(f"{facts.name}: {state(facts)}\n", markup=False)
  _print(console, (), totals(facts))
  if facts.ledger is not None:
    console.print()
    _print(console, ("", "time", "share"), times(facts))
    if facts.ledger.failures:
      console.print()
      head = ("ended by", "times", "steps lost", "time lost")
      _print(console, head, by_class(facts.ledger.failures))
  console.print()
  for line in time_line(facts):
    console.print(line, markup=False)


def _print(console: Console, head, rows) -> None:
  table = Table(box=None, pad_edge=False, show_header=bool(head), padding=(0, 2, 0, 0))
  for i in range(len(rows[0])):
    justify = "right" if head and i else "left"
    table.add_column(head[i] if head else "", justify=justify, overflow="fold")
  for row in rows:
    table.add_row(*(cell.replace("[", "\\[") for cell in row))
  console.print(table)


if __name__ == "__main__":
  cli.run(main)
