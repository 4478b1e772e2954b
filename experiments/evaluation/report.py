"""What tasks found: a table for the terminal, a file for programs."""

import json
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..data.files import write_atomic

_COLUMNS = ("task", "shots", "questions", "metric", "", "value", "+/-")
_LEFT = 4  # columns that are words
_BETTER = {True: "higher is better", False: "lower is better"}


def table(found: dict[str, Any]) -> str:
  """The harness's results, a line a metric; groups above their tasks."""
  rows = [_COLUMNS]
  inside = {child for children in found["group_subtasks"].values() for child in children}
  shown: set[str] = set()

  def add(name: str, depth: int) -> None:
    if name in shown or name not in found["results"]:
      return
    shown.add(name)
    rows.extend(_lines(found, name, "  " * depth))
    for child in found["group_subtasks"].get(name, ()):
      add(child, depth + 1)

  for name in sorted(found["results"], key=lambda name: name in inside):
    add(name, 0)
  widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
  pad = lambda i, text: text.rjust(widths[i]) if i > _LEFT or i in (1, 2) else text.ljust(widths[i])
  return "\n".join("  ".join(pad(i, x) for i, x in enumerate(row)).rstrip() for row in rows)


def _lines(found: dict[str, Any], name: str, indent: str) -> list[tuple[str, ...]]:
  values = found["results"][name]
  better = found["higher_is_better"].get(name, {})
  counts = found["n-samples"].get(name, {})
  first = (
    indent + str(values.get("alias", name)).strip(" -"),
    str(found["n-shot"].get(name, "")),
    f"{counts['effective']:,}" if counts else "",
  )
  lines = []
  for key, value in sorted(values.items()):
    metric, comma, kept = key.partition(",")
    if not comma or metric.endswith("_stderr"):
      continue
    error = values.get(f"{metric}_stderr,{kept}")
    shown = f"{metric} ({kept})" if kept != "none" else metric
    line = (shown, _BETTER.get(better.get(metric), ""), _number(value), _number(error))
    lines.append((*(first if not lines else ("", "", "")), *line))
  return lines or [(*first, "", "", "", "")]


def _number(value: Any) -> str:
  return (
    f"{value:.4f}" if isinstance(value, float) else "" if value in (None, "N/A") else str(value)
  )


def write(path: Path, found: dict[str, Any]) -> None:
  """The results as JSON, whole or not at all.

  Raises:
    ConfigError: the file can't be written.
  """
  text = json.dumps(found, indent=2, default=_plain, ensure_ascii=False) + "\n"
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(str(path), text.encode("utf-8"))
  except OSError as e:
    raise ConfigError(f"the results can't be written to {path}: {e.strerror or e}") from e


def _plain(value: Any) -> Any:
  """Numbers of numpy, and functions of a task's settings."""
  return value.item() if hasattr(value, "item") else getattr(value, "__name__", str(value))
