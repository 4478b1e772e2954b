"""Attention, measured on this CPU or GPU, and estimated for TPUs that are not here.

python benchmarks/attention.py cpu     sparse masks beside dense attention, forward and backward
python benchmarks/attention.py torch   dense causal attention beside PyTorch's, one after the other
python benchmarks/attention.py gpu     on a GPU: speed beside cuDNN and PyTorch, time beside density
python benchmarks/attention.py tpu [CHIP ...]   cycles of the TPU kernels for each visited block
python benchmarks/attention.py memory [MASK ...]  compiles a layer with 131,072 tokens for a v5p

Estimates: the body of a visit is compiled without its branches, in grids of two lengths; the
difference is the visits between. A body behind a data-dependent branch would be under-weighted. The
bound is the peak of the chip's matrix units. jax's splash attention is compiled in the same way.
"""

import dataclasses
import functools
import importlib.util
import itertools
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
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.configs import moe_70b
from experiments.planning.program import compile_with_text
from layers.attention import Rows, layer_mask
from layers.block import Block
from layers.kernels.attention import attention, pallas_tpu, tiles
from layers.kernels.attention.blocks import FULL, PARTIAL, block_kinds, walk
from layers.masks import (
  BigBird,
  Causal,
  Local,
  Longformer,
  Mask,
  MistralWindow,
  SparseTransformer,
)
from layers.params import unbox
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
  for name in ("mosaic_gpu", "pallas_gpu"):
    print()
    try:
      sparse_on_gpu(name)
    except NotImplementedError as reason:
      print(reason)


def dense_on_gpu() -> None:
  print(f"Causal, {TOKENS} tokens, width {WIDTH}: TFLOP/s, forward / forward and backward\n")
  with_torch = importlib.util.find_spec("torch") is not None
  theirs = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
  names = ("cudnn", "mosaic_gpu", "pallas_gpu")
  ours = " | ".join(f"ours, {name}" for name in names)
  print(f"| head size | T | {ours} | jax.nn, cudnn | PyTorch SDPA |")
  print("|---|---|---|---|---|---|---|")
  for H in (64, 128, 256):
    for T in (2048, 4096, 8192, 16_384, 32_768):
      B, N = TOKENS // T, WIDTH // H
      *operands, do = on_gpu(B, T, N, H)
      causal = functools.partial(attention, mask=Causal())
      runs = [functools.partial(causal, implementation=name) for name in names]
      times = []
      for f in (*runs, theirs):
        try:
          times.append(of_jax(f, operands, do))
        except NotImplementedError:  # before Hopper: mosaic_gpu, and cuDNN with heads of 256
          times.append(None)
      times.append(of_torch(B, T, N, H) if with_torch else None)
      flops = 4 * B * N * H * T * (T + 1) / 2  # two products forward, five more backward
      cells = [
        "-" if t is None else f"{flops / t[0] / 1e12:.0f} / {3.5 * flops / t[1] / 1e12:.0f}"
        for t in times
      ]
      print("|", " | ".join((str(H), str(T), *cells)), "|", flush=True)


def sparse_on_gpu(name: str) -> None:
  T, N, H = 16_384, 16, 128
  *operands, do = on_gpu(1, T, N, H)
  print(f"{name}, T={T} N={N} H={H}: ms, and how often density x the time of no mask\n")
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
    f = functools.partial(attention, mask=mask, implementation=name)
    times = of_jax(f, operands, do)
    dense = dense or times
    density = 1.0 if mask is None else mask.density(T)
    cells = [f"{t * 1e3:.2f} | {t / (density * d):.2f}" for t, d in zip(times, dense, strict=True)]
    print("|", " | ".join((str(mask), f"{density:.3f}", *cells)), "|", flush=True)


# ---- TPU ----

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
FLOP_PER_CYCLE = {"v5e": 2**17, "v5p": 2 * 2**17, "v6e": 2**19}  # v5p: of its two cores
KERNELS = {"forward": 2, "dq": 3, "dkv": 4}  # products of a visit
HEADS = 16  # enough that arrays do not fit into fast memory


