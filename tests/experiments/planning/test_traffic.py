"""Traffic is what theory says: bytes a device receives, by mesh axis, in programs compiled for v5p.

Equality of losses can't see an activation that is gathered where a weight should be; this can.
"""

import jax
import numpy as np
import pytest

from experiments.planning.network import bytes_received
from experiments.planning.traffic import by_axes, collectives
from layers.dispatch import expert_capacity
from mesh.topology import make_mesh
from tests.experiments.planning.pod import (
  EXPERTS,
  LAYERS,
  B,
  D,
  T,
  V,
  compiled,
  parameters,
  received,
)  # fmt: skip

BF16, F32 = 2, 4
GATHER, SCATTER, REDUCE = "all-gather", "reduce-scatter", "all-reduce"
PASSES = 2  # forward, and again in the backward pass


def part(n: int) -> float:
  """What a device lacks of something that n share."""
  return (n - 1) / n


def gradients(program, axis: str) -> float:
  """Reduce-scattered bytes; a scatter of a minor dim may compile to an all-reduce of twice that."""
  reduced = received(program, REDUCE, axis=axis, dtype="f32") / 2
  return received(program, SCATTER, axis=axis, dtype="f32") + reduced


def assert_sums_in_float32(program):
  """Nothing is summed in bfloat16 over axes that tokens differ along: no gradient of a weight.

  Over `stage` one device has something to say; over `tensor` a layer's outputs are summed.
  """
  over = {"data", "fsdp", "expert", "context"}
  summed = (c for c in program.found if c.kind in (SCATTER, REDUCE) and over & set(c.axes))
  assert [c for c in summed if c.dtype == "bf16"] == []


def test_experts_exchange_tokens_and_no_weights():
  """fsdp=4 x expert=4: an all-to-all there and back in each pass; dense weights over both axes."""
  program = compiled("moe", "v5p:2x2x4", fsdp=4, expert=4, rules="fsdp_expert")
  capacity = expert_capacity(64, 16, 1, EXPERTS.capacity_factor, EXPERTS.min_capacity)
  slots = B * T // 64 // 16 * 16 * capacity  # of a device: its groups, every expert
  # There and back forward, there and back again recomputed (the last is dead), and their gradients.
  one_way = slots * D * BF16 * part(4) * LAYERS
  exchanged = received(program, "all-to-all", axis="expert", dtype="bf16")
  embedded = B * T // 16 * D * BF16 * part(16)  # activations meet the embedding's columns
  assert 5 * one_way <= exchanged - embedded <= 6 * one_way

  dense = parameters(program, "attention/")
  experts = parameters(program, "moe/", without="router")
  # Two stages: a gather over expert brings a quarter of the weight, one over fsdp the rest.
  over_expert = (PASSES * dense + D * V) * BF16 * part(4) / 4
  over_fsdp = (PASSES * (dense + experts / 4) + D * V) * BF16 * part(4)
  np.testing.assert_allclose(
    received(program, GATHER, axis="expert", dtype="bf16"), over_expert, 0.01
  )
  np.testing.assert_allclose(received(program, GATHER, axis="fsdp", dtype="bf16"), over_fsdp, 0.01)
  assert_sums_in_float32(program)


@pytest.mark.full
def test_dropless_sends_the_chosen_rows_alone():
  """Not the worst case, for which its buffers have room."""
  program = compiled("dropless", "v5p:2x2x1", expert=4)
  one_way = 2 * B * T // 4 * D * BF16 * part(4) * LAYERS
  exchanged = received(program, "ragged-all-to-all", axis="expert", dtype="bf16")
  # There and back forward, there again recomputed, and the gradients of there and back.
  assert exchanged == 5 * one_way


@pytest.mark.full
def test_fsdp_gathers_each_layer_twice_and_scatters_gradients():
  program = compiled("dense", "v5p:2x2x4", fsdp=16, rules="fsdp")
  layers, head = parameters(program, "segment_0", without="norm"), D * V
  wanted = (PASSES * layers + head) * BF16 * part(16)
  np.testing.assert_allclose(received(program, GATHER, axis="fsdp", dtype="bf16"), wanted, 0.01)
  np.testing.assert_allclose(gradients(program, "fsdp"), (layers + head) * F32 * part(16), 0.01)
  assert_sums_in_float32(program)
  # Never all layers at once: what is alive beside the arguments, less the chunk of logits and its
  # gradients, is less than the gathered stack.
  logits = 4 * D * V * F32 + 2 * B * T // 16 * V * F32
  assert program.memory.temp_size_in_bytes - logits < layers * BF16


@pytest.mark.full
def test_no_whole_slice_collective_becomes_an_all_reduce():
  """64 chips along one axis of a 3D torus: the compiler alone turns each gather into an all-reduce
  of the whole weight, and each gradient's sum as well."""
  program = compiled("dense", "v5p:4x4x4", fsdp=64)
  layers, head = parameters(program, "segment_0", without="norm"), D * V
  wanted = (PASSES * layers + head) * BF16 * part(64)
  np.testing.assert_allclose(received(program, GATHER, axis="fsdp", dtype="bf16"), wanted, 0.01)
  reduced = received(program, REDUCE, axis="fsdp", dtype="f32")
  assert reduced < 0.2 * received(program, SCATTER, axis="fsdp", dtype="f32")
  assert_sums_in_float32(program)


