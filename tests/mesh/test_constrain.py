"""constrain(): identity, Auto, Explicit, manual axes, and retracing when the rules change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mesh.constrain import constrain, use_mesh
from mesh.rules import PRESETS
from mesh.topology import make_mesh

pytestmark = pytest.mark.xdist_group("devices")

X_BTD = np.arange(8 * 4 * 16, dtype=np.float32).reshape(8, 4, 16)


@jax.jit
def twice(x_BTD):
  return constrain(x_BTD * 2, "act_batch", "act_seq", "act_mlp")


@pytest.fixture(scope="module")
def mesh():
  return make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})


def local_shape(x):
  return x.addressable_shards[0].data.shape


def test_identity_without_a_mesh_rules_or_second_device(mesh):
  x = jnp.asarray(X_BTD)
  assert constrain(x, "act_batch", "act_seq", None) is x
  with jax.set_mesh(mesh):  # a mesh, but nobody's rules
    assert constrain(x, "act_batch", "act_seq", None) is x
  with use_mesh(make_mesh({}), "all"):
    assert constrain(x, "act_batch", "act_seq", None) is x
  assert constrain(x, "act_batch", "act_seq", None) is x


def test_auto_axes_shard_and_keep_values(mesh):
  with use_mesh(mesh, "all") as active:
    assert active is mesh
    y = twice(X_BTD)
  assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(("fsdp", "expert"), None, "tensor")), 3)
  np.testing.assert_array_equal(y, X_BTD * 2)


def test_works_on_concrete_arrays(mesh):
  with use_mesh(mesh, "all"):
    y = constrain(jnp.asarray(X_BTD), "act_batch", None, "act_mlp")
  assert local_shape(y) == (2, 4, 8)


def test_the_same_jit_retraces_when_rules_or_mesh_change(mesh):
  plain = twice(X_BTD)
  assert len(plain.sharding.device_set) == 1
  wide = make_mesh({"fsdp": 8})
  shapes = []
  for where, rules in [(mesh, "all"), (wide, "all"), (wide, "fsdp"), (mesh, "all")]:
    with use_mesh(where, rules):
      shapes.append(local_shape(twice(X_BTD)))
  assert shapes == [(2, 4, 8), (1, 4, 16), (1, 4, 16), (2, 4, 8)]

  # One mesh, two tables: only the user context tells the traces apart.
  traces = []

  @jax.jit
  def f(x):
    traces.append(None)
    return constrain(x, "act_batch", None, "act_mlp")

  half = make_mesh({"fsdp": 4, "context": 2})
  swapped = PRESETS["all"].table
  swapped = tuple((k, ("context",) if k == "act_mlp" else v) for k, v in swapped)
  other = type(PRESETS["all"])("swapped", swapped)
  shapes = []
  for rules in ("all", other, "all", other):
    with use_mesh(half, rules):
      shapes.append(local_shape(f(X_BTD)))
  assert shapes == [(2, 4, 16), (2, 4, 8)] * 2
  assert len(traces) == 2


def test_explicit_axes_reshard():
  mesh = make_mesh({"fsdp": 4, "tensor": 2}, explicit=True)
  with use_mesh(mesh, "all"):
    y = twice(jax.device_put(X_BTD, NamedSharding(mesh, P())))
    assert jax.typeof(y).sharding.spec == P("fsdp", None, "tensor")
    row = constrain(jax.device_put(X_BTD[:1], NamedSharding(mesh, P())), "act_batch", None, None)
  np.testing.assert_array_equal(y, X_BTD * 2)
  assert local_shape(row) == (1, 4, 16)


def test_a_dim_that_does_not_divide_is_left_to_the_compiler(mesh):
  one_token_BTD = X_BTD[:1, :1]
  with use_mesh(mesh, "all"):
    text = twice.lower(one_token_BTD).as_text()
    y = twice(one_token_BTD)
  np.testing.assert_array_equal(y, one_token_BTD * 2)
  assert local_shape(y) == (1, 1, 8)  # the dim that divides is still sharded
  constraint = next(line for line in text.splitlines() if "sharding_constraint" in line)
  assert "[{?}, {}, {" in constraint  # batch open, position closed, width sharded


def test_inside_shard_map_manual_axes_are_dropped(mesh):
  def body(x_BTD):
    return constrain(x_BTD, "act_batch", "act_seq", "act_mlp") * 2

  with use_mesh(mesh, "all"):
    # Manual over expert: 4 of 8 rows here, of which fsdp (still automatic) takes half.
    partly = jax.shard_map(body, in_specs=P("expert"), out_specs=P("expert"), axis_names={"expert"})
    fully = jax.shard_map(body, in_specs=P(("fsdp", "expert")), out_specs=P(("fsdp", "expert")))
    text = jax.jit(partly).lower(X_BTD).as_text()
    y = jax.jit(partly)(X_BTD)
    z = jax.jit(fully)(X_BTD)
  np.testing.assert_array_equal(y, X_BTD * 2)
  np.testing.assert_array_equal(z, X_BTD * 2)
  constraint = next(line for line in text.splitlines() if "sharding_constraint" in line)
  assert '[{"fsdp"}, {}, {"tensor"}]' in constraint


def test_gradients_and_vmap_pass_through(mesh):
  def loss(x_BTD):
    return jnp.sum(jax.vmap(lambda x_TD: constrain(x_TD, "act_seq", "act_mlp") ** 2)(x_BTD))

  with use_mesh(mesh, "all"):
    grad = jax.jit(jax.grad(loss))(X_BTD)
  np.testing.assert_array_equal(grad, 2 * X_BTD)


def test_mistakes_are_refused_with_or_without_a_mesh(mesh):
  with pytest.raises(ValueError, match="'width' is no logical axis"):
    constrain(X_BTD, "act_batch", "act_seq", "width")
  with pytest.raises(ValueError, match=r"axes \('act_batch',\) for an array of shape \(8, 4, 16\)"):
    constrain(X_BTD, "act_batch")
  with pytest.raises(ValueError, match="'most' is none of the presets"), use_mesh(mesh, "most"):
    pass
  with pytest.raises(ValueError, match="expert=2 is used by no rule"), use_mesh(mesh, "fsdp"):
    pass
  with use_mesh(mesh, "all"), pytest.raises(ValueError, match="want mesh axis tensor"):
    constrain(X_BTD, "act_heads", None, "act_mlp")
