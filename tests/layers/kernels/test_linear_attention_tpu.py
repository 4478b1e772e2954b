"""The TPU kernels for linear attention: values and gradients in interpret mode, races, lowering."""

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

from layers.kernels import linear_attention as package
from layers.kernels.linear_attention import linear_attention, pallas_tpu
from tests.layers.stacks import quick_jit
from tests.oracles.linear_cases import SEGMENTS, close, make

CHUNK = 16  # of 37 tokens; blocks of two chunks, the last one not full


@pytest.fixture
def on_tpu(monkeypatch):
  monkeypatch.setattr(package, "current_platform", lambda: "tpu")
  monkeypatch.setattr(pallas_tpu, "BLOCK", 32)


@pytest.fixture
def interpreted(monkeypatch, on_tpu):
  call = partial(pl.pallas_call, interpret=True)
  monkeypatch.setattr(pallas_tpu, "pl", SimpleNamespace(**vars(pl) | {"pallas_call": call}))


def run(name, implementation, dtype=jnp.float32, *, jit=quick_jit):
  """(gradients of all arrays, (o, last state))."""
  arrays, keywords, segments, (do, dstate) = make(name)
  rounded = {x: arrays[x].astype(dtype) for x in ("q", "k", "v")}

  def loss(arrays):
    o, state = linear_attention(
      arrays["q"], arrays["k"], arrays["v"], decay=arrays["decay"], beta_BTN=arrays["beta"],
      state_BNHU=arrays["state"], segments_BT=segments, chunk=CHUNK,
      implementation=implementation, **keywords,
    )  # fmt: skip
    return jnp.sum(o * do) + jnp.sum(state * dstate), (o, state)

  return jit(jax.grad(loss, has_aux=True))(arrays | rounded)


expected = lru_cache(partial(run, implementation="reference"))


@pytest.mark.parametrize("name", ["feature map", "retention", "gla", "gated delta", "kimi"])
def test_values_and_gradients(name, interpreted):
  got = run(name, "pallas_tpu")
  close(got, expected(name), 1e-5)
  if SEGMENTS is make(name)[2]:
    _, (o, _) = got
    assert not np.asarray(o)[SEGMENTS == 0].any()


def test_bfloat16(interpreted):
  """Products are of rounded values; states and decays are not rounded."""
  want = expected("gated delta", dtype=jnp.bfloat16)
  close(run("gated delta", "pallas_tpu", jnp.bfloat16), want, 2e-2)


def test_no_gradient_leaves_no_states(interpreted):
  arrays, _, _, _ = make("gla")
  f = lambda q, k, v: linear_attention(q, k, v, chunk=CHUNK, implementation="pallas_tpu")
  call = next(
    e for e in equations(jax.make_jaxpr(f)(*(arrays[x] for x in "qkv")).jaxpr)
    if e.primitive.name == "pallas_call"
  )  # fmt: skip
  assert len(call.outvars) == 2


def equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      if hasattr(value, "jaxpr"):
        yield from equations(value.jaxpr)


def one_block_of_results(kernel, **keywords):
  """All rows and heads write to one place, on two cores."""
  fixed = lambda spec: pl.BlockSpec(spec.block_shape, lambda *_: (0,) * len(spec.block_shape))
  is_spec = lambda x: isinstance(x, pl.BlockSpec)
  out_specs = jax.tree.map(fixed, keywords["out_specs"], is_leaf=is_spec)
  return pl.pallas_call(kernel, **keywords | {"out_specs": out_specs})


@pytest.mark.parametrize("seeded", [False, True], ids=["as it is", "seeded"])
def test_races(seeded, on_tpu, monkeypatch, capfd):
  """Forward and backward on two cores, with memory that is NaN until written."""
  if seeded:
    names = vars(pl) | {"pallas_call": one_block_of_results}
    monkeypatch.setattr(pallas_tpu, "pl", SimpleNamespace(**names))
  parameters = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2
  )
  found, got = "", None
  with pltpu.force_tpu_interpret_mode(parameters):
    try:
      got = jax.block_until_ready(run("kimi", "pallas_tpu", jit=jax.jit))
    except jax.errors.JaxRuntimeError as error:  # newer versions raise, older ones print
      found = str(error)
  found += "".join(capfd.readouterr())
  assert ("RACE DETECTED" in found) == seeded
  if not seeded:
    close(got, expected("kimi"), 1e-5)


FORMS = {"none": (None, False), "head": (3, False), "channel": (4, False), "delta": (3, True)}


