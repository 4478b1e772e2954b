"""Attention, measured on this CPU or GPU, and estimated for TPUs that are not here.

python benchmarks/attention.py cpu     sparse masks beside dense attention, forward and backward
python benchmarks/attention.py torch   dense causal attention beside PyTorch's, one after the other
python benchmarks/attention.py gpu     on a GPU: speed beside cuDNN and PyTorch, time beside density
python benchmarks/attention.py tpu [CHIP ...]   cycles of the TPU kernels for each visited block

Estimates: the body of a visit that cuts nothing is compiled without its branches, in grids of two
lengths; the difference is the visits between. A body behind a data-dependent branch would be
under-weighted. The bound is the matrix unit's peak, of one core.
"""

import functools
import importlib.util
import os
import re
import sys
import tempfile
import time
from types import SimpleNamespace

if sys.argv[1:2] == ["tpu"]:
  folder = tempfile.TemporaryDirectory()  # before libtpu loads
  os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_static_llo_profile_to={folder.name}"
if sys.argv[1:2] == ["gpu"]:  # of which PyTorch needs memory too
  os.environ |= {"JAX_PLATFORMS": "cuda,cpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
else:
  os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.planning.program import compile_with_text
from layers.kernels.attention import attention, pallas_tpu, tiles
from layers.kernels.attention.blocks import FULL, block_kinds, walk
from layers.masks import BigBird, Causal, Local, Longformer, Mask, MistralWindow, SparseTransformer
from mesh.topology import describe_devices

ROUNDS = 3


def arrays(T: int, N: int, H: int) -> list[jax.Array]:
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=(1, T, N, H)), jnp.float32) for _ in range(4)]


def program(mask: Mask | None, T: int, N: int, H: int):
  """Compiled forward and backward."""
  q, k, v, do = arrays(T, N, H)
  loss = lambda q, k, v: jnp.sum(attention(q, k, v, mask=mask) * do)
  return jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(q, k, v).compile(), (q, k, v)


def fastest(run, rounds: int = ROUNDS) -> float:
  times = []
  for _ in range(rounds):
    began = time.perf_counter()
    run()
    times.append(time.perf_counter() - began)
  return min(times)


