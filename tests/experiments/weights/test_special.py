"""What a folder says of its tokenizer: as transformers saves it, and as older folders have it."""

import json

import pytest

from experiments.config import ConfigError
from experiments.weights.source import Source
from experiments.weights.special import bos, chat_template, special_tokens, stops

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write(folder, **files):
  for name, value in files.items():
    (folder / f"{name}.json").write_text(json.dumps(value))
  return Source(folder, {}, json.loads((folder / "config.json").read_text()))


def test_as_transformers_saves_it(tmp_path):
  transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")
  vocab = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "▁", "a", "▁a"])}
  theirs = transformers.LlamaTokenizer(vocab=vocab, merges=[("▁", "a")], add_bos_token=True)
  theirs.chat_template = TEMPLATE
  theirs.save_pretrained(tmp_path)
  found = write(tmp_path, config={"eos_token_id": 2})
  assert theirs("a").input_ids[0] == 1 and bos(found) == 1
  assert chat_template(found) == TEMPLATE
  assert special_tokens(found) == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_the_token_that_begins_a_text(tmp_path):
  first = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
  made = {
    "added_tokens": [{"id": 7, "content": "<s>"}],
    "post_processor": {"type": "Sequence", "processors": [
      {"type": "ByteLevel"}, {"type": "TemplateProcessing", "single": first}]},
  }  # fmt: skip
  assert bos(write(tmp_path, config={}, tokenizer=made)) == 7  # as in Llama 3's
  said = {"bos_token": {"content": "<s>"}}
  assert bos(write(tmp_path, config={}, tokenizer_config=said | {"add_bos_token": False})) is None
  made["post_processor"] = None
  assert bos(write(tmp_path, config={}, tokenizer=made, tokenizer_config=said)) is None
  assert bos(write(tmp_path, config={}, tokenizer_config=said | {"add_bos_token": True})) == 7


def test_the_tokens_that_end_an_answer(tmp_path):
  found = write(tmp_path, config={"eos_token_id": 2}, generation_config={"eos_token_id": [2, 9]})
  assert stops(found) == {2, 9}
  assert stops(write(tmp_path, config={"eos_token_id": None}, generation_config={})) == frozenset()


def test_where_a_template_may_be(tmp_path):
  assert chat_template(write(tmp_path, config={})) is None
  named = [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}]
  found = write(tmp_path, config={}, tokenizer_config={"chat_template": named})
  assert chat_template(found) == TEMPLATE
  write(tmp_path, config={}, tokenizer_config={"chat_template": named[:1]})
  with pytest.raises(ConfigError, match="has chat templates, but none called default"):
    chat_template(found)
  (tmp_path / "chat_template.jinja").write_text("alone")
  assert chat_template(found) == "alone"
