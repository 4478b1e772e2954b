"""The rule that chooses an implementation."""

import jax
import pytest
from jax.sharding import AxisType

from layers.kernels.select import anywhere, current_platform, select


def tpu_only(platform):
  return None if platform == "tpu" else f"it needs a TPU, this is {platform}"


CANDIDATES = {"pallas_tpu": tpu_only, "xla": anywhere, "reference": anywhere}


def test_unnamed_takes_the_first_that_can():
  assert select(None, "tpu", CANDIDATES) == "pallas_tpu"
  assert select(None, "cpu", CANDIDATES) == "xla"


def test_named_is_never_replaced():
  assert select("reference", "tpu", CANDIDATES) == "reference"
  assert select("pallas_tpu", "tpu", CANDIDATES) == "pallas_tpu"
  with pytest.raises(NotImplementedError, match=r"pallas_tpu.*needs a TPU, this is gpu"):
    select("pallas_tpu", "gpu", CANDIDATES)


def test_unknown_name_lists_the_known():
  with pytest.raises(ValueError, match="'cudnn'; known: pallas_tpu, xla, reference"):
    select("cudnn", "gpu", CANDIDATES)


def test_platform_is_that_of_the_mesh():
  assert current_platform() == "cpu"
  device = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
  mesh = jax.sharding.AbstractMesh(
    (2,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device
  )
  with jax.sharding.use_abstract_mesh(mesh):
    assert current_platform() == "tpu"
