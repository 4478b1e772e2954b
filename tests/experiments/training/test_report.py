"""The report is a picture with four panels, whatever was logged."""

import json

import matplotlib.image
import numpy as np
import pytest

from experiments.training import report
from experiments.training.report import write_report


def write(folder, steps=40, experts=8, layers=2, **changes):
  rng = np.random.default_rng(0)
  rows = []
  for step in range(1, steps + 1):
    row = {
      "step": step,
      "loss": 2 + 4 / step,
      "learning_rate": 1e-3 * step / steps,
      "tokens_per_second": None if step == 1 else 15_000.0 + step,
    }
    if experts:
      row["load"] = rng.dirichlet(np.ones(experts), layers).tolist()
    rows.append(row | changes)
  heldout = {"step": steps, "heldout_loss": 2.0, "heldout_bits_per_byte": 2.885}
  text = "".join(json.dumps(row) + "\n" for row in [*rows, heldout])
  (folder / "metrics.jsonl").write_text(text)


@pytest.fixture
def panels(monkeypatch):
  """The axes of the figure that is drawn, by title."""
  found = {}
  for name in ("_loss", "_line", "_load"):
    draw = getattr(report, name)

    def spy(ax, *arguments, draw=draw):
      draw(ax, *arguments)
      found[ax.get_title(loc="left")] = ax

    monkeypatch.setattr(report, name, spy)
  return found


def draw(folder, layers=(1, 3), **lines):
  return write_report(
    folder, title="a run", moe_layer_indices=list(layers), baselines=lines or None
  )


def test_png_with_its_panels(tmp_path, panels):
  write(tmp_path)
  path = draw(tmp_path, trigrams=2.412)
  assert path == tmp_path / "report.png"
  assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
  image = matplotlib.image.imread(path)
  assert image.shape[0] > 700 and image.shape[1] > 1000
  assert image[..., :3].std() > 0.05  # not an empty page
  assert list(panels) == [
    "Loss, bits / byte", "Learning rate", "Throughput, tokens / s",
    "Expert load in the last fifth (1 = fair share)",
  ]  # fmt: skip
  assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "report.png"]


def test_loss_is_in_the_unit_of_the_baselines(tmp_path, panels):
  write(tmp_path)
  draw(tmp_path, trigrams=2.412)
  ax = panels["Loss, bits / byte"]
  labels = [text.get_text() for text in ax.get_legend().get_texts()]
  assert labels == ["training", "trigrams: 2.412", "held out: 2.885"]
  training = ax.get_lines()[0].get_ydata()
  np.testing.assert_allclose(training[-1], (2 + 4 / 40) * 2.885 / 2.0)
  low, high = ax.get_ylim()
  assert low < 2.412 < high and low < training[-1] < high


def test_heatmap_says_layer_expert_and_load(tmp_path, panels):
  write(tmp_path)
  draw(tmp_path)
  ax = panels["Expert load in the last fifth (1 = fair share)"]
  assert [t.get_text() for t in ax.get_yticklabels()] == ["1", "3"]
  assert [t.get_text() for t in ax.get_xticklabels()] == list("01234567")
  numbers = np.array([float(t.get_text()) for t in ax.texts]).reshape(2, 8)
  np.testing.assert_allclose(numbers.mean(axis=1), 1, atol=0.01)
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  last_fifth = np.mean([r["load"] for r in rows if r["step"] > 32 and "load" in r], axis=0) * 8
  np.testing.assert_allclose(numbers, last_fifth, atol=0.006)


@pytest.mark.parametrize(
  "settings",
  (
    {"steps": 1},
    {"experts": 0},
    {"experts": 64, "layers": 16},
    {"loss": None},
    {"tokens_per_second": None},
  ),
)
def test_any_run_can_be_drawn(tmp_path, settings, panels):
  """Warnings are errors here: no empty legend, no mean of nothing."""
  write(tmp_path, **settings)
  layers = range(settings.get("layers", 2)) if settings.get("experts", 8) else ()
  assert draw(tmp_path, layers).stat().st_size > 10_000
  if settings.get("experts") == 64:
    ax = panels["Expert load in the last fifth (1 = fair share)"]
    assert not ax.texts and len(ax.get_yticklabels()) == 16


def test_synthetic_tokens_are_drawn_in_nats(tmp_path, panels):
  write(tmp_path)
  text = (tmp_path / "metrics.jsonl").read_text().replace("2.885", "null")
  (tmp_path / "metrics.jsonl").write_text(text)
  draw(tmp_path)
  assert "Loss, nats / token" in panels


def test_nothing_logged_nothing_drawn(tmp_path):
  assert draw(tmp_path) is None and not list(tmp_path.iterdir())
