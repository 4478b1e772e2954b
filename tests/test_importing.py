"""The library in another project: the wheel, the guide `docs/importing.md`, a vendored copy.

Everything runs in other processes, from folders outside the repository, without its import path.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

# One worker builds and installs once.
pytestmark = pytest.mark.xdist_group("importing")

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs" / "importing.md").read_text()
PACKAGES = {"mesh", "layers", "experiments"}


def blocks(language: str, text: str = GUIDE) -> list[str]:
  return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def environment(*folders: Path) -> dict[str, str]:
  """For a Python that sees `folders` and the libraries, but no install or checkout of ours."""
  libraries = [p for p in map(Path, sys.path) if p.is_dir() and p.resolve() != ROOT]
  return {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(map(str, dict.fromkeys([*folders, *libraries]))),
    "PYTHONDONTWRITEBYTECODE": "1",
    "JAX_PLATFORMS": "cpu",
    # Compiling is most of the time here, and the programs are tiny.
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
  }


def python(script: str, cwd: Path, *folders: Path) -> dict:
  """Run `script` and return the JSON object on the last line it prints."""
  # -S: the .pth file of an editable install would bring this checkout back.
  command = [sys.executable, "-S", "-c", script]
  done = subprocess.run(
    command, cwd=cwd, env=environment(*folders), capture_output=True, text=True, timeout=500
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


def run(*command: str | Path, cwd: Path, **env: str) -> None:
  done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
  """Built from a copy, for setuptools leaves a build folder in the sources."""
  folder = tmp_path_factory.mktemp("wheel")
  ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
  source = shutil.copytree(
    ROOT, folder / "source", ignore=shutil.ignore_patterns(".git", "shared", *ignored)
  )
  build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder)
  run(*build, source, cwd=folder)
  (path,) = folder.glob("*.whl")
  return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("installed")
  pip = (sys.executable, "-m", "pip", "install", "--disable-pip-version-check")
  run(*pip, "--no-index", "--no-deps", "--target", folder, wheel, cwd=folder)
  return folder


# After the blocks of the guide: what each form lost, and a check of TransformerLM, which keeps
# the layers of a segment stacked, with the weights of the hand-written model.
REPORT = """
import json

second = {"attention_norm": params["attention_norm"], "mlp_norm": params["moe_norm"]}
second |= {"attention": params["attention"], "moe": params["moe"]}
stack = lambda tree: jax.tree.map(lambda w: w[None], tree)
stacked = {name: params[name] for name in ("embedding", "final_norm", "head")}
stacked["segment_0"] = {"layer_0": stack(params["block"]), "layer_1": stack(second)}
lost = {name: value for name, value in globals().items() if name.endswith("_losses")}
first = float(jax.jit(decoder_loss)(stacked, *batch))
report = {"lost": lost, "first": first, "devices": jax.device_count(), "file": layers.__file__}
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def guide(installed, tmp_path_factory) -> dict:
  script = "\n".join(["import layers", *blocks("python"), REPORT])
  return python(script, tmp_path_factory.mktemp("elsewhere"), installed)


def test_wheel_holds_our_packages_and_nothing_else(wheel):
  with zipfile.ZipFile(wheel) as archive:
    names = [name for name in archive.namelist() if not name.endswith("/")]
  top = {name.split("/")[0] for name in names}
  assert {name for name in top if not name.endswith(".dist-info")} == PACKAGES
  assert len(top) == len(PACKAGES) + 1
  sources = {str(p.relative_to(ROOT)) for name in PACKAGES for p in (ROOT / name).rglob("*.py")}
  assert {name for name in names if name.endswith(".py")} == sources


def test_prices_are_installed(installed, tmp_path):
  script = "import json; from experiments.planning import cost; prices = cost.Prices.load()"
  script += "; print(json.dumps([cost.__file__, prices.pue.value]))"
  file, pue = python(script, tmp_path, installed)
  assert Path(file).is_relative_to(installed)
  assert pue > 1


def test_layers_load_no_training_library(installed, tmp_path):
  script = "import json, sys, layers; print(json.dumps([layers.__file__, sorted(sys.modules)]))"
  file, modules = python(script, tmp_path, installed)
  assert Path(file).is_relative_to(installed)
  loaded = {name.split(".")[0] for name in modules}
  assert {"layers", "mesh", "jax", "flax"} <= loaded
  assert not loaded & {"experiments", "optax", "orbax", "grain", "tensorstore", "tokenizers"}


def test_guide_runs_from_the_installed_wheel(guide, installed):
  assert Path(guide["file"]).is_relative_to(installed)
  forms = {"linen", "decoder", "plain", "nnx", "equinox", "mesh"}
  assert {name.removesuffix("_losses") for name in guide["lost"]} == forms


@pytest.mark.parametrize("form", ["linen", "decoder", "plain", "nnx", "equinox", "mesh"])
def test_every_form_learns(guide, form):
  losses = guide["lost"][f"{form}_losses"]
  assert losses[0] > 4.0  # about log 64: nothing is known yet
  assert min(losses[-2:]) < losses[0] - 0.8


@pytest.mark.parametrize("form", ["plain", "nnx", "equinox"])
def test_same_weights_give_the_same_losses_in_every_form(guide, form):
  lost = guide["lost"]
  np.testing.assert_allclose(lost[f"{form}_losses"], lost["linen_losses"], rtol=1e-4)


def test_transformer_lm_is_the_hand_written_model(guide):
  np.testing.assert_allclose(guide["first"], guide["lost"]["linen_losses"][0], rtol=1e-5)


def test_a_mesh_changes_no_loss(guide):
  assert guide["devices"] == 2
  lost = guide["lost"]
  np.testing.assert_allclose(lost["mesh_losses"], lost["decoder_losses"], rtol=1e-4)


def test_vendored_copy_works_under_another_name(guide, tmp_path):
  (recipe,) = blocks("bash")
  run("bash", "-euo", "pipefail", "-c", recipe, cwd=tmp_path, MESHYARD=str(ROOT))
  name = "third_party.meshyard"
  folder = tmp_path / "third_party" / "meshyard"
  assert {p.name for p in folder.iterdir()} == {"mesh", "layers", "LICENSE"}
  assert not list(folder.rglob("*.bak"))

  text = GUIDE[: GUIDE.index("\n## Flax NNX")].replace("from layers", f"from {name}.layers")
  checks = """
import importlib.util, json, sys
taken = [n for n in ("mesh", "layers", "experiments") if importlib.util.find_spec(n)]
ours = [n for n in sys.modules if n.split(".")[0] in ("mesh", "layers", "experiments")]
print(json.dumps({"taken": taken, "ours": ours, "losses": plain_losses}))
"""
  # The hand-written model is enough here, so the whole decoder is left out.
  kept = [block for block in blocks("python", text) if "TransformerLM" not in block]
  report = python("\n".join([*kept, checks]), tmp_path, tmp_path)
  assert report["taken"] == report["ours"] == []
  np.testing.assert_allclose(report["losses"], guide["lost"]["plain_losses"], rtol=1e-5)
