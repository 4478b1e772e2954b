"""A journal of JSON lines: whole after crashes, and complete once a full disk has room again."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.config import ConfigError
from experiments.training import journal
from experiments.training.journal import Journal, read

ROOT = Path(__file__).parents[3]


class Disk:
  """Refuses writes while `room` bytes are used up, after it took what there was room for."""

  def __init__(self, monkeypatch, code=errno.ENOSPC):
    self.room: float = float("inf")
    self._write, self._code = os.write, code
    monkeypatch.setattr(journal.os, "write", self.write)

  def write(self, file, data):
    if self.room < len(data):
      taken, self.room = int(self.room), 0
      if not taken:
        raise OSError(self._code, os.strerror(self._code))
      return self._write(file, data[:taken])
    self.room -= len(data)
    return self._write(file, data)


@pytest.mark.parametrize("code", (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO))
def test_a_refused_row_waits_and_half_of_it_is_cut_off(tmp_path, monkeypatch, code):
  path, disk = tmp_path / "x.jsonl", Disk(monkeypatch, code)
  book = Journal(path)
  book.append({"n": 1})
  disk.room = 5  # half of the next line
  book.append({"n": 2})
  book.append({"n": 3})
  assert book.pending == 2 and book.refusal == os.strerror(code)
  assert read(path) == [{"n": 1}]
  disk.room = float("inf")
  book.append({"n": 4})
  assert book.pending == 0 and book.refusal is None
  assert path.read_text() == "".join(f'{{"n": {n}}}\n' for n in (1, 2, 3, 4))
  book.close()


def test_closing_tries_once_more(tmp_path, monkeypatch):
  path, disk = tmp_path / "x.jsonl", Disk(monkeypatch)
  book = Journal(path)
  disk.room = 0
  book.append({"n": 1})
  book.append({"n": 2})
  with pytest.raises(OSError, match="No space left on device; 2 rows are lost") as raised:
    book.close()
  assert raised.value.errno == errno.ENOSPC
  disk.room = float("inf")
  book.close()
  assert read(path) == [{"n": 1}, {"n": 2}]


def test_a_sync_that_fails_writes_the_row_once(tmp_path, monkeypatch):
  path, fails = tmp_path / "x.jsonl", iter([False, True, False, False])
  sync = os.fsync

  def fsync(file):
    if next(fails):
      raise OSError(errno.EIO, "Input/output error")
    sync(file)

  monkeypatch.setattr(journal.os, "fsync", fsync)
  book = Journal(path, sync=True)
  for n in (1, 2, 3):
    book.append({"n": n})
  book.close()
  assert read(path) == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_a_disk_that_is_full_at_the_start(tmp_path, monkeypatch):
  refused = [True]
  opened = os.open

  def open_(*args):
    if refused[0]:
      raise OSError(errno.ENOSPC, "No space left on device")
    return opened(*args)

  monkeypatch.setattr(journal.os, "open", open_)
  book = Journal(tmp_path / "x.jsonl")
  book.append({"n": 1})
  refused[0] = False
  book.close()
  assert read(tmp_path / "x.jsonl") == [{"n": 1}]


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
  with pytest.raises(FileNotFoundError):
    Journal(tmp_path / "nowhere" / "x.jsonl")


@pytest.mark.parametrize(
  ("text", "kept"),
  (
    ("", []),
    ('{"n": 1}\n{"n": 2}\n', [1, 2]),
    ('{"n": 1}\n{"n"', [1]),
    ('{"n": 1}\n\0\0\0\0', [1]),
    ('{"n"', []),
    ('{"n": 1}\n{"n": 2}', [1, 2]),  # all but the newline came out
    ('{"n": 1}\n2', [1]),  # part of a number is JSON too
  ),
)
def test_what_a_crash_left(tmp_path, text, kept):
  path = tmp_path / "x.jsonl"
  path.write_text(text)
  assert [row["n"] for row in read(path)] == kept
  book = Journal(path)
  assert book.last == (f'{{"n": {kept[-1]}}}' if kept else None)
  book.append({"n": 9})
  book.close()
  assert path.read_text() == "".join(f'{{"n": {n}}}\n' for n in [*kept, 9])


@given(st.lists(st.text(max_size=9), max_size=4), st.text(max_size=9), st.data())
def test_cut_anywhere(tmp_path_factory, texts, last, data):
  """A file cut at any byte has the lines before, and takes further ones."""
  path = tmp_path_factory.mktemp("cut") / "x.jsonl"
  book = Journal(path)
  for text in [*texts, last]:
    book.append({"text": text})
  book.close()
  whole = path.read_bytes()
  lines = whole.splitlines(keepends=True)
  cut = data.draw(st.integers(len(whole) - len(lines[-1]), len(whole)))
  path.write_bytes(whole[:cut])
  expected = texts + [last] * (cut >= len(whole) - 1)
  assert [row["text"] for row in read(path)] == expected
  book = Journal(path)
  book.append({"text": "on"})
  book.close()
  assert [row["text"] for row in read(path)] == [*expected, "on"]


def test_a_line_longer_than_a_block(tmp_path):
  path = tmp_path / "x.jsonl"
  long = "x" * 200_000
  path.write_text(f'{{"n": 1}}\n{{"n": "{long}"}}\n{{"cut": "{long}')
  book = Journal(path)
  assert book.last == f'{{"n": "{long}"}}'
  book.close()
  assert [row["n"] for row in read(path)] == [1, long]


def test_a_damaged_line_is_named(tmp_path):
  (tmp_path / "x.jsonl").write_text('{"n": 1}\nnoise\n{"n": 2}\n')
  with pytest.raises(ConfigError, match=r"x\.jsonl line 2 is not JSON"):
    read(tmp_path / "x.jsonl")
  assert read(tmp_path / "none.jsonl") == []


def test_threads_share_a_journal(tmp_path):
  book = Journal(tmp_path / "x.jsonl")
  work = lambda name: [book.append({"name": name, "n": n}) for n in range(200)]
  threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  book.close()
  rows = read(tmp_path / "x.jsonl")
  for name in "abc":
    assert [row["n"] for row in rows if row["name"] == name] == list(range(200))


def test_processes_wait_for_each_other(tmp_path):
  script = """
