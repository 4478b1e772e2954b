"""FLOP by what they are for: by hand, by the conventions, and of compiled programs."""

import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli
from experiments.overrides import apply_overrides
from experiments.planning import expert_tiles, flops, speed
from experiments.planning.conventions import flops_per_token
from experiments.planning.search import abstract_mesh
from experiments.planning.work import Op, work
from experiments.training.setup import build_on
from layers.kernels.attention import pallas_tpu
from layers.kernels.grouped_matmul.visits import windows
from layers.kernels.grouped_matmul.xla import make_plan
from layers.masks import Causal
from mesh.hardware import CHIPS
from tests.experiments.planning.pod import compiled

V5P, V5E = CHIPS["v5p"], CHIPS["v5e"]


def planned(name, sizes=None, **overrides):
  paths = [(path.replace("__", "."), str(value)) for path, value in overrides.items()]
  config = apply_overrides(cli.named_config(name), paths)
  return build_on(config, abstract_mesh(sizes or {}), "tpu")


def test_moe_tiny_by_hand():
  """16 rows of 256 tokens in four layers, every second of 8 experts with 40 slots a row each.

  40 = ceil(1.25 * 256 / 8): 320 slots for 256 tokens. One block of 256 x 256 pairs, of which 256 *
  257 / 2 are seen. A pair takes 2 (H + U) FLOP forward and 4 (H + U) backward, whose two kernels
  repeat the logits twice and the gradient of the probabilities once.
  """
  found = flops.step_flops(planned("moe_tiny", train__remat="minimal"), V5E)
  tokens, D, F, H = 16 * 256, 128, 384, 64
  seen, visited = 256 * 257 // 2, 256 * 256
  rows, heads = 16, 2
  attention = 4 * rows * heads * seen * 6 * (H + H)
  dense = 2 * 3 * tokens * (4 * 4 * D * 2 * H + 2 * 3 * D * F + 2 * D * 8 + D * 320)
  experts = 2 * 3 * tokens * 2 * 3 * D * F
  assert found.useful == attention + dense + experts
  again = 4 * rows * heads * seen * 2 * (2 * H + H)
  assert found.recomputed == again
  hidden = 4 * rows * heads * (visited - seen) * (6 * (H + H) + 2 * (2 * H + H))
  assert found.wasted[flops.HIDDEN_PAIRS] == hidden
  assert found.wasted[flops.EMPTY_ROWS] == pytest.approx(experts * 64 / 256)
  assert found.total == pytest.approx(found.useful + again + hidden + experts / 4)
  assert found.waste == pytest.approx(hidden + experts / 4)


def test_full_recomputation_repeats_waste_too():
  """All but the last product of each MLP, and attention's forward kernel, with what they waste."""
  minimal, full = (
    flops.step_flops(planned("moe_tiny", train__remat=r), V5E) for r in ("minimal", "full")
  )
  tokens, D, F, H = 16 * 256, 128, 384, 64
  experts, pair = 2 * 2 * tokens * 2 * D * F, 4 * 16 * 2 * 2 * (H + H)
  again = 2 * tokens * (4 * 4 * D * 2 * H + 2 * 2 * D * F + 2 * D * 8) + experts
  assert full.useful == minimal.useful
  assert full.recomputed - minimal.recomputed == again + pair * 256 * 257 // 2
  more = {why: full.wasted[why] - minimal.wasted[why] for why in full.wasted}
  assert more[flops.EMPTY_ROWS] == pytest.approx(experts / 4)
  assert more[flops.HIDDEN_PAIRS] == pair * 256 * 255 // 2


@pytest.mark.parametrize("name", ["dense_1b", "gemma3:1b", "deepseek:v3", "mixtral:8x7b"])
def test_useful_is_the_convention_that_counts_visible_keys(name):
  """But for vectors, of which the convention multiplies every entry."""
  setup = planned(name)
  data = setup.config.data
  tokens = data.batch_size * data.row_length
  wanted = tokens * flops_per_token(setup.config.model, data.row_length, "causal")
  assert flops.step_flops(setup, V5P).useful == pytest.approx(wanted, rel=1e-3)


