"""The page that `plan --report` writes: whole, true to what is printed, and fine in a browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

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
