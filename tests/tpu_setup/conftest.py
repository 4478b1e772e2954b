"""The fake cloud of fakes/cloud.py on PATH, and the tools that a TPU host has."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).parent / "fakes" / "cloud.py"

TOOLS = {
  # `pip wheel`: leaves a wheel of the project's version where it was told to.
  "python3": """
while [ "$1" != --wheel-dir ]; do shift; done
[ ! -e "$CLOUD/no_wheel" ] || exit 1
[ -f "$3/pyproject.toml" ] && [ -d "$3/experiments" ] && [ -d "$3/mesh" ] && [ -d "$3/layers" ]
version=$(sed -n 's/^version = "\\(.*\\)"/\\1/p' "$3/pyproject.toml")
echo wheel > "$2/meshyard-$version-py3-none-any.whl"
""",
  "hostname": 'echo "${FAKE_HOST:-laptop}"',
  # The installer of uv, which installs a uv whose Python is the program of the plan.
  "curl": """
cat <<'SH'
mkdir -p "$HOME/.local/bin"
cp "$CLOUD/bin/uv" "$HOME/.local/bin/uv"
SH
""",
  "uv": """
echo "$HOME uv $*" >> "$CLOUD/uv_calls"
if [ "$1" = venv ]; then
  for folder in "$@"; do :; done
  mkdir -p "$folder/bin"
  cp "$CLOUD/bin/program" "$folder/bin/python"
else
  for wheel in "$@"; do :; done
  [ -f "${wheel#*file://}" ]
fi
""",
  "program": """
if [[ $1 == */check_devices.py ]]; then
  echo "host $FAKE_HOST is here"
  if [ -e "$CLOUD/check_fails" ]; then exit 1; else exit 0; fi
fi
env > "$HOME/environment"
echo "$@" >> "$HOME/programs"
index=${FAKE_HOST##*-}
what=$(sed -n "$(cat "$CLOUD/launches")p" "$CLOUD/plan")
case "$what" in
  suspended | preempted) exec sleep 100 ;;
  wait) trap 'exit 75' TERM; sleep 100 & wait; ;;
  deaf) trap '' TERM; setsid sleep 100 & echo $! > "$HOME/child"; while true; do sleep 1; done ;;
  *,*) exit "$(cut -d , -f $((index + 1)) <<< "$what")" ;;
  *) exit "$what" ;;
esac
""",
  "sudo": '"$@"',
  "mountpoint": "exit 1",
  "gcsfuse": 'echo "$*" >> "$CLOUD/mounts"',
  "mkdir": 'case "$2" in /mnt/*) ;; *) /bin/mkdir "$@" ;; esac',
  "chown": "",
}


class Cloud:
  """A folder that plays Google Cloud; `run` calls a script of tpu_setup against it."""

  def __init__(self, folder: Path):
    self.folder = folder
    tools = folder / "bin"
    tools.mkdir(parents=True)
    for name in ("gcloud", "kubectl", "sbatch", "ssh-add"):
      self.tool(name, f'exec {sys.executable} -S -E {FAKE} {name} "$@"')
    for name, text in TOOLS.items():
      self.tool(name, text.strip())
    self.environment = os.environ | {
      "CLOUD": str(folder),
      "PATH": f"{tools}:{os.environ['PATH']}",
      "PYTHON": "python3",
      "STOP_SECONDS": "2",
    }

  def tool(self, name: str, text: str) -> None:
    path = self.folder / "bin" / name
    path.write_text(f"#!/bin/bash\nset -eu\n{text}\n")
    path.chmod(0o755)

  def plan(self, *launches: str) -> None:
    (self.folder / "plan").write_text("\n".join(launches) + "\n")

  def calls(self) -> list[list[str]]:
    path = self.folder / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def steps(self) -> list[str]:
    """What changed the slice, in order: create, install, start, stop, delete."""
    found = []
    for call in (c for c in self.calls() if "queued-resources" in c):
      found += [word for word in call if word in ("create", "delete")]
      found += re.findall(r"worker\.sh (install|start|stop)\b", " ".join(call))
    return found

  def hosts(self) -> list[Path]:
    return sorted((self.folder / "hosts").glob("*"))

  def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
      ["bash", str(ROOT / "tpu_setup" / script), *arguments],
      capture_output=True, text=True, timeout=60, env=self.environment | environment,
    )  # fmt: skip


@pytest.fixture
def cloud(tmp_path):
  cloud = Cloud(tmp_path / "cloud")
  yield cloud
  for pid in (tmp_path / "cloud" / "hosts").glob("*/meshyard/pid"):
    subprocess.run(["kill", "-9", "--", f"-{pid.read_text().strip()}"], capture_output=True)
