"""`tpu_vm.sh watch` against a cloud that preempts."""

import os
import re
import signal

import pytest

SLICE = ("--name=run", "--zone=us-east5-a", "--type=v5p-16")  # two hosts
PROGRAM = ("--", "--config=moe_70b", "--workdir=/mnt/my-bucket/moe-70b")


def watch(cloud, *options):
  return cloud.run("tpu_vm.sh", "watch", *SLICE, "--poll=0.02", *options, *PROGRAM)


def watch_one_host(cloud, *options):
  options = ("--type=v5p-8", "--poll=0.02", *options)
  return cloud.run("tpu_vm.sh", "watch", *SLICE, *options, *PROGRAM, HOSTS="1")


def starts(cloud):
  commands = (a for call in cloud.calls() for a in call if a.startswith("--command="))
  return [c for c in commands if "worker.sh start" in c]


def test_two_preemptions_a_restart_and_the_end(cloud):
  cloud.plan("suspended", "preempted", "75", "0")
  done = watch(cloud, "--spot", "--bucket=my-bucket")
  assert done.returncode == 0, done.stdout + done.stderr
  assert cloud.steps() == [
    *("create", "install", "start"),  # suspended: the cloud deletes the slice
    *("delete", "create", "install", "start"),  # preempted: the node says so before the request
    *("delete", "create", "install", "start"),  # 75: saved, the hosts are still there
    "start",
  ]
  assert len(set(starts(cloud))) == 1  # the same work directory, the same flags
  assert "--workdir=/mnt/my-bucket/moe-70b" in starts(cloud)[0]
  creates = [c for c in cloud.calls() if "create" in c]
  assert all("--spot" in c for c in creates)
  mounts = (cloud.folder / "mounts").read_text().splitlines()
  assert len(mounts) == 6  # two hosts, three times
  assert all(m.endswith("my-bucket /mnt/my-bucket") for m in mounts)
  for said in ("SUSPENDED", "PREEMPTED", "ended with 75 and wants a restart", "ended with 0"):
    assert said in done.stdout, done.stdout


@pytest.mark.parametrize(
  ("plan", "code", "launches"),
  [
    (("76", "134", "77"), 77, 3),  # the watchdog and crashes restart, the guard ends
    (("2",), 2, 1),
    (("130",), 130, 1),
    (("75,77",), 77, 1),  # one host's word is final, though the other wants a restart
    (("0,134", "0"), 0, 2),  # one host crashed at the end: the run itself knows that it is done
  ],
)
def test_exit_codes(cloud, plan, code, launches):
  cloud.plan(*plan)
  done = watch(cloud) if "," in plan[0] else watch_one_host(cloud)
  assert done.returncode == code, done.stdout + done.stderr
  assert cloud.steps() == ["create", "install"] + ["start"] * launches


def test_crashes_in_a_row_end_it_and_the_slice_with_it(cloud):
  cloud.plan("1", "1", "1")
  done = watch_one_host(cloud, "--max-failures=3", "--delete-at-end")
  assert done.returncode == 1
  assert "3 failures in a row" in done.stdout
  assert cloud.steps()[-2:] == ["start", "delete"]
  assert not cloud.hosts()


def test_a_run_that_goes_on_is_left_alone(cloud):
  """Started over a slice that launch began, watch neither creates, installs nor starts."""
  cloud.plan("suspended", "0")
  two = ("--type=v5p-8", "--num-slices=2", "--poll=0.02")
  launched = cloud.run("tpu_vm.sh", "launch", *SLICE, *two, *PROGRAM, HOSTS="1")
  assert launched.returncode == 0, launched.stderr
  done = watch_one_host(cloud, *two)
  assert done.returncode == 0, done.stdout + done.stderr
  assert cloud.steps() == ["create", "install", "start", "delete", "create", "install", "start"]


def test_a_host_that_is_stuck_is_stopped(cloud):
  """One host crashed, the other goes on: it gets SIGTERM, then SIGKILL, and all start again."""
  cloud.plan("wait", "0")
  cloud.run("tpu_vm.sh", "launch", *SLICE, "--poll=0.02", *PROGRAM)
  os.killpg(int((cloud.hosts()[0] / "meshyard" / "pid").read_text()), signal.SIGKILL)
  done = watch(cloud)
  assert done.returncode == 0, done.stdout + done.stderr
  assert "stopping them" in done.stdout
  assert "crashed with 137" in done.stdout  # the killed host left no code, the stopped one 75
  assert cloud.steps()[3:] == ["stop", "start"]


def test_gcloud_refusing_the_first_time_ends_it(cloud):
  (cloud.folder / "refuse").write_text("create 7")
  done = watch(cloud)
  assert done.returncode == 7
  assert "refused" in done.stderr
  (cloud.folder / "refuse").write_text("list 4")
  assert watch(cloud).returncode == 4
  assert cloud.steps() == ["create"]


def test_a_workdir_on_the_slice_is_refused(cloud):
  for program in (("--", "--config=moe_70b"), ("--", "--workdir=runs/a")):
    done = cloud.run("tpu_vm.sh", "watch", *SLICE, *program)
    assert done.returncode == 2
    assert "watch needs -- --workdir=gs://BUCKET/FOLDER" in done.stderr
  assert not cloud.calls()


def test_dry_run_prints_every_step(cloud):
  done = cloud.run("tpu_vm.sh", "watch", *SLICE, "--spot", "--dry-run", *PROGRAM)
  assert done.returncode == 0, done.stderr
  order = "list.*worker.sh state.*delete run.*create run.*pip wheel.*scp.*worker.sh install.*start"
  assert re.search(order, done.stdout, re.DOTALL)
  assert not cloud.calls()