def gradients(form, H=128, U=128, dtype=jnp.bfloat16, chunk=64, delta=False):
  """A function of (q, k, v, decay, beta, segments), and its arguments' shapes."""
  dims, is_delta = FORMS[form]

  def loss(q, k, v, decay, beta, segments):
    o, state = linear_attention(
      q, k, v, decay=decay, beta_BTN=beta, segments_BT=segments, chunk=chunk,
      implementation="pallas_tpu",
    )  # fmt: skip
    return jnp.sum(o.astype(jnp.float32) ** 2) + jnp.sum(state**2)

  s = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
  f32, B, T, N = jnp.float32, 2, 2000, 4
  decay = None if dims is None else s(*(B, T, N, H)[:dims], dtype=f32)
  beta = s(B, T, N, dtype=f32) if is_delta or delta else None
  arrays = s(B, T, N, H), s(B, T, 2, H), s(B, T, 2, U), decay, beta, s(B, T, dtype=jnp.int32)
  return jax.grad(loss, tuple(i for i, a in enumerate(arrays[:5]) if a is not None)), arrays


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "cores"), [("TPU v5 lite", 1), ("TPU v5", 2), ("TPU v6 lite", 1)])
def test_lowers_for_tpus(form, kind, cores):
  device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform="tpu")
  mesh = jax.sharding.AbstractMesh((1,), ("d",), (AxisType.Auto,), abstract_device=device)
  f, arrays = gradients(form)
  with jax.sharding.use_abstract_mesh(mesh):
    text = jax.jit(f).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("tpu_custom_call") == 2


def test_lowers_inside_shard_map(on_tpu):
  """Rows and heads by hand; over an axis that is not, it is refused."""
  f, arrays = gradients("delta", chunk=32)
  arrays = [jax.ShapeDtypeStruct((2, a.shape[1], *a.shape[2:]), a.dtype) for a in arrays]
  rows, heads = P("data"), P("data", None, "tensor")
  specs = (heads, heads, heads, heads, heads, rows)
  mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
  mapped = partial(jax.shard_map, f, mesh=mesh, in_specs=specs, out_specs=(heads,) * 5)
  text = jax.jit(mapped()).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("tpu_custom_call") == 2
  with pytest.raises(NotImplementedError, match="spreads it over tensor"):
    by_rows = mapped(in_specs=(rows,) * 6, out_specs=(rows,) * 5, axis_names={"data"})
    jax.jit(by_rows).trace(*arrays)


def test_what_is_not_supported_says_why():
  s = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
  x, bf16 = s(jnp.bfloat16, 1, 64, 2, 64), jnp.bfloat16
  assert pallas_tpu.supports(x, x, x, 64) is None
  assert "float16" in pallas_tpu.supports(x, s(jnp.float16, 1, 64, 2, 64), x, 64)
  assert "256" in pallas_tpu.supports(x, x, s(bf16, 1, 64, 2, 512), 64)
  assert "not 8" in pallas_tpu.supports(x, x, x, 8)
  token = s(bf16, 1, 1, 2, 64)
  assert "16 tokens or more, not 1" in pallas_tpu.supports(token, token, token, 64)
  q = jnp.ones((1, 16, 2, 8))
  with pytest.raises(NotImplementedError, match="not for cpu"):
    linear_attention(q, q, q, implementation="pallas_tpu")


@pytest.mark.full
@pytest.mark.parametrize(
  ("name", "form", "more"),
  [(name, form, {}) for name in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2") for form in FORMS]
  + [
    ("v5e:2x2", "channel", {"H": 256, "U": 256, "dtype": jnp.float32, "delta": True}),
    ("v5e:2x2", "channel", {"H": 64, "U": 80, "chunk": 128}),
    ("v5e:2x2", "delta", {"H": 32, "U": 33, "chunk": 16}),
  ],
)
def test_compiles_for_described_tpus(name, form, more):
  """Fast memory suffices, which lowering alone does not show."""
  topologies = pytest.importorskip("jax.experimental.topologies")
  devices = topologies.get_topology_desc(topology_name=name, platform="tpu").devices
  mesh = jax.sharding.Mesh(np.array(devices[:1]), ("d",))
  replicated = jax.sharding.NamedSharding(mesh, P())
  f, arrays = gradients(form, **more)
  place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = jax.jit(f).lower(*jax.tree.map(place, arrays))
    lowered.compile()
  assert lowered.as_text().count("tpu_custom_call") == 2