def cpu() -> None:
  T, N, H = 16_384, 4, 64
  masks = {
    "none": None,
    "Causal()": Causal(),
    "MistralWindow(1024)": MistralWindow(1024),
    "Local(512, 512)": Local(512, 512),
    "Longformer(1024, 64)": Longformer(1024, 64),
    "BigBird(256)": BigBird(T // 64),
    "SparseTransformer(128, 'fixed')": SparseTransformer(128, "fixed"),
  }
  print(f"jax {jax.__version__}, T={T} N={N} H={H}, float32, forward and backward")
  print("| mask | density | blocks of 256 visited | s | dense / this | temporary MB | at half T |")
  print("|---|---|---|---|---|---|---|")
  dense = None
  for name, mask in masks.items():
    compiled, operands = program(mask, T, N, H)
    took = fastest(lambda compiled=compiled, operands=operands: jax.block_until_ready(
      compiled(*operands)))  # fmt: skip
    dense = dense or took
    half, _ = program(mask, T // 2, N, H)
    megabytes = [p.memory_analysis().temp_size_in_bytes / 1e6 for p in (compiled, half)]
    visited = np.mean(block_kinds(mask, T, T, 256, 256) > 0)
    density = 1.0 if mask is None else mask.density(T)
    cells = (f"{density:.3f}", f"{visited:.3f}", f"{took:.2f}", f"{dense / took:.1f}x")
    print("|", " | ".join((name, *cells, *(f"{mb:.0f}" for mb in megabytes))), "|", flush=True)


def torch() -> None:
  import torch as t

  N, H = 8, 64
  print(
    f"jax {jax.__version__}, torch {t.__version__}, N={N} H={H}, causal, forward and backward, s"
  )
  print("| T | ours | torch | torch / ours |")
  print("|---|---|---|---|")
  for T in (2048, 4096, 8192):
    compiled, operands = program(Causal(), T, N, H)
    q, k, v = (t.randn(1, N, T, H, requires_grad=True) for _ in range(3))
    do = t.randn(1, N, T, H)

    def theirs(q=q, k=k, v=v, do=do):
      o = t.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
      t.autograd.grad(o, (q, k, v), do)

    ours = lambda compiled=compiled, operands=operands: jax.block_until_ready(compiled(*operands))
    pairs = [(fastest(ours, 1), fastest(theirs, 1)) for _ in range(2 * ROUNDS)]
    mine, other = (min(side) for side in zip(*pairs, strict=True))
    print(f"| {T} | {mine:.3f} | {other:.3f} | {other / mine:.2f} |", flush=True)


# ---- GPU ----

CALLS = 10  # between two looks at the clock
TOKENS = 32_768  # of all rows of a batch together
WIDTH = 2048  # of all heads together


def seconds(run, wait) -> float:
  """Of a call; `wait` takes what it returns."""
  wait(run())  # compiles

  def many() -> None:
    for _ in range(CALLS - 1):
      run()
    wait(run())

  return fastest(many) / CALLS


def of_jax(f, operands, do) -> tuple[float, ...]:
  """Seconds (forward, forward and backward) of f(q, k, v)."""
  loss = lambda q, k, v: jnp.sum((f(q, k, v) * do).astype(jnp.float32))
  both = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
  forward = jax.jit(f)
  return tuple(
    seconds(functools.partial(run, *operands), jax.block_until_ready) for run in (forward, both)
  )


def of_torch(B: int, T: int, N: int, H: int) -> tuple[float, float]:
  import torch as t

  q, k, v, do = (t.randn(B, N, T, H, device="cuda", dtype=t.bfloat16) for _ in range(4))
  for x in (q, k, v):
    x.requires_grad_()
  run = lambda: t.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
  wait = lambda _: t.cuda.synchronize()
  with t.no_grad():
    forward = seconds(run, wait)
  return forward, seconds(lambda: t.autograd.grad(run(), (q, k, v), do), wait)


def on_gpu(B: int, T: int, N: int, H: int) -> list[jax.Array]:
  rng = np.random.default_rng(0)
  draw = lambda: jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.bfloat16)
  return [draw() for _ in range(4)]


def gpu() -> None:
  try:
    there = jax.default_backend() == "gpu"
  except RuntimeError:  # JAX for CUDA without a device
    there = False
  if not there:
    print("benchmarks/attention.py gpu needs an NVIDIA GPU that JAX can use; there is none here.")
    raise SystemExit(2)
  print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, bfloat16\n")
  dense_on_gpu()
  print()
  sparse_on_gpu()


def dense_on_gpu() -> None:
  print(f"Causal, {TOKENS} tokens, width {WIDTH}: TFLOP/s, forward / forward and backward\n")
  with_torch = importlib.util.find_spec("torch") is not None
  theirs = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
  print("| head size | T | ours, cudnn | ours, pallas_gpu | jax.nn, cudnn | PyTorch SDPA |")
  print("|---|---|---|---|---|---|")
  for H in (64, 128, 256):
    for T in (2048, 4096, 8192, 16_384, 32_768):
      B, N = TOKENS // T, WIDTH // H
      *operands, do = on_gpu(B, T, N, H)
      ours = functools.partial(attention, mask=Causal())
      runs = [functools.partial(ours, implementation=name) for name in ("cudnn", "pallas_gpu")]
      times = []
      for f in (*runs, theirs):
        try:
          times.append(of_jax(f, operands, do))
        except NotImplementedError:  # cuDNN with heads of 256 before Hopper
          times.append(None)
      times.append(of_torch(B, T, N, H) if with_torch else None)
      flops = 4 * B * N * H * T * (T + 1) / 2  # two products forward, five more backward
      cells = [
        "-" if t is None else f"{flops / t[0] / 1e12:.0f} / {3.5 * flops / t[1] / 1e12:.0f}"
        for t in times
      ]
      print("|", " | ".join((str(H), str(T), *cells)), "|", flush=True)


def sparse_on_gpu() -> None:
  T, N, H = 16_384, 16, 128
  *operands, do = on_gpu(1, T, N, H)
  print(f"pallas_gpu, T={T} N={N} H={H}: ms, and how often density x the time of no mask\n")
  print("| mask | density | forward | of density x dense | both | of density x dense |")
  print("|---|---|---|---|---|---|")
  runs = 64
  masks: list[Mask | None] = [None]
  for density in (0.1, 0.2, 0.3, 0.4, 0.5):
    side = round(T * (1 - (1 - density) ** 0.5))
    masks.append(Local(side, side))
    masks.append(BigBird(runs, T // runs, random=round(density * runs) - 5))
  dense = None
  for mask in masks:
    f = functools.partial(attention, mask=mask, implementation="pallas_gpu")
    times = of_jax(f, operands, do)
    dense = dense or times
    density = 1.0 if mask is None else mask.density(T)
    cells = [f"{t * 1e3:.2f} | {t / (density * d):.2f}" for t, d in zip(times, dense, strict=True)]
    print("|", " | ".join((str(mask), f"{density:.3f}", *cells)), "|", flush=True)


# ---- TPU ----

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
FLOP_PER_CYCLE = {"v5e": 2**17, "v5p": 2**17, "v6e": 2**19}  # of a core
KERNELS = {"forward": 2, "dq": 3, "dkv": 4}  # products of a visit
HEADS = 16  # enough that arrays do not fit into fast memory


def cycles(text: str) -> int:
  calls = [line for line in text.splitlines() if "tpu_custom_call" in line]
  (found,) = re.findall(r'bundle_analysis_data":\{"estimated_cycles":"(\d+)"', "".join(calls))
  return int(found)


def estimate(chip: str, kernel: str, visits: int, H: int) -> int:
  """Cycles of `visits` full blocks in a row (or column) of each head."""
  one = NamedSharding(
    Mesh(np.array(describe_devices(TOPOLOGIES[chip])[:1]), ("d",)), PartitionSpec()
  )
  block, N, turned = pallas_tpu.BLOCK, HEADS, kernel == "dkv"
  short, long = block, block * visits
  T, S = (long, short) if turned else (short, long)
  array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=one)
  q, k, row = array(1, N, T, H), array(1, N, S, H), array(1, N, 1, T, dtype=jnp.float32)
  static = pallas_tpu._Static(None, H**-0.5, None, "index", S, block, block)
  heads, ids = tiles.Heads(None, None), tiles.Ids(None, None)
  rest, backward = (heads, ids, ids), (q, k, k, q, row, row)
  call, operands = {
    "forward": (pallas_tpu._forward, (q, k, k)),
    "dq": (lambda *a: pallas_tpu._backward_queries(*a)[0], backward),
    "dkv": (pallas_tpu._backward_keys, backward),
  }[kernel]
  whole = walk(np.full((1, visits), FULL, np.int8))[None]
  # What stands in branches: the start of a row, the cut body, the whole body, the end of a row.
  turn = iter([False, False, True, False])
  old = pallas_tpu.pl, pallas_tpu._plan
  pallas_tpu.pl = SimpleNamespace(
    **vars(pl) | {"when": lambda condition: lambda f: f() if next(turn) else None}
  )
  pallas_tpu._plan = lambda *args, **keywords: whole
  try:
    with jax.sharding.use_abstract_mesh(one.mesh.abstract_mesh):
      f = lambda mask_N, *operands: call(static, *operands, *rest, mask_N)
      mask_N = array(N, dtype=jnp.int32)
      return cycles(compile_with_text(jax.jit(f).lower(mask_N, *operands))[1])
  finally:
    pallas_tpu.pl, pallas_tpu._plan = old


def tpu() -> None:
  jax.config.update("jax_enable_compilation_cache", False)  # nothing here can read it back
  print("| chip | head size | kernel | cycles a visit | of the bound |")
  print("|---|---|---|---|---|")
  few, many = 2, 6
  for chip in sys.argv[2:] or TOPOLOGIES:
    for H in (128, 256):
      for kernel, products in KERNELS.items():
        run = functools.partial(estimate, chip, kernel, H=H)
        each = (run(many) - run(few)) / (many - few) / HEADS
        bound = 2 * products * pallas_tpu.BLOCK**2 * H / FLOP_PER_CYCLE[chip]
        print(f"| {chip} | {H} | {kernel} | {each:,.0f} | {bound / each:.0%} |", flush=True)


if __name__ == "__main__":
  {"cpu": cpu, "torch": torch, "gpu": gpu, "tpu": tpu}[sys.argv[1]]()
