"""Slow hosts: the decision on streams, and what of a host's time is its own, on a clock by hand."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments.training import goodput, hosts
from experiments.training.goodput import Clock
from experiments.training.hosts import HostTimes, SlowHosts

LOOKS = hosts._LOOKS


def decide(own, step_seconds=1.0):
  """(look, process, slow) of a matrix [looks, processes] of own seconds; NaN says nothing."""
  judge, found = SlowHosts(), []
  for look, row in enumerate(np.asarray(own, float)):
    said = {process: x for process, x in enumerate(row) if np.isfinite(x)}
    found += [(look, process, slow) for process, slow in judge.look(said, step_seconds)]
  return found


def streams(looks, *levels):
  return np.tile(np.asarray(levels, float), (looks, 1))


@pytest.mark.parametrize("slow", (0, 1))
@pytest.mark.parametrize("count", (2, 3, 8, 1000))
def test_a_host_that_becomes_slow_is_named_once(count, slow):
  """Steps of 1 s; from look 10 on the host needs 0.35 s where others need 0.05."""
  own = streams(200, *[0.05] * count)
  own[10:, slow] = 0.35
  assert decide(own) == [(10 + LOOKS - 1, slow, True)]


def test_it_is_over_when_half_of_it_is_gone():
  """0.20 s above the median are the limit of a step of 1 s, and 0.10 s for its end."""
  own = streams(100, 0.05, 0.05, 0.05, 0.30)
  own[20:50, 3] = np.tile([0.22, 0.28], 15)  # hovers about the limit
  own[50:, 3] = 0.12
  assert decide(own) == [(LOOKS - 1, 3, True), (50 + LOOKS - 1, 3, False)]


@pytest.mark.parametrize("burst", (1, LOOKS - 1))
def test_a_burst_is_not_a_slow_host(burst):
  """Say the disk was busy, again and again, but never for a minute."""
  own = streams(300, 0.05, 0.05, 0.05)
  for begin in range(0, 300, LOOKS + 4):
    own[begin : begin + burst, 1] = 5.0
  assert decide(own) == []


def test_healthy_hosts_are_never_named():
  """64 hosts, lognormal noise with a spread of a half about 50 ms; steps of 1 s and of 60 ms."""
  rng = np.random.default_rng(20261123)
  own = 0.05 * np.exp(0.5 * rng.standard_normal((2000, 64)))
  assert decide(own, 1.0) == []
  assert decide(0.2 * own, 0.06) == []


def test_all_slow_alike_is_nobodys_fault():
  own = streams(50, 0.05, 0.05, 0.05)
  own[10:] = 0.9
  assert decide(own) == []
  assert decide(streams(50, 0.6, 0.6, 0.6, 0.85)) == []  # a fifth of a step, but not half as long


def test_small_differences_do_not_matter():
  assert decide(streams(50, 0.001, 0.009), 0.02) == []  # below the noise of an operating system
  assert decide(streams(50, 0.01, 0.15), 1.0) == []  # 15 times, but hardly of a step


def test_two_slow_hosts_of_eight():
  own = streams(60, *[0.05] * 8)
  own[5:, 2] = own[20:, 6] = 0.8
  assert decide(own) == [(5 + LOOKS - 1, 2, True), (20 + LOOKS - 1, 6, True)]


def test_who_says_nothing_is_not_judged():
  """Silence neither counts nor interrupts; one process alone has nobody to be compared with."""
  own = streams(60, 0.05, 0.05, 0.5)
  own[1::2, 2] = np.nan
  assert decide(own) == [(2 * (LOOKS - 1), 2, True)]
  own[:, :2] = np.nan
  assert decide(own) == []


class World:
  """Time by hand, and what a coordinator keeps."""

  def __init__(self, monkeypatch, platform="tpu", several=True, primary=True):
    self.now, self.kept = 1000.0, {}
    fake = SimpleNamespace(monotonic=lambda: self.now, time=lambda: self.now)
    monkeypatch.setattr(goodput, "time", fake)
    monkeypatch.setattr(goodput, "process_age", lambda: 0.0)
    monkeypatch.setattr(hosts, "time", fake)
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 1 + several)
    monkeypatch.setattr(hosts.jax, "devices", lambda: [SimpleNamespace(platform=platform)])
    monkeypatch.setattr(hosts, "is_primary", lambda: primary)
    monkeypatch.setattr(hosts, "tell", self.tell)
    monkeypatch.setattr(hosts, "told", lambda name: self.kept)
    self.clock = Clock()
    self.times = HostTimes(self.clock)
    self.clock.switch("productive")

  def tell(self, name, text):
    self.kept[0] = text

  def step(self, data=0.0, dispatch=0.0, wait=0.0, evaluation=0.0):
    with self.times.dispatching():
      self.now += dispatch
    self.now += data
    self.clock.move(data / 2, "data")  # whatever the clock calls it
    with self.times.waiting():
      self.now += wait
    with self.clock.phase("evaluation"):
      self.now += evaluation


@pytest.mark.parametrize(("platform", "own"), (("tpu", 0.12), ("cpu", 0.1)))
def test_what_is_a_hosts_own(monkeypatch, platform, own):
  """Of 0.42 s a step 0.3 are waiting; where dispatching computes the step, so is it."""
  world = World(monkeypatch, platform)
  for i in range(30):
    world.step(data=0.1, dispatch=0.02, wait=0.3, evaluation=5.0 * (i == 7))
  assert world.times.look() == []
  steps, _, seconds = json.loads(world.kept[0])
  assert steps == 30 and seconds == pytest.approx(own)
  for _ in range(30):
    world.step(data=0.2, wait=0.3)
  world.times.look()
  assert json.loads(world.kept[0])[::2] == [60, pytest.approx(0.2)]  # since the look before


def test_looks_are_rare_and_the_compiled_step_is_not_in_them(monkeypatch):
  world = World(monkeypatch)
  world.clock.switch("compile")
  world.step(dispatch=50.0, wait=50.0)
  world.clock.switch("productive")
  for _ in range(9):
    world.step(wait=0.9, data=0.1)
  world.times.look()
  assert json.loads(world.kept.pop(0))[2] == pytest.approx(0.1 * 9 / 10)
  world.step(wait=9.0)
  assert world.times.look() == [] and world.kept == {}  # 9 s later
  world.step(wait=2.0)
  world.times.look()
  assert world.kept.keys() == {0}


def test_the_others_are_read_and_the_slow_one_is_named(monkeypatch):
  world, found = World(monkeypatch), []
  for look in range(1, LOOKS + 3):
    for _ in range(10):
      world.step(data=0.01, wait=1.0)
    world.kept[1] = json.dumps([10 * look, "host-b", 0.9])
    world.kept[2] = json.dumps([10, "host-c", 7.0])  # its first words, never renewed
    found += world.times.look()
  [slow] = found
  assert slow.describe() == (
    "process 1 on host-b is slow: 0.9 s a step for its own work (data, dispatch), where 0.01 s is "
    "the median and a step takes 1.01 s"
  )
  assert world.times.spread() == {
    "host_p50_s": pytest.approx(0.9), "host_max_s": 7.0, "host_max": "process 2 on host-c",
  }  # fmt: skip


def test_one_process_tells_nobody(monkeypatch):
  world = World(monkeypatch, several=False)
  for _ in range(20):
    world.step(data=0.1, wait=0.9)
  assert world.times.spread() == {}
  assert world.times.look() == [] and world.kept == {}
  assert world.times.spread() == {
    "host_p50_s": pytest.approx(0.1), "host_max_s": pytest.approx(0.1),
  }  # fmt: skip


def test_only_process_0_compares_and_a_lost_coordinator_is_for_others_to_notice(monkeypatch):
  world = World(monkeypatch, primary=False)
  monkeypatch.setattr(hosts, "told", lambda name: pytest.fail("read"))
  world.step(wait=11.0)
  assert world.times.look() == [] and 0 in world.kept

  def fail(name, text):
    raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")

  monkeypatch.setattr(hosts, "tell", fail)
  world.step(wait=11.0)
  assert world.times.look() == []
