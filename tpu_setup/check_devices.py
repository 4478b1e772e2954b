"""Are all chips there, do they add up, and is one slower than the others?

Run on every host at once (`tpu_vm.sh check`, srun, a JobSet): each measures its chips alone, then
all of them sum over the whole mesh. Exit code 0: all is well; 1: the lines say which host is slow
or missing, by process index and host name. Needs jax and the package mesh only.
"""

import argparse
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mesh.hardware import Chip, find_chip
from mesh.multihost import initialize, is_primary
from mesh.topology import count_slices

_NAME_BYTES = 64


class HostRates(NamedTuple):
  """What one host measured: FLOP/s of each device's matmul, and bytes/s of a sum over its devices
  (0 when it has one)."""

  process: int
  host: str
  matmul: tuple[float, ...]
  all_reduce: float


def judge(
  rates: Sequence[HostRates],
  *,
  min_share: float,
  peak: float | None = None,
  min_peak_share: float = 0.0,
  expect_hosts: int | None = None,
  expect_devices: int | None = None,
) -> list[str]:
  """What is wrong, a sentence each; empty when nothing is.

  Args:
    rates: of the hosts that came.
    min_share: a rate below this share of the group's median is too slow.
    peak: FLOP/s of one device, None when unknown.
    min_peak_share: a matmul below this share of `peak` is too slow.
    expect_hosts: how many should be there; None does not ask.
    expect_devices: the same for devices.
  """
  problems = []
  if expect_hosts is not None and len(rates) != expect_hosts:
    present = {r.process for r in rates}
    absent = ", ".join(str(i) for i in range(expect_hosts) if i not in present)
    problems.append(
      f"{len(rates)} hosts of {expect_hosts} are here"
      + (f", missing process {absent}" * bool(absent))
    )
  devices = sum(len(r.matmul) for r in rates)
  if expect_devices is not None and devices != expect_devices:
    most = max(len(r.matmul) for r in rates)
    few = [
      f"process {r.process} ({r.host}) has {len(r.matmul)}" for r in rates if len(r.matmul) < most
    ]
    problems.append("; ".join([f"{devices} devices of {expect_devices} are here", *few]))
  matmul = statistics.median(rate for r in rates for rate in r.matmul)
  sums = statistics.median(r.all_reduce for r in rates)
  for r in rates:
    who = f"process {r.process} ({r.host})"
    slowest = min(r.matmul)
    what = f"{who}: matmul {slowest / 1e12:.3g} TFLOP/s on its device {r.matmul.index(slowest)}"
    if slowest < min_share * matmul:
      problems.append(f"{what}, {slowest / matmul:.0%} of the median")
    elif peak is not None and slowest < min_peak_share * peak:
      problems.append(f"{what}, {slowest / peak:.0%} of the chip's peak")
    if r.all_reduce < min_share * sums:
      problems.append(
        f"{who}: all-reduce {r.all_reduce / 1e9:.3g} GB/s among its devices, "
        f"{r.all_reduce / sums:.0%} of the median"
      )
  return problems


def _seconds(call: Callable[[], Any], repeats: int) -> float:
  """The fastest of `repeats`, after one that compiles."""
  jax.block_until_ready(call())
  times = []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - began)
  return min(times)


def matmul_rate(device: Any, *, size: int, steps: int) -> float:
  """FLOP/s of bfloat16 products (float32 on CPU) of `size` x `size` matrices on one device."""
  dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
  x = jax.device_put(jnp.full((size, size), 1 / size, dtype), device)  # its square is itself

  @jax.jit
  def chain(x):
    return jax.lax.fori_loop(0, steps, lambda _, y: (y @ x).astype(dtype), x)

  return 2 * size**3 * steps / _seconds(lambda: chain(x), 3)


def all_reduce(devices: Sequence[Any], *, bytes_each: int, steps: int) -> float:
  """Bytes/s each device sends while float32 arrays of `bytes_each` are summed over all of them,
  2 (n - 1) / n of the array a sum; 0 for one device.

  Raises:
    RuntimeError: a sum is not what the devices put in.
  """
  count = len(devices)
  if count == 1:
    return 0.0
  mesh = Mesh(np.array(devices), ("all",), axis_types=(AxisType.Auto,))
  length = bytes_each // 4
  sharding = NamedSharding(mesh, P("all"))
  values = np.arange(1, count + 1, dtype=np.float32)
  x = jax.make_array_from_callback(
    (count, length), sharding, lambda index: np.repeat(values[index[0], None], length, axis=1)
  )

  def body(x):
    return jax.lax.fori_loop(
      0, steps, lambda _, y: jax.lax.pcast(jax.lax.psum(y, "all") / count, "all", to="varying"), x
    )

  summed = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("all"), out_specs=P("all")))
  wanted = (count + 1) / 2  # the mean, which further sums keep
  for shard in summed(x).addressable_shards:
    if not np.allclose(np.asarray(shard.data), wanted, rtol=1e-5):
      raise RuntimeError(f"{shard.device} got a wrong sum over {count} devices")
  return 2 * (count - 1) / count * bytes_each * steps / _seconds(lambda: summed(x), 3)


