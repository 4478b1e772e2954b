"""Shards: the same whatever the workers, whole after a kill, refused when settings change."""

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from experiments.config import ConfigError, DataConfig
from experiments.data import command, prepare
from experiments.data.load import load
from experiments.data.loader import make_loader
from experiments.data.train_tokenizer import train_tokenizer

ROOT = Path(__file__).parents[3]
SMALL = {"row_length": 32, "batch_size": 4}


def document(i):
  return f"document {i}: " + "some words to count, " * (1 + i % 7)


def write_inputs(folder, num_files, documents_each):
  folder.mkdir()
  for f in range(num_files):
    ids = range(f * documents_each, (f + 1) * documents_each)
    lines = [json.dumps({"id": i, "text": document(i)}) + "\n" for i in ids]
    (folder / f"{f:02d}.jsonl").write_text("".join(lines))


def run(pattern, output, tokenizer="byte", **kwargs):
  kwargs = {"workers": 1, "report": lambda line: None, "shard_tokens": 2000, **kwargs}
  return prepare.prepare(str(pattern), str(output), str(tokenizer), **kwargs)


def contents(folder):
  return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix != ".tmp"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("inputs") / "text"
  write_inputs(folder, num_files=5, documents_each=30)
  return folder


def test_format_is_as_documented(inputs, tmp_path):
  manifest = run(f"{inputs}/*", tmp_path)
  assert json.loads((tmp_path / "manifest.json").read_text()) == manifest
  texts = [document(i).encode() for i in range(150)]
  assert manifest["documents"] == 150
  assert manifest["bytes"] == sum(map(len, texts))
  assert manifest["tokens"] == manifest["bytes"] + 150
  found = []
  for shard in manifest["shards"]:
    tokens = np.fromfile(tmp_path / f"{shard['name']}.tokens", "<u2")
    ends = np.fromfile(tmp_path / f"{shard['name']}.index", "<i8")
    assert (len(tokens), len(ends)) == (shard["tokens"], shard["documents"])
    assert ends[-1] == len(tokens)
    assert (tokens[ends - 1] == 256).all()
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
      found.append(tokens[start : end - 1].astype(np.uint8).tobytes())
  assert found == texts
  assert len(manifest["shards"]) > 5  # a large file makes several
  assert all(shard["tokens"] < 2000 + 200 for shard in manifest["shards"])


