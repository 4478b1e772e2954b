"""The TPU kernels for attention: values and gradients in interpret mode, visits, lowering."""

from functools import lru_cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from layers.kernels.attention import Bucketed, attention, pallas_tpu, reference
from layers.masks import (
  BigBird,
  Causal,
  Chunked,
  Dilated,
  Global,
  Local,
  Longformer,
  PerHead,
  SparseTransformer,
)
from tests.layers.kernels import attention_cases
from tests.layers.kernels.attention_cases import Case, close

DOCUMENTS = ((120, 150, 30), (200, 70, 30))
CASES = {  # rows of 300: blocks of 128, the last one padded
  "causal": Case(),
  "everything": Case(None, (4, 1), (32, 16)),
  "whole blocks": Case(Causal(), (2, 1), length=256),
  "window, cap, sink": Case(Local(70), (8, 1), softcap=5.0, sink=True),
  "around": Case(Local(20, 40), sink=True),
  "bigbird": Case(BigBird(5, 64), (2, 1)),
  "longformer": Case(Longformer(40, 3, 2), (1, 1)),
  "strided": Case(SparseTransformer(24), (1, 1), length=200),
  "rows that see nothing": Case(Causal() & ~Global(140), (2, 2)),
  "a mask a head": Case(
    PerHead((Causal(), Local(30, 4), BigBird(5, 64), Causal() & Dilated(3, 60))), (4, 2)
  ),
  "documents": Case(Causal(), (4, 2), documents=DOCUMENTS, alibi=True),
  "chunks of documents": Case(Chunked(64), (2, 1), documents=DOCUMENTS, sink=True, softcap=3.0),
  "documents, bigbird": Case(BigBird(5, 64), (2, 1), documents=DOCUMENTS, alibi=True),
  "documents, a mask a head": Case(PerHead((Local(9), BigBird(5, 64))), documents=DOCUMENTS),
  "other keys": Case(Causal() & Local(90), (2, 1), others=True, sink=True, alibi=True),
  "other keys, all": Case(None, (2, 1), others=True, documents=DOCUMENTS),
}


@pytest.fixture
def interpreted(monkeypatch):
  call = partial(pl.pallas_call, interpret=True)
  monkeypatch.setattr(pallas_tpu, "pl", SimpleNamespace(**vars(pl) | {"pallas_call": call}))
  monkeypatch.setattr(pallas_tpu, "BLOCK", 256)  # of which half on what is no TPU


def run(module, name, dtype=jnp.float32):
  return attention_cases.run(module, CASES[name], dtype)


expected = lru_cache(partial(run, reference))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, interpreted):
  close(run(pallas_tpu, name), expected(name), 1e-5)


def test_what_sees_nothing_is_exactly_zero(interpreted):
  """The first 140 places neither see nor are seen."""
  (dq, dk, dv, *_), (o, *_) = run(pallas_tpu, "rows that see nothing")
  for x in (dq, dk, dv, o):
    assert not np.asarray(x)[:, :140].any() and np.asarray(x)[:, 140:].any((2, 3)).all()


@pytest.mark.parametrize("name", ["causal", "window, cap, sink"])
def test_bfloat16(name, interpreted):
  """Probabilities and their gradients are rounded before they meet values, keys and queries."""
  close(run(pallas_tpu, name, jnp.bfloat16), expected(name, jnp.bfloat16), 2e-2)


def one_block_of_results(**specs):
  """All rows and heads write to one place, on two cores."""
  out = [(spec.block_shape, len(spec.block_shape)) for spec in specs["out_specs"]]
  specs["out_specs"] = [pl.BlockSpec(shape, lambda *_, n=n: (0,) * n) for shape, n in out]
  return pltpu.PrefetchScalarGridSpec(**specs)


@pytest.mark.parametrize("seeded", [False, True], ids=["as it is", "seeded"])
def test_races(seeded, monkeypatch, capfd):
  """Forward and backward on two cores, with memory that is NaN until written."""
  monkeypatch.setattr(pallas_tpu, "BLOCK", 256)
  if seeded:
    names = vars(pltpu) | {"PrefetchScalarGridSpec": one_block_of_results}
    monkeypatch.setattr(pallas_tpu, "pltpu", SimpleNamespace(**names))
  masks = PerHead((Local(9), BigBird(4, 64)))
  case = Case(masks, documents=((60, 80, 60), (130, 50, 20)), sink=True, alibi=True, length=200)
  parameters = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2
  )
  found = ""
  with pltpu.force_tpu_interpret_mode(parameters):
    try:
      got = jax.block_until_ready(attention_cases.run(pallas_tpu, case))
    except jax.errors.JaxRuntimeError as error:  # newer versions raise, older ones print
      found = str(error)
  found += "".join(capfd.readouterr())
  assert ("RACE DETECTED" in found) == seeded
  if not seeded:  # but for slopes, of which the float32 reference itself is off by 5e-5
    (*grads, _), o = got
    (*want, _), want_o = attention_cases.run(reference, case)
    close((grads, o), (want, want_o), 1e-5)


