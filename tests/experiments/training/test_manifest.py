"""A damaged checkpoint is refused by name, and the one before it is used."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.config import CheckpointConfig, ConfigError
from experiments.training import manifest
from experiments.training.checkpoint import Checkpoints, saved_steps
from tests.experiments.programs import ROOT
from tests.experiments.training.test_checkpoint import abstract, mesh, state

pytestmark = pytest.mark.xdist_group("devices")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  """Steps 1 and 2 of a state of 80 KB."""
  folder = tmp_path_factory.mktemp("two") / "checkpoints"
  rng = np.random.default_rng(1)
  big = {"w": rng.standard_normal((128, 80)).astype(np.float32)}
  with Checkpoints(folder) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, state(mesh(4, 2), **big), {"position": step})
  return folder


def target():
  return abstract(state(mesh(4, 2), w=np.zeros((128, 80), np.float32)))


def newest(folder):
  """The step that is taken, and what is said."""
  said = []
  with Checkpoints(folder, note=said.append) as checkpoints:
    step = checkpoints.newest()
    if step is not None:
      checkpoints.restore(step, target())
  return step, said


def files(step):
  return sorted(p for p in step.rglob("*") if p.is_file())


def test_forty_flipped_bits(two, tmp_path):
  """A random bit of a random byte of the newest step, lists of digests included."""
  rng = np.random.default_rng(7)
  flipped = {}
  for i in range(40):
    folder = tmp_path / str(i)
    shutil.copytree(two, folder)
    sizes = [p.stat().st_size for p in files(folder / "2")]
    place = int(rng.integers(sum(sizes)))
    which = int(np.searchsorted(np.cumsum(sizes), place, side="right"))
    path = files(folder / "2")[which]
    data = bytearray(path.read_bytes())
    data[place - sum(sizes[:which])] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    flipped[folder] = path
  # Orbax alone, in a process of its own: reads that fail leave callbacks behind that come later.
  script = f"""
from pathlib import Path
from tests.experiments.training.test_manifest import silently_wrong
print(silently_wrong(Path({str(two)!r}), [Path(p) for p in {[str(f) for f in flipped]!r}]))
"""
  done = subprocess.run(
    [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=600
  )
  assert done.returncode == 0, done.stderr
  assert int(done.stdout.split()[-1]) > 10  # the fault is real: Orbax takes most of them
  for folder, path in flipped.items():
    step, said = newest(folder)
    assert step == 1, path
    assert "checkpoint of step 2 refused" in said[0] and path.name in said[0], said
    assert (folder / "2.refused").is_dir() and saved_steps(folder) == [1]


def silently_wrong(whole, folders):
  """How many restore without a word to something else than `whole` does."""
  with Checkpoints(whole, read_only=True) as checkpoints:
    intact, _ = checkpoints.restore(2, target())
  wrong = 0
  for folder in folders:
    try:
      with Checkpoints(folder, read_only=True) as checkpoints:
        found, _ = checkpoints.restore(2, target())
    except Exception:  # whatever Orbax makes of it, it is not silent
      continue
    same = jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), found, intact)
    wrong += not all(jax.tree.leaves(same))
  return wrong


def truncated(step):
  path = max(files(step), key=lambda p: p.stat().st_size)
  os.truncate(path, path.stat().st_size // 2)
  return path.name


def missing(step):
  path = files(step / "params")[0]
  path.unlink()
  return path.name


def extra(step):
  (step / "params" / "more").write_text("?")
  return "params/more does not belong"


def half_a_list(step):
  path = step / "digests.0-of-1.json"
  os.truncate(path, path.stat().st_size // 2)
  return "digests.0-of-1.json is damaged"


def no_list(step):
  (step / "digests.0-of-1.json").unlink()
  return "never finished"


def of_two_processes(step):
  (step / "digests.0-of-1.json").rename(step / "digests.0-of-2.json")
  return "never finished"


def a_link(step):
  path = max(files(step), key=lambda p: p.stat().st_size)
  elsewhere = step.parent.parent / "elsewhere"
  path.rename(elsewhere)
  path.symlink_to(elsewhere)
  return f"{path.name} is a symbolic link"


def a_linked_folder(step):
  shutil.move(step / "optimizer", step.parent.parent / "away")
  (step / "optimizer").symlink_to(step.parent.parent / "away")
  return "optimizer is a symbolic link"


def out_of_the_folder(step):
  path = step / "digests.0-of-1.json"
  body = json.loads(path.read_text().split("\n", 1)[1])
  body["files"]["../../secret"] = [1, "0" * 64]
  (step.parent.parent / "secret").write_text("s")
  text = json.dumps(body)
  path.write_text(f"{manifest.hashlib.sha256(text.encode()).hexdigest()}\n{text}")
  return "../../secret is missing"


DAMAGES = (
  truncated, missing, extra, half_a_list, no_list, of_two_processes, a_link, a_linked_folder,
  out_of_the_folder,
)  # fmt: skip


@pytest.mark.parametrize("harm", DAMAGES)
def test_damage_is_named_and_the_step_before_is_used(two, tmp_path, harm):
  folder = tmp_path / "checkpoints"
  shutil.copytree(two, folder)
  named = harm(folder / "2")
  step, said = newest(folder)
  assert step == 1 and len(said) == 1 and named in said[0], said
  assert newest(folder) == (1, [])  # set aside, so said once


def test_with_none_left_it_says_so(two, tmp_path):
  folder = tmp_path / "checkpoints"
  shutil.copytree(two, folder)
  for step in ("1", "2"):
    truncated(folder / step)
  with pytest.raises(ConfigError, match="no intact checkpoint left"):
    newest(folder)


def test_an_unfinished_first_step_is_a_fresh_start(two, tmp_path):
  folder = tmp_path / "checkpoints"
  shutil.copytree(two / "1", folder / "1")
  no_list(folder / "1")
  step, said = newest(folder)
  assert step is None and "never finished" in said[0]


def test_what_is_kept(tmp_path):
  """The last two, multiples of five, and the best by held-out loss."""
  policy = CheckpointConfig(keep=2, keep_every=5, keep_best=1)
  losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: 2.0, 6: 1.5, 7: 2.0, 8: 9.0}
  with Checkpoints(tmp_path / "c", policy) as checkpoints:
    for step, loss in losses.items():
      checkpoints.save(step, state(), {}, loss=loss)
    checkpoints.wait()
    ended = checkpoints.ended()
  assert saved_steps(tmp_path / "c") == [2, 5, 7, 8]
  assert [s.step for s in ended] == list(losses) and not checkpoints.ended()
  for saved in ended:
    assert saved.error is None and saved.block_s <= saved.total_s and saved.bytes > 1000


def test_a_step_half_removed_is_no_step(two, tmp_path):
  """Killed while an old step was being removed: it has no digests any more."""
  folder = tmp_path / "checkpoints"
  shutil.copytree(two, folder)
  manifest.unseal(folder / "1")
  shutil.rmtree(folder / "1" / "params")
  assert saved_steps(folder) == [2] and newest(folder) == (2, [])


def test_facts_are_not_read_through_a_link(two, tmp_path):
  folder = tmp_path / "c"
  shutil.copytree(two, folder)
  [path] = (folder / "2").glob("digests.*")
  assert "files" in manifest.read_facts(folder / "2")
  path.rename(tmp_path / "elsewhere")
  path.symlink_to(tmp_path / "elsewhere")
  assert manifest.read_facts(folder / "2") == {}
