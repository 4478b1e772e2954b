"""Eight virtual CPU devices, strict numerics, warnings as errors; set before JAX starts."""

import functools
import os
import re
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8"
  + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)

import jax
import pytest
from xdist.scheduler import LoadScopeScheduling

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory):
  """One persistent compilation cache a test process: equal programs compile once."""
  jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("jax_cache")))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


class _Grouped(LoadScopeScheduling):
  """Files that name an `xdist_group` run in one worker, all files of one group in the same.

  xdist 3.8 appends the group to an attribute that pytest 9.2 no longer reads, so `loadgroup` alone
  spreads groups over workers without a word.
  """

  def _split_scope(self, nodeid: str) -> str:
    return _group(Path(self.config.rootpath) / nodeid.split("::")[0]) or nodeid

  def remove_node(self, node):
    """A test that ended its process, or hung until it was ended, is not run again in the next."""
    workload = self.assigned_work.pop(node)
    left = [test for unit in workload.values() for test, done in unit.items() if not done]
    if left:
      workload[self._split_scope(left[0])][left[0]] = True
      self.workqueue.update({k: unit for k, unit in workload.items() if not all(unit.values())})
      for other in self.assigned_work:
        self._reschedule(other)
    return left[0] if left else None


@functools.cache
def _group(path: Path) -> str | None:
  found = re.search(r'xdist_group\("(\w+)"\)', path.read_text())
  return found and found[1]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  return _Grouped(config, log) if config.getvalue("dist") == "loadgroup" else None
