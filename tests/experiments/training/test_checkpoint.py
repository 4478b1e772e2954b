"""Checkpoints hold every bit, fit any mesh, and refuse what is not theirs, by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.cli import named_config
from experiments.config import CheckpointConfig, ConfigError
from experiments.overrides import apply_overrides
from experiments.training.checkpoint import Checkpoints, saved_steps
from experiments.training.setup import build
from experiments.training.state import TrainState

pytestmark = pytest.mark.xdist_group("devices")


def mesh(rows, columns):
  devices = np.array(jax.devices()[: rows * columns]).reshape(rows, columns)
  return Mesh(devices, ("a", "b"))


def state(where=None, **changes):
  """A small state; its matrix is sharded over both axes of `where`."""
  rng = np.random.default_rng(0)
  leaves = {
    "w": rng.standard_normal((8, 4)).astype(np.float32),
    "b": rng.standard_normal(4).astype(np.float32),
  } | changes
  where = mesh(1, 1) if where is None else where
  put = lambda x: jax.device_put(
    x, NamedSharding(where, PartitionSpec(*("a", "b")[: x.ndim] if x.ndim == 2 else ()))
  )
  params = jax.tree.map(put, leaves)
  moments = jax.tree.map(lambda x: put(np.asarray(x) * 2), params)
  return TrainState(put(np.int32(3)), params, (moments, {"count": put(np.int32(3))}))


def abstract(of):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), of)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp("saved") / "checkpoints"
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(3, state(mesh(4, 2)), {"position": 24})
  return folder


@pytest.mark.parametrize("shape", ((4, 2), (2, 4), (8, 1), (1, 1)))
def test_any_mesh_restores_every_bit(saved, shape):
  target = state(mesh(*shape))
  with Checkpoints(saved, read_only=True) as checkpoints:
    found, data = checkpoints.restore(checkpoints.newest(), abstract(target))
    params = checkpoints.restore_params(3, abstract(target).params)
  assert data == {"position": 24}
  jax.tree.map(np.testing.assert_array_equal, found, target)
  jax.tree.map(np.testing.assert_array_equal, params, target.params)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(target), strict=True):
    assert a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, a.ndim)


W = np.zeros((8, 4), np.float32)


@pytest.mark.parametrize(
  ("target", "message"),
  (
    (state(w=W.astype(jnp.bfloat16)), "params/w is float32[8, 4], the config needs bfloat16[8, 4]"),
    (
      state()._replace(
        opt_state=({"w": W.astype(jnp.bfloat16), "b": W[0]}, {"count": np.int32(3)})
      ),
      "optimizer/opt_state/0/w is float32[8, 4], the config needs bfloat16[8, 4]; the optimizer "
      "must be as it was saved",
    ),
    (state(w=W[:, :2]), "params/w is float32[8, 4], the config needs float32[8, 2]"),
    (state(w=W.T), "params/w is float32[8, 4], the config needs float32[4, 8]"),
    (state(extra=W), "params/extra is not in the checkpoint"),
    (state()._replace(params={"w": W}), "params/b is only in the checkpoint"),
    (
      state()._replace(opt_state=(state().opt_state[0],)),
      "optimizer/opt_state/1/count is only in the checkpoint",
    ),
    (
      state()._replace(opt_state=(state().params, {"count": np.int64(3)})),
      "optimizer/opt_state/1/count is int32[], the config needs int64[]",
    ),
  ),
)
def test_another_state_is_refused_by_leaf(saved, target, message):
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), target)
  with Checkpoints(saved, read_only=True) as checkpoints, pytest.raises(ConfigError) as caught:
    checkpoints.restore(3, shapes)
  assert message in str(caught.value) and "checkpoint of step 3" in str(caught.value)


@pytest.mark.parametrize("name", ("adamw", "adafactor", "lion", "muon", "sgd"))
def test_every_optimizers_state_comes_back(name, tmp_path):
  """Masked leaves, empty states and named tuples included."""
  overrides = [("optimizer.name", name), ("mesh.fsdp", "2")]
  abstract = build(apply_overrides(named_config("debug"), overrides)).abstract
  rng = np.random.default_rng(0)
  draw = lambda s: jax.device_put(rng.integers(99, size=s.shape).astype(s.dtype), s.sharding)
  expected = jax.tree.map(draw, abstract)
  with Checkpoints(tmp_path / "c") as checkpoints:
    checkpoints.save(1, expected, {"position": 8})
    checkpoints.wait()
    found, _ = checkpoints.restore(1, abstract)
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_only_the_newest_are_kept(tmp_path):
  with Checkpoints(tmp_path / "c", CheckpointConfig(keep=2)) as checkpoints:
    for step in (1, 2, 5):
      checkpoints.save(step, state(), {})
    checkpoints.save(5, state(), {"position": 1})  # there already
    checkpoints.wait()
    assert checkpoints.newest() == 5
  assert saved_steps(tmp_path / "c") == [2, 5]


def test_no_folder_no_steps(tmp_path):
  assert saved_steps(tmp_path / "none") == []
  with Checkpoints(tmp_path / "new") as checkpoints:
    assert checkpoints.newest() is None


def test_leftovers_of_a_killed_process_are_cleared_by_the_next_writer_only(saved, tmp_path):
  folder = tmp_path / "checkpoints"
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, state(), {})
  leftover = folder / "2.orbax-checkpoint-tmp"
  leftover.mkdir()
  (leftover / "half").write_text("half")
  with Checkpoints(folder, read_only=True) as checkpoints:
    assert checkpoints.newest() == 1
  assert leftover.exists()
  with Checkpoints(folder) as checkpoints:
    assert checkpoints.newest() == 1
  assert saved_steps(folder) == [1] and not leftover.exists()


def test_saving_goes_on_while_the_state_changes(tmp_path):
  """The arrays are copied before `save` returns: a donated state may be overwritten."""
  with Checkpoints(tmp_path / "c") as checkpoints:
    first = state()
    expected = jax.tree.map(np.asarray, first)
    checkpoints.save(1, first, {})
    jax.tree.map(lambda x: x.delete(), first)
    checkpoints.wait()
    found, _ = checkpoints.restore(1, abstract(state()))
  jax.tree.map(np.testing.assert_array_equal, found, expected)
