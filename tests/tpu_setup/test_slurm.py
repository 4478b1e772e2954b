"""The batch script of slurm.sh, run with a fake srun and scontrol."""

import re
import subprocess

import pytest

PROGRAM = ("--", "--config=moe_70b", "--config.data.path=/shared/my shards")


def script(cloud, *options):
  done = cloud.run("slurm.sh", "script", "--name=moe-70b", *options, *PROGRAM)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.parametrize(
  ("code", "restarts", "requeued"),
  [
    *((code, 0, False) for code in (0, 2, 77, 130)),
    *((code, 0, True) for code in (75, 76, 1, 134, 137)),
    (75, 2, True),
    (75, 3, False),  # --max-restarts=3
  ],
)
def test_requeues_on_the_codes_that_want_it(cloud, code, restarts, requeued):
  text = script(cloud, "--nodes=2", "--gpus-per-node=8", "--max-restarts=3")
  cloud.tool("srun", f'printf "%s\\n" "$@" > "$CLOUD/srun"; exit {code}')
  cloud.tool("scontrol", 'echo "$@" > "$CLOUD/scontrol"')
  job = {"SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": str(restarts)}
  done = subprocess.run(["bash"], input=text, text=True, env=cloud.environment | job)
  assert done.returncode == code
  assert (cloud.folder / "scontrol").exists() == requeued
  if requeued:
    assert (cloud.folder / "scontrol").read_text() == "requeue 42\n"
  words = (cloud.folder / "srun").read_text().splitlines()
  assert words[-2:] == list(PROGRAM[1:])
  assert words[-7:-2] == ["python3", "-u", "-m", "experiments.run", "--supervise"]


def test_submit(cloud):
  options = ("--name=n", "--nodes=4", "--gpus-per-node=8", "--time=4:00:00", "--partition=p")
  assert cloud.run("slurm.sh", "submit", *options, *PROGRAM).returncode == 0
  text = (cloud.folder / "batch").read_text()
  directives = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE))
  assert directives["nodes"] == "4"
  assert directives["ntasks-per-node"] == "1"  # the one process has all GPUs of its node
  assert directives["gpus-per-node"] == "8"
  assert directives["signal"] == "TERM@300"  # to the steps, not to the batch shell (no B:)
  assert "requeue" in directives
  assert directives["time"] == "4:00:00"
  assert directives["partition"] == "p"
  dry = cloud.run("slurm.sh", "submit", *options, "--dry-run", *PROGRAM).stdout
  assert dry == f"sbatch <<'SCRIPT'\n{text}SCRIPT\n"


def test_tpu_nodes(cloud):
  text = script(cloud, "--tpu=v5litepod", "--nodes=4", "--env=A=b c")
  assert "gpus" not in text
  assert "export LIBTPU_INIT_ARGS=" in text
  assert "export A='b c'" in text
  # With it, JAX would take SLURM's task numbers for the TPU's process numbers.
  assert "env -u SLURM_LOCALID python3" in text


def test_mistakes(cloud):
  name = "--name=n"
  for arguments, message in (
    ((), "usage"),
    (("dance",), "unknown command dance"),
    (("script", *PROGRAM), "--name=NAME is needed"),
    (("script", name), "flags of experiments.run are needed"),
    (("script", name, *PROGRAM), "--gpus-per-node=N or --tpu=CHIP is needed"),
    (("script", name, "--gpus-per-node=0", *PROGRAM), "not a positive whole number"),
    (("script", name, "--tpu=v5e", *PROGRAM), "none of v4"),
    (("script", name, "--tpu=v5p", "--gpus-per-node=8", *PROGRAM), "exclude each other"),
    (("submit", name, "--env=b c", *PROGRAM), "not of the form NAME=VALUE"),
  ):
    done = cloud.run("slurm.sh", *arguments)
    assert done.returncode == 2, arguments
    assert message in done.stderr
