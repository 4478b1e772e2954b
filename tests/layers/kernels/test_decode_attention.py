"""Attention over a cache: every implementation against numpy, what is read, and on a mesh."""

from functools import lru_cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from layers.kernels.decode_attention import (
  decode_attention,
  paged_decode_attention,
  pallas_tpu,
  reference,
  xla,
)
from layers.kernels.decode_attention.inputs import Inputs, bounds, needed_pages
from layers.masks import Causal, Local, PerHead
from tests.layers.stacks import quick_jit
from tests.oracles import decode
from tests.oracles.decode import CASES, SEEN, S, paged

make = lru_cache(decode.make)
expected = lru_cache(lambda name, dtype: make(name, dtype).expected())

# Probabilities are rounded to the dtype of the values, results to that of the queries.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
FORMS = ("reference", "dense", "loop", "pallas_tpu")
PAGED = [name for name, case in CASES.items() if not case.rolling]


@pytest.fixture
def small(monkeypatch):
  """Blocks so small that rows have several, and the TPU kernel in interpret mode."""
  monkeypatch.setattr(xla, "BLOCK", 48)  # the last of 200 is not full
  monkeypatch.setattr(pallas_tpu, "STEP_BYTES", 2**16)
  monkeypatch.setattr(pallas_tpu, "COLUMNS", 128)
  call = partial(pl.pallas_call, interpret=True)
  monkeypatch.setattr(pallas_tpu, "pl", SimpleNamespace(**vars(pl) | {"pallas_call": call}))
  # What may run is decided by the platform; here it is the interpreter.
  monkeypatch.setattr(
    "layers.kernels.decode_attention.current_platform",
    lambda: "tpu",
  )


def call(name, form, dtype="float32", page=None):
  """The result of a case as float64; in pages of `page` positions."""
  made = make(name, dtype)
  a, case = made.arrays, made.case
  array = lambda x: None if x is None else jnp.asarray(x, dtype)
  integers = lambda x: jnp.asarray(x, jnp.int32)
  more = {
    "q_positions_BT": integers(a["q_positions_BT"]),
    "lengths_B": integers(a["lengths_B"]),
    "sink_N": None if a["sink"] is None else jnp.asarray(a["sink"], jnp.float32),
    "alibi_slopes_N": None if a["slopes"] is None else jnp.asarray(a["slopes"], jnp.float32),
  }
  how = {"mask": case.mask, "softcap": case.softcap}
  how["implementation"] = "xla" if form in ("dense", "loop") else form
  if page is not None:
    k, v, table = paged(made, page)
    function, arrays = paged_decode_attention, (array(k), array(v), integers(table))
  else:
    function, arrays = decode_attention, (array(a["k"]), array(a["v"]))
    how["seq_sharded"] = form == "dense"
    if case.rolling:
      more["kv_positions_BS"] = integers(a["kv_positions_BS"])
  o = quick_jit(partial(function, **how))(array(a["q"]), *arrays, **more)
  assert o.dtype == jnp.dtype(dtype)
  return np.asarray(o, np.float64)


def close(got, want, dtype="float32"):
  atol = TOLERANCE[dtype] * np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=0, atol=atol)
  np.testing.assert_array_equal(got[want == 0], 0)  # rows that have or see nothing


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_values(name, form, small):
  close(call(name, form), expected(name, "float32"))


@pytest.mark.parametrize("name", PAGED)
@pytest.mark.parametrize("form", [form for form in FORMS if form != "dense"])
def test_pages(name, form, small):
  close(call(name, form, page=16), expected(name, "float32"))


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(form, small):
  name, dtype = "sink, cap, alibi", "bfloat16"
  close(call(name, form, dtype), expected(name, dtype), dtype)
  if form != "dense":
    close(call(name, form, dtype, page=16), expected(name, dtype), dtype)


@pytest.mark.parametrize("page", [8, 100])
@pytest.mark.parametrize("form", ["loop", "pallas_tpu"])
def test_page_sizes(form, page, small):
  """Several pages a step, and several products a page."""
  close(call("window", form, page=page), expected("window", "float32"))


def test_the_longest_row_decides():
  assert SEEN[-1] == S and 0 in SEEN  # rows that are empty, full, and between
