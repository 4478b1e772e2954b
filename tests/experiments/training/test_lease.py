"""The lease of a run directory in a bucket, here on a disk: who may have it, and when."""

import contextlib
import json
import os
import subprocess
import threading
import time

import pytest

from experiments.config import ConfigError
from experiments.training import lease


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
  monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)
  monkeypatch.setattr(lease, "DEAD_SECONDS", 1.0)
  monkeypatch.setattr(lease, "_POLL_SECONDS", 0.05)


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "lock").mkdir()
  return tmp_path / "lock"


def held(folder, said=None, **options):
  note = [].append if said is None else said.append
  return lease.hold(folder, "the run", lost=note, note=note, **options)


def read(folder, number):
  return json.loads((folder / f"{number:06d}.json").read_text())


def leave(folder, **changes):
  """The lease of somebody who neither renews it nor gave it back."""
  with held(folder):
    who = read(folder, 1)
  (folder / "000001.json").write_text(json.dumps(who | {"released": False} | changes))


def test_given_back_and_taken_again(folder):
  for number in (1, 2, 3):
    with held(folder):
      assert [path.name for path in folder.iterdir()] == [f"{number:06d}.json"]
      assert read(folder, number)["pid"] == os.getpid()
    assert read(folder, number)["released"]


def test_a_second_is_refused_once_the_first_is_seen_alive(folder):
  with held(folder):
    said = f"the run is in use by process {os.getpid()} on "
    with pytest.raises(ConfigError, match=said), held(folder):
      pass
    before = read(folder, 1)["renewals"]
    time.sleep(0.5)
    assert read(folder, 1)["renewals"] > before


def test_patience_outlives_a_holder_that_ends(folder):
  with contextlib.ExitStack() as stack:
    stack.enter_context(held(folder))
    threading.Timer(1.0, stack.pop_all().close).start()
    with held(folder, patience=30):
      assert read(folder, 2)["pid"] == os.getpid()


def test_a_dead_process_of_this_host_is_no_holder(folder):
  with subprocess.Popen(["sleep", "0"]) as process:
    process.wait()
    leave(folder, pid=process.pid, begun="1")
  began = time.monotonic()
  with held(folder):
    assert time.monotonic() - began < 0.9  # no need to watch it


def test_a_later_process_of_the_same_number_is_no_holder(folder):
  leave(folder, begun="1")  # our number
  with held(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["000002.json"]


def test_one_of_elsewhere_is_watched(folder):
  leave(folder, boot="another", host="elsewhere")
  said, began = [], time.monotonic()
  with held(folder, said):
    assert time.monotonic() - began > 1.0
  assert "elsewhere" in said[0] and "taking over the run" in said[-1]


def test_who_lost_it_is_told_and_gives_nothing_back(folder):
  said = []
  with held(folder, said):
    (folder / "000002.json").write_text(json.dumps({"host": "h", "pid": 7, "start": "noon"}))
    time.sleep(0.5)
    assert said == ["taken over by process 7 on h, since noon"]
  assert "released" not in read(folder, 2)


def test_one_at_a_time(folder):
  inside, most, lock = 0, 0, threading.Lock()

  def work():
    nonlocal inside, most
    for _ in range(3):
      while True:
        with contextlib.suppress(ConfigError), held(folder):
          with lock:
            inside += 1
            most = max(most, inside)
          time.sleep(0.02)
          with lock:
            inside -= 1
          break

  threads = [threading.Thread(target=work) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  assert most == 1 and inside == 0
