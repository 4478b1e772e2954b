"""Near copies hold every bit, and are used only where they are whole and of this very run."""

import json
import os
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.attempt import progress
from experiments.cli import named_config
from experiments.config import ConfigError
from experiments.overrides import apply_overrides
from experiments.training import near as module
from experiments.training.near import NearCopies
from experiments.training.setup import build
from tests.experiments.test_bad_input import crowded
from tests.experiments.training.test_checkpoint import abstract, mesh, state

pytestmark = pytest.mark.xdist_group("devices")

DATA = {"position": 24, "guard": {"level": [0.1 + 0.2, 1e-320, float("inf")], "last": None}}


def config_of(near, *overrides):
  near = {"checkpoint.near": str(near), "checkpoint.near_every": "2", "train.steps": "100"}
  return apply_overrides(named_config("debug"), (near | dict(overrides)).items())


class Run:
  """A run directory, its near folder, and what was said."""

  def __init__(self, home, name="run"):
    self.near, self.folder, self.said, self.refused = home / "near", home / name, [], []
    self.folder.mkdir(parents=True, exist_ok=True)

  def open(self, *overrides):
    self.said.clear(), self.refused.clear()
    config = config_of(self.near, *overrides)
    return NearCopies(config, self.folder, note=self.said.append, refused=self.refused.append)

  def make(self, *steps, where=None, **leaves):
    """A start that copies these steps and dies."""
    with self.open() as near:
      near.begin()
      for step in steps:
        near.save(step, state(where, n=np.float32(step), **leaves), DATA | {"step": step})

  def newest(self, *overrides, where=None, saved=(), **leaves):
    """The step that another start finds, once what it restores is what was copied."""
    target = state(where, n=np.float32(0), **leaves)
    with self.open(*overrides) as near:
      step = near.newest(list(saved), abstract(target))
      if step is not None:
        found, data = near.restore(step, abstract(target))
        expected = state(where, n=np.float32(step), **leaves)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert data == DATA | {"step": step}
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
          assert a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, a.ndim)
    return step

  def part(self, step):
    [path] = self.near.glob(f"run-*/*/0-of-1/{step}")
    return path

  def steps(self):
    names = (path.name for path in self.near.glob("run-*/*/*/*"))
    return sorted(int(name) for name in names if name.isdecimal())


@pytest.fixture
def run(tmp_path):
  return Run(tmp_path)


@pytest.mark.parametrize("shape", ((4, 2), (1, 1)))
def test_every_bit_comes_back(run, shape):
  rng = np.random.default_rng(3)
  leaves = {
    "half": rng.standard_normal((8, 2)).astype(jnp.bfloat16),
    "small": rng.standard_normal((16, 4)).astype(jnp.float8_e4m3fn),
    "flags": rng.integers(0, 2, 5).astype(bool),
    "none": np.zeros((0, 2), np.float32),
    "nan": np.array([np.nan, -0.0, np.inf], np.float32),
  }
  run.make(2, where=mesh(*shape), **leaves)
  assert run.newest(where=mesh(*shape), **leaves) == 2 and not run.said + run.refused


def test_the_state_may_be_overwritten_at_once(run):
  """As the next step does, which is given the buffers of this one."""
  overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
  with run.open() as near:
    near.begin()
    first = state(mesh(4, 2), n=np.float32(2))
    near.save(2, first, DATA | {"step": 2})
    jax.block_until_ready(overwrite(first))
  assert run.newest(where=mesh(4, 2)) == 2


@pytest.mark.parametrize("name", ("adamw", "adafactor", "muon"))
def test_every_optimizers_state_comes_back(name, run):
  target = build(config_of(run.near, ("optimizer.name", name), ("mesh.fsdp", "2"))).abstract
  rng = np.random.default_rng(0)
  draw = lambda s: jax.device_put(rng.integers(99, size=s.shape).astype(s.dtype), s.sharding)
  expected = jax.tree.map(draw, target)
  with run.open() as near:
    near.begin()
    near.save(2, expected, {})
  with run.open() as near:
    assert near.newest([], target) == 2
    found, data = near.restore(2, target)
  assert jax.tree.structure(found) == jax.tree.structure(expected) and data == {}
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def flipped(step):
  path = max(step.glob("*params.w"))
  content = bytearray(path.read_bytes())
  content[17] ^= 4
  path.write_bytes(content)
  return f"{path.name} is damaged"


def truncated(step):
  path = max(step.glob("*params.w"))
  os.truncate(path, 100)
  return f"{path.name} has 100 bytes, not 128"


def missing(step):
  path = max(step.glob("*params.b"))
  path.unlink()
  return f"{path.name} is missing"


def of_a_list(step):
  path = step / "digests.0-of-1.json"
  path.write_bytes(path.read_bytes().replace(b'"position":24', b'"position":25'))
  return "digests.0-of-1.json is damaged"


