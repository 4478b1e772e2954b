"""Mixture-of-experts layers, measured: one layer on this CPU, moe_tiny with every router, and a
training step compiled for TPUs that are not here.

python benchmarks/moe.py layer     forward and backward of a layer beside a dense MLP
python benchmarks/moe.py routers   moe_tiny trained with each router: a row a run
python benchmarks/moe.py pod CONFIG TOPOLOGY [section.field=value ...]   what a step computes, sends
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli
from experiments.overrides import apply_overrides
from experiments.planning.compiling import lower_step
from experiments.planning.program import compile_with_text
from experiments.planning.traffic import by_axes, collectives
from experiments.planning.work import totals, work
from experiments.training.setup import build
from layers.experts import ExpertMath, ExpertWeights
from layers.mlp import mlp
from layers.moe import moe
from layers.router import top_k_route
from mesh.topology import describe_devices

T, D, F, ROUNDS = 2048, 256, 512, 7
GRID = [(8, 1), (8, 2), (8, 4), (32, 1), (32, 2), (32, 4), (128, 1), (128, 2), (128, 4)]

_LAYER = "model.segments.0.layers.1.mlp"
HELDOUT = "heldout_bits_per_byte"
_ALL = {"dispatch": "dropless"}
ROUTERS = {
  "switch": _ALL,
  "switch, capacity 1.25": {},
  "switch, capacity 1.25 by gate (reads later tokens)": {"priority": "gate", "noncausal": True},
  "hash": _ALL | {"router": "hash", "hash_vocab": 320},
  "no token left behind, 4 choices, capacity 1.25": {
    "router": "no_token_left_behind", "experts_per_token": 4,
  },
  "sigmoid top-1, input scaled (Llama 4)": _ALL | {
    "router": "top_k", "scores": "sigmoid", "scale_input": True,
  },
  "expert choice, capacity 1 (reads later tokens)": {
    "router": "expert_choice", "capacity_factor": 1.0, "eval_capacity_factor": 1.0,
    "noncausal": True,
  },
  "top-2, normalised (Mixtral)": _ALL | {
    "router": "top_k", "experts_per_token": 2, "normalize": True,
  },
  "top-2, random second (GShard)": _ALL | {"router": "gshard", "experts_per_token": 2},
  "top-2 of 2 groups of 4, selection bias (DeepSeek-V3)": _ALL | {
    "router": "top_k", "experts_per_token": 2, "scores": "sigmoid", "normalize": True,
    "num_groups": 4, "keep_groups": 2, "bias_rate": 1e-3, "balance_loss": 1e-4,
  },
}  # fmt: skip


def arrays(E: int):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / shape[-2] ** 0.5, jnp.float32)
  weights = ExpertWeights(draw(E, D, F), draw(E, F, D), draw(E, D, F))
  return draw(1, T, D) * T**0.5, draw(D, E), weights


def sparse(x_BTD, w_router_DE, weights, k, dispatch="dropless"):
  route = functools.partial(top_k_route, k=k, normalize=k > 1)
  y_BTD, *_ = moe(x_BTD, w_router_DE, weights, route=route, math=ExpertMath(), dispatch=dispatch)
  return y_BTD


def ragged(x_BTD, w_router_DE, weights, k):
  """The same layer with jax.lax.ragged_dot."""
  routing = top_k_route(x_BTD, w_router_DE, k=k, normalize=k > 1)
  expert_K = routing.expert_GSX.reshape(-1)
  order_K = jnp.argsort(expert_K)
  rows_KD = x_BTD[0][order_K // k]
  sizes_E = jnp.bincount(expert_K, length=w_router_DE.shape[1]).astype(jnp.int32)
  dot = lambda x, w: jax.lax.ragged_dot(x, w, sizes_E)
  hidden_KF = jax.nn.silu(dot(rows_KD, weights.gate_EDF)) * dot(rows_KD, weights.up_EDF)
  out_KD = dot(hidden_KF, weights.down_EFD) * routing.weight_GSX.reshape(-1, 1)[order_K]
  return jnp.zeros_like(x_BTD[0]).at[order_K // k].add(out_KD)[None]


def dense(x_BTD, up_DF, down_FD, gate_DF):
  return mlp(x_BTD, up_DF, down_FD, w_gate_DF=gate_DF, activation="silu")


def seconds(programs: dict, rounds: int = ROUNDS) -> dict[str, float]:
  """The fastest of each program, measured in turn."""
  for run in programs.values():
    jax.block_until_ready(run())
  times = {name: [] for name in programs}
  for _ in range(rounds):
    for name, run in programs.items():
      began = time.perf_counter()
      jax.block_until_ready(run())
      times[name].append(time.perf_counter() - began)
  return {name: min(found) for name, found in times.items()}


def graded(function, *args):
  """A program that computes outputs and all gradients."""
  loss = lambda *args: jnp.sum(jnp.sin(function(*args)))
  run = jax.jit(jax.value_and_grad(loss, tuple(range(len(args)))))
  return lambda: run(*args)


def layer() -> None:
  print(f"jax {jax.__version__}, T={T} D={D} F={F}, gated SiLU, float32, forward and backward, ms")
  print("| experts | k | dense of k F | dropless | capacity 1.25 | dropless / dense |")
  print("|---|---|---|---|---|---|")
  for E, k in GRID:
    x_BTD, w_router_DE, weights = arrays(E)
    wide = lambda w, axis, k=k: jnp.concatenate([w[0]] * k, axis)
    matrices = (wide(weights.up_EDF, 1), wide(weights.down_EFD, 0), wide(weights.gate_EDF, 1))
    programs = {"dense": graded(dense, x_BTD, *matrices)}
    for dispatch in ("dropless", "capacity"):
      function = functools.partial(sparse, k=k, dispatch=dispatch)
      programs[dispatch] = graded(function, x_BTD, w_router_DE, weights)
    t = seconds(programs)
    cells = [f"{t[name] * 1e3:.1f}" for name in ("dense", "dropless", "capacity")]
    print(
      "|", E, "|", k, "|", " | ".join(cells), f"| {t['dropless'] / t['dense']:.2f} |", flush=True
    )
  x_BTD, w_router_DE, weights = arrays(32)
  programs = {
    name: graded(functools.partial(f, k=4), x_BTD, w_router_DE, weights)
    for name, f in (("ours", sparse), ("ragged_dot", ragged))
  }
  t = seconds(programs, rounds=2)
  slow, ratio = t["ragged_dot"] * 1e3, t["ragged_dot"] / t["ours"]
  print(f"E=32 k=4: a layer of lax.ragged_dot {slow:.0f} ms, {ratio:.1f} x ours")


def routers() -> None:
  print("| router | held-out bits a byte | load CV | dropped | seconds |")
  print("|---|---|---|---|---|")
  for name, fields in ROUTERS.items():
    with tempfile.TemporaryDirectory() as folder:
      overrides = [f"--config.{_LAYER}.{key}={value}" for key, value in fields.items()]
      command = [
        sys.executable,
        "-m",
        "experiments.run",
        "--config=moe_tiny",
        f"--workdir={folder}",
      ]
      command += ["--config.eval.twin=", "--config.eval.baselines=false", *overrides]
      began = time.monotonic()
      done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
      took = time.monotonic() - began
      if done.returncode:
        sys.exit(f"{name}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
      rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
      logged = [row for row in rows if "load_cv" in row]
      late = logged[len(logged) // 2 :]
      mean = lambda key, late=late: float(np.mean([row[key] for row in late]))
      bits = next(row[HELDOUT] for row in reversed(rows) if HELDOUT in row)
      cells = (f"{bits:.3f}", f"{mean('load_cv'):.2f}", f"{mean('drop_rate'):.1%}", f"{took:.0f}")
      print("|", " | ".join((name, *cells)), "|", flush=True)


def pod() -> None:
  """Memory, work and traffic of a chip in one training step, as the TPU's compiler states them."""
  os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  jax.config.update("jax_enable_compilation_cache", False)  # nothing here can read it back
  name, topology, *overrides = sys.argv[2:]
  config = cli.named_config(name)
  pairs = [(path, text) for path, _, text in (o.partition("=") for o in overrides)]
  setup = build(apply_overrides(config, pairs), describe_devices(topology))
  began = time.process_time()
  program, text = compile_with_text(lower_step(setup))
  print(f"compiled in {time.process_time() - began:.0f} CPU seconds")
  memory = program.memory_analysis()
  arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  peak = memory.peak_memory_in_bytes
  print(f"GB: arguments {arguments / 1e9:.2f}, temporaries {temporaries / 1e9:.2f}", end=", ")
  print(f"peak {peak / 1e9:.2f}")
  ops = work(text)
  # The loops of xla's attention run as often as their masks say: not seen here.
  inside = lambda op: "attention/while" in op.name or "attention/closed_call" in op.name
  for kind, unit, title in (
    ("product", 1e12, "TFLOP of dense products"),
    ("kernel", 1e12, "TFLOP stated by kernels"),
    ("cycles", 1e9, "10^9 cycles outside kernels"),
  ):
    found = [op for op in ops if op.kind == kind and not inside(op)]
    whole = sum(op.total for op in found) / unit
    again = sum(op.total for op in found if op.recomputed) / unit
    parts = ", ".join(f"{k} {v / unit:.3f}" for k, v in totals(found, ("attention", "mlp")).items())
    print(f"{title}: {whole:.3f}, recomputed {again:.3f} ({parts})")
  for (kind, axes, dtype), received in by_axes(collectives(text, setup.mesh)).items():
    print(f"{kind} over {', '.join(axes)}, {dtype}: {received / 1e9:.2f} GB")


if __name__ == "__main__":
  {"layer": layer, "routers": routers, "pod": pod}[sys.argv[1]]()
