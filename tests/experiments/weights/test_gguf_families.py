"""GGUF of each architecture that llama.cpp has: models that transformers drew, the same logits."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from experiments.config import ConfigError
from experiments.training.state import param_layout
from experiments.weights.families import gemma
from experiments.weights.gguf import open_gguf
from experiments.weights.load import check
from experiments.weights.open import open_weights
from experiments.weights.table import pieces, to_ours
from layers.positions import rotary_table
from layers.transformer import TransformerLM

WHY = "needs the extra `parity`: pip install 'meshyard[parity]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
gguf = pytest.importorskip("gguf", reason=WHY)
to_gguf = pytest.importorskip("tests.experiments.weights.to_gguf")
pytestmark = pytest.mark.filterwarnings("ignore")  # of theirs

V, T = 97, 64
BASE = {
  "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
  "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": T,
}  # fmt: skip
ROPE = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA_3 = ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = ROPE | {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0}
MODELS = {
  "llama": ("Llama", BASE | {"attention_bias": True, "rope_parameters": LLAMA_3}),
  "mixtral": ("Mixtral", BASE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
  "qwen3": ("Qwen3", BASE | {"head_dim": 16, "rope_parameters": YARN}),
  "qwen3moe": ("Qwen3Moe", BASE | {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16,
    "norm_topk_prob": True}),
  "gemma2": ("Gemma2", BASE | {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}),
  "gemma3": ("Gemma3Text", BASE | {
    "num_hidden_layers": 6, "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}),
  "gpt-oss": ("GptOss", BASE | {
    "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 5,
    "router_aux_loss_coef": 0.9, "rope_parameters": YARN | {"truncate": False}}),
  "deepseek2": ("DeepseekV3", BASE | {
    "num_key_value_heads": 4, "moe_intermediate_size": 24, "q_lora_rank": 12, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12, "n_routed_experts": 8,
    "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "n_shared_experts": 2, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
  "gpt2": ("GPT2", {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": T}),
  "bloom": ("Bloom", {"vocab_size": V, "hidden_size": 48, "n_layer": 2, "n_head": 6,
                      "seq_length": T}),
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(3, V, (2, 13)).astype(np.int32)


def save(folder, kind, arguments):
  torch.manual_seed(0)
  theirs = transformers.AutoModelForCausalLM.from_config(
    getattr(transformers, f"{kind}Config")(**arguments), attn_implementation="eager"
  )
  with torch.no_grad():  # as drawn, biases are 0 and norms 1, which would hide them
    for p in theirs.parameters():
      p.add_(torch.randn_like(p) * (0.2 if p.ndim > 1 else 0.1))
  theirs.eval().save_pretrained(folder)
  return theirs


def opened(path):
  with contextlib.ExitStack() as stack:
    return open_weights(path, stack)


def parameters(found):
  """As numpy arrays by path, without a device."""
  shapes = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree.leaves_with_path(param_layout(TransformerLM(found.spec)).shapes)
  }
  plan = list(pieces(found.table, found.spec, {k: s.shape for k, s in shapes.items()},
                     found.source.tensors))  # fmt: skip
  check(found.source, found.table, shapes, plan)
  made = {name: np.full(s.shape, np.nan, np.float32) for name, s in shapes.items()}
  for piece in plan:
    tensor = found.source.tensors[piece.name].read()
    made[piece.leaf][piece.at] = to_ours(piece.rule, piece.part, tensor, piece.shapes(shapes))
  return made


def the_same(found, expected):
  assert found.keys() == expected.keys()
  for name, value in found.items():
    # A norm's weight plus 1, less 1, as Gemma's: rounded once.
    np.testing.assert_allclose(value, expected[name], rtol=0, atol=2.0**-23, err_msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_as_the_folder_that_it_was_made_of(name, tmp_path):
  """The same model and parameters, whose logits `test_parity` compares with transformers'."""
  save(tmp_path, *MODELS[name])
  to_gguf.convert(tmp_path, tmp_path / "model.gguf")
  found, folder = opened(tmp_path / "model.gguf"), opened(tmp_path)
  assert found.source.gguf["general.architecture"] == {"mixtral": "llama"}.get(name, name)
  assert found.spec == folder.spec
  the_same(parameters(found), parameters(folder))


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_logits(name, tmp_path):
  theirs = save(tmp_path, *MODELS[name])
  to_gguf.convert(tmp_path, tmp_path / "model.gguf")
  found = opened(tmp_path / "model.gguf")
  with torch.no_grad():
    expected = theirs(torch.tensor(TOKENS).long()).logits.numpy()
  params = nested(parameters(found))
  logits = TransformerLM(found.spec).apply({"params": params}, TOKENS).logits_BTV
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# Those that transformers 5 reads from GGUF itself, as llama.cpp writes them.
@pytest.mark.full
@pytest.mark.parametrize(
  "name", ["llama", "qwen3", "qwen3moe", "gemma2", "gemma3", "gpt2", "bloom"]
)
def test_transformers_reads_the_file_that_the_test_wrote(name, tmp_path):
  theirs = save(tmp_path, *MODELS[name])
  to_gguf.convert(tmp_path, tmp_path / "model.gguf")
  load = transformers.AutoModelForCausalLM.from_pretrained
  again = load(tmp_path, gguf_file="model.gguf", attn_implementation="eager", dtype="float32")
  with torch.no_grad():
    expected, found = (m(torch.tensor(TOKENS).long()).logits.numpy() for m in (theirs, again))
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def nested(flat):
  made: dict = {}
  for path, value in flat.items():
    *outer, last = path.split("/")
    at = made
    for part in outer:
      at = at.setdefault(part, {})
    at[last] = value
  return made


