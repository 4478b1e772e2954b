"""The report is a picture with four panels and four more of the routers, whatever was logged."""

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
      row |= {"router_entropy": 1.5, "drop_rate": 0.2 / step, "dead_experts": 3, "nonfinite": 0.0}
    rows.append(row | changes)
  heldout = {"step": steps, "heldout_loss": 2.0, "heldout_bits_per_byte": 2.885}
  text = "".join(json.dumps(row) + "\n" for row in [*rows, heldout])
  (folder / "metrics.jsonl").write_text(text)


@pytest.fixture
def panels(monkeypatch):
  """The axes of the figure that is drawn, by title."""
  found = {}
  for name in ("_loss", "_line", "_load", "_imbalance"):
    draw = getattr(report, name)

    def spy(ax, *arguments, draw=draw, **settings):
      draw(ax, *arguments, **settings)
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
  assert image.shape[0] > 1000 and image.shape[1] > 1000
  assert image[..., :3].std() > 0.05  # not an empty page
  assert list(panels) == [
    "Loss, bits / byte", "Learning rate", "Throughput, tokens / s",
    "Expert load in the last fifth (1 = fair share)", "Load CV (0 = even)", "Router entropy, nats",
    "Dropped choices", "Dead experts of 16",
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


def heading(panels):
  return panels["Dead experts of 16"].figure.get_suptitle()


def test_router_health_over_steps(tmp_path, panels):
  write(tmp_path)
  draw(tmp_path)
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][:-1]
  load = np.array([row["load"] for row in rows])
  cv = load.std(axis=2) / load.mean(axis=2)
  ax = panels["Load CV (0 = even)"]
  np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), cv.mean(axis=1))
  (band,) = ax.collections
  corners = band.get_paths()[0].vertices
  for step in (1, 40):
    edges = corners[corners[:, 0] == step, 1]
    np.testing.assert_allclose([edges.min(), edges.max()], [cv[step - 1].min(), cv[step - 1].max()])
  assert cv[4:].max() < ax.get_ylim()[1]
  labels = [text.get_text() for text in ax.get_legend().get_texts()]
  assert labels == ["mean of layers", f"all; worst: layer {(1, 3)[cv[-1].argmax()]}"]
  drops = panels["Dropped choices"]
  np.testing.assert_allclose(drops.get_lines()[0].get_ydata(), 0.2 / np.arange(1, 41))
  assert drops.yaxis.get_major_formatter()(0.05, 0) == "5 %"
  np.testing.assert_allclose(panels["Dead experts of 16"].get_lines()[0].get_ydata(), 3)
  uniform = panels["Router entropy, nats"].get_lines()[1].get_ydata()
  np.testing.assert_allclose(uniform, np.log(8))
  assert heading(panels) == ""


def test_nan_logits_are_said_in_the_picture(tmp_path, panels):
  """And rows of a run that began before a metric existed are no hindrance."""
  write(tmp_path, nonfinite=2.0)
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  for row in rows[:3]:
    del row["dead_experts"], row["nonfinite"]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  draw(tmp_path)
  assert heading(panels) == "tokens with NaN or infinite router logits: 74"


@pytest.mark.parametrize(
  "settings",
  (
    {"steps": 1},
    {"experts": 0},
    {"experts": 256, "layers": 32},
    {"experts": 8, "layers": 1, "drop_rate": 0.0, "router_entropy": None},
    {"loss": None},
    {"tokens_per_second": None},
  ),
)
def test_any_run_can_be_drawn(tmp_path, settings, panels):
  """Warnings are errors here: no empty legend, no mean of nothing."""
  write(tmp_path, **settings)
  layers = range(settings.get("layers", 2)) if settings.get("experts", 8) else ()
  assert draw(tmp_path, layers).stat().st_size > 10_000
  ax = panels["Expert load in the last fifth (1 = fair share)"] if layers else None
  if settings.get("experts") == 256:
    assert not ax.texts
    assert [t.get_text() for t in ax.get_yticklabels()] == [str(i) for i in range(0, 32, 2)]
  if settings.get("layers") == 1:
    assert len(ax.texts) == 8 and panels["Load CV (0 = even)"].get_legend() is None
    assert panels["Dropped choices"].get_ylim() == (0, 0.01)


def test_synthetic_tokens_are_drawn_in_nats(tmp_path, panels):
  write(tmp_path)
  text = (tmp_path / "metrics.jsonl").read_text().replace("2.885", "null")
  (tmp_path / "metrics.jsonl").write_text(text)
  draw(tmp_path)
  assert "Loss, nats / token" in panels


def test_nothing_logged_nothing_drawn(tmp_path):
  assert draw(tmp_path) is None and not list(tmp_path.iterdir())
