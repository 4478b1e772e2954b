"""The scripts' dry runs print the commands they would run, and a fake gcloud receives them."""

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "tpu_setup" / "tpu_vm.sh"


def run(*arguments, **kwargs):
  return subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, **kwargs)


def test_dry_run_of_launch_prints_every_step():
  done = run(
    "launch", "--name=n", "--zone=z", "--type=v5p-64", "--dry-run", "--",
    "--config=moe_70b", "--config.data.path=/shared/my shards",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert lines[0].startswith("gcloud compute tpus tpu-vm create n --accelerator-type=v5p-64")
  assert "pip wheel" in lines[1]
  assert "tpu-vm scp" in lines[2]
  assert "meshyard" in lines[3]
  assert "experiments.run" in lines[4]
  assert "--config=moe_70b" in lines[4]
  assert "nohup" in lines[4]
  assert all("--zone=z" in line for line in lines if "gcloud" in line)


def test_delete_reaches_gcloud(tmp_path):
  fake = tmp_path / "gcloud"
  fake.write_text('#!/bin/sh\necho "$@" > "$RECORD"\n')
  fake.chmod(0o755)
  record = tmp_path / "record"
  environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(record)}
  assert run("delete", "--name=n", "--zone=z", env=environment).returncode == 0
  assert record.read_text().strip() == "compute tpus tpu-vm delete n --quiet --zone=z"


def test_mistakes_exit_with_2_and_say_what_is_missing():
  for arguments, message in (
    (("launch", "--zone=z"), "--name and --zone are needed"),
    (("create", "--name=n", "--zone=z"), "create needs --type"),
    (("launch", "--name=n", "--zone=z"), "needs the flags"),
    (("dance", "--name=n", "--zone=z"), "unknown command dance"),
    (("create", "--name=n", "--zone=z", "--tpye=x"), "unknown option --tpye=x"),
  ):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
  assert "usage" in run("--help").stdout