@pytest.mark.parametrize("name", ["mixtral", "deepseek2"])
def test_older_files(name, tmp_path):
  """Experts one by one, keys and values in one matrix."""
  save(tmp_path, *MODELS[name])
  to_gguf.convert(tmp_path, tmp_path / "model.gguf", old_experts=True, old_latent=True)
  found, folder = opened(tmp_path / "model.gguf"), opened(tmp_path)
  assert found.spec == folder.spec
  the_same(parameters(found), parameters(folder))


def metadata_only(folder, arch, **values):
  """A file of one small layer's metadata, with `{arch}.`-values (underscores for dots) changed."""
  path = folder / "x.gguf"
  writer = gguf.GGUFWriter(path, arch)
  said = {"context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 48,
          "attention.head_count": 4, "rope.freq_base": 10_000.0} | values  # fmt: skip
  for name, value in said.items():
    if isinstance(value, str):
      writer.add_string(f"{arch}.{name}", value)
    elif isinstance(value, float):
      writer.add_float32(f"{arch}.{name}", value)
    elif isinstance(value, list):
      writer.add_array(f"{arch}.{name}", value)
    elif isinstance(value, np.ndarray):
      writer.add_tensor(name, value)
    else:
      writer.add_uint32(f"{arch}.{name}", value)
  writer.add_tensor("token_embd.weight", np.zeros((128, 32), np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def test_linear_scaling(tmp_path):
  scaled = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
  position = opened(metadata_only(tmp_path, "llama", **scaled)).spec.layers[0].attention.position
  assert position.scaling.factor == 2.0
  found, _ = rotary_table(position, 8)
  np.testing.assert_allclose(found, 1e4 ** (-np.arange(4) / 4) / 2, rtol=1e-6)


def test_yarn(tmp_path):
  scaled = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16}  # fmt: skip
  scaling = opened(metadata_only(tmp_path, "llama", **scaled)).spec.layers[0].attention.position
  assert dataclasses.astuple(scaling.scaling) == (4.0, 16, 32.0, 1.0, None, True)
  for more, words in [
    ({"rope.scaling.yarn_attn_factor": 0.5}, "YaRN with rope.scaling.yarn_attn_factor"),
    ({"rope.scaling.type": "longrope"}, "rotary positions scaled as 'longrope' are not read"),
    ({"rope.scaling.factor": float("nan")}, "rope.scaling.factor is nan"),
  ]:
    with pytest.raises(ConfigError, match=words):
      opened(metadata_only(tmp_path, "llama", **(scaled | more)))


# Of Llama 3.1 8B and 3.2 1B, made by Meta's rule; then others that make tables of their own.
@pytest.mark.parametrize(
  ("head", "theta", "said"),
  [
    (128, 5e5, (8.0, 1.0, 4.0, 8192)),
    (64, 5e5, (32.0, 1.0, 4.0, 8192)),
    (64, 1e4, (4.0, 2.0, 8.0, 4096)),
    (8, 1e4, (4.0, 1.0, 4.0, 16)),
  ],
)
def test_a_table_of_rotary_factors(head, theta, said, tmp_path):
  factor, low, high, length = said
  rope = {"rope_theta": theta, "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
          "original_max_position_embeddings": length}  # fmt: skip
  table = to_gguf.rope_table({"head_dim": head}, rope)
  path = metadata_only(
    tmp_path, "llama", **{"attention.key_length": head, "rope.dimension_count": head,
                          "rope.freq_base": theta, "rope_freqs.weight": table}
  )  # fmt: skip
  found, _ = rotary_table(opened(path).spec.layers[0].attention.position, head)
  np.testing.assert_allclose(found, theta ** (-np.arange(0, head, 2) / head) / table, rtol=2e-5)


def test_a_table_that_is_no_scaling_of_llama(tmp_path):
  table = np.array([1, 3, 2, 4], np.float32)
  with pytest.raises(ConfigError, match=r"rope_freqs.weight are not those of Llama 3.1"):
    opened(metadata_only(tmp_path, "llama", **{"rope_freqs.weight": table}))


@pytest.mark.parametrize(("arch", "layers", "width"), [("gemma2", 46, 4608), ("gemma3", 62, 5376)])
def test_the_largest_gemmas_scale_logits_otherwise(arch, layers, width, tmp_path):
  """By query_pre_attn_scalar 144 and 168, which the files lack; others by their head."""
  said = {"block_count": layers, "embedding_length": width, "attention.head_count": 32,
          "attention.key_length": 128, "attention.sliding_window": 4096}  # fmt: skip
  path = metadata_only(tmp_path, arch, **said)
  with pytest.raises(ConfigError, match="there are only 1 tensors"):
    opened(path)
  spec = gemma.spec(open_gguf(path).config)
  expected = {4608: 144, 5376: 168}[width] ** -0.5
  assert {layer.attention.scale for layer in spec.layers} == {expected}
  local = [layer.attention.window is not None for layer in spec.layers]
  period = 2 if arch == "gemma2" else 6
  assert local == [i % period != period - 1 for i in range(layers)]


def test_what_is_refused(tmp_path):
  for arch, values, words in [
    ("mamba", {}, "is of architecture 'mamba'; of GGUF are read llama, gpt2"),
    ("llama", {"attention.head_count": [4, 2]}, "is a list of unlike numbers; one whole number"),
    ("llama", {"rope.dimension_count": 4}, "4 of the 8 dimensions of a head are rotated"),
    ("llama", {"context_length": -1.0}, "llama.context_length is -1.0; one whole number"),
    ("deepseek2", {"expert_gating_func": 1}, "only DeepSeek-V3 and R1 are read"),
    ("gpt-oss", {}, "lacks gpt-oss.attention.sliding_window"),
  ]:
    with pytest.raises(ConfigError, match=words) as error:
      opened(metadata_only(tmp_path, arch, **values))
    assert "\n" not in str(error.value)


def test_a_model_in_several_files(tmp_path):
  save(tmp_path, *MODELS["llama"])
  to_gguf.convert(tmp_path, tmp_path / "model.gguf")
  whole = opened(tmp_path / "model.gguf")
  names = sorted(whole.source.tensors)
  for i, own in enumerate([names[::2], names[1::2]]):
    writer = gguf.GGUFWriter(tmp_path / f"m-{i + 1:05}-of-00002.gguf", "llama")
    writer.add_uint16("split.count", 2)
    for name, value in whole.source.gguf.items():
      if i == 0 and name.startswith("llama."):
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(name, value)
    for name in own:
      writer.add_tensor(name, np.array(whole.source.tensors[name].read()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
  parts = opened(tmp_path / "m-00002-of-00002.gguf")
  assert parts.spec == whole.spec
  the_same(parameters(parts), parameters(whole))
  (tmp_path / "m-00001-of-00002.gguf").rename(tmp_path / "first.gguf")
  with pytest.raises(ConfigError, match=r"m-00001-of-00002.gguf is missing: .* needs all 2 files"):
    opened(tmp_path / "m-00002-of-00002.gguf")
  with pytest.raises(ConfigError, match=r"one of 2 files of a model, but not named like"):
    opened(tmp_path / "first.gguf")