@pytest.mark.parametrize("harm", (flipped, truncated, missing, of_a_list))
def test_damage_is_named_and_the_copy_before_is_used(run, harm):
  run.make(2, 4, where=mesh(2, 2))
  named = harm(run.part(4))
  assert run.newest(where=mesh(2, 2)) == 2
  [said] = run.refused
  assert said.startswith("near copy of step 4 refused: ") and named in said
  assert run.steps() == [2] and run.newest(where=mesh(2, 2)) == 2 and not run.refused
  harm(run.part(2))
  assert run.newest(where=mesh(2, 2)) is None and "near copy of step 2 refused" in run.refused[0]


@pytest.mark.parametrize(
  ("overrides", "where", "said"),
  (
    ((), (2, 4), "w was cut otherwise, by another mesh or model"),
    ((), (1, 1), "w was cut otherwise, by another mesh or model"),
    ((("train.seed", "1"),), (4, 2), "train.seed was 0 and is 1"),
    ((("optimizer.learning_rate", "1"),), (4, 2), "optimizer.learning_rate was 0.003 and is 1.0"),
  ),
)
def test_of_another_mesh_or_config_it_is_left_alone(run, overrides, where, said):
  run.make(2, where=mesh(4, 2))
  assert run.newest(*overrides, where=mesh(*where)) is None
  assert len(run.said) == 1 and said in run.said[0] and "step 2 not used" in run.said[0]
  assert run.newest(("train.log_every", "7"), where=mesh(4, 2)) == 2


def test_another_number_of_processes(run):
  run.make(2)
  part = run.part(2).parent
  part.rename(part.with_name("0-of-2"))
  assert run.newest() is None
  assert run.said == ["near copies not used: number of processes was 2 and is 1"]


def test_other_leaves_are_named(run):
  run.make(2, extra=np.zeros(3, np.float32))
  assert run.newest() is None and "by another mesh or model" in run.said[0]


def test_a_newer_checkpoint_goes_first_and_the_last_step_is_one(run):
  run.make(2, 4)
  assert run.newest(saved=(1, 3)) == run.newest(saved=(4,)) == 4
  assert run.newest(saved=(5,)) is None
  # Nothing would be left to train, and no checkpoint would ever be.
  assert run.newest(("train.steps", "4")) == 2 and not run.said + run.refused


def test_two_are_kept_and_none_is_half(run):
  with run.open() as near:
    near.begin()
    for step in range(2, 12, 2):
      near.save(step, state(n=np.float32(step)), {})
      there = set(run.steps())  # while the copy of `step` is written, or after
      assert there <= {step - 4, step - 2, step} and (step == 2 or step - 2 in there)
  assert run.steps() == [8, 10]
  half = run.part(10).with_name("12.tmp")  # of a process that was killed
  shutil.copytree(run.part(10), half)
  with run.open() as near:
    assert near.newest([], abstract(state(n=np.float32(0)))) == 10
    near.begin()
  assert run.steps() == [10]  # what this start goes on from, and nothing else


@pytest.mark.parametrize("how", ("checkpoint", "beginning", "back", "without"))
def test_what_a_run_did_not_go_on_from_is_never_found_again(run, how, tmp_path):
  """Not even where it was copied away and comes back: another host may have been in its place."""
  run.make(2, 4)
  shutil.copytree(run.near, tmp_path / "away")
  if how == "checkpoint":  # of step 5
    run.make()
  elif how == "beginning":
    shutil.rmtree(run.folder)
    run.folder.mkdir()
    run.make()
  elif how == "back":
    with run.open() as near:
      assert near.newest([], abstract(state(n=np.float32(0)))) == 4
      near.begin()
      near.save(6, state(n=np.float32(6)), {})
      near.forget()
  else:
    with NearCopies(named_config("debug"), run.folder) as off:
      off.begin()
    assert json.loads((run.folder / "near.json").read_text()) == {}
  if how != "without":
    assert not run.steps()
  shutil.copytree(tmp_path / "away", run.near, dirs_exist_ok=True)
  assert run.newest() is None and not run.said + run.refused


def both(monkeypatch, run, act, count=2):
  """What `act` returns for each of several processes, which are threads here."""
  said, barrier, number = [""] * count, threading.Barrier(count, timeout=30), threading.local()

  def agree(mine, judge):
    said[number.here] = mine
    barrier.wait()
    verdict = judge(list(said))
    barrier.wait()
    return verdict

  def one(index):
    number.here = index
    with run.open() as near:
      near._process, near._count = index, count
      return act(near)

  monkeypatch.setattr(module, "_agree", agree)
  with ThreadPoolExecutor(count) as pool:
    return list(pool.map(one, range(count)))


def copies(*steps):
  def make(near):
    near.begin()
    for step in steps:
      near.save(step, state(n=np.float32(step)), {})

  return make


def found(near):
  return near.newest([], abstract(state(n=np.float32(0))))