@pytest.mark.full
def test_tensor_parallelism_gathers_and_scatters_between_blocks():
  """Norms stand on a share of the positions: no all-reduce of activations in the blocks."""
  program = compiled("dense", "v5p:2x2x4", fsdp=4, tensor=4, rules="fsdp_tensor")
  activation = B // 4 * T * D
  size = activation * BF16 * part(4)
  reduced = [c for c in program.found if c.kind == REDUCE and "/Block/" in c.name]
  whole = [c for c in reduced if "tensor" in c.axes and c.received >= size]
  assert not whole
  assert received(program, SCATTER, axis="tensor") >= 4 * LAYERS * activation * BF16 * part(4)
  assert_sums_in_float32(program)
  # The estimate of `plan` has every collective of a few bytes or more.
  estimate = bytes_received(program.setup)
  for axis in ("tensor", "fsdp"):
    along = sum(c.total for c in program.found if c.axes == (axis,))
    assert estimate[axis] == pytest.approx(along, rel=0.05), axis
  # Each device runs the kernels with its own heads.
  for kernel in ("attention_forward", "attention_dq", "attention_dkv"):
    assert kernel in program.text


@pytest.mark.full
def test_one_key_head_is_on_all_devices():
  """PaLM's layers: both branches at once, and no sums over `tensor` for what reads keys."""
  rules = "all,kv_heads=,act_kv_heads="
  program = compiled("palm", "v5p:2x2x4", fsdp=4, tensor=4, rules=rules)
  along = sum(c.total for c in program.found if c.axes == ("tensor",))
  assert bytes_received(program.setup)["tensor"] == pytest.approx(along, rel=0.05)


@pytest.mark.full
def test_context_parallelism_permutes_keys():
  """A ring of four: keys and values move three times in each pass and in the backward pass, where
  their gradients move with them in float32, and once more, rounded, to come home."""
  program = compiled("dense", "v5p:2x2x4", data=4, context=4)
  keys = B // 4 * T // 4 * D * 2  # elements of keys and values a device holds
  forward = 3 * keys * BF16
  backward = 3 * keys * (BF16 + F32) + keys * BF16
  wanted = LAYERS * (PASSES * forward + backward)
  moved = received(program, "collective-permute", axis="context")
  assert wanted <= moved <= 1.01 * wanted  # positions and segments go along
  weights = parameters(program, "segment_0", without="norm") * PASSES + 2 * D * V
  gathered = received(program, GATHER, axis="context", dtype="bf16")
  np.testing.assert_allclose(gathered, weights * BF16 * part(4), 0.02)


@pytest.mark.full
def test_pipeline_permutes_activations():
  program = compiled("dense", "v5p:2x2x4", stage=4, fsdp=4, microbatches=8)
  tick = B // 4 // 8 * T * D * BF16
  moved = received(program, "collective-permute", axis="stage", dtype="bf16")
  ticks = 8 + 4 - 1
  assert 2 * ticks * tick <= moved <= 2.2 * ticks * tick  # forward and backward
  assert_sums_in_float32(program)
  # The estimate of `plan`, which knows nothing of what the compiler adds.
  estimate = bytes_received(program.setup)
  for axis in ("stage", "fsdp"):
    along = sum(c.total for c in program.found if c.axes == (axis,))
    assert 0.5 * along <= estimate[axis] <= 1.2 * along, axis


@pytest.mark.full
def test_one_mesh_uses_every_axis():
  axes = dict.fromkeys(("data", "stage", "fsdp", "expert", "context", "tensor"), 2)
  program = compiled("moe", "v5p:4x4x4", **axes, microbatches=4)
  used = {axis for c in program.found for axis in c.axes}
  assert used == set(axes)
  assert_sums_in_float32(program)


TEXT = """
HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%condition (state: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = bf16[16,4]{1,0} all-gather(%p), replica_groups={{0,1},{2,3}}, dimensions={0}
  %r = f32[8]{0} all-reduce(%x), replica_groups=mesh['a'=2,'b'=2] {'a'}, to_apply=%add
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%condition, body=%body
  %c = (f32[4], f32[4], u32[]) collective-permute-start(%y), source_target_pairs={{0,2},{2,0}}
  %s = f32[2]{0} reduce-scatter(%y), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
  %n = f32[8]{0} all-reduce(%y), replica_groups={{0},{1},{2},{3}}, to_apply=%add
}
"""


def test_reading_a_program():
  mesh = make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])
  found = by_axes(collectives(TEXT, mesh))
  assert found == {
    ("all-gather", ("tensor",), "bf16"): 5 * 16 * 4 * BF16 / 2,
    ("all-reduce", ("data",), "f32"): 5 * 2 * 8 * F32 / 2,
    ("collective-permute", ("data",), "f32"): 4 * F32,
    ("reduce-scatter", ("data",), "f32"): 2 * F32,
  }
