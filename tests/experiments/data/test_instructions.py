"""Examples as rows: the templates, what counts in the loss, packing, bad lines."""

import gzip
import importlib.util
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from experiments.config import ConfigError, DataConfig
from experiments.data.instructions import pack, prompt_of, read_examples
from experiments.data.load import load
from experiments.data.loader import make_loader
from experiments.data.tokenizer import load_tokenizer
from experiments.inference.template import ChatTemplate
from experiments.training.state import TrainState
from experiments.training.step import make_train_step
from layers.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, RotarySpec, Segment
from layers.transformer import TransformerLM
from tests.experiments.programs import random_params

DOCS = Path(__file__).parents[3] / "docs" / "finetuning"
END = 256  # the byte tokenizer's
# As the authors' repository prints them.
PLAIN = (
  "Below is an instruction that describes a task. Write a response that appropriately completes "
  "the request.\n\n### Instruction:\nName a colour.\n\n### Response:"
)
WITH_INPUT = (
  "Below is an instruction that describes a task, paired with an input that provides further "
  "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
  "Add {input}.\n\n### Input:\n1 and {instruction}\n\n### Response:"
)
EXAMPLES = [
  {"prompt": "ab", "response": "xyz"},  # five predictions, of which four count
  {"prompt": "Q", "response": ""},  # only the end
  {"prompt": "longer prompt", "response": "y"},
  {"prompt": "p" * 40, "response": "never"},  # leaves no room in a row of 20
  {"prompt": "word", "response": "r" * 30},  # is cut
]


def write(path, records):
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return str(path)


def config(path, **more):
  fields = {"row_length": 20, "batch_size": 1, "holdout_path": path, **more}
  return DataConfig(source="instructions", path=path, **fields)


def test_the_two_templates():
  assert prompt_of("Name a colour.") == PLAIN
  assert prompt_of("Add {input}.", "1 and {instruction}") == WITH_INPUT


def test_examples_of_each_form(tmp_path):
  records = [{"instruction": "Name a colour.", "input": "", "output": "Red"}, EXAMPLES[0]]
  found = [(PLAIN, "Red"), ("ab", "xyz")]
  assert list(read_examples(write(tmp_path / "a.jsonl", records))) == found
  (tmp_path / "b.json").write_text(json.dumps(records, indent=1))
  assert list(read_examples(str(tmp_path / "b.json"))) == found
  with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
    file.write((tmp_path / "a.jsonl").read_text())
  assert list(read_examples(str(tmp_path / "c.jsonl.gz"))) == found


def test_what_counts_in_the_loss(tmp_path):
  path = write(tmp_path / "a.jsonl", EXAMPLES[:2])
  row = load(config(path), 257).train[0]
  a, b, x, y, z, q = (ord(c) for c in "abxyzQ")
  assert row["tokens"].tolist() == [a, b, x, y, z, q] + [0] * 14
  assert row["targets"].tolist() == [b, x, y, z, END, END] + [0] * 14
  assert row["weights"].tolist() == [0, 1, 1, 1, 1, 1] + [0] * 14
  assert row["segments"].tolist() == [1] * 5 + [2] + [0] * 14
  assert row["positions"].tolist() == [0, 1, 2, 3, 4, 0] + [0] * 14


def test_long_examples_are_cut_or_left_out_and_counted(tmp_path):
  dataset = load(config(write(tmp_path / "a.jsonl", EXAMPLES), packing=False), 257)
  assert len(dataset.train) == 4
  cut = dataset.train[3]
  assert (
    cut["targets"][3:].tolist() == [ord("r")] * 17 and cut["weights"].tolist() == [0] * 3 + [1] * 17
  )
  assert "4 to train on, 1.0 a row (50% filled), 4 held out" in dataset.note  # 5 + 1 + 14 + 20
  assert "2 cut at 20 tokens; 2 left out" in dataset.note  # of both files


