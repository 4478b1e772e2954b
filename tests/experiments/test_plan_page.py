"""The page that `plan --report` writes: whole, true to what is printed, and fine in a browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from experiments.planning import drawing, speed
from mesh.hardware import CHIPS
from tests.experiments.programs import call

BROWSER = next(
  filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
  """(what is printed, the page's path)."""
  path = tmp_path_factory.mktemp("plan") / "plan.html"
  result = call("plan", "--config=dense_1b", "--topology=v5p-32", f"--report={path}")
  assert result.code == 0, result.err
  assert result.out.endswith(f"report: {path}\n")
  return result.out, path


class Reader(HTMLParser):
  """Text, open tags and attributes; fails where tags do not close in order."""

  def __init__(self):
    super().__init__()
    self.open, self.words, self.attributes, self.tags = [], [], [], set()

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    self.attributes += attrs
    if tag != "meta":
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.words.append(data)


def test_one_file_that_says_what_is_printed(plan):
  out, path = plan
  reader = Reader()
  reader.feed(path.read_text())
  assert reader.open == []
  assert not reader.tags & {"script", "link", "img", "iframe", "object"}
  assert not {name for name, _ in reader.attributes} & {"src", "href"}
  assert "url(" not in path.read_text() and "@import" not in path.read_text()
  text = " ".join(" ".join(reader.words).split())
  assert "dense_1b on 16 x v5p" in text
  for name, figure in re.findall(r"^(parameters|optimizer|gradients) +([\d.]+ .B) ", out, re.M):
    assert f"{name} {figure}" in text
  (best,) = re.findall(r"^the first: (.*)$", out, re.M)
  assert best in text
  (hours,) = re.findall(r"^chip-hours +([\d,]+)", out, re.M)
  assert f"chip-hours {hours}" in text


def test_bars_are_as_long_as_their_parts(plan):
  """Those of memory fill what is used of the device, those of time the whole step."""
  _, path = plan
  widths = [
    sum(float(w) for w in re.findall(r"width:([\d.]+)%", bar))
    for bar in re.findall(r"</h2>\n<div class=bar>(.*?)</div>", path.read_text())
  ]
  used, available = re.search(r"<p>([\d.]+) GB of ([\d.]+) GB: fits", path.read_text()).groups()
  assert widths[0] == pytest.approx(100 * float(used) / float(available), abs=0.5)
  assert widths[1] == pytest.approx(100, abs=0.5)


def parts(track, *named):
  return [(name, begin, end) for name, begin, end, color in track if color in named]


def test_the_time_line_of_a_step():
  """By hand: 10 s of computing, under which 6.5 s of weights travel; tensor's 2 s do not hide."""
  step = speed.Step(
    products=6.0, attention=1.0, repeated=2.0, memory=0.5, optimizer=0.5,
    traffic={"data": 1.5, "fsdp": 5.0, "tensor": 2.0}, exposed=2.0, bubble=1.0, host=0.0,
  )  # fmt: skip
  sizes = {"data": 2, "fsdp": 2, "tensor": 8}
  found = drawing.tracks(step, sizes, CHIPS["h100"])
  assert list(found) == ["compute", "NVLink", "network"]  # eight of tensor fill a node
  hidden = parts(found["network"], drawing.HIDDEN)
  assert [p for p in hidden if p[1] < p[2]] == [("fsdp", 0.0, 5.0), ("data", 5.0, 6.5)]
  assert parts(found["NVLink"], drawing.EXPOSED) == [("tensor", 11.0, 13.0)]
  assert parts(found["compute"], drawing.WAITING) == [("waiting for other stages", 10.0, 11.0)]
  # Of 9 s of weights 8 hide.
  step = step._replace(traffic={"data": 2.0, "fsdp": 7.0}, exposed=1.0, bubble=0.0)
  found = drawing.tracks(step, {"data": 2, "fsdp": 2}, CHIPS["v5p"])
  assert found["DCN"] == []
  begun = [p for p in parts(found["ICI"], drawing.HIDDEN, drawing.EXPOSED) if p[1] < p[2]]
  assert begun == [("fsdp", 0.0, 7.0), ("data", 7.0, 8.0), ("data", 10.0, 11.0)]


def squares(page):
  """Devices drawn of each mesh axis, by their place along it."""
  found = {}
  for path, name, value in re.findall(r'<path d="(.*?)".*?<title>(\w+) (\d+)</title>', page):
    found.setdefault(name, {})[int(value)] = path.count("z")
  return found


def test_the_mesh_on_its_slice(tmp_path):
  """4 x 4 x 4 chips as four planes; each place along an axis has its share of the chips."""
  path = tmp_path / "plan.html"
  call("plan", "--config=moe_70b", "--topology=v5p:4x4x4", f"--report={path}")
  page = path.read_text()
  assert squares(page) == {
    "fsdp": dict.fromkeys(range(4), 16),
    "expert": dict.fromkeys(range(16), 4),
  }
  assert "64 devices on 4 x 4 x 4 chips" in page
  assert re.findall(r">z=(\d)<", page) == ["0", "1", "2", "3"] * 2
  assert "<b>expert 16</b> 4 along x, 4 along y" in page and "<b>fsdp 4</b> 4 along z" in page
  for track in ("compute", "ICI", "DCN"):
    assert f">{track}</text>" in page
  assert "Nothing goes over DCN, since this is one slice." in page


def test_a_large_machine_stays_readable(tmp_path):
  path = tmp_path / "plan.html"
  sizes = ("--config.mesh.data=4", "--config.mesh.fsdp=256", "--config.data.batch_size=1024")
  call("plan", "--config=dense_1b", "--topology=h100:128x8", *sizes, f"--report={path}")
  page = path.read_text()
  assert sum(squares(page)["data"].values()) == 512
  assert squares(page)["data"] == dict.fromkeys(range(4), 128)
  assert "drawn is one in 2 of 128 nodes" in page and "node 126" in page
  assert len(page) < 300_000


def test_what_to_change_is_on_the_page_too(tmp_path):
  """Each line of both tables of the terminal, where the config or everything is too large."""
  for config, topology in (("dense_1b", "v5e-16"), ("moe_70b", "v5e:2x2")):
    path = tmp_path / "plan.html"
    out = call("plan", f"--config={config}", f"--topology={topology}", f"--report={path}").out
    reader = Reader()
    reader.feed(path.read_text())
    text = " ".join(" ".join(reader.words).split())
    begin, end = out.index("largest arrays"), out.index("time of a step")
    printed = [" ".join(line.split()) for line in out[begin:end].splitlines() if line.strip()]
    assert len(printed) >= 7
    for line in printed:
      assert line in text, line
    assert text.index("What to change") < text.index("Time of a step")
  path = tmp_path / "fits.html"
  call("plan", "--config=dense_1b", "--topology=v5p-32", f"--report={path}")
  assert "What to change" not in path.read_text()


def test_a_folder_that_is_not_there_is_said():
  arguments = ("--config=debug", "--topology=v5e:2x2", "--report=/nowhere/plan.html")
  result = call("plan", *arguments)
  assert result.code == 2 and "--report=/nowhere/plan.html: No such file" in result.err


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_in_a_browser(plan, tmp_path):
  """What it shows after layout, and nothing on its console."""
  _, path = plan
  flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
           f"--user-data-dir={tmp_path}"]  # fmt: skip
  run = lambda *more: subprocess.run(
    [BROWSER, *flags, *more, path.as_uri()], capture_output=True, text=True, timeout=120
  )
  done = run("--dump-dom")
  assert done.returncode == 0
  assert "CONSOLE" not in done.stderr, done.stderr
  assert "<h2>Options</h2>" in done.stdout and "dense_1b on 16 x v5p" in done.stdout
  picture = tmp_path / "page.png"
  assert run(f"--screenshot={picture}", "--window-size=1150,1500").returncode == 0
  assert picture.stat().st_size > 50_000  # text, bars and tables, not an empty page
