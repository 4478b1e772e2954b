"""The rules table and the shardings that follow from it."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mesh.axes import LOGICAL_AXES, MESH_AXES
from mesh.rules import PRESETS, make_rules, parse_rules, shardings, spec_for, validate
from mesh.topology import make_mesh


def abstract_mesh(**sizes):
  shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
  return AbstractMesh(shape, MESH_AXES, (AxisType.Auto,) * len(shape))


BATCH = ("data", "fsdp", "expert")
FULL = abstract_mesh(data=2, fsdp=4, expert=2, context=2, tensor=2)


def test_presets_cover_exactly_the_logical_axes():
  for rules in PRESETS.values():
    assert tuple(name for name, _ in rules.table) == LOGICAL_AXES
  used = {name: rules.mesh_axes for name, rules in PRESETS.items()}
  assert used == {
    "fsdp": {"data", "stage", "fsdp", "context"},
    "fsdp_tensor": {"data", "stage", "fsdp", "context", "tensor"},
    "fsdp_expert": {"data", "stage", "fsdp", "context", "expert"},
    "all": set(MESH_AXES),
  }


@pytest.mark.parametrize(
  ("logical", "expected"),
  [
    (("embed", "mlp"), P(("fsdp", "expert", "context"), "tensor")),
    (("embed", "heads", "head_dim"), P(("fsdp", "expert", "context"), "tensor", None)),
    (("vocab", "embed"), P("tensor", ("fsdp", "expert", "context"))),
    (("layers", "expert", "expert_embed", "expert_mlp"), P(None, "expert", "fsdp", "tensor")),
    (("norm",), P(None)),
    (("embed", None), P(("fsdp", "expert", "context"), None)),
    (("act_batch", "act_seq", "act_embed"), P(BATCH, "context", None)),
    (("act_batch", "act_norm_seq", None), P(BATCH, ("context", "tensor"), None)),
    (("act_batch", "act_seq", "act_heads", None), P(BATCH, "context", "tensor", None)),
    (("act_batch", "act_expert", None, "act_embed"), P(("data", "fsdp"), "expert", None, None)),
    (("cache_batch", "cache_seq", "cache_heads", None), P(BATCH, None, "tensor", None)),
    ((), P()),
  ],
)  # fmt: skip
def test_where_arrays_lie_in_the_full_preset(logical, expected):
  assert spec_for(logical, PRESETS["all"], FULL) == expected


def test_a_dense_weight_is_spread_over_every_device_but_replicas():
  """No copy of an [embed, mlp] weight is left on any axis except `data`."""
  spec = spec_for(("embed", "mlp"), PRESETS["all"], FULL)
  named = {a for entry in spec for a in (entry if isinstance(entry, tuple) else (entry,))}
  assert named == {axis for axis, size in FULL.shape.items() if size > 1} - {"data"}


def test_mesh_axes_of_size_one_or_absent_are_dropped():
  assert spec_for(("embed", "mlp"), PRESETS["all"], abstract_mesh(fsdp=8)) == P("fsdp", None)
  own = AbstractMesh((8,), ("tensor",), (AxisType.Auto,))
  assert spec_for(("embed", "mlp"), PRESETS["all"], own) == P(None, "tensor")


def test_presets_leave_out_what_they_do_not_use():
  assert spec_for(("embed", "mlp"), PRESETS["fsdp"], FULL) == P(("fsdp", "context"), None)
  assert spec_for(("expert", "expert_embed"), PRESETS["fsdp_tensor"], FULL) == P(None, "fsdp")
  assert spec_for(("act_batch", "act_mlp"), PRESETS["fsdp_expert"], FULL) == P(
    ("data", "fsdp", "expert"), None
  )


def test_a_mesh_axis_wanted_twice_is_refused():
  with pytest.raises(
    ValueError, match=r"moe/router with axes .*: both embed and expert want mesh axis expert"
  ):
    spec_for(("embed", "expert"), PRESETS["all"], FULL, name="moe/router")
  with pytest.raises(ValueError, match=r"up of shape \(8, 6\) with axes .* want mesh axis tensor"):
    spec_for(("embed", "mlp"), parse_rules("all,embed=tensor"), FULL, (8, 6), name="up")
  with pytest.raises(ValueError, match="both act_norm_seq and act_heads want mesh axis tensor"):
    spec_for(("act_norm_seq", "act_heads"), PRESETS["all"], FULL)


def test_an_unknown_logical_axis_is_refused():
  with pytest.raises(
    ValueError, match="'all' have no entry for logical axis 'width'; known: embed"
  ):
    spec_for(("width",), PRESETS["all"], FULL)
  message = r"block/up of shape \(8, 6\) with axes .* logical axis 'embedd'; did you mean embed"
  with pytest.raises(ValueError, match=message):
    spec_for(("embedd", "mlp"), PRESETS["all"], FULL, (8, 6), name="block/up")


def test_a_dim_that_does_not_divide_is_refused_with_every_number():
  message = r"wq of shape \(36, 8\): dim 0 \(embed, size 36\) does not divide over mesh fsdp=4 x "
  with pytest.raises(ValueError, match=message + "expert=2 x context=2"):
    spec_for(("embed", "heads"), PRESETS["all"], FULL, (36, 8), name="wq")
  with pytest.raises(ValueError, match=r"shape \(4, 4\) does not fit the axes \('norm',\)"):
    spec_for(("norm",), PRESETS["all"], FULL, (4, 4))


def test_multi_query_heads_are_not_copied_silently():
  wk_DKH = ("embed", "kv_heads", "head_dim")
  with pytest.raises(ValueError, match=r"dim 1 \(kv_heads, size 1\) .* tensor=2; choose mesh"):
    spec_for(wk_DKH, PRESETS["all"], FULL, (32, 1, 8))


def test_rules_must_cover_the_axes_and_name_real_mesh_axes():
  table = dict(PRESETS["all"].table)
  assert make_rules("all", table) == PRESETS["all"]
  with pytest.raises(ValueError, match=r"missing \['embed'\], unknown \['width'\]"):
    make_rules("mine", {**{k: v for k, v in table.items() if k != "embed"}, "width": "fsdp"})
  with pytest.raises(ValueError, match="mlp maps to 'model', which is no mesh axis"):
    make_rules("mine", table | {"mlp": "model"})


def test_a_mesh_axis_that_no_rule_uses_is_refused():
  validate(PRESETS["all"], FULL)
  validate(PRESETS["fsdp"], abstract_mesh(data=2, fsdp=4))
  with pytest.raises(ValueError, match="tensor=2 is used by no rule of 'fsdp'; rules fsdp_tensor"):
    validate(PRESETS["fsdp"], abstract_mesh(fsdp=4, tensor=2))
  for rules in PRESETS.values():
    validate(rules, abstract_mesh(stage=2))
  with pytest.raises(ValueError, match="stage=2 is used by no rule of 'all,layers='"):
    validate(parse_rules("all,layers="), abstract_mesh(stage=2))
  with pytest.raises(ValueError, match="context=2 is used by no rule"):
    validate(parse_rules("fsdp,embed=fsdp,act_seq=,act_norm_seq="), abstract_mesh(context=2))


def test_stages_hold_their_share_of_the_layers():
  mesh = abstract_mesh(stage=2, fsdp=4)
  for rules in PRESETS.values():
    assert spec_for(("layers", "embed", "mlp"), rules, mesh) == P("stage", "fsdp", None)
  with pytest.raises(ValueError, match=r"segment_1/up .* dim 0 \(layers, size 3\) .* mesh stage=2"):
    spec_for(("layers", "embed"), PRESETS["all"], mesh, (3, 8), name="segment_1/up")


def test_text_is_a_preset_and_changes():
  for name, preset in PRESETS.items():
    assert parse_rules(name) is preset
  rules = parse_rules("all,embed=fsdp+context, act_norm_seq = context,mlp=")
  assert rules.name == "all,embed=fsdp+context,act_norm_seq=context,mlp="
  changed = {"embed": ("fsdp", "context"), "act_norm_seq": ("context",), "mlp": ()}
  assert dict(rules.table) == dict(PRESETS["all"].table) | changed
  assert tuple(name for name, _ in rules.table) == LOGICAL_AXES
  assert parse_rules(rules.name) == rules and hash(parse_rules(rules.name)) == hash(rules)
  assert spec_for(("embed", "mlp"), rules, FULL) == P(("fsdp", "context"), None)
  # The first axis named is the outermost: the order of the text counts.
  assert spec_for(("embed",), parse_rules("all,embed=context+fsdp"), FULL) == P(("context", "fsdp"))


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("al", "no preset 'al'; did you mean all"),
    ("", "no preset ''; known: fsdp, fsdp_tensor, fsdp_expert, all"),
    ("embed=fsdp", "begin with a preset: fsdp, fsdp_tensor"),
    ("all,embd=fsdp", "no logical axis 'embd'; did you mean embed"),
    ("all,=fsdp", "no logical axis ''; known: embed, mlp"),
    ("all,embed", "write 'embed' as LOGICAL=AXIS"),
    ("all,", "write '' as LOGICAL=AXIS"),
    ("all,embed=fdsp", "embed maps to 'fdsp', which is no mesh axis; did you mean fsdp"),
    ("all,embed=fsdp+", "embed maps to '', which is no mesh axis; known: data, stage"),
    ("all,embed=fsdp+fsdp", "embed maps to mesh axis fsdp twice"),
    ("all,embed=fsdp,embed=", "embed is changed twice"),
  ],
)
def test_wrong_text_is_refused_with_the_nearest_names(text, message):
  with pytest.raises(ValueError, match=message):
    parse_rules(text)


@pytest.mark.xdist_group("devices")
def test_shardings_place_a_tree_on_devices():
  mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
  params = {
    "block": {"up": jnp.ones((8, 4)), "scale": jnp.ones(8)},
    "experts": {"up": jnp.ones((2, 8, 4))},
    "step": jnp.zeros(()),
  }
  axes = {
    "block": {"up": ("embed", "mlp"), "scale": ("norm",)},
    "experts": {"up": ("expert", "expert_embed", "expert_mlp")},
    "step": (),
  }
  shapes = jax.eval_shape(lambda tree: tree, params)
  placed = jax.device_put(params, shardings(axes, shapes, PRESETS["all"], mesh))
  assert placed["block"]["up"].sharding == NamedSharding(mesh, P(("fsdp", "expert"), "tensor"))
  local = jax.tree.map(lambda x: x.addressable_shards[0].data.shape, placed)
  assert local == {
    "block": {"up": (2, 2), "scale": (8,)},
    "experts": {"up": (1, 4, 2)},
    "step": (),
  }


def test_errors_in_a_tree_name_the_leaf():
  tree = {"layers": [{"wk": jax.ShapeDtypeStruct((32, 1, 8), jnp.float32)}]}
  axes = {"layers": [{"wk": ("embed", "kv_heads", "head_dim")}]}
  with pytest.raises(ValueError, match="layers/0/wk of shape"):
    shardings(axes, tree, PRESETS["all"], make_mesh({"tensor": 2}))