def test_blocks_that_the_mask_cuts():
  """Of 4096 positions in blocks of 1024 ten of sixteen are visited; v4's are half as long."""
  causal = Causal()
  assert flops._visited(causal, 4096, 1024) == 10 * 1024**2
  assert flops._visited(causal, 4096, 512) == 36 * 512**2
  dense = planned("dense_1b")  # 16 layers of 32 heads of 64; remat=minimal
  pairs = {"v5p": 10 * 1024**2, "v4": 36 * 512**2}
  for name, visited in pairs.items():
    hidden = flops.step_flops(dense, CHIPS[name]).wasted[flops.HIDDEN_PAIRS]
    each = 16 * 32 * dense.config.data.batch_size * (6 * 128 + 2 * 3 * 64)
    assert hidden == (visited - 4096 * 4097 // 2) * each


@pytest.mark.parametrize("length", [128, 600, 1500, 4096, 9000])
def test_blocks_are_the_kernel_s(length):
  """Where no TPU is, that of v4's fast memory."""
  kernel = flops._kernel(planned("dense_1b").config.model.layers[0].attention, length, CHIPS["v4"])
  side = pallas_tpu.block_size(length)
  (kinds,) = pallas_tpu._kinds(Causal(), "index", length, length)
  assert kernel.visited == (kinds > 0).sum() * side**2


def test_stages_compute_on_nothing():
  """Two stages, four microbatches: each computes five times, one of them on zeros."""
  alone = flops.step_flops(planned("dense_1b", {"fsdp": 8}), V5P)
  staged = flops.step_flops(
    planned("dense_1b", {"stage": 2, "fsdp": 8}, train__microbatches=4), V5P
  )
  head = 3 * 2 * 256 * 4096 * 128_256 * 2048
  assert staged.wasted[flops.IDLE] == pytest.approx((alone.total - head) / 4)
  assert staged.useful == alone.useful


def test_windows_are_those_of_the_kernels():
  """For runs of 16 experts, tile by tile; and the plan of the products that need no kernel."""
  heights, tile = (64, 128, 192, 256, 288, 320), 1024
  for rows in (100, 1024, 5000, 40_000):
    total = 0
    runs = expert_tiles.runs(rows, 16)
    for begin, end in runs:
      for first in range(begin // tile * tile, end, tile):
        low, high = max(begin - first, 0), min(end - first, tile)
        _, full, last = windows(np.int32(low), np.int32(high), heights)
        total += int(full) * 256 + heights[int(last)] if high > low else 0
    assert expert_tiles.window_rows(rows, 16, tile, heights) == total
    lengths = np.array([end - begin for begin, end in runs])
    assert (
      lengths.sum() == rows and 0.75 < lengths.min() * 16 / rows < 1 < lengths.max() * 16 / rows
    )
    plan = make_plan(jnp.asarray(lengths, jnp.int32), 2 * rows)
    multiplied = plan.row_EA.size + int(plan.count) * plan.size
    assert expert_tiles.tiled_rows(2 * rows, rows, 16) == multiplied


def test_dropless_rows():
  """Mixtral: on 8 devices runs in windows; with nothing but `tensor` a slot for every token of
  each of 8 experts, where two are chosen."""
  in_runs = planned("mixtral:8x7b", {"fsdp": 2, "expert": 4})
  in_slots = planned("mixtral:8x7b", {"tensor": 8})
  spec, data = in_runs.config.model, in_runs.config.data
  tokens, moe = data.batch_size * data.row_length, spec.layers[0].mlp
  one = 3 * moe.expert.hidden * spec.embed_dim * 2 * 3 * spec.num_layers
  runs, slots = (flops.step_flops(s, V5P) for s in (in_runs, in_slots))
  assert slots.wasted[flops.EMPTY_ROWS] == pytest.approx(6 * tokens * one)
  assert speed.count_work(in_slots).experts == pytest.approx(8 * tokens * one)
  assert speed.count_work(in_runs).experts == pytest.approx(2 * tokens * one)
  assert 0 < runs.wasted[flops.EMPTY_ROWS] < 0.2 * 2 * tokens * one


ROOT = "jit(step)/transpose(jvp(TransformerLM))/while/body/checkpoint"


def test_a_program_by_the_names_of_its_products():
  """On moe_tiny's shapes: a fifth of the slots are empty, 255 of 512 pairs are hidden."""
  setup = planned("moe_tiny")
  names = {
    "up": "Block/mlp/Block._mlp/moe/experts/vmap()/dot_general",
    "again": "rematted_computation/Block/attention/attention._project/dot_general",
    "dq": "Block/attention/attention/attention_dq/pallas_call",
    "head": "head/TransformerLM._head/dot_general",
  }
  ops = [Op("kernel" if key == "dq" else "product", f"{ROOT}/{name}", 512.0, 10)
         for key, name in names.items()]  # fmt: skip
  found = flops.compiled_flops(setup, V5E, [*ops, Op("cycles", "", 9e9, 1)])
  seen = 5120 * 257 / 512
  assert found.wasted[flops.EMPTY_ROWS] == pytest.approx(5120 / 5)
  assert found.wasted[flops.HIDDEN_PAIRS] == pytest.approx(5120 - seen)
  assert found.recomputed == pytest.approx(5120 + seen / 3)
  assert found.useful == pytest.approx(5120 * 4 / 5 + 5120 + seen * 2 / 3)
  assert found.total == pytest.approx(4 * 5120)
  staged = setup._replace(
    mesh=abstract_mesh({"stage": 2}),
    config=replace(setup.config, train=replace(setup.config.train, microbatches=4)),
  )
  idle = flops.compiled_flops(staged, V5E, ops).wasted[flops.IDLE]
  assert idle == pytest.approx(3 * 5120 / 5)  # one tick of five, of all but the head


@pytest.mark.full
@pytest.mark.parametrize(
  ("kind", "mesh"),
  [("moe", {"fsdp": 4, "expert": 4}), ("dense", {"stage": 4, "fsdp": 4, "microbatches": 8})],
)
def test_compiled_programs(kind, mesh):
  """Each part within 3 % of all, in capacity slots and in a pipeline."""
  program = compiled(kind, "v5p:2x2x4", **mesh)
  theirs = flops.compiled_flops(program.setup, V5P, work(program.text))
  mine = flops.per_device(flops.step_flops(program.setup, V5P), program.setup)
  parts = lambda f: [f.useful, f.recomputed, *(f.wasted[why] for why in flops.WASTE)]
  np.testing.assert_allclose(parts(theirs), parts(mine), atol=0.03 * mine.total, rtol=0)
  assert math.isclose(theirs.total, sum(parts(theirs)))
