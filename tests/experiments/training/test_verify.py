"""A bit flipped inside a running step is found where the step is run twice; so are other copies."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from jax.sharding import NamedSharding, PartitionSpec

from experiments.cli import named_config
from experiments.config import HaltError
from experiments.data.load import load
from experiments.overrides import apply_overrides
from experiments.training.loop import train
from experiments.training.setup import build
from experiments.training.verify import compare_copies, make_digest
from mesh.constrain import use_mesh

pytestmark = pytest.mark.xdist_group("devices")

EVERY = 4
SETTINGS = [
  ("mesh.fsdp", "4"), ("mesh.data", "2"), ("train.verify_every", str(EVERY)),
  ("train.steps", "14"), ("checkpoint.every", "2"), ("checkpoint.keep", "9"),
  ("eval.batches", "1"), ("eval.sample_prompt", ""),
]  # fmt: skip


def make(*more):
  return build(apply_overrides(named_config("debug"), list((dict(SETTINGS) | dict(more)).items())))


@pytest.fixture(scope="module")
def dataset():
  setup = make()
  return load(setup.config.data, setup.config.model.vocab_size)


def corrupted(setup, leaf, flips):
  """The setup with a model of whose gradients `flips(device)` xors the first number of leaf `leaf`,
  asked anew by each device in each run of the step."""
  specs = [x.sharding.spec for x in jax.tree.leaves(setup.abstract.params)]
  mesh, spec = setup.mesh, specs[leaf]

  def local(x):
    index = jax.lax.axis_index(mesh.axis_names)
    mask = io_callback(
      lambda d: np.uint32(flips(int(d))), jax.ShapeDtypeStruct((), np.uint32), index
    )
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)
    bits = bits.at[0].set(bits[0] ^ mask)
    return jax.lax.bitcast_convert_type(bits.reshape(x.shape), x.dtype)

  @jax.custom_vjp
  def through(x):
    return x

  flip = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  through.defvjp(lambda x: (x, None), lambda _, g: (flip(g),))

  def apply(variables, *args, **options):
    leaves, tree = jax.tree.flatten(variables["params"])
    leaves[leaf] = through(leaves[leaf])
    return setup.model.apply({"params": jax.tree.unflatten(tree, leaves)}, *args, **options)

  model = types.SimpleNamespace(spec=setup.model.spec, apply=apply, init=setup.model.init)
  return setup._replace(model=model)


class Device:
  """Flips a bit in some executions: `when(execution)`, counted from 0 by each device."""

  def __init__(self, index, bits, when):
    self.index, self.bits, self.when, self.count = index, bits, when, 0

  def __call__(self, device):
    if device != self.index:
      return 0
    self.count += 1
    return next(self.bits) if self.when(self.count - 1) else 0


def bits(seed):
  rng = np.random.default_rng(seed)
  while True:
    yield 1 << int(rng.integers(31))


def faults(folder):
  rows = [json.loads(line) for line in (folder / "logbook.jsonl").read_text().splitlines()]
  return [row for row in rows if row["kind"] == "fault"]


@pytest.mark.parametrize("seed", (0, pytest.param(1, marks=pytest.mark.full)))
def test_a_device_that_flips_bits_is_found_and_named(seed, dataset, tmp_path):
  """Ever after some step, another bit each time: found within EVERY steps, then the run stops."""
  rng = np.random.default_rng(seed)
  setup = make()
  leaf = int(rng.integers(len(jax.tree.leaves(setup.abstract.params))))
  index, since = int(rng.integers(8)), 5
  # Steps 4, 8, ... are executed twice; execution e is before step e there.
  device = Device(index, bits(seed), lambda execution: execution >= since)
  folder = tmp_path / "run"
  with pytest.raises(HaltError, match="run twice with other results") as caught:
    train(corrupted(setup, leaf, device), dataset, folder)
  assert caught.value.code == 77
  found = faults(folder)
  name = jax.tree_util.keystr(
    jax.tree.leaves_with_path(setup.abstract.params)[leaf][0], simple=True, separator="/"
  )
  assert len(found) == 2  # the first goes back, the second stops
  for row in found:
    assert name in row["detail"]["error"] and row["detail"]["device"] == index
    assert row["step"] - since <= EVERY


def test_one_flip_in_a_doubled_step_goes_back_and_on(dataset, tmp_path):
  """In the first run of step 8: the run goes on from what was saved before, to its end, as if
  nothing had been."""
  setup, folder = make(), tmp_path / "run"
  device = Device(3, bits(3), lambda execution: execution == 8)  # 1-3, 4 4, 5-7, then 8
  found = train(corrupted(setup, 2, device), dataset, folder)
  assert found.step == 14 and len(faults(folder)) == 1
  clean = train(
    corrupted(setup, 2, Device(3, bits(3), lambda _: False)), dataset, tmp_path / "clean"
  )
  jax.tree.map(np.testing.assert_array_equal, found.state.params, clean.state.params)
  assert not (tmp_path / "clean" / "logbook.jsonl").read_text().count('"fault"')


@pytest.mark.full
def test_a_flip_in_a_step_that_is_not_doubled_is_missed(dataset, tmp_path):
  """What the switch does not promise. The copies over `data` then differ, which is found."""
  setup, folder = make(("mesh.data", "1"), ("mesh.fsdp", "8")), tmp_path / "run"
  specs = [x.sharding.spec for x in jax.tree.leaves(setup.abstract.params)]
  whole = next(i for i, s in enumerate(specs) if any(s))  # cut over all eight: no copies
  train(corrupted(setup, whole, Device(1, iter([1 << 20] * 9), lambda e: e == 6)), dataset, folder)
  assert not faults(folder)


def test_no_false_alarm(dataset, tmp_path):
  folder = tmp_path / "run"
  setup = make(("train.verify_every", "1"))
  train(setup, dataset, folder)
  assert not faults(folder)


@pytest.mark.full
def test_no_false_alarm_in_five_hundred_steps(dataset, tmp_path):
  folder = tmp_path / "run"
  setup = make(("train.verify_every", "1"), ("train.steps", "500"), ("checkpoint.every", "500"))
  assert train(setup, dataset, folder).step == 500
  assert not faults(folder)


def test_tried_steps_change_nothing(dataset, tmp_path):
  """A run with doubled steps is, to the bit, the one without digests but for how XLA fuses."""
  with_them = train(make(("train.verify_every", "2")), dataset, tmp_path / "a")
  seldom = train(make(("train.verify_every", "1000")), dataset, tmp_path / "b")
  jax.tree.map(np.testing.assert_array_equal, with_them.state, seldom.state)


def test_copies_that_drift_are_named():
  setup = make()
  params = setup.abstract.params
  digest = jax.jit(make_digest(params, setup.mesh))
  rng = np.random.default_rng(0)
  draw = lambda s: jax.device_put(rng.standard_normal(s.shape).astype(s.dtype), s.sharding)
  values = jax.tree.map(draw, params)
  with use_mesh(setup.mesh, setup.rules):
    assert compare_copies(np.asarray(digest(values)), params, setup.mesh) == []
    leaves, tree = jax.tree.flatten(values)
    row = next(i for i, x in enumerate(leaves) if not any(x.sharding.spec))  # a copy on each
    bad = setup.mesh.devices.flat[5]
    parts = []
    for shard in leaves[row].addressable_shards:
      data = np.array(shard.data)
      if shard.device == bad:
        data.view(np.uint32).reshape(-1)[0] ^= 1
      parts.append(jax.device_put(data, shard.device))
    leaves[row] = jax.make_array_from_single_device_arrays(
      leaves[row].shape, leaves[row].sharding, parts
    )
    [found] = compare_copies(
      np.asarray(digest(jax.tree.unflatten(tree, leaves))), params, setup.mesh
    )
  assert found.devices == {str(bad): bad.id}


def test_the_digest_of_any_single_bit(tmp_path):
  """Sums modulo 2^32 of float32 and of bfloat16."""
  setup = make(("mesh.fsdp", "8"), ("mesh.data", "1"))
  like = {"a": jnp.ones((16, 4)), "b": jnp.ones((8, 3), jnp.bfloat16)}
  place = NamedSharding(setup.mesh, PartitionSpec("fsdp"))
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), like)
  digest = jax.jit(make_digest(abstract, setup.mesh))
  rng = np.random.default_rng(0)
  host = {k: rng.standard_normal(x.shape).astype(x.dtype) for k, x in like.items()}
  put = functools.partial(jax.tree.map, lambda x: jax.device_put(x, place))
  before = np.asarray(digest(put(host)))
  for _ in range(30):
    name = str(rng.choice(["a", "b"]))
    flipped = {k: x.copy() for k, x in host.items()}
    width = host[name].dtype.itemsize * 8
    view = flipped[name].view(f"uint{width}")
    where = tuple(int(rng.integers(n)) for n in view.shape)
    view[where] ^= view.dtype.type(1 << int(rng.integers(width)))
    after = np.asarray(digest(put(flipped)))
    row, device = np.argwhere(before != after)[0]
    assert (before != after).sum() == 1 and row == ("a", "b").index(name)
    assert device == where[0] // (host[name].shape[0] // 8)