@pytest.mark.parametrize("seed", range(3))
def test_packing_loses_nothing_and_wastes_little(seed):
  lengths = np.random.default_rng(seed).integers(1, 101, 300).tolist()
  rows = pack(lengths, 100)
  assert sorted(itertools.chain(*rows)) == list(range(300))
  sizes = [sum(lengths[i] for i in row) for row in rows]
  assert max(sizes) <= 100
  # At most 11/9 of the best, which is no less than all that is to be placed (D. S. Johnson, 1973).
  assert len(rows) <= 11 / 9 * max(np.ceil(sum(lengths) / 100), sum(n > 50 for n in lengths)) + 4
  assert pack(lengths, 100) == rows


LAYER = LayerSpec(AttentionSpec(2, 8, position=RotarySpec()), MlpSpec(24))
SPEC = ModelSpec(
  vocab_size=257, embed_dim=16, max_length=32, segments=(Segment((LAYER,), 2),)
)  # fmt: skip


def test_a_packed_row_is_its_examples_alone(tmp_path):
  """Loss and gradients, through the training step; the oracle is the logits of single examples."""
  words = [("ab", "1234567"), ("abcdef", "123"), ("abcd", "12345")]  # nine predictions each
  path = write(tmp_path / "a.jsonl", [{"prompt": p, "response": r} for p, r in words])
  packed = load(config(path, row_length=30), 257).train
  assert len(packed) == 1 and packed[0]["segments"].max() == 3
  model = TransformerLM(SPEC)
  params = random_params(model, 0.2)
  ids = np.array([[*prompt.encode(), *response.encode(), END] for prompt, response in words])
  is_answer = np.arange(1, 10) >= np.array([[len(prompt)] for prompt, _ in words])

  def alone(params):
    log_p = jax.nn.log_softmax(model.apply({"params": params}, ids[:, :-1]).logits_BTV)
    each = -jnp.take_along_axis(log_p, ids[:, 1:, None], axis=2)[..., 0]
    return jnp.sum(each * is_answer) / (8 + 4 + 6)  # answers and ends

  loss, gradients = jax.jit(jax.value_and_grad(alone))(params)

  class Keep:
    """An optimizer whose state is the gradient."""

    init = staticmethod(lambda params: params)
    update = staticmethod(lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads))

  batch = {name: jnp.asarray(x)[None] for name, x in packed[0].items()}
  state = TrainState(jnp.int32(0), params, params)
  after, metrics = jax.jit(make_train_step(model, Keep(), seed=0))(state, batch)
  np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(after.opt_state), jax.tree.leaves(gradients), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


TALK = [
  {"role": "user", "content": "Name a colour."},
  {"role": "assistant", "content": " Red."},
  {"role": "user", "content": "Another."},
]


def beginning(folder, kind):
  """A tokenizer that begins texts by a token, or does not, as `transformers` saves it."""
  transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")
  words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
  if kind.startswith("LLaMA"):  # a blank goes before a text; in newer ones not behind <s>
    words += ["▁", *(chr(i) for i in range(33, 127)), "▁B", "▁Re", "▁R"]
    vocab, pairs = {word: i for i, word in enumerate(words)}, [("▁", "B"), ("▁", "R"), ("▁R", "e")]
    made = transformers.LlamaTokenizer(
      vocab=vocab, merges=pairs, add_bos_token=kind != "LLaMA without", legacy=kind == "LLaMA 1"
    )
  else:
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    letters = ["<s>", "</s>", *sorted(byte_level.alphabet())]
    model = tokenizers.models.BPE({word: i for i, word in enumerate(letters)}, [])
    whole = tokenizers.Tokenizer(model)
    whole.add_special_tokens(["<s>", "</s>"])
    whole.pre_tokenizer = byte_level(add_prefix_space=False)
    whole.post_processor = tokenizers.processors.TemplateProcessing(
      single="<s> $A", special_tokens=[("<s>", 0)]
    )
    made = transformers.PreTrainedTokenizerFast(
      tokenizer_object=whole, bos_token="<s>", eos_token="</s>"
    )
  made.save_pretrained(folder)
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
  )
  return theirs, load_tokenizer(str(folder))