def gather(matmul: Sequence[float], local_sum: float) -> list[HostRates]:
  """Every host's rates, on every host."""
  most = int(np.max(multihost_utils.process_allgather(np.int32(len(matmul)))))
  row = np.zeros(2 + most, np.float32)
  row[:2] = len(matmul), local_sum
  row[2 : 2 + len(matmul)] = matmul
  name = np.zeros(_NAME_BYTES, np.uint8)
  encoded = socket.gethostname().encode()[:_NAME_BYTES]
  name[: len(encoded)] = list(encoded)
  rows, names = multihost_utils.process_allgather((row, name))
  rows, names = rows.reshape(-1, 2 + most), names.reshape(-1, _NAME_BYTES)
  return [
    HostRates(
      process=index,
      host=bytes(names[index]).rstrip(b"\0").decode(),
      matmul=tuple(map(float, row[2 : 2 + int(row[0])])),
      all_reduce=float(row[1]),
    )
    for index, row in enumerate(rows)
  ]


def report(rates: Sequence[HostRates], total: float, chip: Chip | None, slices: int) -> None:
  """Print what was measured beside what the chip can do."""
  devices = [rate for r in rates for rate in r.matmul]
  peak = chip.flops_per_device if chip else None
  name = chip.name if chip else jax.devices()[0].device_kind
  print(
    f"{len(rates)} hosts, {len(devices)} devices ({name})" + f", {slices} slices" * (slices > 1)
  )
  median = statistics.median(devices)
  print(
    f"matmul      {median / 1e12:.3g} TFLOP/s median, {min(devices) / 1e12:.3g} lowest"
    + (f"; {median / peak:.0%} of the chip's {peak / 1e12:.4g}" if peak else "")
  )
  if len(devices) > 1:
    # Half of `interconnect`, which counts both directions. Slices are joined by another network.
    link = chip.interconnect / 2 / chip.devices_per_chip if chip and chip.interconnect else None
    share = f"; {total / link:.0%} of the links' {link / 1e9:.4g}" if link and slices == 1 else ""
    print(f"all-reduce  {total / 1e9:.3g} GB/s a device over all{share}")


def _share(text: str) -> float:
  value = float(text)
  if not 0 <= value <= 1:
    raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
  return value


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
  parser.add_argument("--expect-hosts", type=int, help="fail unless so many are there")
  parser.add_argument("--expect-devices", type=int, help="the same for JAX devices")
  parser.add_argument(
    "--min-share", type=_share, default=0.8, help="of the median, of all rates (default 0.8)"
  )
  parser.add_argument(
    "--min-peak-share", type=_share, default=0.5, help="of the chip's peak, of matmul (default 0.5)"
  )
  return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
  arguments = _arguments(argv)
  # Before anything that waits for the others: whoever is missing below has not said this.
  print(f"host {socket.gethostname()} is here", flush=True)
  initialize()
  local, chip = jax.local_devices(), find_chip(jax.devices()[0])
  on_cpu = local[0].platform == "cpu"
  size, bytes_each, steps = (256, 2**18, 4) if on_cpu else (8192, 2**26, 20)
  try:
    matmul = [matmul_rate(device, size=size, steps=steps) for device in local]
    rates = gather(matmul, all_reduce(local, bytes_each=bytes_each, steps=steps))
    total = all_reduce(jax.devices(), bytes_each=bytes_each, steps=steps)
  except RuntimeError as error:
    print(f"process {jax.process_index()} ({socket.gethostname()}): {error}", file=sys.stderr)
    return 1
  problems = judge(
    rates,
    min_share=arguments.min_share,
    peak=chip.flops_per_device if chip else None,
    min_peak_share=arguments.min_peak_share,
    expect_hosts=arguments.expect_hosts,
    expect_devices=arguments.expect_devices,
  )
  if is_primary():
    report(rates, total, chip, count_slices(jax.devices()))
    print("\n".join(problems) or "all is well", flush=True)
  return 1 if problems else 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
