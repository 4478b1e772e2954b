"""Meshes, recomputation and microbatches that fit a machine, the quickest first."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from jax.sharding import AbstractMesh, AxisType, Mesh

from layers.spec import AttentionSpec, MoeSpec
from mesh.axes import MESH_AXES
from mesh.hardware import Chip
from mesh.rules import parse_rules

from ..config import Config, ConfigError, MeshConfig
from ..training.setup import Setup, build_on, check_batch, check_parallel
from ..training.state import abstract_state
from .estimate import Memory, Weights, memory, weights_of
from .speed import Step, step_time, time_rows

ROOM = 0.95  # of a chip's memory that a program can have
MAX_TENSOR, MAX_PARTS = 16, 32
_POLICIES = ("none", "minimal", "full")


class Option(NamedTuple):
  """One way to run a config."""

  setup: Setup
  memory: Memory
  step: Step
  fits: bool

  @property
  def overrides(self) -> list[str]:
    """What to write on a command line to get it."""
    mesh, train = self.setup.config.mesh, self.setup.config.train
    sizes = [f"--config.mesh.{a}={n}" for a in MESH_AXES if (n := getattr(mesh, a)) is not None]
    rules = [] if mesh.rules == "all" else [f"--config.mesh.rules={mesh.rules}"]
    return [
      *rules,
      *(size for size in sizes if not size.endswith("=1")),
      f"--config.train.remat={train.remat}",
      f"--config.train.microbatches={train.microbatches}",
    ]

  @property
  def name(self) -> str:
    """fsdp=16 x expert=4, minimal, 2 microbatches."""
    sizes = " x ".join(f"{a}={n}" for a, n in self.setup.mesh.shape.items() if n > 1)
    train = self.setup.config.train
    parts = f", {train.microbatches} microbatches" if train.microbatches > 1 else ""
    return f"{sizes or 'one device'}, {train.remat}{parts}"


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
  """A mesh that is numbers only."""
  shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
  return AbstractMesh(shape, MESH_AXES, (AxisType.Auto,) * len(MESH_AXES))


def start(config: Config) -> Setup:
  """A setup to move about, on one device that holds everything."""
  here = replace(config, mesh=MeshConfig(rules=config.mesh.rules))
  return build_on(here, abstract_mesh({}), "tpu")


def move(setup: Setup, config: Config, mesh: Mesh | AbstractMesh) -> Setup:
  """`setup` elsewhere: a config that differs only in what changes no weight, on another mesh.

  For planners, which compare hundreds; the model is not the one that would run. Errors as in
  `build`.
  """
  try:
    check_batch(config, setup.rules, mesh)
    check_parallel(config, mesh)
    circular = config.mesh.circular
    shapes = setup.abstract.opt_state  # the same on every mesh
    abstract = abstract_state(setup.layout, shapes, mesh, setup.rules, circular)
  except ValueError as e:
    raise ConfigError(str(e).splitlines()[0]) from e
  return setup._replace(config=config, mesh=mesh, abstract=abstract)


def search(setup: Setup, chip: Chip, chips: int, *, quick: bool = False) -> list[Option]:
  """The best option of each mesh: those that fit by predicted time, then the others by memory.

  Args:
    setup: of `start`.
    quick: without the axes that are seldom the best, data and context.
  """
  assert chip.hbm_bytes
  room = ROOM * chip.hbm_bytes / chip.devices_per_chip
  found = []
  for sizes in meshes(setup.config, chips * chip.devices_per_chip, quick=quick):
    rules = _rules(setup.config, sizes["tensor"])
    config = replace(setup.config, mesh=replace(setup.config.mesh, **sizes, rules=rules))
    whole = replace(config, train=replace(config.train, microbatches=1))
    try:
      moved = move(setup._replace(rules=parse_rules(rules)), whole, abstract_mesh(sizes))
    except ConfigError:  # sizes that do not divide
      continue
    weights = weights_of(moved)
    here = [o for policy in _POLICIES if (o := _with_policy(moved, weights, chip, policy, room))]
    fits = [option for option in here if option.fits]
    found += sorted(fits, key=_rank)[:1] or sorted(here, key=lambda o: o.memory.total)[:1]
  fits = sorted((o for o in found if o.fits), key=_rank)
  return fits + sorted((o for o in found if not o.fits), key=lambda o: o.memory.total)


def loses_by(option: Option, best: Option) -> str:
  """What an option that fits spends more time on than the best one."""
  mine, theirs = (dict(time_rows(o.step)) for o in (option, best))
  more = {name: mine[name] - theirs[name] for name in mine}
  name = max(more, key=lambda key: more[key])
  return f"{name} +{more[name]:.2f} s" if more[name] > 0.005 else "the same"


def _rank(option: Option) -> tuple[float, int]:
  """By time, and by memory where that is the same to a thousandth."""
  return float(f"{option.step.total:.3g}"), option.memory.total


def _rules(config: Config, tensor: int) -> str:
  """The config's, but key heads fewer than `tensor` devices are copied to each."""
  heads = [a.kv_heads for layer in config.model.layers
           if isinstance(a := layer.attention, AttentionSpec)]  # fmt: skip
  whole = all(n % tensor == 0 for n in heads)
  return config.mesh.rules + ("" if whole else ",kv_heads=,act_kv_heads=")


def _with_policy(
  moved: Setup, weights: Weights, chip: Chip, policy: str, room: float
) -> Option | None:
  """With as many microbatches as it takes to fit (more only repeat the gathers), or the most."""
  config, last = moved.config, None
  for parts in _parts(config):
    train = replace(config.train, remat=policy, microbatches=parts)
    setup = moved._replace(config=replace(config, train=train))
    try:
      check_batch(setup.config, setup.rules, setup.mesh)
    except ConfigError:
      break
    needed = memory(setup, weights)
    last = setup, needed
    if needed.total <= room:
      break
  if last is None:
    return None
  setup, needed = last
  return Option(setup, needed, step_time(setup, chip), needed.total <= room)


def _parts(config: Config) -> Iterator[int]:
  count = 1
  while count <= MAX_PARTS and config.data.batch_size % count == 0:
    yield count
    count *= 2


def meshes(config: Config, devices: int, *, quick: bool = False) -> Iterator[dict[str, int]]:
  """Sizes of all axes whose product is `devices`; no pipeline stages."""
  experts = [m.mlp.num_experts for m in config.model.layers if isinstance(m.mlp, MoeSpec)]
  common = math.gcd(devices, *experts) if experts else 1
  divisors = lambda n, most: [d for d in range(1, min(n, most) + 1) if n % d == 0]
  powers = lambda n, most: [d for d in divisors(n, most) if d & (d - 1) == 0]
  choices = (divisors(devices, MAX_TENSOR), divisors(common, devices), (1,) if quick else (1, 2, 4))
  for tensor, expert, context in itertools.product(*choices):
    inner = tensor * expert * context
    if devices % inner:
      continue
    rest = devices // inner
    for data in powers(rest, 1 if quick else 8):
      yield {
        "data": data, "stage": 1, "fsdp": rest // data, "expert": expert, "context": context,
        "tensor": tensor,
      }  # fmt: skip