SIZES = {
  "64": (64, 64), "80": (80, 80), "96": (96, 96), "128": (128, 128), "192, 128": (192, 128),
  "256": (256, 256),
}  # fmt: skip
MASK = PerHead((BigBird(32), Causal() & Local(700), BigBird(32), SparseTransformer(kind="fixed")))


def gradients(H, U, dtype=jnp.bfloat16, mask=MASK, **more):
  """A function of (q, k, v, ids) and its arguments' shapes."""

  def loss(q, k, v, positions, segments):
    o = attention(
      q, k, v, mask=mask, implementation="pallas_tpu", q_positions_BT=positions,
      q_segments_BT=segments, **more,
    )  # fmt: skip
    return jnp.sum(o.astype(jnp.float32) ** 2)

  s = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
  ids = s(2, 2048, dtype=jnp.int32)
  arrays = s(2, 2048, 4, H), s(2, 2048, 2, H), s(2, 2048, 2, U), ids, ids
  return jax.grad(loss, (0, 1, 2)), arrays


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
  ("kind", "cores"),
  [("TPU v5 lite", 1), pytest.param("TPU v5", 2, marks=pytest.mark.full), ("TPU v6 lite", 1)],
)
def test_lowers_for_tpus(sizes, kind, cores):
  device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform="tpu")
  mesh = jax.sharding.AbstractMesh((1,), ("d",), (AxisType.Auto,), abstract_device=device)
  f, arrays = gradients(*SIZES[sizes], softcap=20.0, sink_N=jnp.ones(4))
  with jax.sharding.use_abstract_mesh(mesh):
    text = jax.jit(f).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("tpu_custom_call") == 3


def test_what_is_not_supported_says_why():
  s = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
  x, bf16 = s(jnp.bfloat16, 1, 8, 2, 64), jnp.bfloat16
  why = lambda q, k=x, bias=None, mask=None: pallas_tpu.supports(q, k, x, bias, mask, "index")
  assert why(x) is None
  assert "Bucketed" in why(x, bias=Bucketed(jnp.ones((8, 2))))
  assert "float16" in why(s(jnp.float16, 1, 8, 2, 64))
  assert "256" in why(s(bf16, 1, 8, 2, 512), s(bf16, 1, 8, 2, 512))
  long = s(bf16, 1, 2**19, 2, 64)  # 1024 blocks a side, which is 512 on what is no TPU
  assert why(long, long, mask=Local(2**16)) is None
  assert "scalar memory" in why(long, long, mask=Causal())
  q = jnp.ones((1, 8, 2, 64))
  with pytest.raises(NotImplementedError, match="not for cpu"):
    attention(q, q, q, implementation="pallas_tpu")


@pytest.mark.full
@pytest.mark.parametrize(
  ("name", "sizes", "mask", "dtype"),
  [("v5p:2x2x1", sizes, Causal(), jnp.bfloat16) for sizes in SIZES]
  + [(name, "128", MASK, jnp.bfloat16) for name in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")]
  + [("v5e:2x2", "256", Causal(), jnp.float32)],
)
def test_compiles_for_described_tpus(name, sizes, mask, dtype):
  """Fast memory suffices, which lowering alone does not show."""
  topologies = pytest.importorskip("jax.experimental.topologies")
  devices = topologies.get_topology_desc(topology_name=name, platform="tpu").devices
  mesh = jax.sharding.Mesh(np.array(devices[:1]), ("d",))
  replicated = jax.sharding.NamedSharding(mesh, P())
  f, arrays = gradients(*SIZES[sizes], dtype, mask, softcap=20.0)
  arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated) for a in arrays]
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    compiled = jax.jit(f).lower(*arrays).compile()
  assert compiled.as_text().count("tpu_custom_call") == 3
