"""Parts of pages for a browser: text, bars of parts, tables."""

import html
from collections.abc import Iterable, Sequence

COLORS = (
  "#3b6ea5", "#7aa6d2", "#c0392b", "#e08e79", "#4f8f5b", "#9cc5a1", "#8e6bb0", "#c9b3dd", "#b8860b",
  "#e3c878", "#5f6a72",
)  # fmt: skip


def escape(value: object) -> str:
  return html.escape(str(value))


def bar(
  amounts: Iterable[tuple[str, float, str]], whole: float, colors: Sequence[str] = COLORS
) -> str:
  """A bar of parts, each (name, amount, as text), and its legend; parts of nothing are left out.

  Args:
    colors: of the parts that are shown, from the first again after the last.
  """
  shown = [item for item in amounts if item[1] > 0]
  spans, legend = [], []
  for i, (name, amount, words) in enumerate(shown):
    color, label = colors[i % len(colors)], f"{escape(name)} {escape(words)}"
    width = f"width:{100 * amount / whole:.2f}%"
    spans.append(f'<span style="background:{color};{width}" title="{label}"></span>')
    legend.append(f'<span><i style="background:{color}"></i>{label}</span>')
  return f"<div class=bar>{''.join(spans)}</div><div class=legend>{''.join(legend)}</div>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: Sequence[int] = ()) -> str:
  """A table of numbers, but for its first column.

  Args:
    words: further columns of text, which may be broken into lines.
  """

  def line(tag: str, cells: Sequence[str]) -> str:
    kind = lambda i: " class=text" if i in words else ""
    return "".join(f"<{tag}{kind(i)}>{escape(cell)}</{tag}>" for i, cell in enumerate(cells))

  body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
  return f"<table><tr>{line('th', head)}</tr>{body}</table>"