def cycles(text: str) -> dict[str, int]:
  """Of each kernel of a program, by its name."""
  call = r'%([a-z_]+)[.\d]* = [^\n]*"tpu_custom_call".*?"estimated_cycles":"(\d+)"'
  return {name: int(count) for name, count in re.findall(call, text, re.DOTALL)}


def cycles_of(chip: str, module, branches: list[bool], f, *operands) -> dict[str, int]:
  """With only those bodies of `module`'s kernels that `branches` names, without branches."""
  turn = itertools.cycle(branches)
  when = lambda condition: lambda body: body() if next(turn) else None
  old = module.pl
  devices = np.array(describe_devices(TOPOLOGIES[chip])[:1])
  one = NamedSharding(Mesh(devices, ("d",)), PartitionSpec())
  placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one) for x in operands]
  module.pl = SimpleNamespace(**vars(pl) | {"when": when})
  try:
    with jax.sharding.use_abstract_mesh(one.mesh.abstract_mesh):
      return cycles(compile_with_text(jax.jit(f).lower(*placed))[1])
  finally:
    module.pl = old


def array(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def ours(chip: str, mask: Mask | None, H: int, T: int, S: int) -> dict[str, int]:
  """All blocks of T queries and S keys, as partial ones if there is a mask, in three kernels."""
  block, N = pallas_tpu.BLOCK, HEADS
  q, k, row = array(1, N, T, H), array(1, N, S, H), array(1, N, 1, T, dtype=jnp.float32)
  static = pallas_tpu._Static(mask, H**-0.5, None, S, block, block, each_row=False)
  heads, ids = tiles.Heads(None, None), tiles.Ids(None, None)
  kinds = np.full((T // block, S // block), PARTIAL if mask else FULL, np.int8)
  plan = pallas_tpu._Plan(*(jnp.asarray(walk(k))[None] for k in (kinds, kinds.T)))

  def f(kernel, mask_N, q, k, v, do, row):
    rest = (plan, heads, ids, ids, mask_N)
    if kernel == "forward":
      return pallas_tpu._forward(static, q, k, v, *rest)
    backward = (static, q, k, v, do, row, row, *rest, None)
    if kernel == "dq":
      return pallas_tpu._backward_queries(*backward)[0]
    return pallas_tpu._backward_keys(*backward)

  # What stands in branches: the start of a row, the cut body, the whole body, the end of a row.
  branches = [False, mask is not None, mask is None, False]
  operands = (array(N, dtype=jnp.int32), q, k, k, q, row)
  found = {}
  for kernel in ("dkv",) if T > S else ("forward", "dq"):
    run = functools.partial(f, kernel)
    (found[kernel],) = cycles_of(chip, pallas_tpu, branches, run, *operands).values()
  return found


def splash(chip: str, mask: Mask | None, H: int, T: int, S: int) -> dict[str, int]:
  """The same in jax's kernels with blocks and steps as ours; a causal mask cuts all blocks."""
  block, N = pallas_tpu.BLOCK, HEADS
  one = splash_mask.FullMask((T, S)) if mask is None else splash_mask.CausalMask((T, S), S)
  back = pallas_tpu.BACKWARD_STEP
  sizes = splash_kernel.BlockSizes(
    block_q=block, block_kv=block, block_kv_compute=back, block_q_dkv=block, block_kv_dkv=block,
    block_kv_dkv_compute=back, block_q_dq=block, block_kv_dq=block,
  )  # fmt: skip
  kernel = splash_kernel.make_splash_mha(
    splash_mask.MultiHeadMask([one] * N), block_sizes=sizes, head_shards=1, q_seq_shards=1
  )
  f = lambda q, k, v, do: jax.vjp(kernel, q, k, v)[1](do)
  branches = [False, True, False]  # the start of a row, the body, the end
  found = cycles_of(chip, splash_kernel, branches, f, *[array(N, n, H) for n in (T, S, S, T)])
  part = lambda name: next(x for x in ("fwd", "dq", "dkv") if x in name)
  return {part(name).replace("fwd", "forward"): count for name, count in found.items()}


def tpu() -> None:
  jax.config.update("jax_enable_compilation_cache", False)  # nothing here can read it back
  print("| chip | head size | blocks | kernel | cycles a visit | of the bound | splash |")
  print("|---|---|---|---|---|---|---|")
  block, (few, many) = pallas_tpu.BLOCK, (2, 6)
  for chip, H, (name, mask) in itertools.product(
    sys.argv[2:] or TOPOLOGIES, (128, 256), {"full": None, "causal": Causal()}.items()
  ):
    of = {}
    for side, f in (("ours", ours), ("splash", splash)):
      run = functools.partial(f, chip, mask, H)
      rows = run(block, many * block), run(block, few * block)  # more keys
      columns = run(many * block, block), run(few * block, block)  # more queries
      for kernel in KERNELS:
        more, less = columns if kernel == "dkv" else rows
        of[side, kernel] = (more[kernel] - less[kernel]) / (many - few) / HEADS
    for kernel, products in KERNELS.items():
      each, theirs = of["ours", kernel], of["splash", kernel]
      bound = 2 * products * block**2 * H / FLOP_PER_CYCLE[chip]
      cells = (chip, H, name, kernel, f"{each:,.0f}", f"{bound / each:.0%}")
      print(
        "|", " | ".join(map(str, cells)), f"| {theirs:,.0f}, {theirs / each:.2f}x |", flush=True
      )


# ---- memory ----

LONG_CONTEXT = (  # each also causal
  "Causal()", "MistralWindow(4096)", "GemmaLocal(1024)", "GPT3Banded(256)", "Chunked(8192)",
  "SparseTransformer(1024, 'strided')", "SparseTransformer(1024, 'fixed')",
  "Longformer(4096, 64)", "BigBird(1024)",
)  # fmt: skip


def memory() -> None:
  """Forward and backward of a layer of moe_70b with experts, a row of 131,072 tokens, one v5p."""
  jax.config.update("jax_enable_compilation_cache", False)
  T, spec = 131_072, moe_70b.model()
  one = NamedSharding(Mesh(np.array(describe_devices("v5p:2x2x1")[:1]), ("d",)), PartitionSpec())
  placed = functools.partial(
    jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one)
  )
  print("| mask | density | seconds to compile | arguments GB | temporary GB |")
  print("|---|---|---|---|---|")
  for text in sys.argv[2:] or LONG_CONTEXT:
    layer = spec.segments[0].layers[1]
    layer = dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, mask=text))
    block = Block(layer, spec.embed_dim)
    x, ids = array(1, T, spec.embed_dim), array(1, T, dtype=jnp.int32)

    def loss(params, x, positions, segments, block=block):
      y, stats, _ = block.apply({"params": params}, x, Rows(positions, segments))
      return jnp.sum(y.astype(jnp.float32) ** 2) + jnp.sum(stats.aux_loss)

    rows = Rows(jnp.zeros((1, 64), jnp.int32), jnp.ones((1, 64), jnp.int32))
    make = lambda key, rows=rows, block=block: unbox(
      block.init(key, jnp.zeros((1, 64, spec.embed_dim), jnp.bfloat16), rows)["params"]
    )
    params = jax.tree.map(lambda p: array(*p.shape), jax.eval_shape(make, jax.random.key(0)))
    began = time.perf_counter()
    with jax.sharding.use_abstract_mesh(one.mesh.abstract_mesh):
      lowered = jax.jit(jax.grad(loss, (0, 1))).lower(*placed((params, x, ids, ids)))
      program, text_of = compile_with_text(lowered)
    took = time.perf_counter() - began
    assert all(f"attention_{kernel}" in text_of for kernel in KERNELS)
    needed = program.memory_analysis()
    cells = (f"{layer_mask(layer.attention).density(T):.4f}", f"{took:.0f}")
    sizes = (needed.argument_size_in_bytes, needed.temp_size_in_bytes)
    print("|", " | ".join((text, *cells, *(f"{n / 1e9:.1f}" for n in sizes))), "|", flush=True)


if __name__ == "__main__":
  {"cpu": cpu, "torch": torch, "gpu": gpu, "tpu": tpu, "memory": memory}[sys.argv[1]]()
