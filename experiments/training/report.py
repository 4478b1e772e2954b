"""The report of a run: one PNG with loss, learning rate, throughput and the health of routers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .metrics import read_metrics

_TRAIN, _HELDOUT, _QUIET = "#3b6ea5", "#c0392b", "#7f7f7f"
_NUMBERED_CELLS = (12, 16)  # layers and experts up to which cells of the heatmap say their number
_LAYER_TICKS = 16


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
  every = read_metrics(folder)
  rows = [row for row in every if "loss" in row]
  heldout = [row for row in every if "heldout_loss" in row]
  if not rows:
    return None
  # Matplotlib takes a second to import, so only a program that draws pays for it.
  import matplotlib
  from matplotlib.figure import Figure

  style = {
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "lines.linewidth": 1.6,
  }  # fmt: skip
  with matplotlib.rc_context(style):
    figure = Figure(figsize=(12, 11.5 if moe_layer_indices else 8), layout="constrained")
    upper = lower = figure
    if moe_layer_indices:
      upper, lower = figure.subfigures(2, 1, height_ratios=(8, 3.5))
    axes = upper.subplots(2, 2, width_ratios=(3, 2))
    _loss(axes[0, 0], rows, heldout, baselines or {})
    _line(axes[0, 1], rows, "learning_rate", "Learning rate")
    _line(axes[1, 1], rows, "tokens_per_second", "Throughput, tokens / s")
    _load(axes[1, 0], upper, rows, moe_layer_indices)
    if moe_layer_indices:
      _routers(lower.subplots(1, 4), rows, moe_layer_indices)
    figure.suptitle(title, fontsize=13)
    path = folder / "report.png"
    temporary = folder / "report.png.tmp"
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(path)
  return path


def _numbers(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray:
  """A column; NaN where a row has no number."""
  return np.array([row.get(name) for row in rows], float)


def _loss(ax: Any, rows: list[dict], heldout: list[dict], baselines: dict[str, float]):
  steps, nats = _numbers(rows, "step"), _numbers(rows, "loss")
  scale, unit = 1.0, "nats / token"
  held = _numbers(heldout, "heldout_loss")
  bits = _numbers(heldout, "heldout_bits_per_byte")
  if np.isfinite(bits).any():  # tokens stand for as many bytes in training as in the held-out text
    scale, unit, held = np.nanmean(bits / held), "bits / byte", bits
  ax.plot(steps, nats * scale, color=_TRAIN, label="training")
  for i, (name, value) in enumerate(baselines.items()):
    style = ("--", ":", "-.")[i % 3]
    ax.axhline(value, ls=style, lw=1.3, color=_QUIET, label=f"{name}: {value:.3f}")
  if heldout:
    label = f"held out: {held[-1]:.3f}"
    ax.plot(_numbers(heldout, "step"), held, "o-", color=_HELDOUT, ms=6, label=label)
  ax.set(title=f"Loss, {unit}", xlabel="step")
  shown = np.concatenate([nats[len(nats) // 10 :] * scale, held, list(baselines.values())])
  shown = shown[np.isfinite(shown)]
  if len(shown):  # the first steps may leave the picture: what matters is the rest
    low, high = shown.min(), shown.max()
    room = 0.08 * max(high - low, 0.05 * abs(high))
    ax.set_ylim(low - room, high + room)
  ax.legend(frameon=False, loc="upper right")


def _line(ax: Any, rows: list[dict], name: str, title: str, top: float = 1.0):
  """A column over steps, from 0 on; `top` is the end of the scale when there is nothing above 0."""
  values = _numbers(rows, name)
  ax.plot(_numbers(rows, "step"), values, color=_TRAIN, clip_on=False)
  finite = values[np.isfinite(values)]
  ax.set(title=title, xlabel="step", ylim=(0, 1.1 * finite.max() if finite.any() else top))
  ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}" if value < 1e6 else f"{value:.3g}")


def _load(ax: Any, figure: Any, rows: list[dict], layers: list[int]):
  ax.grid(False)
  if not layers:
    ax.set_axis_off()
    ax.text(0.5, 0.5, "no mixture-of-experts layers", ha="center", color=_QUIET)
    return
  recent = [r["load"] for r in rows if r["step"] > rows[-1]["step"] * 0.8]
  load_LE = np.mean(recent, axis=0)
  num_experts = load_LE.shape[1]
  load_LE = load_LE * num_experts
  image = ax.imshow(load_LE, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
  ax.set(title="Expert load in the last fifth (1 = fair share)", xlabel="expert",
         ylabel="layer")  # fmt: skip
  shown = range(0, len(layers), -(-len(layers) // _LAYER_TICKS))
  ax.set_yticks(shown, [layers[i] for i in shown])
  for side in ax.spines.values():
    side.set_visible(False)
  if num_experts <= _NUMBERED_CELLS[1]:
    ax.set_xticks(range(num_experts))
  if np.all(load_LE.shape <= np.array(_NUMBERED_CELLS)):
    for (i, j), value in np.ndenumerate(load_LE):
      color = "black" if 0.45 < value < 1.55 else "white"
      ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=color)
  bar = figure.colorbar(image, ax=ax, fraction=0.04, extend="max", ticks=(0, 0.5, 1, 1.5, 2))
  bar.outline.set_visible(False)


def _routers(axes: Any, rows: list[dict], layers: list[int]):
  """Load imbalance, entropy, drops and dead experts over steps."""
  num_experts = len(rows[-1]["load"][0])
  _imbalance(axes[0], rows, layers)
  _line(axes[1], rows, "router_entropy", "Router entropy, nats")
  most = np.log(num_experts)
  axes[1].axhline(most, ls="--", lw=1.3, color=_QUIET, label=f"uniform: {most:.2f}")
  axes[1].set_ylim(0, 1.25 * max(most, 0.1))
  axes[1].legend(frameon=False, loc="upper right")
  _line(axes[2], rows, "drop_rate", "Dropped choices", top=0.01)
  axes[2].yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
  _line(axes[3], rows, "dead_experts", f"Dead experts of {num_experts * len(layers):,}")
  nonfinite = np.nansum(_numbers(rows, "nonfinite"))
  if nonfinite:
    text = f"tokens with NaN or infinite router logits: {nonfinite:,.0f}"
    axes[0].figure.suptitle(text, fontsize=11, color=_HELDOUT)


def _imbalance(ax: Any, rows: list[dict], layers: list[int]):
  """Standard deviation of expert load over its mean, of any number of layers."""
  steps = _numbers(rows, "step")
  cv_NL = np.array([np.std(r["load"], axis=1) * len(r["load"][0]) for r in rows])
  ax.plot(steps, cv_NL.mean(axis=1), color=_TRAIN, label="mean of layers")
  if len(layers) > 1:
    worst = layers[int(cv_NL[-1].argmax())]
    ax.fill_between(
      steps, cv_NL.min(axis=1), cv_NL.max(axis=1), color=_TRAIN, alpha=0.2, lw=0,
      label=f"all; worst: layer {worst}",
    )  # fmt: skip
    ax.legend(frameon=False, loc="upper right")
  top = cv_NL[len(cv_NL) // 10 :].max()  # the first steps may leave the picture
  ax.set(title="Load CV (0 = even)", xlabel="step", ylim=(0, 1.3 * max(top, 0.1)))
