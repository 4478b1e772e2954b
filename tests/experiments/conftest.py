"""What the tests of programs share: a user's cache folder, and one finished run."""

from pathlib import Path

import jax
import pytest

from tests.experiments.programs import DEBUG, Result, call


@pytest.fixture(scope="session", autouse=True)
def caches(compile_cache, tmp_path_factory):
  """Programs keep to the tests' compilation cache, and to a cache folder of the session."""
  patch = pytest.MonkeyPatch()
  patch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
  patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
  patch.setenv("MPLCONFIGDIR", str(tmp_path_factory.mktemp("matplotlib")))
  yield
  patch.undo()


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> tuple[Path, Result]:
  """A run of config `debug` on one device, and what it printed. Not to be changed."""
  folder = tmp_path_factory.mktemp("finished") / "run"
  result = call("run", *DEBUG, f"--workdir={folder}")
  assert result.code == 0, result.err
  return folder, result


@pytest.fixture
def trained(finished) -> Path:
  return finished[0]
