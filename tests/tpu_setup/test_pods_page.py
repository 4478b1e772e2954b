"""Every command of docs/pods.md, in order, against the fake cloud."""

import ast
import re
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "pods.md"

# Stands for `python`: the module or script must exist and define the flags.
PYTHON = """
case "$1" in
  -m) file="$ROOT/${2//.//}.py" ;;
  *) file="$ROOT/$1" ;;
esac
[ -f "$file" ] || { echo "no $file" >&2; exit 2; }
echo "$*" >> "$CLOUD/python_calls"
"""


def commands() -> list[str]:
  blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
  return [line for block in blocks for line in block.splitlines()]


def defined_flags() -> set[str]:
  """Of all programs in experiments, absl flags and argparse arguments."""
  found = set()
  files = [*(ROOT / "experiments").rglob("*.py"), ROOT / "tpu_setup" / "check_devices.py"]
  for path in files:
    for node in ast.walk(ast.parse(path.read_text())):
      if not (isinstance(node, ast.Call) and node.args):
        continue
      name = getattr(node.func, "attr", "")
      if name.startswith("DEFINE_") or name == "add_argument":
        found.add("--" + str(getattr(node.args[0], "value", "")).lstrip("-"))
  return found


def test_every_command_runs(cloud):
  """`watch` sees its spot slice preempted once, and the run finish."""
  lines = commands()
  assert len(lines) > 25
  cloud.tool("python", PYTHON)
  cloud.plan("wait", "suspended", "0")
  environment = cloud.environment | {"ROOT": str(ROOT)}
  for line in lines:
    if "tpu_vm.sh" in line:  # two hosts instead of sixteen, and no waiting
      line = line.replace("--type=v5p-128", "--type=v5p-16")
      line = line.replace(" create ", " create --poll=0.02 ").replace(
        " watch ", " watch --poll=0.02 "
      )
    done = subprocess.run(
      ["bash", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
  launched = ["create", "install", "start", "stop", "delete"]
  watched = ["create", "install", "start", "delete", "create", "install", "start", "delete"]
  assert cloud.steps()[: len(launched + watched)] == launched + watched
  assert (cloud.folder / "manifest").exists()
  assert (cloud.folder / "batch").exists()


def test_flags_of_programs_exist():
  known = defined_flags()
  checked = 0
  for line in commands():
    words = shlex.split(line)
    if not any(word in ("python", "--") for word in words):
      continue
    start = words.index("--") if "--" in words else words.index("python")
    for word in words[start + 1 :]:
      name = word.partition("=")[0]
      if name.startswith("--") and not name.startswith("--config."):
        assert name in known, f"{name} in: {line}"
        checked += 1
  assert checked > 15


def test_codes_are_those_of_the_programs():
  rows = re.findall(r"^\| ([\d, .]+) \|", PAGE.read_text(), re.MULTILINE)
  named = {int(code) for row in rows for code in re.findall(r"\d+", row)}
  assert {0, 2, 75, 76, 77, 130} <= named
