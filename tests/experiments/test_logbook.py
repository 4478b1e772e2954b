"""`python -m experiments.logbook`: notes while a run trains, the book printed, and its page."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from experiments.configs import dense_1b
from experiments.overrides import to_json
from experiments.training.logbook import read_logbook
from tests.experiments.book.life import Life
from tests.experiments.programs import call, spawn

BROWSER = next(
  filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def live(folder):
  """A run with one of everything: a spike and its rewind, two crashes, a change, evaluations."""
  life = Life(flops_per_token=6e12)
  loss = lambda step: 2 + 8 / (1 + step / 10)
  life.birth()
  life.spend(5, "start")
  life.launch()
  life.spend(10, "compile")

  def steps(first, last):
    for step in range(first, last + 1):
      life.spend(1, "productive")
      life.row(step, loss=loss(step) + 3 * (58 <= step <= 60 and life.attempt == 1),
               grad_norm=0.5 + step % 3, tokens_per_second=1000.0)  # fmt: skip

  steps(1, 40)
  life.event("checkpoint", 40, summary="saved", status="finished", bytes=10**9, block_s=0.5)
  life.row(40, heldout_loss=loss(40), heldout_bits_per_byte=loss(40) / 3)
  life.event("eval", 40, summary="held out: 1.200 bits a byte", suite="heldout", metrics={})
  steps(41, 60)
  spike = life.event("anomaly", 60, cls="E", severity="warn", summary="loss 3.1->6.1",
                     signal="loss", value=6.1)  # fmt: skip
  life.event("action", 60, cls="E", severity="error", summary="20 back", policy="rewind_skip",
             from_step=60, to_step=40, cause=spike, outcome="pending", skipped=[1, 2])  # fmt: skip
  life.back(40)
  steps(41, 70)
  life.event("fault", source="supervisor", cls="A", severity="error", host="a", error="x",
             summary="<script>alert('ECC')</script>")  # fmt: skip
  life.event("action", 70, source="supervisor", policy="restart", outcome="pending")
  life.now += 20
  life.birth()
  life.spend(4, "start")
  life.launch(40)
  life.back(40)
  change = {"key": "optimizer.learning_rate", "old": 3e-4, "new": 2e-4}
  life.event("action", 40, cls="F", summary="slower", policy="none", change=[change],
             outcome="pending", reason="too fast")  # fmt: skip
  steps(41, 80)
  life.event("checkpoint", 80, summary="saved", status="finished", bytes=10**9, block_s=0.5)
  life.event("milestone", 80, summary="80 %", what="80 %")
  steps(81, 100)
  life.row(100, heldout_loss=loss(100), heldout_bits_per_byte=loss(100) / 3)
  life.event("eval", 100, summary="held out: 0.900 bits a byte", suite="heldout", metrics={})
  life.event("stop", 100, summary="finished at step 100", reason="finished", exit_code=0)
  (folder / "config.json").write_text(json.dumps(to_json(dense_1b.config())))
  return life.save(folder)


@pytest.fixture
def run(tmp_path):
  folder = tmp_path / "run"
  folder.mkdir()
  return live(folder)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
  """The page, as text, and its path."""
  folder = live(tmp_path_factory.mktemp("run"))
  result = call("logbook", "report", f"--workdir={folder}")
  assert result.code == 0, result.err
  path = folder / "logbook.html"
  assert result.out == f"report: {path}\n"
  return path.read_text(), path


def test_the_book_is_printed(run):
  result = call("logbook", "show", f"--workdir={run}")
  assert result.code == 0 and result.err == ""
  assert result.out.startswith("dense_1b: Finished at step 100\n")
  assert re.search(r"^productive +1 min 40 s +52\.9%$", result.out, re.MULTILINE)  # of 189 s
  assert re.search(r"^A hardware +1 +30 +30 s$", result.out, re.MULTILINE)
  assert "step 60 REWIND_SKIP 20 back; cause " in result.out
  assert (run / "LOGBOOK.md").read_text().startswith("# dense_1b: logbook\n")


def test_a_note_goes_into_its_own_file(run):
  trainers = (run / "logbook.jsonl").read_bytes()
  result = call("logbook", "note", "two\nlines [red]", f"--workdir={run}")
  assert result.code == 0 and result.out == f"noted in {run / 'LOGBOOK.md'}\n"
  assert (run / "logbook.jsonl").read_bytes() == trainers
  note = read_logbook(run).events[-1]
  assert (note["source"], note["run"], note["summary"]) == ("human", "1.2", "two")
  assert note["detail"] == {"text": "two\nlines [red]", "tags": []}
  out = call("logbook", "show", f"--workdir={run}").out
  assert "1.2 NOTE two\n    lines [red]\n" in out
  # A second one explains the first.
  result = call("logbook", "note", "because", f"--about={note['id'][-4:]}", f"--workdir={run}")
  assert result.code == 0 and read_logbook(run).events[-1]["refs"] == [note["id"]]
  assert read_logbook(run).problems == []
  assert re.search(r"NOTE two .*  WARNING: see \w{4}$", (run / "LOGBOOK.md").read_text(), re.M)


def test_from_a_terminal(run, tmp_path):
  result = spawn(tmp_path, "logbook", "note", "by hand", "--workdir=run")
  assert result.code == 0, result.err
  assert result.out == "noted in run/LOGBOOK.md\n"


@pytest.mark.parametrize(
  ("arguments", "words"),
  (
    ((), "which part of it: give show, note TEXT or report"),
    (("burn",), "unknown command 'burn': give show, note TEXT or report"),
    (("note",), 'a note is one argument, in quotes: note "TEXT"'),
    (("note", " "), "a note is one argument"),
    (("note", "a", "b"), "a note is one argument"),
    (("show", "it"), "unexpected argument 'it' after show"),
    (("show", "--about=12"), "--about goes with note"),
    (("note", "x", "--about=zzzz"), "--about=zzzz: no event's id ends so"),
    (("note", "x", "--about="), None),
  ),
)
def test_mistakes(run, arguments, words):
  result = call("logbook", *arguments, f"--workdir={run}")
  if words is None:
    assert result.code == 0
  else:
    assert result.code == 2 and words in result.err and len(result.err.splitlines()) == 1
    assert not (run / "logbook.notes.jsonl").exists()


def test_a_folder_without_a_run(tmp_path):
  result = call("logbook", "show", f"--workdir={tmp_path}")
  assert result.code == 2 and "holds no run" in result.err


def test_an_edited_book_is_shown_and_refused(run):
  path = run / "logbook.jsonl"
  path.write_text(path.read_text().replace("loss 3.1->6.1", "nothing"))
  number = next(i for i, line in enumerate(path.read_text().splitlines(), 1) if '"anomaly"' in line)
  result = call("logbook", "show", f"--workdir={run}")
  assert result.code == 2 and "STOP finished" in result.out
  assert f"logbook.jsonl: line {number} is not as it was written" in result.err


class Reader(HTMLParser):
  """Tags and attributes; fails where tags do not close in order."""

  def __init__(self):
    super().__init__()
    self.open, self.attributes, self.tags = [], [], []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag != "meta":
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def test_one_file_that_needs_nothing_else(report):
  text, _ = report
  reader = Reader()
  reader.feed(text)
  assert reader.open == [] and reader.tags.count("script") == 1
  assert not set(reader.tags) & {"link", "img", "iframe", "object", "base", "form"}
  assert not {name for name, _ in reader.attributes} & {"src", "href", "onclick", "onload"}
  assert "url(" not in text and "@import" not in text and "fetch(" not in text
  addresses = set(re.findall(r"https?://[^'\"\s<]+", text))
  assert addresses == {"http://www.w3.org/2000/svg"}  # the name of a language
  assert "<script>alert" not in text and "&lt;script&gt;alert" in text


def marks(text, kind):
  """Pictures have each mark twice, for a desk and a phone."""
  found = re.findall(rf'<path class="{kind}(?: bad)?" d="M([\d.]+) ', text)
  assert len(found) % 2 == 0
  return [float(x) for x in found[: len(found) // 2]]


def test_every_kind_of_event_is_marked(report):
  text, _ = report
  assert {kind: len(marks(text, kind)) for kind in (
    "restarts", "rewinds", "spikes", "faults", "changes", "notes", "saves", "evals",
  )} == {
    "restarts": 1, "rewinds": 1, "spikes": 1, "faults": 1, "changes": 1, "notes": 1, "saves": 2,
    "evals": 2,
  }  # fmt: skip
  # On one axis: 40 and 80 of 100 steps, and 60 half-way between them.
  (first, second), (spike,) = marks(text, "saves"), marks(text, "spikes")
  assert spike == pytest.approx((first + second) / 2, abs=0.1)
  assert marks(text, "restarts") == [first] and marks(text, "changes") == [first]
  assert text.count('class="held"') == 4 and text.count('class="leap"') == 2
  assert len(re.findall(r'<path class="lost" d="M', text)) == 4  # two branches, drawn twice
  assert len(re.findall(r'<path class="again" d="M', text)) == 4
  assert "1.2 from step 40\nafter A hardware: &lt;script&gt;" in text


def test_bars_and_figures_agree_with_the_ledger(report):
  """By hand: 60 and 30 steps before the crash, 60 after it, a second each; 100 of them count."""
  text, _ = report
  bar = re.search(r"<div class=bar>(.*?)</div>", text)[1]
  widths = dict(re.findall(r'width:([\d.]+)%" title="(\w+)', bar))
  shares = {name: float(width) for width, name in widths.items()}
  whole = 5 + 10 + 60 + 30 + 20 + 4 + 60
  assert shares == pytest.approx({
    "productive": 100 * 100 / whole, "lost": 100 * 50 / whole, "down": 100 * 20 / whole,
    "start": 100 * 9 / whole, "compile": 100 * 10 / whole,
  }, abs=0.02)  # fmt: skip
  assert f"<b>{100 / whole:.1%}</b>" in text  # goodput


def test_a_large_run_makes_a_small_page(tmp_path):
  life = Life(steps=1_000_000)
  life.birth()
  life.launch()
  for step in range(10, 300_000, 10):
    life.spend(0.1, "productive")
    life.row(step, loss=2 + 1e3 / step, learning_rate=1e-4)
    if step % 100 == 0:
      life.event("checkpoint", step, summary="saved", status="finished")
  (tmp_path / "config.json").write_text(json.dumps(to_json(dense_1b.config())))
  result = call("logbook", "report", f"--workdir={life.save(tmp_path)}")
  assert result.code == 0, result.err
  assert (tmp_path / "logbook.html").stat().st_size < 2_000_000


# The page in a frame as wide as a phone; what it measures goes into the title of the frame's page.
FRAME = """<!doctype html><meta charset=utf-8><iframe id=f width=400 height=900></iframe><script>
const frame = document.getElementById('f');
frame.onload = () => {
  const inner = frame.contentDocument, view = frame.contentWindow;
  const found = {};
  found.wide = inner.documentElement.scrollWidth;
  found.over = [...inner.querySelectorAll('h1,h2,p,.card,figure,svg,.bar,.legend,.line li')].filter(
    e => e.getBoundingClientRect().right > 401).map(e => e.outerHTML.slice(0, 80));
  const shown = [...inner.querySelectorAll('svg')].filter(e => e.getBoundingClientRect().width);
  found.kinds = shown.map(e => e.getAttribute('class'));
  found.small = Math.min(...shown.flatMap(s => [...s.querySelectorAll('text')].map(
    t => parseFloat(view.getComputedStyle(t).fontSize) * s.getBoundingClientRect().width /
      s.viewBox.baseVal.width)));
  const move = (e, x, y) => e.dispatchEvent(new view.PointerEvent('pointermove',
    {bubbles: true, clientX: x, clientY: y}));
  const mark = shown[0].querySelector('.m path.rewinds');
  const at = mark.getBoundingClientRect();
  move(mark, at.x, at.y);
  const tip = inner.getElementById('tip');
  found.mark = tip.textContent;
  found.shown = view.getComputedStyle(tip).display;
  const box = shown[0].getBoundingClientRect();
  move(shown[0], box.right - 8, box.top + 50);
  found.point = tip.textContent;
  found.inside = tip.getBoundingClientRect().right <= 400;
  found.paper = view.getComputedStyle(inner.body).backgroundColor;
  document.title = 'done';
  document.body.append(Object.assign(document.createElement('pre'),
    {id: 'found', textContent: JSON.stringify(found)}));
};
frame.srcdoc = PAGE;
</script>"""


def chromium(tmp_path, *arguments):
  flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
           f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
  done = subprocess.run(
    [BROWSER, *flags, *map(str, arguments)], capture_output=True, text=True, timeout=120
  )
  assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
  return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_in_a_browser_as_narrow_as_a_phone(report, tmp_path):
  """Nothing hangs over, letters stay readable, and marks and curves answer to the pointer."""
  text, _ = report
  wrapper = tmp_path / "frame.html"
  quoted = json.dumps(text).replace("</", "<\\/")
  wrapper.write_text(FRAME.replace("PAGE", quoted), encoding="utf-8")
  out = chromium(tmp_path, "--virtual-time-budget=5000", "--dump-dom", wrapper.as_uri())
  found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', out, re.S)[1].replace("&gt;", ">"))
  assert found["wide"] <= 400 and found["over"] == []
  assert found["kinds"][:2] == ["narrow", "narrow"] and "wide" not in found["kinds"]
  assert found["small"] >= 9
  assert "step 60 REWIND_SKIP 20 back" in found["mark"] and found["shown"] == "block"
  assert found["point"] == "step 100\nloss 2.727" and found["inside"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_in_a_browser_in_light_and_dark(report, tmp_path):
  _, path = report
  out = chromium(tmp_path, "--dump-dom", "--window-size=1150,1500", path.as_uri())
  assert "<h2>Loss, nats</h2>" in out and 'id="tip"' in out
  pictures = []
  for name, more in (("light", []), ("dark", ["--force-dark-mode"])):
    picture = tmp_path / f"{name}.png"
    shot = (f"--screenshot={picture}", "--window-size=1150,1500", *more)
    chromium(tmp_path, *shot, path.as_uri())
    pictures.append(picture.read_bytes())
    assert len(pictures[-1]) > 50_000  # text, curves and tables, not an empty page
  assert pictures[0] != pictures[1]