@pytest.mark.parametrize("kind", ["LLaMA 1", "LLaMA", "LLaMA without", "Llama 3"])
def test_examples_begin_as_texts_do(tmp_path, kind):
  """Each in its row, and what is asked by the chat template, have the ids of transformers."""
  theirs, ours = beginning(tmp_path, kind)
  assert (ours.bos is None) == (kind == "LLaMA without")
  records = [{"instruction": "Name a colour.", "output": "Red"}, {"prompt": "Be", "response": "Re"}]
  path = write(tmp_path / "a.jsonl", [records[0], *records])
  dataset = load(config(path, row_length=512), len(theirs), ours)
  row, ids, first = dataset.train[0], [], []
  for prompt, response in ((PLAIN, "Red"), (PLAIN, "Red"), ("Be", "Re")):
    asked = theirs(prompt).input_ids
    answer = theirs(response, add_special_tokens=False).input_ids
    first.append(len(ids))
    ids += [*asked, *answer, theirs.eos_token_id]
    ids[-1:] = []  # the end is only foretold
    assert row["targets"][len(ids) - 1] == theirs.eos_token_id
    scored = row["weights"][first[-1] : len(ids)]
    assert scored.tolist() == [0] * (len(asked) - 1) + [1] * (len(answer) + 1)
  assert row["tokens"][: len(ids)].tolist() == ids and not row["segments"][len(ids) :].any()
  assert [row["positions"][i] for i in first] == [0, 0, 0]
  pytest.importorskip("jinja2", reason="needs the extra chat")
  found = ChatTemplate(dataset.template, {}).encode(TALK[:1], ours)
  assert found == theirs(PLAIN).input_ids
  rendered = theirs.apply_chat_template(
    TALK[:1], chat_template=dataset.template, add_generation_prompt=True
  )
  assert rendered["input_ids"] == found


def test_asking_again(tmp_path):
  """Later turns stand below the same preamble; a system prompt has no place."""
  pytest.importorskip("jinja2", reason="needs the extra chat")
  records = [{"instruction": "Name a colour.", "output": "Red"}, EXAMPLES[0]]
  path = write(tmp_path / "a.jsonl", [records[0], *records])
  template = ChatTemplate(load(config(path, row_length=400), 257).template, {})
  again = f"{PLAIN} Red.\n\n### Instruction:\nAnother.\n\n### Response:"
  assert template.render(TALK) == again
  assert template.render(TALK[:2], answer=False) == f"{PLAIN} Red."
  assert bytes(template.encode(TALK, load_tokenizer("byte"))).decode() == again
  with pytest.raises(ConfigError, match="no place for a system prompt"):
    template.render([{"role": "system", "content": "x"}, *TALK])
  # Where most examples are taken as they are there is no one way to ask.
  path = write(tmp_path / "b.jsonl", [records[0], EXAMPLES[0], EXAMPLES[0]])
  assert load(config(path, row_length=400), 257).template == ""


@pytest.mark.parametrize(
  ("line", "says"),
  [
    ('{"instruction": "a"', "line 2 is not JSON: Expecting ',' delimiter at column 20"),
    ('["a"]', "line 2 is no object, but list"),
    ('{"instruction": "a", "output": 3}', "line 2 has no text in field 'output'"),
    ('{"instruction": "a", "input": null, "output": "b"}', "line 2 has no text in field 'input'"),
    ('{"text": "a"}', "line 2 has no text in field 'prompt' (it has text): an example has"),
    ('{"instruction": " ", "output": "b"}', "line 2 has an empty instruction"),
    ('{"prompt": "\\ud800", "response": "b"}', "line 2 holds a lone surrogate"),
  ],
)
def test_bad_lines_are_named_or_skipped(tmp_path, line, says):
  good = json.dumps(EXAMPLES[0])
  (tmp_path / "a.jsonl").write_text(f"{good}\n{line}\n\n{good}\n")
  path = str(tmp_path / "a.jsonl")
  with pytest.raises(ConfigError) as error:
    load(config(path), 257)
  assert says in str(error.value) and "\n" not in str(error.value)
  dataset = load(config(path, on_error="skip"), 257)
  assert len(dataset.skipped) == 2 and says in dataset.skipped[0]  # in both readings
  assert "2 to train on" in dataset.note


