"""`evaluate --weights` on a text, against the loss that `transformers` computes of the same ids."""

import json

import numpy as np
import pytest
import tokenizers

from tests.experiments.programs import ONE, call

WHY = "needs the extra `parity`: pip install 'meshyard[parity]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
pytestmark = pytest.mark.filterwarnings("ignore")  # of theirs

TEXT = "The rain fell on the roofs, the rain fell on the road, and nobody spoke of the rain. " * 3
BEGIN, END = "<s>", "</s>"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """A drawn LLaMA, its tokenizer, which begins texts, and their folder with a text."""
  folder = tmp_path_factory.mktemp("weights")
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  made.train_from_iterator([TEXT], tokenizers.trainers.BpeTrainer(
    vocab_size=300, special_tokens=[BEGIN, END], initial_alphabet=letters, show_progress=False
  ))  # fmt: skip
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)]
  )
  made.save(str(folder / "tokenizer.json"))
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
  )  # fmt: skip
  theirs = transformers.LlamaForCausalLM(config).eval()
  with torch.no_grad():
    for p in theirs.parameters():
      p.add_(torch.randn_like(p) * 0.1)
  theirs.save_pretrained(folder)
  documents = [TEXT, "A second document.", "x"]
  lines = [json.dumps({"text": text}) for text in documents]
  (folder / "text.jsonl").write_text("\n".join(lines))
  return theirs, made, folder, documents


def test_loss_of_a_text(model):
  """Rows of 32 of the documents one after the other; each begins and ends with its token."""
  theirs, made, folder, documents = model
  ids, document = [], []
  for number, text in enumerate(documents):
    here = [*made.encode(text).ids, 1]
    ids, document = ids + here, document + [number] * len(here)
  assert ids[0] == 0 and ids.count(0) == 3
  total, count = 0.0, 0
  for start in range(0, len(ids) - 1, 32):
    row = list(range(start, min(start + 32, len(ids) - 1)))
    for number in sorted({document[i] for i in row}):  # documents do not see each other
      part = [i for i in row if document[i] == number]
      with torch.no_grad():
        logits = theirs(torch.tensor([[ids[i] for i in part]])).logits[0].double()
      log_p = torch.log_softmax(logits, -1)
      scored = [(k, ids[i + 1]) for k, i in enumerate(part) if document[i + 1] == number]
      total -= sum(float(log_p[k, target]) for k, target in scored)
      count += len(scored)
  result = call("evaluate", f"--weights={folder}", f"--config.data.path={folder}/text.jsonl", ONE)
  assert result.code == 0, result.err
  name, loss, bits = result.out.splitlines()
  assert f"{count:,} tokens of {folder}/text.jsonl" in name
  assert float(loss.split()[1]) == pytest.approx(total / count, abs=2e-5)
  num_bytes = sum(len(text.encode()) for text in documents)
  assert float(bits.split()[-1]) == pytest.approx(total / np.log(2) / num_bytes, abs=1e-4)


def test_part_of_a_text(model):
  _, made, folder, documents = model
  count = sum(len(made.encode(text).ids) + 1 for text in documents)
  result = call("evaluate", f"--weights={folder}", f"--config.data.path={folder}/text.jsonl", ONE,
                "--config.data.holdout=0.4", "--config.data.batch_size=1")  # fmt: skip
  assert result.code == 0, result.err
  said = int(result.out.split(" held-out tokens")[0].split(", ")[1])
  assert 0.4 * count - 4 <= said < 0.4 * count


def test_bad_input(model, tmp_path):
  folder = model[2]
  path = f"--config.data.path={folder}/text.jsonl"
  result = call("evaluate", f"--weights={folder}", ONE)
  assert result.code == 2 and "give the text to read" in result.err
  result = call("evaluate", f"--weights={folder}", f"--workdir={tmp_path}", path)
  assert result.code == 2 and "give one of them" in result.err
  result = call("run", "--config=debug", ONE, path, "--config.data.holdout=1",
                f"--workdir={tmp_path / 'run'}")  # fmt: skip
  assert result.code == 2 and "leaves no row to train on" in result.err