def test_workers_do_not_change_a_byte(inputs, tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  assert run(f"{inputs}/*", one)["digest"] == run(f"{inputs}/*", two, workers=2)["digest"]
  assert contents(one) == contents(two)


def test_small_files_share_shards_and_gzip_changes_nothing(tmp_path):
  plain, packed = tmp_path / "plain", tmp_path / "packed"
  plain.mkdir()
  packed.mkdir()
  for i in range(12):
    (plain / f"{i:02d}.txt").write_text(document(i))
    (packed / f"{i:02d}.txt.gz").write_bytes(gzip.compress(document(i).encode()))
  manifests = [run(f"{folder}/*", tmp_path / f"{folder.name}_out") for folder in (plain, packed)]
  assert [len(m["shards"]) for m in manifests] == [1, 1]
  assert manifests[0]["digest"] == manifests[1]["digest"]
  assert manifests[0]["documents"] == 12


def test_digest_follows_the_text(inputs, tmp_path):
  before = run(f"{inputs}/*", tmp_path / "a")["digest"]
  assert run(f"{inputs}/0[0-3]*", tmp_path / "b")["digest"] != before


def test_large_vocabularies_take_four_bytes():
  assert prepare.shards.token_dtype(1 << 16) == "<u2"
  assert prepare.shards.token_dtype((1 << 16) + 1) == "<u4"


def test_finished_units_are_kept_and_damaged_ones_made_again(inputs, tmp_path):
  manifest = run(f"{inputs}/*", tmp_path)
  before = contents(tmp_path)
  tokens = tmp_path / "00001-00000.tokens"
  flipped = bytearray(tokens.read_bytes())
  flipped[100] ^= 1
  tokens.write_bytes(flipped)
  (tmp_path / "00002-00000.index").unlink()
  (tmp_path / "00003-00000.tokens.tmp").write_bytes(b"left by a kill")
  kept = (tmp_path / "00000-00000.tokens").stat().st_mtime_ns
  lines = []
  assert run(f"{inputs}/*", tmp_path, report=lines.append) == manifest
  assert lines[-1].startswith("5/5 units (3 found finished)")
  assert contents(tmp_path) == before
  assert not list(tmp_path.glob("*.tmp"))
  assert (tmp_path / "00000-00000.tokens").stat().st_mtime_ns == kept


def start_program(inputs, output, workers):
  arguments = [f"--input={inputs}/*", f"--output={output}", "--tokenizer=byte"]
  arguments += [f"--workers={workers}", "--shard_tokens=20000"]
  return subprocess.Popen(
    [sys.executable, "-m", "experiments.data.prepare", *arguments],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def test_kill_leaves_only_whole_shards_and_the_next_run_finishes(tmp_path):
  write_inputs(tmp_path / "text", num_files=12, documents_each=3000)
  wanted = run(f"{tmp_path}/text/*", tmp_path / "wanted", shard_tokens=20000)
  output = tmp_path / "output"
  process = start_program(tmp_path / "text", output, workers=2)
  deadline = time.monotonic() + 60
  while not list(output.glob("*.unit.json")):
    assert time.monotonic() < deadline and process.poll() is None
    time.sleep(0.001)
  process.kill()
  # The pipe ends when the last worker has: orphans do not linger.
  process.communicate(timeout=30)
  assert process.returncode == -9
  assert not (output / "manifest.json").exists()
  found, whole = contents(output), contents(tmp_path / "wanted")
  units = [name for name in found if name.endswith(".unit.json")]
  assert 1 <= len(units) < 12
  assert {name: whole[name] for name in found} == found
  process = start_program(tmp_path / "text", output, workers=2)
  said, _ = process.communicate(timeout=120)
  assert process.returncode == 0, said
  assert f"12/12 units ({len(units)} found finished)" in said
  assert f"digest {wanted['digest']}" in said
  assert contents(output) == whole


def test_other_settings_or_input_are_refused(inputs, tmp_path):
  output = tmp_path / "out"
  run(f"{inputs}/*", output)
  train_tokenizer(f"{inputs}/*", str(tmp_path / "tokenizer"), vocab_size=300)
  with pytest.raises(ConfigError, match="begun with other tokenizer: "):
    run(f"{inputs}/*", output, tmp_path / "tokenizer")
  with pytest.raises(ConfigError, match="begun with other shard_tokens: "):
    run(f"{inputs}/*", output, shard_tokens=3000)
  with pytest.raises(ConfigError, match="begun with other inputs: "):
    run(f"{inputs}/00*", output)


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_input_is_named_and_nothing_is_finished(tmp_path, workers):
  write_inputs(tmp_path / "text", num_files=3, documents_each=20)
  with open(tmp_path / "text" / "01.jsonl", "a") as stream:
    stream.write("{broken\n")
  with pytest.raises(ConfigError, match=r"01\.jsonl line 21 is not JSON"):
    run(f"{tmp_path}/text/*", tmp_path / "out", workers=workers, shard_tokens=500)
  assert not (tmp_path / "out" / "manifest.json").exists()


def test_shards_behind_a_url_give_the_same_rows(inputs, tmp_path):
  run(f"{inputs}/*", tmp_path)
  fs = fsspec.filesystem("memory")
  for path in inputs.iterdir():
    fs.pipe(f"/prepare/text/{path.name}", path.read_bytes())
  run("memory://prepare/text/*", "memory://prepare/shards")
  local = load(DataConfig(path=str(tmp_path), **SMALL), 257)
  remote = load(DataConfig(path="memory://prepare/shards", **SMALL), 257)
  assert local.fingerprint == remote.fingerprint
  assert len(local.train) == len(remote.train) > 100
  loaders = [make_loader(d, DataConfig(**SMALL), "train") for d in (local, remote)]
  for _ in range(20):
    one, two = (next(loader) for loader in loaders)
    for name in one:
      np.testing.assert_array_equal(one[name], two[name])
  for loader in loaders:
    loader.close()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--input=/absent/*"], "no file matches /absent/*"),
    (["--input=/absent/*", "--workers=0"], "must be at least 1"),
    (["--tokenizer=/absent"], "--input must have a value"),
  ],
)
def test_program_mistakes_exit_with_2(tmp_path, arguments, message, capsys):
  argv = ["prepare", f"--output={tmp_path}/out", "--tokenizer=byte", *arguments]
  assert command.run(prepare._program, prepare._flags(), argv) == 2
  assert message in capsys.readouterr().err
