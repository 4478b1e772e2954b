"""What check_devices.py thinks of made-up rates, and that it measures real ones."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tpu_setup" / "check_devices.py"
spec = importlib.util.spec_from_file_location("check_devices", SCRIPT)
check_devices = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_devices)
judge, HostRates = check_devices.judge, check_devices.HostRates

pytestmark = pytest.mark.xdist_group("devices")


def host(process, *matmul, all_reduce=100e9):
  return HostRates(process, f"w-{process}", tuple(1e12 * rate for rate in matmul), all_reduce)


GROUP = [host(0, 400, 401), host(1, 402, 399), host(2, 398, 400)]


def test_an_even_group_is_well():
  assert judge(GROUP, min_share=0.8, peak=459e12, min_peak_share=0.5) == []
  assert judge(GROUP, min_share=0.8, expect_hosts=3, expect_devices=6) == []


def test_a_slow_device_names_its_host():
  slow = [*GROUP[:2], host(2, 400, 300)]
  assert judge(slow, min_share=0.8) == [
    "process 2 (w-2): matmul 300 TFLOP/s on its device 1, 75% of the median"
  ]
  assert judge(slow, min_share=0.74) == []
  assert judge(slow, min_share=0.74, peak=459e12, min_peak_share=0.7) == [
    "process 2 (w-2): matmul 300 TFLOP/s on its device 1, 65% of the chip's peak"
  ]


def test_slow_links_name_their_host():
  slow = [*GROUP[:2], host(2, 400, 400, all_reduce=30e9)]
  assert judge(slow, min_share=0.8) == [
    "process 2 (w-2): all-reduce 30 GB/s among its devices, 30% of the median"
  ]
  alone = [host(process, 400, all_reduce=0.0) for process in range(3)]
  assert judge(alone, min_share=0.8) == []  # hosts of one device have none


def test_a_group_that_is_slow_together_shows_against_the_peak():
  assert judge(GROUP, min_share=0.8, peak=918e12, min_peak_share=0.5) == [
    f"process {r.process} ({r.host}): matmul {min(r.matmul) / 1e12:.3g} TFLOP/s on its device "
    f"{r.matmul.index(min(r.matmul))}, {min(r.matmul) / 918e12:.0%} of the chip's peak"
    for r in GROUP
  ]


def test_missing_hosts_and_devices():
  few = [GROUP[0], host(2, 400)]
  assert judge(few, min_share=0.8, expect_hosts=3, expect_devices=6) == [
    "2 hosts of 3 are here, missing process 1",
    "3 devices of 6 are here; process 2 (w-2) has 1",
  ]
  assert judge(GROUP, min_share=0.8, expect_hosts=2) == ["3 hosts of 2 are here"]


def start(*arguments, devices, **environment):
  count = f"--xla_force_host_platform_device_count={devices}"
  outer = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
  return subprocess.Popen(
    [sys.executable, "-W", "error", SCRIPT, "--min-share=0.0001", *arguments],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    env=outer | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": count} | environment,
  )  # fmt: skip


def test_on_virtual_devices_then_one_too_few():
  good, short = start("--expect-devices=4", devices=4), start("--expect-devices=4", devices=3)
  out, err = good.communicate(timeout=100)
  assert good.returncode == 0, err
  assert "1 hosts, 4 devices (cpu)" in out
  assert "TFLOP/s median" in out
  assert "GB/s a device over all" in out
  assert out.endswith("all is well\n")
  out, _ = short.communicate(timeout=100)
  assert short.returncode == 1
  assert "3 devices of 4 are here" in out


def test_two_processes():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
  processes = [
    start("--expect-hosts=2", "--expect-devices=4", devices=2, JAX_PROCESS_ID=str(index), **shared)
    for index in range(2)
  ]
  outputs = [process.communicate(timeout=100) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  assert f"host {socket.gethostname()} is here" in outputs[1][0]
  assert "2 hosts, 4 devices (cpu)" in outputs[0][0]
  assert "all is well" in outputs[0][0]
  assert "all is well" not in outputs[1][0]  # one process speaks
