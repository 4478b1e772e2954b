"""What a folder says of its tokenizer: as transformers saves it, and as older folders have it."""

import json

import pytest
import tokenizers

from experiments.config import ConfigError
from experiments.data.tokenizer import load_tokenizer
from experiments.weights.source import Source
from experiments.weights.special import chat_template, special_tokens, stops

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
  assert theirs("a").input_ids[0] == 1 == load_tokenizer(str(tmp_path)).bos
  assert chat_template(found) == TEMPLATE
  assert special_tokens(found) == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("adds", [None, False, True])
def test_the_token_that_begins_a_text(tmp_path, own, adds):
  """As the file's own template has it, in one of several steps (Llama 3), as in transformers;
  unless a tokenizer_config.json says otherwise, which transformers 4 heeded for such models
  (DeepSeek-V3) and 5 no longer does."""
  transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")
  vocab = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "a"])}
  made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>"))
  made.add_special_tokens(["<unk>", "<s>", "</s>"])
  template = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
  byte_level = tokenizers.processors.ByteLevel()
  made.post_processor = (
    tokenizers.processors.Sequence([byte_level, template]) if own else byte_level
  )
  made.save(str(tmp_path / "tokenizer.json"))
  said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": {"content": "<s>"}}
  said |= {} if adds is None else {"add_bos_token": adds}
  write(tmp_path, config={}, tokenizer_config=said | {"bos_token": "<s>", "eos_token": "</s>"})
  ours = load_tokenizer(str(tmp_path))
  if adds in (None, own):
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)("aa").input_ids
    assert theirs == ([] if ours.bos is None else [ours.bos]) + ours.encode("aa").tolist()
  assert (ours.bos == 1) == (own if adds is None else adds)
  write(tmp_path, config={}, tokenizer_config=said)  # a token as an object, as older files have it
  assert load_tokenizer(str(tmp_path)).bos == ours.bos
  (tmp_path / "tokenizer_config.json").write_text("[1]")
  with pytest.raises(ConfigError, match=r"tokenizer_config\.json can't be read"):
    load_tokenizer(str(tmp_path))


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