import sys
from pathlib import Path
from experiments.training.journal import Journal
for n in range(20):
  book = Journal(Path(sys.argv[1]), shared=True)
  before = book.last
  book.append({"n": n, "before": before is not None})
  book.close()
"""
  path = tmp_path / "x.jsonl"
  command = [sys.executable, "-c", script, str(path)]
  both = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
  assert [process.wait(120) for process in both] == [0, 0]
  rows = read(path)
  assert sorted(row["n"] for row in rows) == sorted([*range(20), *range(20)])
  assert [row["before"] for row in rows] == [False] + [True] * 39


def test_a_killed_process_leaves_what_it_wrote(tmp_path):
  script = """
import os, signal, sys
from pathlib import Path
from experiments.training.journal import Journal
book = Journal(Path(sys.argv[1]))
for n in range(50):
  book.append({"n": n})
os.kill(os.getpid(), signal.SIGKILL)
"""
  path = tmp_path / "x.jsonl"
  done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, timeout=120)
  assert done.returncode == -signal.SIGKILL
  assert [row["n"] for row in read(path)] == list(range(50))


def test_what_json_has_not(tmp_path):
  book = Journal(tmp_path / "x.jsonl")
  book.append({
    "nan": float("nan"), "inf": [float("inf")], "numpy": np.float32(0.5), "count": np.int64(3),
    "array": np.arange(3), "path": Path("a/b"), "true": True, "none": None, 1: "key",
  })  # fmt: skip
  book.close()
  row = json.loads((tmp_path / "x.jsonl").read_text(), parse_constant=pytest.fail)
  assert row == {
    "nan": None, "inf": [None], "numpy": 0.5, "count": 3, "array": [0, 1, 2], "path": "a/b",
    "true": True, "none": None, "1": "key",
  }  # fmt: skip