def test_what_one_process_lacks_no_process_uses(run, monkeypatch):
  both(monkeypatch, run, copies(2, 4, 6))
  assert both(monkeypatch, run, found) == [6, 6] and not run.said + run.refused
  [theirs] = run.near.glob("run-*/*/1-of-2")
  shutil.rmtree(theirs / "6")  # it was killed before that was written
  assert both(monkeypatch, run, found) == [4, 4]
  assert set(run.said) == {"near copy of step 6 not used: process 1 has none"}
  flipped(theirs / "4")
  assert both(monkeypatch, run, found) == [None, None]
  assert "near copy of step 4 refused: process 1: " in run.refused[0]


def test_parts_of_different_starts_are_no_state(run, monkeypatch, tmp_path):
  """A host that was away comes back, with a step that was made anew meanwhile."""
  both(monkeypatch, run, copies(2, 4))
  [theirs] = run.near.glob("run-*/*/1-of-2")
  shutil.copytree(theirs, tmp_path / "away")
  shutil.rmtree(theirs / "4")

  def go_on(near):
    assert found(near) == 2
    copies(4)(near)

  both(monkeypatch, run, go_on)
  assert both(monkeypatch, run, found) == [4, 4]
  shutil.rmtree(theirs)
  shutil.copytree(tmp_path / "away", theirs)
  assert both(monkeypatch, run, found) == [2, 2]
  assert set(run.said) == {"near copy of step 4 not used: its parts are of different starts"}


def test_two_runs_in_one_near_folder(run, tmp_path):
  other = Run(tmp_path, "other")
  run.make(2)
  other.make(4)
  assert (run.newest(), other.newest()) == (2, 4)
  with other.open() as near:
    near.newest([], abstract(state(n=np.float32(0))))
    near.remove()
  assert run.newest() == 2 and other.newest() is None
  assert len(list(run.near.iterdir())) == 1 and not (other.folder / "near.json").exists()


def test_a_run_directory_from_elsewhere_names_no_other_folder(run, tmp_path):
  """Its id is a name that we draw, not a path."""
  run.make(2)
  stored = json.loads((run.folder / "near.json").read_text())
  shutil.copytree(run.near, tmp_path / "mine")
  (run.folder / "near.json").write_text(json.dumps(stored | {"id": "../../mine"}))
  assert run.newest() is None
  run.make(2)
  assert len(list((tmp_path / "mine").glob("run-*/*/*/2"))) == 1
  (run.folder / "near.json").write_text('{"id": "')
  assert run.newest() is None


def test_no_room_for_three_keeps_one(run):
  big = {"w": np.random.default_rng(0).standard_normal((256, 1024)).astype(np.float32)}
  run.near.mkdir()
  with crowded(run.near, 5):
    if not os.path.ismount(run.near):
      pytest.skip("mounting a small disk is not allowed here")
    run.make(2, 4, 6, **big)  # 2 MiB each, with the moments
    assert run.steps() == [4, 6] and not run.said
    assert run.newest(**big) == 6


def test_a_full_folder_is_told_once_and_what_is_there_stays(run):
  big = {"w": np.random.default_rng(0).standard_normal((256, 1024)).astype(np.float32)}
  run.near.mkdir()
  with crowded(run.near, 3) as make_room:
    if not os.path.ismount(run.near):
      pytest.skip("mounting a small disk is not allowed here")
    with run.open() as near:
      near.begin()
      for step in (2, 4, 6, 8):
        near.save(step, state(n=np.float32(step), **big), DATA | {"step": step})
      near.save(10, state(n=np.float32(10), **big), {})
      [said] = run.said
      assert "No space left on device; training goes on without them" in said
    assert run.steps() == [2] and run.newest(**big) == 2
    make_room()
    run.make(4, **big)
    assert run.newest(**big) == 4


def test_a_folder_that_can_not_be_written_is_told_once(run):
  run.near.write_text("a file")
  with run.open() as near:
    near.begin()
    for step in (2, 4, 6):
      near.save(step, state(), {})
    near.remove()
  assert len(run.said) == 1 and "training goes on without them" in run.said[0]
  assert "Not a directory" in run.said[0] or "File exists" in run.said[0]


def test_what_a_supervisor_sees(run):
  before = progress(run.folder)
  run.make(2, 4)
  after = progress(run.folder)
  assert len(after.sealed - before.sealed) == 2 and after.checkpoint == 4
  (run.folder / "near.json").write_text("[")
  assert progress(run.folder).checkpoint == 0


def test_settings():
  with pytest.raises(ConfigError, match=r"near_every=5 needs a folder.*checkpoint\.near="):
    config_of("", ("checkpoint.near_every", "5"))
  with pytest.raises(ConfigError, match="must be a folder on the host itself"):
    config_of("gs://bucket/near")
  section = config_of("/x", ("checkpoint.near_every", "0"), ("checkpoint.every", "500")).checkpoint
  assert section.near_steps == 50 and named_config("debug").checkpoint.near_steps == 0


def test_nobody_else_may_read_them(run):
  run.make(2)
  [folder] = run.near.iterdir()
  assert subprocess.run(["stat", "-c", "%a", folder], capture_output=True, check=True).stdout == (
    b"700\n"
  )
