"""The report of a run: one PNG with loss, learning rate, throughput and expert load."""

from pathlib import Path
from typing import Any

import numpy as np

from .metrics import read_metrics


def write_report(
  folder: Path,
  *,
  title: str,
  moe_layer_indices: list[int],
  baselines: dict[str, float] | None = None,
) -> Path | None:
  """Draw `report.png` from `metrics.jsonl`; None when nothing was logged yet.

  Args:
    moe_layer_indices: the model layer behind each row of `load`.
    baselines: horizontal lines in the loss panel, bits a byte by name.
  """
  rows = [row for row in read_metrics(folder) if "loss" in row]
  if not rows:
    return None
  # Matplotlib takes a second to import, so only a program that draws pays for it.
  import matplotlib
  from matplotlib.figure import Figure

  with matplotlib.rc_context(
    {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
  ):
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2, width_ratios=(3, 2))
    _loss(axes[0, 0], rows, [r for r in read_metrics(folder) if "heldout_loss" in r], baselines)
    _line(axes[0, 1], rows, "learning_rate", "learning rate")
    _line(axes[1, 1], rows, "tokens_per_second", "tokens / s")
    _load(axes[1, 0], figure, rows, moe_layer_indices)
    figure.suptitle(title)
    path = folder / "report.png"
    figure.savefig(path, dpi=110)
  return path


def _loss(ax: Any, rows: list[dict], heldout: list[dict], baselines: dict[str, float] | None):
  steps = [r["step"] for r in rows]
  bits = lambda nats: np.asarray(nats) / np.log(2)
  scale = next((r["heldout_bits_per_byte"] / bits(r["heldout_loss"]) for r in heldout), 1.0)
  ax.plot(steps, bits([r["loss"] for r in rows]) * scale, lw=1.2, label="training")
  if heldout:
    points = [r["heldout_bits_per_byte"] for r in heldout]
    ax.plot([r["step"] for r in heldout], points, "o-", c="C3", ms=5, label="held out")
    note = f"{points[-1]:.3f}"
    ax.annotate(note, (heldout[-1]["step"], points[-1]), textcoords="offset points",
                xytext=(-4, -14), ha="right", color="C3")  # fmt: skip
  for i, (name, value) in enumerate((baselines or {}).items()):
    ax.axhline(value, ls="--", lw=1, c=f"C{i + 4}", label=f"{name} {value:.3f}")
  ax.set(title="loss", xlabel="step", ylabel="bits / byte" if heldout else "bits / token")
  ax.legend(frameon=False)


def _line(ax: Any, rows: list[dict], name: str, title: str):
  points = [(r["step"], r[name]) for r in rows if r[name] is not None]
  ax.plot([step for step, _ in points], [value for _, value in points], lw=1.2)
  ax.set(title=title, xlabel="step", ylim=(0, None))


def _load(ax: Any, figure: Any, rows: list[dict], layers: list[int]):
  if not layers:
    ax.set_axis_off()
    ax.text(0.5, 0.5, "no mixture-of-experts layers", ha="center")
    return
  recent = [r["load"] for r in rows if r["step"] > rows[-1]["step"] * 0.8]
  load_LE = np.mean(recent, axis=0)
  load_LE = load_LE * load_LE.shape[1]
  image = ax.imshow(load_LE, aspect="auto", cmap="RdYlBu_r", vmin=0, vmax=2)
  ax.set(title="expert load, last fifth of the run (1 = fair share)", xlabel="expert",
         ylabel="layer", yticks=range(len(layers)), yticklabels=layers)  # fmt: skip
  if load_LE.shape[1] <= 16:
    ax.set_xticks(range(load_LE.shape[1]))
    for (i, j), value in np.ndenumerate(load_LE):
      color = "black" if 0.4 < value < 1.6 else "white"
      ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
  figure.colorbar(image, ax=ax, fraction=0.05)
