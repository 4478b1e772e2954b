"""A cloud in a folder, behind the names gcloud, kubectl, sbatch and ssh-add.

Every call must use a subcommand and flags that the real tool has (flags.json), else it fails as the
real one would. A TPU slice is a few folders below $CLOUD/hosts, one a host; `ssh` runs its command
there with HOME set, so that the shipped worker.sh really runs. $CLOUD/plan says what each launch of
the program comes to, a line a launch: an exit code for all hosts, one a host ("75,77"), `wait` (for
SIGTERM), or `suspended` or `preempted`: it runs until the cloud takes the slice.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

FLAGS = json.loads((Path(__file__).parent / "flags.json").read_text())
CLOUD = Path(os.environ.get("CLOUD", "."))
HOSTS = int(os.environ.get("HOSTS", "2"))  # a slice
ASKED = ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")


def main(tool, arguments):
  with (CLOUD / "calls").open("a") as calls:
    calls.write(json.dumps([tool, *arguments]) + "\n")
  if tool == "ssh-add":
    return 0
  if tool == "sbatch":
    return check_batch_script(sys.stdin.read())
  command, flags, words = parse(tool, arguments)
  if tool == "kubectl":
    if "--filename" in flags and flags["--filename"] == "-":
      (CLOUD / "manifest").write_text(sys.stdin.read())
    return 0
  refused = CLOUD / "refuse"  # `COMMAND CODE`: gcloud itself fails
  if refused.exists() and command.endswith(refused.read_text().split()[0]):
    print("ERROR: (gcloud) refused", file=sys.stderr)
    return int(refused.read_text().split()[1])
  handler = HANDLERS.get(command)
  return handler(flags, words) if handler else 0


def parse(tool, arguments):
  """The command's name, its flags and its other words; exits like the real tool on unknown ones."""
  words = [a for a in arguments if not a.startswith("-")]
  count = next((n for n in range(len(words), 0, -1) if " ".join([tool, *words[:n]]) in FLAGS), None)
  if count is None:
    fail(f"{tool}: no such command: {' '.join(words)}")
  command = " ".join([tool, *words[:count]])
  flags = {}
  for argument in (a for a in arguments if a.startswith("-")):
    name, _, value = argument.partition("=")
    if name not in FLAGS[command] + FLAGS[tool]:
      fail(f"{command}: unrecognized argument {argument}")
    flags[name] = value
  return command, flags, words[count:]


def fail(text, code=2):
  print(f"ERROR: {text}", file=sys.stderr)
  sys.exit(code)


def check_batch_script(text):
  for flag in re.findall(r"^#SBATCH (--[a-z-]+)", text, re.MULTILINE):
    if flag not in FLAGS["sbatch"]:
      fail(f"sbatch: unrecognized option {flag}")
  (CLOUD / "batch").write_text(text)
  print("Submitted batch job 7")
  return 0


def read(name, default=""):
  path = CLOUD / name
  return path.read_text() if path.exists() else default


def hosts():
  return sorted((CLOUD / "hosts").glob("*"))


def end_programs():
  for path in (CLOUD / "hosts").glob("*/meshyard/pid"):
    with contextlib.suppress(ProcessLookupError):
      os.killpg(int(path.read_text()), signal.SIGKILL)


def create(flags, words):
  if read("state"):
    fail("ALREADY_EXISTS", 1)
  assert ("--node-id" in flags) != ("--node-count" in flags)
  assert "--node-prefix" not in flags or int(flags["--node-count"]) > 1
  (CLOUD / "state").write_text(ASKED[0])
  (CLOUD / "type").write_text(flags["--accelerator-type"])
  for node in range(int(flags.get("--node-count", 1))):
    for worker in range(HOSTS):
      (CLOUD / "hosts" / f"t1v-n-{node}-w-{worker}").mkdir(parents=True)
  return 0


def delete(flags, words):
  end_programs()
  shutil.rmtree(CLOUD / "hosts", ignore_errors=True)
  (CLOUD / "state").unlink(missing_ok=True)
  return 0


def plan():
  launches = int(read("launches", "0"))
  lines = read("plan").split()
  return lines[launches - 1] if 0 < launches <= len(lines) and hosts() else ""


def list_queued(flags, words):
  """Each look moves the request on; the second look at a doomed program takes its slice."""
  state = read("state")
  if not state:
    return 0
  if state in ASKED:
    after = ASKED[min(ASKED.index(state) + 1, 2)]
    started = any((h / "meshyard" / "pid").exists() for h in hosts())
    if state == "ACTIVE" and started and plan() in ("suspended", "preempted"):
      looks = int(read("looks", "0")) + 1
      (CLOUD / "looks").write_text(str(looks % 2))
      if looks == 2:
        end_programs()
        after = "SUSPENDED" if plan() == "suspended" else "ACTIVE-PREEMPTED"
    (CLOUD / "state").write_text(after)
    state = after
  if "acceleratorType" in flags.get("--format", ""):
    print(f"{read('type')}\t{len(hosts()) // HOSTS}")
  else:
    print(state.split("-")[0])
  return 0


def list_nodes(flags, words):
  state = "PREEMPTED" if "PREEMPTED" in read("state") else "READY"
  print("\n".join([state] * (len(hosts()) // HOSTS)))
  return 0


def environment(host):
  return {**os.environ, "HOME": str(host), "FAKE_HOST": host.name}


def reachable():
  if read("state") != "ACTIVE":
    fail("cannot connect: the TPU is in state " + read("state", "NOT_FOUND"), 1)
  return hosts()


def ssh(flags, words):
  command = flags["--command"]
  machines = reachable()
  if flags["--worker"] != "all":
    machines = [h for h in machines if h.name.endswith(f"-{flags['--node']}-w-{flags['--worker']}")]
  if "worker.sh start" in command:
    (CLOUD / "launches").write_text(str(int(read("launches", "0")) + 1))
    (CLOUD / "looks").write_text("0")
  codes = []
  for host in machines:
    if "tail -n 50 -F" in command:
      command = command.replace(" -F", "")
    done = subprocess.run(["bash", "-c", command], cwd=host, env=environment(host))
    codes.append(done.returncode)
  return next((code for code in codes if code), 0)


def scp(flags, words):
  *sources, target = words
  for host in reachable():
    for source in sources:
      shutil.copy(source, host / target.split(":", 1)[1])
  return 0


def build(flags, words):
  (context,) = words
  assert sorted(p.rpartition(".")[2] for p in os.listdir(context)) == ["Dockerfile", "whl"]
  shutil.copy(f"{context}/Dockerfile", CLOUD)
  return 0


HANDLERS = {
  "gcloud builds submit": build,
  "gcloud compute tpus queued-resources create": create,
  "gcloud compute tpus queued-resources delete": delete,
  "gcloud compute tpus queued-resources list": list_queued,
  "gcloud compute tpus queued-resources ssh": ssh,
  "gcloud compute tpus queued-resources scp": scp,
  "gcloud compute tpus tpu-vm list": list_nodes,
}

if __name__ == "__main__":
  sys.exit(main(sys.argv[1], sys.argv[2:]))
