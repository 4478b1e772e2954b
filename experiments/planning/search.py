"""Meshes, recomputation and microbatches that fit a machine, the quickest first."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from jax.sharding import AbstractMesh, AxisType, Mesh

from layers.spec import AttentionSpec, MoeSpec
from layers.stack import is_staged
from mesh.axes import MESH_AXES
from mesh.hardware import Chip
from mesh.rules import parse_rules, validate

from ..config import Config, ConfigError, MeshConfig
from ..overrides import flatten
from ..training.setup import Setup, build_on, check_batch, check_parallel, optimizer_for
from ..training.state import abstract_state
from .estimate import Memory, Weights, memory, weights_of
from .speed import Step, step_time, time_rows

ROOM = 0.95  # of a chip's memory that a program can have
MAX_TENSOR, MAX_PARTS = 16, 32
STAGES = (2, 4, 8)
_POLICIES = ("none", "minimal", "full")


class Option(NamedTuple):
  """One way to run a config."""

  setup: Setup
  memory: Memory
  step: Step
  fits: bool

  def overrides(self, base: Config) -> list[str]:
    """What to write on a command line with the config `base` to get it."""
    return changes(base, self.setup.config, always=("train.remat", "train.microbatches"))

  @property
  def name(self) -> str:
    """fsdp=16 x expert=4, minimal, 2 microbatches."""
    sizes = " x ".join(f"{a}={n}" for a, n in self.setup.mesh.shape.items() if n > 1)
    train = self.setup.config.train
    parts = f", {train.microbatches} microbatches" if train.microbatches > 1 else ""
    return f"{sizes or 'one device'}, {train.remat}{parts}"


def changes(base: Config, config: Config, always: Sequence[str] = ()) -> list[str]:
  """The overrides that make `config` of `base`, and those of the fields in `always`."""
  was, now = ({**flatten(c), **_sizes(c.mesh)} for c in (base, config))
  text = lambda value: ",".join(value) if isinstance(value, tuple) else str(value).lower()
  return [
    f"--config.{path}={text(value)}"
    for path, value in now.items()
    if path in always or value != was[path]
  ]


def _sizes(mesh: MeshConfig) -> dict[str, int]:
  """By path; what is not given is 1 beside what is."""
  return {f"mesh.{axis}": getattr(mesh, axis) or 1 for axis in MESH_AXES}


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
  """A mesh that is numbers only."""
  shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
  return AbstractMesh(shape, MESH_AXES, (AxisType.Auto,) * len(MESH_AXES))


def slices(config: Config) -> int:
  """That its mesh spans."""
  return config.mesh.dcn_data * config.mesh.dcn_stage * config.mesh.dcn_fsdp


def over_slices(config: Config, sizes: dict[str, int]) -> dict[str, int]:
  """Sizes within a slice times those across slices."""
  return {axis: n * getattr(config.mesh, f"dcn_{axis}", 1) for axis, n in sizes.items()}


def start(config: Config) -> Setup:
  """A setup to move about, on one device that holds everything.

  The slices that its config's mesh spans remain.
  """
  across = {name: getattr(config.mesh, name) for name in ("dcn_data", "dcn_stage", "dcn_fsdp")}
  here = replace(config, mesh=MeshConfig(rules=config.mesh.rules, **across))
  return build_on(here, abstract_mesh({}), "tpu")


def move(setup: Setup, config: Config, mesh: Mesh | AbstractMesh) -> Setup:
  """`setup` elsewhere: a config that differs only in what changes no weight, on another mesh.

  For planners, which compare hundreds; the model is not the one that would run. Errors as in
  `build`.
  """
  layout, optimizer = setup.layout, setup.optimizer
  try:
    rules = parse_rules(config.mesh.rules)
    validate(rules, mesh)
    check_batch(config, rules, mesh)
    check_parallel(config, mesh)
    shapes = setup.abstract.opt_state  # the same on every mesh
    if config.optimizer != setup.config.optimizer:
      _, shapes = optimizer_for(config, setup.schedule, layout)
    abstract = abstract_state(layout, shapes, mesh, rules, config.mesh.circular)
  except ValueError as e:
    raise ConfigError(str(e).splitlines()[0]) from e
  return setup._replace(
    config=config, mesh=mesh, rules=rules, optimizer=optimizer, abstract=abstract
  )


def search(setup: Setup, chip: Chip, chips: int, *, quick: bool = False) -> list[Option]:
  """The best option of each mesh: those that fit by predicted time, then the others by memory.

  Args:
    setup: of `start`.
    chips: of each slice.
    quick: without the axes that are seldom the best: data, stage and context.
  """
  assert chip.hbm_bytes
  room = ROOM * chip.hbm_bytes / chip.devices_per_chip
  whole = replace(setup.config, train=replace(setup.config.train, microbatches=1))
  found = []
  for moved in moves(setup, whole, chips * chip.devices_per_chip, quick=quick):
    weights = weights_of(moved)
    here = [o for policy in _POLICIES if (o := _with_policy(moved, weights, chip, policy, room))]
    fits = [option for option in here if option.fits]
    found += sorted(fits, key=_rank)[:1] or sorted(here, key=lambda o: o.memory.total)[:1]
  fits = sorted((o for o in found if o.fits), key=_rank)
  return fits + sorted((o for o in found if not o.fits), key=lambda o: o.memory.total)


def moves(setup: Setup, config: Config, devices: int, *, quick: bool = False) -> Iterator[Setup]:
  """`config` on every mesh of so many devices, in each slice, that divides it."""
  for sizes in meshes(config, devices, quick=quick):
    for rules in _rules(config, sizes["tensor"]):
      try:
        here = replace(config, mesh=replace(config.mesh, **sizes, rules=rules))
        yield move(setup, here, abstract_mesh(over_slices(here, sizes)))
        break
      except ConfigError:  # sizes that do not divide, or that these rules do not use
        continue


def loses_by(option: Option, best: Option) -> str:
  """What an option that fits spends more time on than the best one."""
  mine, theirs = (dict(time_rows(o.step)) for o in (option, best))
  more = {name: mine[name] - theirs[name] for name in mine}
  name = max(more, key=lambda key: more[key])
  return f"{name} +{more[name]:.2f} s" if more[name] > 0.005 else "the same"


def _rank(option: Option) -> tuple[float, int]:
  """By time, and by memory where that is the same to a thousandth."""
  return float(f"{option.step.total:.3g}"), option.memory.total


def _rules(config: Config, tensor: int) -> list[str]:
  """The config's, or else those of every axis, with its changes.

  Other presets are no others: each is `all` on a mesh without the axes it leaves out. Key heads
  fewer than `tensor` devices are copied to each.
  """
  _, comma, changed = config.mesh.rules.partition(",")
  heads = [a.kv_heads for layer in config.model.layers
           if isinstance(a := layer.attention, AttentionSpec)]  # fmt: skip
  whole = all(n % tensor == 0 for n in heads) or "kv_heads=" in changed
  names = dict.fromkeys((config.mesh.rules, "all" + comma + changed))
  return [name + ("" if whole else ",kv_heads=,act_kv_heads=") for name in names]


def _with_policy(
  moved: Setup, weights: Weights, chip: Chip, policy: str, room: float
) -> Option | None:
  """With the microbatches it takes to fit, or the most.

  More of them only repeat the gathers; but stages wait less, so there the quickest counts.
  """
  config, best, last = moved.config, None, None
  stages = moved.mesh.shape["stage"]
  for parts in _parts(config):
    if parts < stages:
      continue
    train = replace(config.train, remat=policy, microbatches=parts)
    setup = moved._replace(config=replace(config, train=train))
    try:
      check_batch(setup.config, setup.rules, setup.mesh)
    except ConfigError:
      break
    needed = memory(setup, weights)
    last = setup, needed
    if needed.total > room and stages == 1:
      continue  # timed only if it stays the last
    option = Option(setup, needed, step_time(setup, chip), needed.total <= room)
    if best is None or not best.fits or (option.fits and _rank(option) < _rank(best)):
      best = option
    if stages == 1:
      return best
  if best is not None or last is None:
    return best
  setup, needed = last
  return Option(setup, needed, step_time(setup, chip), needed.total <= room)


def _parts(config: Config) -> Iterator[int]:
  count = 1
  while count <= MAX_PARTS and config.data.batch_size % count == 0:
    yield count
    count *= 2


def meshes(config: Config, devices: int, *, quick: bool = False) -> Iterator[dict[str, int]]:
  """Sizes of all axes whose product is `devices`.

  Pipeline stages come without tensor and context, whose traffic inside of stages nobody fitted.
  """
  experts = [m.mlp.num_experts for m in config.model.layers if isinstance(m.mlp, MoeSpec)]
  common = math.gcd(devices, *experts) if experts else 1
  divisors = lambda n, most: [d for d in range(1, min(n, most) + 1) if n % d == 0]
  powers = lambda n, most: [d for d in divisors(n, most) if d & (d - 1) == 0]
  choices = (
    (1,) if quick else _stages(config),
    divisors(devices, MAX_TENSOR),
    divisors(common, devices),
    (1,) if quick else (1, 2, 4),
  )
  for stage, tensor, expert, context in itertools.product(*choices):
    inner = stage * tensor * expert * context
    if devices % inner or (stage > 1 and tensor * context > 1):
      continue
    rest = devices // inner
    for data in powers(rest, 1 if quick else 8):
      yield {
        "data": data, "stage": stage, "fsdp": rest // data, "expert": expert, "context": context,
        "tensor": tensor,
      }  # fmt: skip


def _stages(config: Config) -> list[int]:
  """Pipeline stages that the largest segment divides into."""
  repeats = max(config.model.segments, key=lambda s: s.repeats * len(s.layers)).repeats
  circular = config.mesh.circular
  return [1, *(n for n in STAGES if is_staged(repeats, n, circular))]
