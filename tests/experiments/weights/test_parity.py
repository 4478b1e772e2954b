"""Models that `transformers` drew and saved: the same logits here, and gradients."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from experiments.training.state import param_layout
from experiments.weights import hub
from experiments.weights.express import essence, express
from experiments.weights.load import by_path, load
from experiments.weights.open import open_weights
from experiments.weights.source import open_source
from experiments.weights.table import pieces, their_shape, to_ours, to_theirs
from layers.count import count_params
from layers.transformer import TransformerLM, init_caches

WHY = "needs the extra `parity`: pip install 'meshyard[parity]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
pytestmark = [
  pytest.mark.filterwarnings("ignore"),  # of theirs
  pytest.mark.xdist_group("parity"),  # each pair is made once
]

V, T = 97, 64
LLAMA = {
  "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
  "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": T,
}  # fmt: skip
OPT = {
  "vocab_size": V, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2,
  "num_attention_heads": 4, "max_position_embeddings": T,
}  # fmt: skip
ROPE = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA_31 = ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
GPT = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": T}
NEO = {
  "vocab_size": V, "hidden_size": 32, "num_layers": 4, "num_heads": 4, "window_size": 5,
  "attention_types": [[["global", "local"], 2]], "max_position_embeddings": T,
}  # fmt: skip
QWEN_MOE = {
  "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True,
  "head_dim": 16,
}  # fmt: skip
GPT_OSS = {
  "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 5,
  "rope_parameters": ROPE | {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0,
                             "truncate": False},
}  # fmt: skip
DEEPSEEK = {
  "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24,
  "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 12,
  "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
  "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2,
  "first_k_dense_replace": 1, "n_shared_experts": 2, "max_position_embeddings": T,
  "rope_parameters": ROPE | {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip
# The class of the config, and its arguments.
MODELS = {
  "llama": ("Llama", LLAMA),
  "llama 3.1": ("Llama", LLAMA | {"tie_word_embeddings": True, "rope_parameters": LLAMA_31}),
  "llama, linear": ("Llama", LLAMA | {"rope_parameters": LINEAR}),
  "llama, yarn": ("Llama", LLAMA | {"rope_parameters": ROPE | {"rope_type": "yarn"}}),
  "llama, biases": ("Llama", LLAMA | {"attention_bias": True}),
  "mistral": ("Mistral", LLAMA | {"sliding_window": 5}),
  "qwen3": ("Qwen3", LLAMA | {"head_dim": 16}),
  "gpt2": ("GPT2", GPT),
  "opt": ("OPT", OPT | {"word_embed_proj_dim": 32}),
  "opt 350m": ("OPT", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
  "gpt_neo": ("GPTNeo", NEO),
  "gpt_j": ("GPTJ", GPT | {"rotary_dim": 4}),
  "mixtral": ("Mixtral", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
  "qwen3_moe": ("Qwen3Moe", LLAMA | QWEN_MOE),
  "qwen3_moe, some dense": ("Qwen3Moe", LLAMA | QWEN_MOE | {
    "num_hidden_layers": 4, "decoder_sparse_step": 2, "norm_topk_prob": False}),
  "gemma2": ("Gemma2", LLAMA | {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 16}),
  "gemma3": ("Gemma3Text", LLAMA | {
    "num_hidden_layers": 8, "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 16}),
  "gpt_oss": ("GptOss", LLAMA | GPT_OSS),
  "deepseek_v3": ("DeepseekV3", DEEPSEEK),
  "bloom": ("Bloom", {"vocab_size": V, "hidden_size": 48, "n_layer": 2, "n_head": 6}),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
  """(their model, ours, our parameters, folder)."""
  kind, arguments = MODELS[request.param]
  torch.manual_seed(0)
  theirs = transformers.AutoModelForCausalLM.from_config(
    getattr(transformers, f"{kind}Config")(**arguments), attn_implementation="eager"
  )
  with torch.no_grad():  # as drawn, biases are 0 and norms 1, which would hide them
    for p in theirs.parameters():
      p.add_(torch.randn_like(p) * (0.2 if p.ndim > 1 else 0.1))
  folder = tmp_path_factory.mktemp("model")
  theirs.eval().save_pretrained(folder)
  model, params = read(folder)
  return theirs, model, params, folder


def read(folder, reads=None):
  """Our model and its parameters; names of tensors go to `reads` as they are read."""
  with contextlib.ExitStack() as stack:
    opened = open_weights(folder, stack)
    model = TransformerLM(opened.spec)
    mesh = Mesh(jax.devices()[:1], "x")
    place = NamedSharding(mesh, PartitionSpec())
    give = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place)
    abstract = jax.tree.map(give, param_layout(model).shapes)
    source = opened.source
    if reads is not None:
      told = lambda name, x: x._replace(read=lambda: reads.append(name) or x.read())
      source = source._replace(tensors={k: told(k, x) for k, x in source.tensors.items()})
    return model, load(source, opened.table, opened.spec, abstract)


def close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# Without ids 0 to 2: a padding token gets no gradient from where it is read.
TOKENS = np.random.default_rng(0).integers(3, V, (2, 13)).astype(np.int32)


def test_logits(pair):
  theirs, model, params, _ = pair
  with torch.no_grad():
    expected = theirs(torch.tensor(TOKENS).long()).logits.numpy()
  close(np.asarray(model.apply({"params": params}, TOKENS).logits_BTV), expected)


def test_parameters_are_as_many(pair):
  theirs, model, _, _ = pair
  assert count_params(model.spec).total == sum(p.numel() for p in theirs.parameters())


def test_token_by_token(pair):
  theirs, model, params, _ = pair
  with torch.no_grad():
    expected = theirs(torch.tensor(TOKENS).long()).logits.numpy()
  caches = init_caches(model.spec, 2, 16, jnp.float32)
  step = jax.jit(lambda caches, token, at: model.apply(
    {"params": params}, token, positions_BT=at, caches=caches))  # fmt: skip
  for t in range(TOKENS.shape[1]):
    out = step(caches, TOKENS[:, t : t + 1], np.full((2, 1), t, np.int32))
    caches = out.caches
    close(np.asarray(out.logits_BTV)[:, 0], expected[:, t])


def test_padding(pair):
  """Theirs on the left, ours on the right: the real tokens have the same logits."""
  theirs, model, params, _ = pair
  real = [TOKENS[0, :13], TOKENS[1, :8]]
  left, mask = np.zeros((2, 13), np.int64), np.zeros((2, 13), np.int64)
  right, segments = np.zeros((2, 13), np.int32), np.zeros((2, 13), np.int32)
  for row, tokens in enumerate(real):
    left[row, 13 - len(tokens) :], mask[row, 13 - len(tokens) :] = tokens, 1
    right[row, : len(tokens)], segments[row, : len(tokens)] = tokens, 1
  positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
  options = {} if theirs.config.model_type in ("bloom", "opt") else {
    "position_ids": torch.tensor(positions)}  # fmt: skip
  with torch.no_grad():
    expected = theirs(torch.tensor(left), attention_mask=torch.tensor(mask), **options)
  found = model.apply({"params": params}, right, segments_BT=segments)
  for row, tokens in enumerate(real):
    n = len(tokens)
    close(np.asarray(found.logits_BTV)[row, :n], expected.logits.numpy()[row, 13 - n :])


@pytest.mark.parametrize("pair", ["llama", "gpt2", "opt 350m", "bloom"], indirect=True)
def test_gradients_of_the_loss(pair):
  """With respect to the table of tokens, in which all others show."""
  theirs, model, params, _ = pair
  tokens = torch.tensor(TOKENS).long()
  theirs.zero_grad()
  theirs(tokens, labels=tokens).loss.backward()

  def loss(params):
    log_p = jax.nn.log_softmax(model.apply({"params": params}, TOKENS).logits_BTV[:, :-1])
    return -jnp.take_along_axis(log_p, TOKENS[:, 1:, None], -1).mean()

  found = jax.grad(loss)(params)["embedding"]["table"]
  close(np.asarray(found), theirs.get_input_embeddings().weight.grad.numpy())


def test_a_table_is_as_its_inverse(pair):
  """What is read is written back as it was, to the bit."""
  _, _, params, folder = pair
  with contextlib.ExitStack() as stack:
    opened = open_weights(folder, stack)
    named = {
      jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
      for path, leaf in jax.tree.leaves_with_path(params)
    }
    shapes = {name: leaf.shape for name, leaf in named.items()}
    parts: dict = {}
    for piece in pieces(opened.table, opened.spec, shapes, opened.source.tensors):
      value = named[piece.leaf][piece.at]
      parts.setdefault(piece.name, (piece.rule, {}))[1][piece.part] = value
    source = open_source(folder, stack)
    for name, (rule, values) in parts.items():
      whole = source.tensors[name].read()
      ours = [values[i] for i in range(len(rule.ours))]
      np.testing.assert_array_equal(to_theirs(rule, ours), whole)
      own = [value.shape for value in ours]
      assert their_shape(rule, own) == whole.shape
      for i, value in enumerate(ours):
        np.testing.assert_array_equal(to_ours(rule, i, whole, own), value)


def test_written_and_read_by_theirs(pair, tmp_path):
  """The same tensors to the bit, none missing or left over, and the same logits."""
  theirs, model, params, _ = pair
  expressed = express(model.spec)
  assert expressed.kind == theirs.config.model_type
  hub.write(
    tmp_path, expressed, model.spec, by_path(params), ids=hub.Ids(), files={}, dtype="float32",
    largest=40_000, progress=lambda done, count: None,
  )  # fmt: skip
  again, told = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, output_loading_info=True, attn_implementation="eager"
  )
  assert not any(told.values()), told
  tensors, expected = again.state_dict(), theirs.state_dict()
  assert tensors.keys() == expected.keys()
  for name, tensor in expected.items():
    np.testing.assert_array_equal(tensors[name].numpy(), tensor.numpy(), name)
  with torch.no_grad():
    close(*(m(torch.tensor(TOKENS).long()).logits.numpy() for m in (again, theirs)))
  with contextlib.ExitStack() as stack:
    assert essence(open_weights(tmp_path, stack).spec) == essence(model.spec)


@pytest.mark.parametrize("pair", ["mixtral", "qwen3_moe", "deepseek_v3"], indirect=True)
def test_names_as_transformers_5_has_them_in_memory(pair, tmp_path):
  """All experts of a layer in one tensor, where files have one each; each tensor is read once."""
  theirs, _, params, folder = pair
  tensors = {name: x.contiguous().numpy() for name, x in theirs.state_dict().items()}
  assert any(name.endswith("mlp.experts.gate_up_proj") for name in tensors)
  save_file(tensors, tmp_path / "model.safetensors")
  (tmp_path / "config.json").symlink_to(folder / "config.json")
  reads = []
  _, found = read(tmp_path, reads)
  jax.tree.map(np.testing.assert_array_equal, found, params)
  assert sorted(reads) == sorted(tensors)


def test_a_config_of_older_words(tmp_path, pair):
  """`rope_theta` and `rope_scaling` outside of `rope_parameters`, as before transformers 5."""
  _, model, _, folder = pair
  config = json.loads((folder / "config.json").read_text())
  said = config.pop("rope_parameters", None)
  if said is None:
    return
  if "full_attention" in said:  # Gemma 3
    config["rope_local_base_freq"] = said["sliding_attention"]["rope_theta"]
    said = dict(said["full_attention"])
  config["rope_theta"] = said.pop("rope_theta", 1e4)
  kind = said.pop("rope_type", "default")
  config["rope_scaling"] = None if kind == "default" else said | {"type": kind}
  (tmp_path / "config.json").write_text(json.dumps(config))
  (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
  with contextlib.ExitStack() as stack:
    assert open_weights(tmp_path, stack).spec == model.spec
