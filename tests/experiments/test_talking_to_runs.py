"""Runs that start from weights of a tokenizer with a begin token and a chat template: what their
directories keep, how they are asked, and what `transformers` has of them after an export."""

import contextlib
import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers

from experiments.config import ConfigError
from experiments.data.instructions import prompt_of
from experiments.data.tokenizer import begins_with, load_tokenizer
from experiments.pretrained import Pretrained
from experiments.training.folder import read_config
from experiments.weights.open import check_tokenizer, open_weights
from experiments.weights.source import Source
from experiments.weights.special import chat_template, special_tokens, stops
from tests.experiments.programs import ONE, call
from tests.experiments.test_finetune import ADAPTED, tune
from tests.experiments.tiny_weights import TEMPLATE, make_examples, make_weights

ASKED = "Add 3 and 4, </s> and <s>."  # what a user writes is text


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  return make_weights(tmp_path_factory.mktemp("given") / "weights", begin=True)


@pytest.fixture(scope="module")
def run(weights, tmp_path_factory):
  folder = tmp_path_factory.mktemp("talking")
  given = weights, make_examples(folder / "data.jsonl")
  result = tune(given, folder / "run", *ADAPTED, "--config.train.steps=1", rate="2")
  assert result.code == 0, result.err
  assert f"generate --workdir={folder / 'run'} --chat\n" in result.out
  return folder / "run"


@pytest.fixture(scope="module")
def theirs(weights):
  transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")
  return transformers.AutoTokenizer.from_pretrained(weights)