def test_nothing_to_learn(tmp_path):
  with pytest.raises(ConfigError, match=r"data\.source=instructions needs data\.path"):
    load(config(""), 257)
  (tmp_path / "a.jsonl").write_text("\n")
  with pytest.raises(ConfigError, match="is empty: there is no example"):
    load(config(str(tmp_path / "a.jsonl")), 257)
  path = write(tmp_path / "b.jsonl", EXAMPLES[3:4])
  with pytest.raises(ConfigError, match="leaves no example to train on"):
    load(config(path), 257)


def test_a_share_is_held_out(tmp_path):
  records = [{"prompt": f"{i:02}", "response": "!"} for i in range(40)]
  path = write(tmp_path / "a.jsonl", records)
  options = {"holdout_path": "", "holdout": 0.25, "packing": False}
  dataset = load(config(path, **options), 257)
  names = lambda rows: {bytes(rows[i]["tokens"][:2].tolist()) for i in range(len(rows))}
  train, heldout = names(dataset.train), names(dataset.heldout)
  assert (len(train), len(heldout)) == (30, 10)
  assert train | heldout == {f"{i:02}".encode() for i in range(40)}
  assert heldout != {f"{i:02}".encode() for i in range(30, 40)}  # not only the last
  again = load(config(path, **options), 257)
  assert names(again.heldout) == heldout and again.fingerprint == dataset.fingerprint
  other = load(config(path, **options | {"seed": 1}), 257)
  assert names(other.heldout) != heldout


def test_reading_goes_on_where_it_was(tmp_path):
  records = [{"prompt": f"{i:03}", "response": "a" * (i % 5)} for i in range(50)]
  settings = config(write(tmp_path / "a.jsonl", records), batch_size=4)
  dataset = load(settings, 257)
  whole, part = (make_loader(dataset, settings, "train") for _ in range(2))
  for _ in range(3):
    next(whole), next(part)
  again = make_loader(load(settings, 257), settings, "train")
  again.restore(part.state())
  for _ in range(5):
    a, b = next(whole), next(again)
    assert all(np.array_equal(a[name], b[name]) for name in a)
  for loader in (whole, part, again):
    loader.close()
  packed_otherwise = config(settings.path, batch_size=4, packing=False)
  loader = make_loader(load(packed_otherwise, 257), packed_otherwise, "train")
  with pytest.raises(ConfigError, match="packing was True and is False"):
    loader.restore(part.state())
  loader.close()


def test_the_set_in_docs():
  """It is what its script writes; what is held out is asked in other words, about other things."""
  read = lambda name: [json.loads(line) for line in (DOCS / name).read_text().splitlines()]
  train, heldout = read("train.jsonl"), read("heldout.jsonl")
  assert len(train) == 360 and len(heldout) == 60
  spec = importlib.util.spec_from_file_location("examples", DOCS / "examples.py")
  script = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(script)
  made = [json.dumps(example) for _, example in script.examples()]
  assert sorted(made) == sorted(map(json.dumps, train + heldout))
  key = lambda example: (example["instruction"], example.get("input"))
  assert len({key(example) for example in train + heldout}) == 420
  about = lambda examples: {json.loads(e["output"])["about"] for e in examples}
  assert about(train) == about(heldout) and len(about(train)) == 10
  assert not {e["instruction"] for e in train} & {e["instruction"] for e in heldout}
  given = lambda examples: {
    (e["input"], json.loads(e["output"])["about"]) for e in examples if "input" in e
  }
  assert not given(train) & given(heldout)