def test_what_a_run_keeps(weights, run):
  """Of any kind its tokenizer's files, byte for byte; of one on instructions their template."""
  for name in ("tokenizer.json", "tokenizer_config.json"):
    assert (run / name).read_bytes() == (weights / name).read_bytes()
  kept, tokenizer = Source(run, {}, {}), load_tokenizer(str(run))
  assert special_tokens(kept) == {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
  assert stops(kept) == {tokenizer.eod}
  assert chat_template(kept) != TEMPLATE
  assert begins_with(read_config(run), tokenizer) == tokenizer.special["<s>"]


def test_asked_as_it_learned(run, tmp_path):
  """As a conversation, by a file of examples, and by the whole prompt."""
  pytest.importorskip("jinja2", reason="needs the extra chat")
  records = [
    {"messages": [{"role": "user", "content": ASKED}]},
    {"instruction": ASKED},
    {"prompt": prompt_of(ASKED)},
    {"instruction": ASKED, "input": "short", "output": "unread"},
  ]
  (tmp_path / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
  common = ("generate", ONE, f"--workdir={run}", "--json", "--max_tokens=3", "--temperature=0")
  result = call(*common, f"--prompts={tmp_path / 'p.jsonl'}")
  assert result.code == 0, result.err
  said = [json.loads(line) for line in result.out.splitlines()]
  # A begin token and the bytes.
  assert [one["prompt_tokens"] for one in said[:3]] == [1 + len(prompt_of(ASKED))] * 3
  assert said[0]["tokens"] == said[1]["tokens"] == said[2]["tokens"]
  assert said[3]["prompt_tokens"] == 1 + len(prompt_of(ASKED, "short"))
  refused = call(*common, "--chat", f"--prompt={ASKED}", "--system=Be brief.")
  assert refused.code == 2 and "no place for a system prompt" in refused.err


def test_exported(run, theirs, tmp_path):
  """The template goes along, and its ids are those of the prompt that was learned."""
  result = call("convert", ONE, f"--input={run}", f"--output={tmp_path / 'out'}")
  assert result.code == 0, result.err
  exported = type(theirs).from_pretrained(tmp_path / "out")
  talk = [{"role": "user", "content": "Add 3 and 4."}]
  found = exported.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
  assert found == theirs(prompt_of("Add 3 and 4.")).input_ids
  assert exported.bos_token == "<s>" and exported.eos_token == "<|endoftext|>"


def test_weights_as_a_run(weights, tmp_path):
  """Converted, they keep their own template, and say what a config of another name needs."""
  native = tmp_path / "native"
  result = call("convert", ONE, f"--input={weights}", f"--output={native}", "--format=native")
  assert result.code == 0, result.err
  assert chat_template(Source(native, {}, {})) == TEMPLATE
  tokenizer = load_tokenizer(str(native))
  assert begins_with(read_config(native), tokenizer) == tokenizer.bos == tokenizer.special["<s>"]
  result = call("run", ONE, f"--workdir={native}", "--config=alpaca", "--config.data.path=x")
  assert result.code == 2 and result.err.count("\n") == 1
  assert "begins with weights that were converted as 'weights'" in result.err
  assert "leave out --config and set" in result.err and "--weights=PATH" in result.err


def test_text_leaves_the_template_of_the_weights(weights, tmp_path):
  with Pretrained(str(weights)) as given:
    tokenizer = given.tokenizer("")
    given.keep(tmp_path, tokenizer)
  assert chat_template(Source(tmp_path, {}, {})) == TEMPLATE
  again = load_tokenizer(str(tmp_path))
  assert again.fingerprint == tokenizer.fingerprint and again.bos == tokenizer.bos


def test_ends_are_added_to_those_of_the_weights(tmp_path):
  """A chat model ends answers by one token and documents, as examples here, by another."""
  folder = make_weights(tmp_path / "weights", begin=True)
  theirs = {"eos_token_id": 7, "temperature": 0.2}
  (folder / "generation_config.json").write_text(json.dumps(theirs))
  with Pretrained(str(folder)) as given:
    given.keep(tmp_path, given.tokenizer(""))
  kept = json.loads((tmp_path / "generation_config.json").read_text())
  assert kept == {"eos_token_id": [7, 256], "temperature": 0.2}


# Ids and rows of our small configs, GPT-2 padded, Phi-3, Qwen2.5, gpt-oss, Phi-2.
PADDED = [
  (257, 320), (50257, 50304), (32011, 32064), (151665, 151936), (200019, 201088), (50295, 51200),
]  # fmt: skip


def test_a_tokenizer_of_another_model(weights, tmp_path):
  """Far smaller than the table is refused; not what padding explains, nor any for weights that come
  without one."""
  with contextlib.ExitStack() as stack:
    opened = open_weights(weights, stack)
    of_rows = lambda n: opened._replace(spec=dataclasses.replace(opened.spec, vocab_size=n))
    for ids, rows in PADDED:
      known = SimpleNamespace(vocab_size=ids, byte_lengths_V=np.ones(ids, np.int32), bos=1)
      check_tokenizer(known, of_rows(rows))
      for other in (ids - 1, rows * 3 // 2):
        with pytest.raises(ConfigError, match="they do not belong together"):
          check_tokenizer(known, of_rows(other))
    with pytest.raises(ConfigError, match="texts begin with token 188, of a model with 188"):
      check_tokenizer(
        SimpleNamespace(vocab_size=1, byte_lengths_V=np.ones(1), bos=188), of_rows(188)
      )
  other = shutil.copytree(weights, tmp_path / "other")
  small = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
  small.add_special_tokens(["</s>"])
  small.save(str(other / "tokenizer.json"))
  for arguments in (
    ("generate", f"--weights={other}"),
    ("generate", f"--weights={weights}", f"--config.data.tokenizer={other}"),
    ("convert", f"--input={other}", f"--output={tmp_path / 'out'}"),
  ):
    refused = call(*arguments, ONE)
    assert refused.code == 2 and refused.err.count("\n") == 1, refused.err
    assert "the tokenizer has only 3 ids, but the model 257" in refused.err
  given = weights, make_examples(tmp_path / "data.jsonl")
  refused = tune(given, tmp_path / "run", f"--config.data.tokenizer={other}")
  assert refused.code == 2 and "the tokenizer has only 3 ids" in refused.err
  with contextlib.ExitStack() as stack:
    (other / "tokenizer.json").unlink()
    opened = open_weights(other, stack)
    wide = opened._replace(spec=dataclasses.replace(opened.spec, vocab_size=1000))
    check_tokenizer(load_tokenizer("byte"), wide)


@pytest.mark.parametrize(
  ("url", "how"),
  [
    ("gs://bucket/model", "gcloud storage cp -r URL ."),
    ("s3://bucket/model", "aws s3 cp --recursive URL FOLDER"),
    ("https://example.com/model.gguf", "download it"),
  ],
)
def test_weights_are_not_read_from_a_bucket(url, how, tmp_path):
  for arguments in (
    ("generate", f"--weights={url}"),
    ("run", "--config=alpaca", f"--weights={url}", f"--workdir={tmp_path}"),
    ("convert", f"--input={url}", f"--output={tmp_path / 'out'}"),
  ):
    refused = call(*arguments)
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert f"={url}: weights are read from a disk" in refused.err
    assert f"({how.replace('URL', url)})" in refused.err
